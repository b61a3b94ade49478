"""The mixture-of-experts layer. The one place where shard_map is entered. Shape letters: layers.py, dispatch.py."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import Model, Moe
from deepseek_jax.model.layers import MLP, param
from deepseek_jax.model.router import Routing, route
from deepseek_jax.parallel import dispatch
from deepseek_jax.parallel.mesh import BATCH_AXES
from deepseek_jax.parallel.sharding import whole


class SelectionBias(nnx.Variable):
    """`e_score_correction_bias`: float32, added to the scores for choosing only. Not trained: train/step.py moves it."""


class MoEStats(NamedTuple):
    """Routing statistics of the global batch: summed over all devices, the same on each. Stacked over layers by the scan.

    The sums are differentiable in the router's scores; train/losses.py turns them into losses.
    """

    expert_counts: jax.Array  # int32 [E]: assignments of each expert; padding counts nothing
    rounds: jax.Array  # int32: dispatch rounds run
    sequence_balance: jax.Array  # float32: sum over sequences of sum_i f_i P_i (V3, equations 17 to 20)
    score_sum: jax.Array  # float32 [E]: sum over tokens of the normalised scores
    z_sum: jax.Array  # float32: sum over tokens of logsumexp(logits)^2


class Gate(nnx.Module):
    """The router's parameters."""

    def __init__(self, model: Model, rngs: nnx.Rngs):
        init = nnx.initializers.normal(model.initializer_range)
        self.kernel = param(rngs, init, (model.hidden_size, model.n_routed_experts), ("embed", "router"))
        if model.topk_method == "noaux_tc":
            self.e_score_correction_bias = SelectionBias(jnp.zeros((model.n_routed_experts,), jnp.float32), out_sharding=("router",),
                                                         eager_sharding=False)


class Experts(nnx.Module):
    """All routed experts' weights: gate and up together as [E, D, 2, F], down as [E, F, D]."""

    def __init__(self, model: Model, rngs: nnx.Rngs):
        e, d, f = model.n_routed_experts, model.hidden_size, model.moe_intermediate_size
        init = nnx.initializers.normal(model.initializer_range)
        self.gate_up_proj = param(rngs, init, (e, d, 2, f), ("experts", "expert_embed", "pair", "expert_mlp"))
        self.down_proj = param(rngs, init, (e, f, d), ("experts", "expert_mlp", "expert_embed"))


