"""Routed experts around a shared core: each projection of all experts of a layer is one matrix, the core, and
for each expert two low-rank wrappers,

    W_e = (I + U_out V_out^T) C (I + U_in V_in^T)          as Hugging Face lays weights out, [out, in]

so that E experts of I x O numbers become I O + 2 E R (I + O) (MoE_Factorize_Compress; compress/ makes such a
model of another one). Core, U and V are parameters like any other: sharded by the rule tables, trained,
saved. Names are those of that program's checkpoints.

A device multiplies its experts out inside the layer, for its pass over the tokens, and nothing of that
outlives the layer where it is rematerialised (train.remat=full; `none` and `dots` keep products, these
among them). That is 8 I O R FLOPs an expert and pass, those of 4 R tokens; factors kept apart would be two
narrow products more for every token, R (1 / I + 1 / O) times the expert: with Qwen3-30B-A3B's widths and
R = 64 a quarter of its FLOPs, against 6% at 4,000 tokens an expert. Gradients reach core, U and V on the
device, so that the mesh adds up factors and never experts.

Shape letters: G experts of this device, I inputs and O outputs of a projection, R the rank, and those of
layers.py. A core is [I, O], the transpose of C, as every kernel here.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.experts.low_rank import ExpertWeights
from deepseek_jax.model.layers import param
from deepseek_jax.parallel.mesh import per_device
from deepseek_jax.parallel.weights import (
    WEIGHTS,
    gather_for_use,
    gather_on_device,
    stored_arrays,
)

PROJECTIONS = ("gate", "up", "down")
EXACT = lax.Precision.HIGHEST


class LowRankWrapper(nnx.Module):
    """I + U V^T of each expert, on the side of a projection that is `width` wide: U and V [E, width, R]."""

    def __init__(self, config: ModelConfig, width: int, axis: str, rngs: nnx.Rngs):
        r = config.shared_core_rank
        shape, axes = (config.n_routed_experts, width, r), ("experts", axis, "lora")
        # U of zeros and V of variance 1 / R: every expert begins as the core.
        self.U = param(rngs, nnx.initializers.zeros, shape, axes)
        self.V = param(rngs, nnx.initializers.normal(r**-0.5), shape, axes)


class SharedCore(nnx.Module):
    """One projection of all experts of a layer."""

    def __init__(self, config: ModelConfig, down: bool, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.moe_intermediate_size
        # On the side of an expert's width no embed axis divides a factor: lora_expert_mlp is divided there.
        hidden, expert = (d, "expert_embed"), (f, "lora_expert_mlp")
        inputs, outputs = (expert, hidden) if down else (hidden, expert)
        self.core = param(
            rngs,
            nnx.initializers.normal(config.initializer_range),
            (f, d) if down else (d, f),
            ("expert_mlp", "embed") if down else ("embed", "expert_mlp"),
        )
        self.input_wrapper = LowRankWrapper(config, *inputs, rngs)
        self.output_wrapper = LowRankWrapper(config, *outputs, rngs)

    def variables(self) -> tuple[nnx.Variable, ...]:
        """Core, U and V of the inputs, U and V of the outputs."""
        first, last = self.input_wrapper, self.output_wrapper
        return self.core, first.U, first.V, last.U, last.V


class SharedCoreExperts(nnx.Module):
    """All routed experts of a layer, in place of `moe.Experts`."""

    is_plain = False
    is_unstacked = False

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.gate_shared_core = SharedCore(config, False, rngs)
        self.up_shared_core = SharedCore(config, False, rngs)
        self.down_shared_core = SharedCore(config, True, rngs)

    def variables(self) -> Iterator[nnx.Variable]:
        """Of gate, up and down."""
        for name in PROJECTIONS:
            yield from getattr(self, f"{name}_shared_core").variables()

    def stored(self) -> tuple[list[jax.Array], tuple[tuple[str, list[P]], ...]]:
        """As `moe.Experts.stored`."""
        arrays, specs = [], []
        for variable in self.variables():
            of_one, of_one_specs = stored_arrays(variable)
            arrays += of_one
            specs.append(("", of_one_specs))
        return arrays, tuple(specs)

    def on_device(self, arrays: Sequence[jax.Array], specs, dtype) -> ExpertWeights:
        """Inside `per_device`, this device's experts, multiplied out, from what `stored` made."""
        used = []
        for _, of_one in specs:
            used.append(gather_on_device(arrays[: len(of_one)], of_one, dtype))
            arrays = arrays[len(of_one) :]
        return _expert_weights(used)

    def multiplied_out(self, dtype: jnp.dtype) -> ExpertWeights:
        """The experts of a layer, outside of `per_device`: [E, D, 2, F] and [E, F, D], laid out as they are
        used. Multiplied in float32.
        """
        arrays = [gather_for_use(v, jnp.float32) for v in self.variables()]
        specs = tuple(jax.typeof(a).sharding.spec for a in arrays)

        def one_device(*arrays: jax.Array) -> ExpertWeights:
            return jax.tree.map(lambda w: w.astype(dtype), _expert_weights(arrays, EXACT))

        out = ExpertWeights(P("expert", None, None, "tensor"), P("expert", "tensor", None))
        return per_device(one_device, specs, out)(*arrays)


