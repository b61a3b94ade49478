"""The mixture-of-experts layer. Shape letters: layers.py, experts/rounds.py."""

import functools
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from deepseek_jax.config.options import ModelConfig, MoeConfig
from deepseek_jax.experts import cpu_unstacked, dispatch
from deepseek_jax.experts.cpu_unstacked import UnstackedExperts
from deepseek_jax.experts.low_rank import ExpertWeights, Pair
from deepseek_jax.model import expert_taps
from deepseek_jax.model.layers import MLP, LowRank, param
from deepseek_jax.model.moe_statistics import (
    MoEStats,
    count_per_sequence,
    load_of,
    statistics_of,
)
from deepseek_jax.model.router import route
from deepseek_jax.model.shared_core import SharedCoreExperts
from deepseek_jax.model.taps import PER_TOKEN, ROUTED, Taps, tap, wanted
from deepseek_jax.parallel.mesh import TOKENS, per_device
from deepseek_jax.parallel.quantized import QuantizedWeight
from deepseek_jax.parallel.weights import gather_for_use, gather_on_device, stored_arrays

# The weights of experts in the order in which they are handed to devices: the last four with LoRA.
WEIGHTS = (
    "gate_up_proj",
    "down_proj",
    "gate_up_lora_A",
    "gate_up_lora_B",
    "down_lora_A",
    "down_lora_B",
)


class SelectionBias(nnx.Variable):
    """`e_score_correction_bias`: float32, added to the scores for choosing only.

    It is not trained: train/step.py moves it.
    """


class Gate(nnx.Module):
    """The router's parameters."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.initializer_range)
        self.kernel = param(
            rngs, init, (config.hidden_size, config.n_routed_experts), ("embed", "router")
        )
        if config.topk_method == "noaux_tc":
            self.e_score_correction_bias = SelectionBias(
                jnp.zeros((config.n_routed_experts,), jnp.float32),
                out_sharding=("router",),
                eager_sharding=False,
            )


class Experts(nnx.Module):
    """All routed experts' weights: gate and up together as [E, D, 2, F], down as [E, F, D].

    With LoRA (model/lora.py) factors of both or one of them too, and `lora`, which says the scale.
    """

    lora: LowRank | None = None

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        e, d, f = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        init = nnx.initializers.normal(config.initializer_range)
        self.gate_up_proj = param(
            rngs, init, (e, d, 2, f), ("experts", "expert_embed", "pair", "expert_mlp")
        )
        self.down_proj = param(rngs, init, (e, f, d), ("experts", "expert_mlp", "expert_embed"))

    @property
    def is_plain(self) -> bool:
        """Whether each weight is one array, to which nothing is added."""
        w = self.gate_up_proj.get_value()
        return self.lora is None and not isinstance(w, QuantizedWeight)

    @property
    def is_unstacked(self) -> bool:
        """Whether generation holds each expert as an array of its own."""
        return isinstance(self.gate_up_proj.get_value(), UnstackedExperts)

    def stored(self) -> tuple[list[jax.Array], tuple[tuple[str, list[P]], ...]]:
        """The arrays of all weights, to be handed to `per_device`, and (name, specs) of each weight."""
        arrays, specs = [], []
        for name in WEIGHTS:
            if (variable := getattr(self, name, None)) is not None:
                of_one, of_one_specs = stored_arrays(variable)
                arrays += of_one
                specs.append((name, of_one_specs))
        return arrays, tuple(specs)

    def on_device(self, arrays: Sequence[jax.Array], specs, dtype) -> ExpertWeights:
        """Inside `per_device`, this device's experts, from what `stored` made."""
        found: dict[str, jax.Array] = {}
        for name, of_one in specs:
            # Several arrays where a weight is held in several layouts, or in few bits.
            found[name] = gather_on_device(arrays[: len(of_one)], of_one, dtype)
            arrays = arrays[len(of_one) :]
        pairs = [self._pair(found, name) for name in ("gate_up", "down")]
        return ExpertWeights(found["gate_up_proj"], found["down_proj"], *pairs)

    def _pair(self, found: dict[str, jax.Array], name: str) -> Pair | None:
        if self.lora is None or f"{name}_lora_A" not in found:
            return None
        a, b = (found[f"{name}_lora_{side}"] for side in "AB")
        # The tensor axis divides the width of an expert, which is a side of one factor only: the other has
        # a part of its gradient on each of its devices.
        if name == "gate_up":
            a = lax.pcast(a, "tensor", to="varying")
        else:
            b = lax.pcast(b, "tensor", to="varying")
        return Pair(a * self.lora.scale, b)


