"""The mixture-of-experts layer. Shape letters: layers.py, experts/rounds.py."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

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
from deepseek_jax.model.layers import MLP, LowRank, param
from deepseek_jax.model.router import Routing, route
from deepseek_jax.model.taps import ROUTER, Taps, tap, wanted
from deepseek_jax.parallel.mesh import TOKEN_AXES, TOKENS, per_device
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


class Load(NamedTuple):
    """Where the assignments of the global batch went: integers, the same on every device, without gradient.

    W: the devices of data x fsdp x expert, row-major. Padding counts nowhere. Stacked over layers,
    leaves have a leading [L].
    """

    expert_counts: jax.Array  # int32 [E]: assignments as the router chose, dropped ones included
    rounds: jax.Array  # int32 []: most dispatch rounds that any device ran
    dropped_counts: jax.Array  # int32 [E]: assignments dropped, by expert
    received: jax.Array  # int32 [W]: assignments that arrived at each device's experts
    dropped_from: jax.Array  # int32 [W]: assignments dropped, by the device of their token
    # int32 []: assignments, not dropped, whose expert lies on another device than their token
    left: jax.Array


class MoEStats(NamedTuple):
    """Routing statistics of the global batch: summed over all devices, the same on each.

    Stacked over layers by the scan, leaves have a leading [L].

    The sums are differentiable in the router's scores; objectives/routing.py turns them into losses.
    """

    load: Load
    # float32 []: sum over sequences of sum_i f_i P_i (V3, equations 17 to 20)
    sequence_balance: jax.Array
    score_sum: jax.Array  # float32 [E]: sum over tokens of the normalised scores
    z_sum: jax.Array  # float32 []: sum over tokens of logsumexp(logits)^2


def merge_loads(loads: Load, axis: int = 0) -> Load:
    """The load of several micro-batches, stacked along `axis`, as one: sums; of the rounds the most."""
    return jax.tree.map(lambda a: jnp.sum(a, axis=axis), loads)._replace(
        rounds=jnp.max(loads.rounds, axis=axis)
    )


def merge_stats(stats: MoEStats | None, axis: int) -> MoEStats | None:
    """Statistics of parts of a batch, stacked along an axis, to those of all of it."""
    if stats is None:
        return None
    return jax.tree.map(lambda a: jnp.sum(a, axis), stats)._replace(
        load=merge_loads(stats.load, axis)
    )


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

    def __init__(self, config: ModelConfig, moe: MoeConfig, rngs: nnx.Rngs):
        self.config = config
        self.moe = moe
        self.gate = Gate(config, rngs)
        self.experts = Experts(config, rngs)
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
        if isinstance(self.experts.gate_up_proj.get_value(), UnstackedExperts):
            return self._unstacked(x_BSD, valid_BS, bias_E), None
        # Expert weights enter as they are stored, and `_routed` gathers what the strategy divided:
        # the transpose of that gather is a reduce-scatter.
        weights, specs = self.experts.stored()
        kernel = gather_for_use(self.gate.kernel, jnp.float32)
        taps = tuple(name for name in ROUTER if wanted(name))
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
                dict.fromkeys(taps, TOKENS),
            ),
        )
        y_BSD, stats, found = routed(x_BSD, valid_BS, kernel, bias_E, *weights)
        for name, value in found.items():
            tap(name, value)
        if self.config.n_shared_experts:
            y_BSD = y_BSD + self.shared_experts(x_BSD)
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
        y_TD, rounds = dispatch.dispatch(moe.dispatch, tokens, experts, moe.capacity_factor)
        y_TD = lax.psum(y_TD, "tensor")
        count_BE = _count(chosen_TK.reshape(b, -1), m.n_routed_experts)
        chosen_E = jnp.sum(count_BE, axis=0)
        kept_E = _count(kept_TK.reshape(1, -1), m.n_routed_experts)[0] if moe.drop else chosen_E
        y_BSD = y_TD.reshape(b, s, d)
        stats = _statistics(routing, count_BE, valid_BS, load_of(chosen_E, kept_E, rounds), m)
        found = {
            "router_scores": lambda: routing.score_TE,
            "router_choices": lambda: chosen_TK,
            "router_weights": lambda: routing.weight_TK,
            "expert_norms": lambda: _expert_norms(moe, x_TD, chosen_TK, experts),
        }
        return y_BSD, stats, {n: found[n]().reshape(b, s, -1) for n in taps}


def _expert_norms(
    moe: MoeConfig, x_TD: jax.Array, chosen_TK: jax.Array, experts: ExpertWeights
) -> jax.Array:
    """float32 [T, K]: the norm of each chosen expert's output, 0 for padding. Without gradient.

    The dispatch adds up the outputs of a token's experts, so each choice goes through it alone, with
    weight 1.
    """
    x_TD, experts = lax.stop_gradient((x_TD, experts))
    one_T1 = jnp.ones_like(x_TD, jnp.float32, shape=(x_TD.shape[0], 1))

    def norm(_, chosen_T):
        y_TD, _ = dispatch.dispatch(
            moe.dispatch,
            dispatch.Tokens(x_TD, one_T1, chosen_T[:, None]),
            experts,
            moe.capacity_factor,
        )
        return None, jnp.linalg.norm(lax.psum(y_TD, "tensor").astype(jnp.float32), axis=-1)

    return lax.scan(norm, None, chosen_TK.T)[1].T


def load_of(chosen_E: jax.Array, kept_E: jax.Array, rounds: jax.Array) -> Load:
    """The global load.

    Args:
      chosen_E: int32, this device's assignments of each expert.
      kept_E: int32, those not dropped.
      rounds: int32 [], the most that any device ran.
    """
    groups, devices = lax.axis_size(("data", "fsdp")), lax.axis_size("expert")
    group, device = lax.axis_index(("data", "fsdp")), lax.axis_index("expert")
    # To each device of this one's expert group.
    sent_X = jnp.sum(kept_E.reshape(devices, -1), axis=1)
    mine_YX = (jnp.arange(groups) == group)[:, None] & (jnp.arange(devices) == device)

    def total(a: jax.Array) -> jax.Array:
        return lax.psum(a, TOKEN_AXES)

    return Load(
        expert_counts=total(chosen_E),
        rounds=rounds,
        dropped_counts=total(chosen_E - kept_E),
        received=total(jnp.where((jnp.arange(groups) == group)[:, None], sent_X, 0).reshape(-1)),
        dropped_from=total(jnp.where(mine_YX, jnp.sum(chosen_E - kept_E), 0).reshape(-1)),
        left=total(jnp.sum(sent_X) - sent_X[device]),
    )


def _count(expert_BN: jax.Array, experts: int) -> jax.Array:
    """int32 [B, E]: how often each expert is in each sequence; numbers out of range are not counted."""
    sequences = expert_BN.shape[0]
    sequence_B1 = jnp.arange(sequences, dtype=jnp.int32)[:, None]
    sequence_BN = jnp.broadcast_to(sequence_B1, expert_BN.shape)
    zeros_BE = jnp.zeros_like(expert_BN, shape=(sequences, experts))
    return zeros_BE.at[sequence_BN, expert_BN].add(1, mode="drop")


@jax.named_scope("route")
def _statistics(
    routing: Routing, count_BE: jax.Array, valid_BS: jax.Array, load: Load, m: ModelConfig
) -> MoEStats:
    b, s = valid_BS.shape
    valid_BS1 = valid_BS[:, :, None].astype(jnp.float32)
    score_BSE = (
        routing.score_TE / (jnp.sum(routing.score_TE, axis=-1, keepdims=True) + 1e-20)
    ).reshape(b, s, -1) * valid_BS1
    length_B1 = jnp.maximum(jnp.sum(valid_BS1, axis=1), 1.0)
    f_BE = count_BE.astype(jnp.float32) * m.n_routed_experts / (m.num_experts_per_tok * length_B1)
    p_BE = jnp.sum(score_BSE, axis=1) / length_B1
    z_T = jax.nn.logsumexp(routing.logit_TE, axis=-1) ** 2 * valid_BS1.reshape(-1)
    return MoEStats(
        load=load,
        sequence_balance=lax.psum(jnp.sum(f_BE * p_BE), TOKEN_AXES),
        score_sum=lax.psum(jnp.sum(score_BSE, axis=(0, 1)), TOKEN_AXES),
        z_sum=lax.psum(jnp.sum(z_T), TOKEN_AXES),
    )