def _expert_weights(
    arrays: Sequence[jax.Array], precision: lax.Precision | None = None
) -> ExpertWeights:
    """From what `variables` gives, on a device."""
    gate, up, down = (arrays[i : i + 5] for i in (0, 5, 10))
    # The tensor axis divides the width of an expert: the outputs of gate and up, the inputs of down.
    pair = [product(*p, divided="outputs", precision=precision) for p in (gate, up)]
    gate_up_GDPF = jnp.stack(pair, axis=2)
    down_GFD = product(*down, divided="inputs", precision=precision)
    return ExpertWeights(checkpoint_name(gate_up_GDPF, WEIGHTS), checkpoint_name(down_GFD, WEIGHTS))


@jax.named_scope("experts")
def product(
    core_IO: jax.Array,
    u_in_GIR: jax.Array,
    v_in_GIR: jax.Array,
    u_out_GOR: jax.Array,
    v_out_GOR: jax.Array,
    divided: str = "",
    precision: lax.Precision | None = None,
) -> jax.Array:
    """[G, I, O] in the dtype of the core: (I + V_in U_in^T) core (I + V_out U_out^T) of each expert.

    With A = U_in^T core and M = core V_out + V_in A V_out that is core + [V_in, M] [A; U_out^T]: one product
    of inner width 2 R, and no second array of the size of the experts in either pass. Sums in float32.

    Args:
      core_IO: the core.
      u_in_GIR, v_in_GIR: of the wrappers of the inputs.
      u_out_GOR, v_out_GOR: of the wrappers of the outputs.
      divided: inside `per_device`, "inputs" or "outputs": the side of which the tensor axis gives this device
        a part.
      precision: of products of float32, which GPUs round to fewer bits by default.
    """
    dtype = core_IO.dtype

    def einsum(formula: str, *arrays: jax.Array) -> jax.Array:
        return jnp.einsum(formula, *arrays, precision=precision, preferred_element_type=jnp.float32)

    a_GRO = einsum("gir,io->gro", u_in_GIR, core_IO)
    if divided == "inputs":
        a_GRO = lax.psum(a_GRO, "tensor")
    a_GRO = a_GRO.astype(dtype)
    av_GRR = einsum("gro,gos->grs", a_GRO, v_out_GOR).astype(dtype)
    m_GIR = einsum("io,gor->gir", core_IO, v_out_GOR) + einsum("gis,gsr->gir", v_in_GIR, av_GRR)
    if divided == "outputs":
        m_GIR = lax.psum(m_GIR, "tensor")
    left = jnp.concatenate([v_in_GIR, m_GIR.astype(dtype)], axis=2)
    right = jnp.concatenate([a_GRO, jnp.swapaxes(u_out_GOR, 1, 2)], axis=1)
    low_GIO = einsum("gir,gro->gio", left, right)
    return (core_IO + low_GIO).astype(dtype)
