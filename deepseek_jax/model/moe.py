"""The mixture-of-experts layer. Shape letters: layers.py, dispatch.py."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from deepseek_jax.config.options import ModelConfig, MoeConfig
from deepseek_jax.experts import cpu_decode, dispatch
from deepseek_jax.experts.cpu_decode import Listed
from deepseek_jax.model.layers import MLP, param
from deepseek_jax.model.router import Routing, route
from deepseek_jax.model.taps import ROUTER, Taps, tap, wanted
from deepseek_jax.parallel.mesh import TOKEN_AXES, TOKENS, per_device
from deepseek_jax.parallel.weights import gather_for_use, gather_on_device, stored_arrays


class SelectionBias(nnx.Variable):
    """`e_score_correction_bias`: float32, added to the scores for choosing only. Not trained: train/balance.py moves it."""


class Load(NamedTuple):
    """Where the assignments of the global batch went: integers, the same on every device, without gradient.

    W: the devices of data x fsdp x expert, row-major. Padding counts nowhere. Stacked over layers, leaves have a leading [L].
    """

    expert_counts: (
        jax.Array
    )  # int32 [E]: assignments of each expert, as the router chose: dropped ones included
    rounds: jax.Array  # int32 []: most dispatch rounds that any device ran
    dropped_counts: jax.Array  # int32 [E]: assignments dropped, by expert
    received: jax.Array  # int32 [W]: rows that arrived at each device's experts
    dropped_from: jax.Array  # int32 [W]: assignments dropped, by the device of their token
    left: (
        jax.Array
    )  # int32 []: assignments, not dropped, whose expert lies on another device than their token


class MoEStats(NamedTuple):
    """Routing statistics of the global batch: summed over all devices, the same on each. Stacked over layers by the scan.

    The sums are differentiable in the router's scores; objectives/routing.py turns them into losses.
    """

    load: Load
    sequence_balance: (
        jax.Array
    )  # float32: sum over sequences of sum_i f_i P_i (V3, equations 17 to 20)
    score_sum: jax.Array  # float32 [E]: sum over tokens of the normalised scores
    z_sum: jax.Array  # float32: sum over tokens of logsumexp(logits)^2


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

    def __init__(self, model: ModelConfig, rngs: nnx.Rngs):
        init = nnx.initializers.normal(model.initializer_range)
        self.kernel = param(
            rngs, init, (model.hidden_size, model.n_routed_experts), ("embed", "router")
        )
        if model.topk_method == "noaux_tc":
            self.e_score_correction_bias = SelectionBias(
                jnp.zeros((model.n_routed_experts,), jnp.float32),
                out_sharding=("router",),
                eager_sharding=False,
            )


class Experts(nnx.Module):
    """All routed experts' weights: gate and up together as [E, D, 2, F], down as [E, F, D]."""

    def __init__(self, model: ModelConfig, rngs: nnx.Rngs):
        e, d, f = model.n_routed_experts, model.hidden_size, model.moe_intermediate_size
        init = nnx.initializers.normal(model.initializer_range)
        self.gate_up_proj = param(
            rngs, init, (e, d, 2, f), ("experts", "expert_embed", "pair", "expert_mlp")
        )
        self.down_proj = param(rngs, init, (e, f, d), ("experts", "expert_mlp", "expert_embed"))