class MoE(nnx.Module):
    """Routed experts plus shared experts (DeepSeekMoE, arXiv:2401.06066)."""

    def __init__(self, config: ModelConfig, moe: MoeConfig, rngs: nnx.Rngs, fp8: str = "none"):
        self.config = config
        self.moe = moe
        self.fp8 = fp8
        self.gate = Gate(config, rngs)
        self.experts: Experts | SharedCoreExperts = (
            SharedCoreExperts if config.shared_core_rank else Experts
        )(config, rngs)
        if config.n_shared_experts:
            self.shared_experts = MLP(
                config, config.n_shared_experts * config.moe_intermediate_size, rngs
            )

    def __call__(self, x_BSD: jax.Array, valid_BS: jax.Array) -> tuple[jax.Array, MoEStats | None]:
        """Routed experts' and shared experts' output.

        Args:
          x_BSD: in the compute dtype.
          valid_BS: bool, False for padding, which is routed nowhere.

        Returns:
          [B, S, D] in the compute dtype, and the statistics; None where the weights are UnstackedExperts.
        """
        chex.assert_rank(x_BSD, 3)
        chex.assert_shape(valid_BS, x_BSD.shape[:2])
        chex.assert_type(valid_BS, bool)
        bias_E = (
            self.gate.e_score_correction_bias[...]
            if self.config.topk_method == "noaux_tc"
            else jnp.zeros((self.config.n_routed_experts,))
        )
        if self.experts.is_unstacked:
            return self._unstacked(x_BSD, valid_BS, bias_E), None
        # Expert weights enter as they are stored, and `_routed` gathers what the strategy divided:
        # the transpose of that gather is a reduce-scatter.
        weights, specs = self.experts.stored()
        kernel = gather_for_use(self.gate.kernel, jnp.float32)
        taps = tuple(name for name in ROUTED if wanted(name))
        routed = per_device(
            functools.partial(self._routed, specs=specs, taps=taps),
            in_specs=(
                TOKENS,
                TOKENS,
                jax.typeof(kernel).sharding.spec,
                P(),
                *(spec for _, of_one in specs for spec in of_one),
            ),
            out_specs=(
                TOKENS,
                MoEStats(*[P()] * len(MoEStats._fields)),
                {name: TOKENS if name in PER_TOKEN else P() for name in taps},
            ),
        )
        y_BSD, stats, found = routed(x_BSD, valid_BS, kernel, bias_E, *weights)
        for name, value in found.items():
            tap(name, value)
        if self.config.n_shared_experts:
            y_BSD = y_BSD + self.shared_experts(x_BSD)
            if wanted("shared_units"):
                tap("shared_units", self.shared_experts.unit_sums(x_BSD, valid_BS))
        return y_BSD, stats

    def _unstacked(self, x_BSD: jax.Array, valid_BS: jax.Array, bias_E: jax.Array) -> jax.Array:
        """The output where generation holds the experts as one array each, on one CPU."""

        def one_device(x_BSD, valid_BS, kernel_DE, bias_E, gate_up, down):
            x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
            routing = route(x_TD, kernel_DE, bias_E, self.config)
            chosen_TK = jnp.where(
                valid_BS.reshape(-1, 1), routing.expert_TK, self.config.n_routed_experts
            )
            y_TD = cpu_unstacked.compute(x_TD, routing.weight_TK, chosen_TK, gate_up, down)
            return y_TD.reshape(x_BSD.shape)

        assert isinstance(self.experts, Experts)
        weights = self.experts.gate_up_proj.get_value(), self.experts.down_proj.get_value()
        routed = per_device(one_device, (TOKENS, TOKENS, P(), P(), P(), P()), TOKENS)
        y_BSD = routed(
            x_BSD, valid_BS, gather_for_use(self.gate.kernel, jnp.float32), bias_E, *weights
        )
        if self.config.n_shared_experts:
            y_BSD = y_BSD + self.shared_experts(x_BSD)
        return y_BSD

    def _routed(
        self, x_BSD, valid_BS, kernel, bias_E, *weights, specs, taps
    ) -> tuple[jax.Array, MoEStats, Taps]:
        """One device's part: route, drop if asked to, dispatch, count.

        Args:
          x_BSD: as of `__call__`.
          valid_BS: as of `__call__`.
          kernel: float32 [D, E], perhaps after an axis of replicas: the router's weight.
          bias_E: float32, added to scores for choosing only.
          weights: arrays of the experts, as they are stored.
          specs: what they are, as `Experts.stored`.
          taps: names of what is handed out besides (taps.py).
        """
        m, moe = self.config, self.moe
        b, s, d = x_BSD.shape
        x_TD = x_BSD.reshape(b * s, d)
        kernel_DE = kernel.reshape(kernel.shape[-2:])  # without the axis of replicas, if it has one
        routing = route(x_TD, kernel_DE, bias_E, m)
        chosen_TK = jnp.where(valid_BS.reshape(-1, 1), routing.expert_TK, m.n_routed_experts)
        kept_TK = chosen_TK
        if moe.drop:
            capacity = dispatch.expert_capacity(
                b * s, m.num_experts_per_tok, m.n_routed_experts, moe.capacity_factor
            )
            kept_TK = dispatch.drop(
                chosen_TK, routing.weight_TK, m.n_routed_experts, capacity, moe.drop_policy
            )
        experts = self.experts.on_device(weights, specs, x_TD.dtype)
        # Every device of the tensor axis computes a slice of each expert's width, and so a part of every sum.
        x_TD, weight_TK = (lax.pcast(a, "tensor", to="varying") for a in (x_TD, routing.weight_TK))
        tokens = dispatch.Tokens(x_TD, weight_TK, kept_TK)
        y_TD, rounds = dispatch.dispatch(
            moe.dispatch,
            tokens,
            experts,
            moe.capacity_factor,
            moe.experts_implementation,
            self.fp8,
            moe.fp8_dispatch,
        )
        y_TD = lax.psum(y_TD, "tensor")
        count_BE = count_per_sequence(chosen_TK.reshape(b, -1), m.n_routed_experts)
        chosen_E = jnp.sum(count_BE, axis=0)
        kept_E = (
            count_per_sequence(kept_TK.reshape(1, -1), m.n_routed_experts)[0]
            if moe.drop
            else chosen_E
        )
        y_BSD = y_TD.reshape(b, s, d)
        stats = statistics_of(routing, count_BE, valid_BS, load_of(chosen_E, kept_E, rounds), m)
        alone = functools.cache(lambda: expert_taps.outputs(moe, x_TD, chosen_TK, experts))
        found = {
            "router_scores": lambda: routing.score_TE,
            "router_logits": lambda: routing.logit_TE,
            "router_choices": lambda: chosen_TK,
            "router_weights": lambda: routing.weight_TK,
            "expert_norms": lambda: alone()[0],
            "expert_peaks": lambda: alone()[1],
        }
        out = {n: found[n]().reshape(b, s, -1) for n in taps if n in found}
        if "expert_outputs" in taps:
            valid_T = valid_BS.reshape(-1)
            out["expert_outputs"] = expert_taps.output_sums(
                moe, x_TD, valid_T, experts, m.n_routed_experts
            )
        if "expert_units" in taps:
            out["expert_units"] = expert_taps.unit_sums(
                moe, x_TD, chosen_TK, experts, m.n_routed_experts
            )
        return y_BSD, stats, out