class MoE(nnx.Module):
    """Routed experts plus shared experts (DeepSeekMoE, arXiv:2401.06066)."""

    def __init__(self, model: Model, moe: Moe, rngs: nnx.Rngs):
        self.model, self.moe = model, moe
        self.gate = Gate(model, rngs)
        self.experts = Experts(model, rngs)
        if model.n_shared_experts:
            self.shared_experts = MLP(model, model.n_shared_experts * model.moe_intermediate_size, rngs)

    def __call__(self, x_BSD: jax.Array, valid_BS: jax.Array) -> tuple[jax.Array, MoEStats]:
        """Args: x_BSD in the compute dtype; valid_BS bool, False for padding, which is routed nowhere.

        Returns: [B, S, D] and the statistics.
        """
        bias_E = self.gate.e_score_correction_bias[...] if self.model.topk_method == "noaux_tc" else jnp.zeros((self.model.n_routed_experts,))
        # Expert weights enter as they are stored; `_routed` gathers what the strategy divided, so that the transpose of that
        # gather is a reduce-scatter.
        gate_up, down = self.experts.gate_up_proj[...], self.experts.down_proj[...]
        gate_up_spec, down_spec = jax.typeof(gate_up).sharding.spec, jax.typeof(down).sharding.spec
        routed = jax.shard_map(
            functools.partial(self._routed, gate_up_spec=gate_up_spec, down_spec=down_spec),
            in_specs=(P(BATCH_AXES), P(BATCH_AXES), P(), P(), gate_up_spec, down_spec),
            out_specs=(P(BATCH_AXES), MoEStats(*[P()] * len(MoEStats._fields))),
            check_vma=True,
        )
        y_BSD, stats = routed(x_BSD, valid_BS, whole(self.gate.kernel, jnp.float32), bias_E, gate_up, down)
        if self.model.n_shared_experts:
            y_BSD = y_BSD + self.shared_experts(x_BSD)
        return y_BSD, stats

    def _routed(self, x_BSD, valid_BS, kernel_DE, bias_E, gate_up, down, gate_up_spec, down_spec) -> tuple[jax.Array, MoEStats]:
        """One device's part: route, plan, exchange, compute, combine."""
        m = self.model
        b, s, d = x_BSD.shape
        x_TD = x_BSD.reshape(b * s, d)
        routing = route(x_TD, kernel_DE, bias_E, m)
        expert_TK = jnp.where(valid_BS.reshape(-1, 1), routing.expert_TK, m.n_routed_experts)
        slots = dispatch.slots_per_round(b * s, m.num_experts_per_tok, m.n_routed_experts, self.moe.capacity_factor)
        plan = dispatch.make_plan(expert_TK, m.n_routed_experts, slots)
        gate_up, down = _gather(gate_up.astype(x_TD.dtype), gate_up_spec), _gather(down.astype(x_TD.dtype), down_spec)
        y_TD = dispatch.exchange_and_compute(x_TD, routing.weight_TK, gate_up, down, plan, slots, lax.axis_size("expert"))
        return y_TD.reshape(b, s, d), _statistics(routing, plan, expert_TK, valid_BS, m)


def _gather(w: jax.Array, stored: P) -> jax.Array:
    """This device's experts with the embed axis whole, varying over every batch axis. Its transpose is a reduce-scatter."""
    held = {"expert"}
    for dimension, axes in enumerate(stored):
        if axes not in (None, "expert"):
            w = lax.all_gather(w, axes, axis=dimension, tiled=True)
            held.update((axes,) if isinstance(axes, str) else axes)
    missing = tuple(axis for axis in BATCH_AXES if axis not in held)
    return lax.pcast(w, missing, to="varying") if missing else w


def _statistics(routing: Routing, plan: dispatch.Plan, expert_TK: jax.Array, valid_BS: jax.Array, m: Model) -> MoEStats:
    b, s = valid_BS.shape
    valid_BS1 = valid_BS[:, :, None].astype(jnp.float32)
    score_BSE = (routing.score_TE / (jnp.sum(routing.score_TE, axis=-1, keepdims=True) + 1e-20)).reshape(b, s, -1) * valid_BS1
    row_BSK = jnp.broadcast_to(jnp.arange(b, dtype=jnp.int32)[:, None, None], (b, s, m.num_experts_per_tok))
    count_BE = jnp.zeros_like(score_BSE, shape=(b, m.n_routed_experts)).at[row_BSK, expert_TK.reshape(b, s, -1)].add(1.0, mode="drop")
    length_B1 = jnp.maximum(jnp.sum(valid_BS1, axis=1), 1.0)
    f_BE = lax.stop_gradient(count_BE) * m.n_routed_experts / (m.num_experts_per_tok * length_B1)
    p_BE = jnp.sum(score_BSE, axis=1) / length_B1
    z_T = jax.nn.logsumexp(routing.logit_TE, axis=-1) ** 2 * valid_BS1.reshape(-1)
    return MoEStats(
        expert_counts=lax.psum(plan.count_E, BATCH_AXES),
        rounds=plan.rounds,
        sequence_balance=lax.psum(jnp.sum(f_BE * p_BE), BATCH_AXES),
        score_sum=lax.psum(jnp.sum(score_BSE, axis=(0, 1)), BATCH_AXES),
        z_sum=lax.psum(jnp.sum(z_T), BATCH_AXES),
    )
