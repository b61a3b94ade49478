"""What becomes of a dense MLP: how many copies in how many shards, what scales their sum back to the MLP's.

Sources: sparse upcycling (arXiv:2212.05055), fine-grained experts with virtual groups (arXiv:2410.07524),
shared experts (DeepSeekMoE, arXiv:2401.06066).

A copy is a set of neighbouring experts, its shards, that together are the whole MLP. They share a router row,
so that they are chosen together: of equal scores the expert with the lower index is chosen (model/router.py).
With weights that sum to 1 every shard of a chosen copy c has p_c / (shards * sum p): the output is the MLP's
divided by `shards`, whatever the router says.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.errors import UserError
from deepseek_jax.hf import configuration

DRAWS = 4096  # tokens of which the sum of weights is estimated


class Wanted(NamedTuple):
    """What the user asks for, by its options."""

    experts: int
    experts_per_token: int
    granularity: int = 1
    shared: bool = False
    norm_topk_prob: bool = True
    scale: bool = False
    dense_layers: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a dense model becomes a mixture of experts.

    Attributes:
      model: its new options.
      family: that it is saved as.
      pieces: that an MLP is cut into; `shards` of them are routed, one more is shared where there is one.
      shards: routed experts of a copy.
      copies: of an MLP in a layer.
      down_scale: of the down projections of routed experts, where the family has no routed_scaling_factor.
      shared_scale: of the shared expert's.
    """

    model: ModelConfig
    family: str
    pieces: int
    shards: int
    copies: int
    down_scale: float
    shared_scale: float

    @property
    def chosen(self) -> int:
        """Copies that a token goes to."""
        return self.model.num_experts_per_tok // self.shards

    @property
    def is_exact(self) -> bool:
        """Whether the weights of the chosen experts sum to 1, before any noise."""
        m = self.model
        every = m.scoring_func == "softmax" and m.num_experts_per_tok == m.n_routed_experts
        return m.norm_topk_prob or every


def make(dense: ModelConfig, wanted: Wanted, exact_powers: bool) -> Plan:
    """The plan.

    Args:
      dense: options of the dense model.
      wanted: of the new one.
      exact_powers: whether down projections hold only multiples by powers of two exactly: bfloat16, float16.

    Raises:
      UserError: the model has experts, numbers do not divide each other, weights would not sum to 1, or no
        family has such a model.
    """
    _check(dense, wanted)
    pieces = wanted.granularity
    shards = pieces - 1 if wanted.shared and pieces > 1 else pieces
    whole_too = wanted.shared and pieces == 1  # the shared expert is a copy: each gives half
    factor = 0.5 if whole_too else float(shards)
    width = dense.intermediate_size // pieces
    base = dataclasses.replace(
        dense,
        first_k_dense_replace=wanted.dense_layers,
        n_routed_experts=wanted.experts,
        num_experts_per_tok=wanted.experts_per_token,
        n_shared_experts=int(wanted.shared),
        moe_intermediate_size=width,
        norm_topk_prob=wanted.norm_topk_prob,
        n_group=1,
        topk_group=1,
    )
    softmax = dataclasses.replace(
        base, scoring_func="softmax", topk_method="greedy", routed_scaling_factor=1.0
    )
    sigmoid = dataclasses.replace(
        base, scoring_func="sigmoid", topk_method="noaux_tc", routed_scaling_factor=factor
    )
    rounds = exact_powers and not (factor.is_integer() and int(factor).bit_count() == 1)
    refused = None
    for model, down_scale in ((softmax, factor), (sigmoid, 1.0)):
        if model is softmax and (wanted.shared or rounds and wanted.norm_topk_prob):
            continue
        try:
            family = configuration.find_family(model)
        except UserError as e:
            refused = refused or e
            continue
        plan = Plan(
            model=model,
            family=family,
            pieces=pieces,
            shards=shards,
            copies=wanted.experts // shards,
            down_scale=down_scale,
            shared_scale=0.5 if whole_too else 1.0,
        )
        _check_sums(plan, wanted)
        return plan
    if rounds and not wanted.shared:
        raise UserError(
            f"--granularity={pieces} multiplies down projections by {pieces}, which their dtype rounds, and "
            f"no family with a routed_scaling_factor has this model's attention. Give a power of two."
        )
    raise UserError(f"no family of Hugging Face has this model with experts: {refused}")


def _check(dense: ModelConfig, wanted: Wanted) -> None:
    if dense.has_experts:
        raise UserError(
            f"MODEL has {dense.n_routed_experts} routed experts a layer already. Name a dense model."
        )
    if dense.num_nextn_predict_layers:
        raise UserError(
            f"MODEL has num_nextn_predict_layers={dense.num_nextn_predict_layers}: multi-token prediction of "
            f"dense models is not upcycled. Drop these layers first."
        )
    e, k, pieces = wanted.experts, wanted.experts_per_token, wanted.granularity
    if not 0 < k <= e or e < 2 or pieces < 1:
        raise UserError(
            f"--experts={e} must be 2 or more, --experts-per-token={k} from 1 to that, "
            f"--granularity={pieces} 1 or more."
        )
    if dense.intermediate_size % pieces:
        raise UserError(
            f"--granularity={pieces} does not divide the model's intermediate_size="
            f"{dense.intermediate_size}. Give one that does."
        )
    shards = pieces - 1 if wanted.shared and pieces > 1 else pieces
    if e % shards or k % shards:
        less = ", without the shared one," if shards < pieces else ""
        raise UserError(
            f"--experts={e} and --experts-per-token={k} are not both multiples of {shards}: the pieces of a "
            f"copy{less} must be chosen together. Give multiples, or another --granularity={pieces}."
        )
    if not 0 <= wanted.dense_layers < dense.num_hidden_layers:
        raise UserError(
            f"--first-k-dense-replace={wanted.dense_layers} is not below the model's num_hidden_layers="
            f"{dense.num_hidden_layers}. Give fewer."
        )


def _check_sums(plan: Plan, wanted: Wanted) -> None:
    if plan.is_exact:
        if wanted.scale:
            raise UserError(
                "--scale has no effect: the weights of the chosen experts sum to 1. Leave it out."
            )
        return
    if not wanted.scale:
        raise UserError(
            f"--norm-topk-prob=false with --experts-per-token={wanted.experts_per_token} of "
            f"--experts={wanted.experts}: the chosen weights do not sum to 1, so that the first loss is not "
            f"the dense model's. Give --norm-topk-prob=true, or --scale for an approximation."
        )


def sums(plan: Plan, logit_std: float, seed: int) -> tuple[float, float]:
    """(mean, standard deviation) of the sum of a token's weights in a layer, over random tokens.

    Args:
      plan: without norm_topk_prob.
      logit_std: of the router's logits, which are independent between copies.
      seed: of the draws.
    """
    rng = np.random.default_rng([seed, 1])
    logits_TC = rng.standard_normal((DRAWS, plan.copies)) * logit_std
    if plan.model.scoring_func == "softmax":
        scores_TC = np.exp(logits_TC - logits_TC.max(axis=1, keepdims=True))
        scores_TC /= scores_TC.sum(axis=1, keepdims=True)
    else:
        scores_TC = plan.shards / (1 + np.exp(-logits_TC))
    top_TK = np.sort(scores_TC, axis=1)[:, -plan.chosen :]
    sums_T = top_TK.sum(axis=1)
    return float(sums_T.mean()), float(sums_T.std())