class MoE(nnx.Module):
    """Routed experts plus shared experts (DeepSeekMoE, arXiv:2401.06066)."""

    def __init__(self, model: ModelConfig, moe: MoeConfig, rngs: nnx.Rngs):
        self.model, self.moe = model, moe
        self.gate = Gate(model, rngs)
        self.experts = Experts(model, rngs)
        if model.n_shared_experts:
            self.shared_experts = MLP(
                model, model.n_shared_experts * model.moe_intermediate_size, rngs
            )

    def __call__(self, x_BSD: jax.Array, valid_BS: jax.Array) -> tuple[jax.Array, MoEStats | None]:
        """Args: x_BSD in the compute dtype; valid_BS bool, False for padding, which is routed nowhere.

        Returns: [B, S, D] and the statistics; None where the weights are `Listed`.
        """
        bias_E = (
            self.gate.e_score_correction_bias[...]
            if self.model.topk_method == "noaux_tc"
            else jnp.zeros((self.model.n_routed_experts,))
        )
        if isinstance(self.experts.gate_up_proj.get_value(), Listed):
            return self._listed(x_BSD, valid_BS, bias_E), None
        # Expert weights enter as they are stored; `_routed` gathers what the strategy divided, so that the transpose of that
        # gather is a reduce-scatter.
        gate_up, down = (
            stored_arrays(self.experts.gate_up_proj),
            stored_arrays(self.experts.down_proj),
        )
        weights, specs = gate_up[0] + down[0], (gate_up[1], down[1])
        kernel = gather_for_use(self.gate.kernel, jnp.float32)
        taps = tuple(name for name in ROUTER if wanted(name))
        routed = per_device(
            functools.partial(self._routed, specs=specs, taps=taps),
            in_specs=(
                TOKENS,
                TOKENS,
                jax.typeof(kernel).sharding.spec,
                P(),
                *gate_up[1],
                *down[1],
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
        if self.model.n_shared_experts:
            y_BSD = y_BSD + self.shared_experts(x_BSD)
        return y_BSD, stats

    def _listed(self, x_BSD: jax.Array, valid_BS: jax.Array, bias_E: jax.Array) -> jax.Array:
        """The same of weights that generation holds one expert at a time, on one CPU."""

        def one_device(x_BSD, valid_BS, kernel_DE, bias_E, gate_up, down):
            x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
            routing = route(x_TD, kernel_DE, bias_E, self.model)
            chosen_TK = jnp.where(
                valid_BS.reshape(-1, 1), routing.expert_TK, self.model.n_routed_experts
            )
            return cpu_decode.compute(x_TD, routing.weight_TK, chosen_TK, gate_up, down).reshape(
                x_BSD.shape
            )

        weights = self.experts.gate_up_proj.get_value(), self.experts.down_proj.get_value()
        routed = per_device(one_device, (TOKENS, TOKENS, P(), P(), P(), P()), TOKENS)
        y_BSD = routed(
            x_BSD, valid_BS, gather_for_use(self.gate.kernel, jnp.float32), bias_E, *weights
        )
        return y_BSD + self.shared_experts(x_BSD) if self.model.n_shared_experts else y_BSD

    def _routed(
        self, x_BSD, valid_BS, kernel, bias_E, *weights, specs, taps
    ) -> tuple[jax.Array, MoEStats, Taps]:
        """One device's part: route, drop if asked to, dispatch, count. `specs`: of the arrays of gate_up, and of down."""
        m, moe = self.model, self.moe
        b, s, d = x_BSD.shape
        x_TD = x_BSD.reshape(b * s, d)
        kernel_DE = kernel.reshape(kernel.shape[-2:])  # without the axis of replicas, if it has one
        routing = route(x_TD, kernel_DE, bias_E, m)
        chosen_TK = jnp.where(valid_BS.reshape(-1, 1), routing.expert_TK, m.n_routed_experts)
        kept_TK = chosen_TK
        if moe.drop:
            places = dispatch.slots_per_round(
                b * s, m.num_experts_per_tok, m.n_routed_experts, moe.capacity_factor
            )
            kept_TK = dispatch.drop(
                chosen_TK, routing.weight_TK, m.n_routed_experts, places, moe.drop_policy
            )
        # One array or two of each: `min_weight_size` may lie between their sizes.
        first = len(specs[0])
        gate_up, down = (
            gather_on_device(weights[:first], specs[0], x_TD.dtype),
            gather_on_device(weights[first:], specs[1], x_TD.dtype),
        )
        # Every device of the tensor axis computes a slice of each expert's width, and so a part of every sum.
        x_TD, weight_TK = (lax.pcast(a, "tensor", to="varying") for a in (x_TD, routing.weight_TK))
        y_TD, rounds = dispatch.dispatch(
            moe.dispatch, x_TD, weight_TK, kept_TK, gate_up, down, moe.capacity_factor
        )
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
            "expert_norms": lambda: _expert_norms(moe, x_TD, chosen_TK, gate_up, down),
        }
        return y_BSD, stats, {n: found[n]().reshape(b, s, -1) for n in taps}


def _expert_norms(
    moe: MoeConfig, x_TD: jax.Array, chosen_TK: jax.Array, gate_up: jax.Array, down: jax.Array
) -> jax.Array:
    """float32 [T, K]: the norm of each chosen expert's output, 0 for padding. Without gradient.

    The dispatch adds up the outputs of a token's experts, so each choice goes through it alone, with weight 1.
    """
    x_TD, gate_up, down = lax.stop_gradient((x_TD, gate_up, down))
    one_T1 = jnp.ones_like(x_TD, jnp.float32, shape=(x_TD.shape[0], 1))

    def norm(_, chosen_T):
        y_TD, _ = dispatch.dispatch(
            moe.dispatch, x_TD, one_T1, chosen_T[:, None], gate_up, down, moe.capacity_factor
        )
        return None, jnp.linalg.norm(lax.psum(y_TD, "tensor").astype(jnp.float32), axis=-1)

    return lax.scan(norm, None, chosen_TK.T)[1].T


def load_of(chosen_E: jax.Array, kept_E: jax.Array, rounds: jax.Array) -> Load:
    """The global load, from each device's counts int32 [E] of assignments chosen and not dropped, and from everyone's rounds."""
    groups, devices = lax.axis_size(("data", "fsdp")), lax.axis_size("expert")
    group, device = lax.axis_index(("data", "fsdp")), lax.axis_index("expert")
    sent_X = jnp.sum(
        kept_E.reshape(devices, -1), axis=1
    )  # rows to each device of this one's expert group
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
    """int32 [B, E]: how often each expert is in each row; an expert out of range is nobody's."""
    row_BN = jnp.broadcast_to(
        jnp.arange(expert_BN.shape[0], dtype=jnp.int32)[:, None], expert_BN.shape
    )
    zeros_BE = jnp.zeros_like(expert_BN, shape=(expert_BN.shape[0], experts))
    return zeros_BE.at[row_BN, expert_BN].add(1, mode="drop")


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
