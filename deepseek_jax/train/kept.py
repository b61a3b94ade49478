"""train.remat=auto: what layers keep for backward is what fits, by an estimate of the step's memory.

The estimate adds up what is known before anything is compiled: the state, gradients and weights in the
compute dtype, a layer's input for every layer, the largest of the arrays that live for a moment, and what
each name of REMAT_NAMES keeps. `python -m deepseek_jax.plan` compares it with the compiled step. On a CPU,
and with stages, whose ticks each keep their own, it is train.remat=full.

Letters of sizes: config/sections/training.py; T tokens of a device in a micro-batch, N layers.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from deepseek_jax.cli.texts import gb
from deepseek_jax.config.options import Config, replaced
from deepseek_jax.experts.block_rows import BLOCK
from deepseek_jax.model.head import LOGIT_BYTES
from deepseek_jax.parallel.mesh import TOKEN_AXES
from deepseek_jax.parallel.xla_options import ITEM_BYTES, bytes_of_a_layer
from deepseek_jax.train.state import Layout

# In the order in which they are taken up: by the time that a kept byte saves. Attention saves a whole kernel;
# the next three one or two matrix products of the same work for each byte; mlp_hidden a pass over memory.
ORDER = ("attention", "experts_hidden", "mlp_gate_up", "mla_latent", "exchange", "mlp_hidden")
SLACK = 1.1  # of what does not lie in the state: XLA's buffers do not fit without gaps


class Sizes(NamedTuple):
    """Bytes of a device."""

    state: int  # parameters, moments, frozen weights
    weights: int  # gradients, and weights in the compute dtype
    passing: int  # the most that lives for a moment
    inputs: int  # of every layer
    kept: Mapping[str, int]  # by name, of all layers together

    def total(self, names: tuple[str, ...]) -> int:
        """With these kept."""
        rest = self.weights + self.passing + self.inputs + sum(self.kept[n] for n in names)
        return self.state + round(SLACK * rest)


def chosen(
    config: Config, mesh: jax.sharding.Mesh, layout: Layout, room: int | None, beside: int = 0
) -> tuple[Config, str]:
    """The options with what train.remat=auto stands for, and a line that says so; "" where it was not asked
    for.

    Args:
      layout: of the same options.
      room: bytes of a device that a program may use; None: not known, as of CPUs.
      beside: bytes that lie there as well: a teacher's.
    """
    if config.train.remat != "auto":
        return config, ""
    full = replaced(config, "train.remat", "full")
    if room is None:
        return full, "remat auto: full, as on CPUs"
    if mesh.shape["stage"] > 1:
        return full, "remat auto: full, as with stages each tick keeps what it is told to"
    sizes = sizes_of(config, mesh, layout)
    names: tuple[str, ...] = ()
    for name in (n for n in ORDER if sizes.kept[n]):
        if sizes.total((*names, name)) + beside <= room:
            names = (*names, name)
    remat = f"save:{','.join(names)}" if names else "full"
    said = f"remat auto: {remat}, about {gb(sizes.total(names) + beside)} of {gb(room)}"
    if names:
        said += f"; {gb(sizes.total(()) + beside)} with full"
    return replaced(config, "train.remat", remat), said


def sizes_of(config: Config, mesh: jax.sharding.Mesh, layout: Layout) -> Sizes:
    """The estimate, for a mesh without stages."""
    stored = layout.bytes_per_device(mesh)
    stored.pop("host", 0)
    layer = bytes_of_a_layer(config, layout.model.abstract.params, mesh)
    return sizes(config, mesh.shape, stored, layer)


def sizes(config: Config, shape: Mapping[str, int], stored: Mapping[str, int], layer: int) -> Sizes:
    """The estimate from what a mesh's shape says.

    Args:
      shape: of the mesh, without stages.
      stored: as Layout.bytes_per_device has it, "host" left out.
      layer: bytes of one layer's weights as it uses them.
    """
    gradients = stored["gradients"]
    item = ITEM_BYTES[config.train.dtype]
    # Those of a micro-batch are in the compute dtype, and so is a copy of the weights (cast_weights.py).
    weights = gradients if item == 4 else gradients // 2 + stored["parameters"] // 2
    if config.train.accumulation > 1:
        weights += gradients * ITEM_BYTES[config.train.accumulation_dtype] // 4
    tokens = config.micro_batch * config.train.sequence_length
    tokens //= math.prod(shape[a] for a in TOKEN_AXES)
    m = config.model
    layers = m.num_hidden_layers + m.num_nextn_predict_layers
    return Sizes(
        sum(stored.values()) - gradients,
        weights,
        passing(config, shape, tokens) + 2 * layer,
        layers * tokens * m.hidden_size * item,
        kept(config, shape, tokens),
    )


def kept(config: Config, shape: Mapping[str, int], tokens: int) -> dict[str, int]:
    """Bytes that each name keeps in all layers of a device, 0 where no layer has it."""
    m, item, tensor = config.model, ITEM_BYTES[config.train.dtype], shape["tensor"]
    dense, layers = m.first_k_dense_replace, m.num_hidden_layers + m.num_nextn_predict_layers
    routed = layers - dense
    heads = m.num_attention_heads // tensor
    latent = m.kv_lora_rank + m.qk_rope_head_dim + (m.q_lora_rank or 0)
    shared = m.n_shared_experts * m.moe_intermediate_size
    width = (dense * m.intermediate_size + routed * shared) // tensor  # of all layers together
    rows = _rows(config, shape, tokens)
    if config.moe.dispatch != "all_to_all":
        visitors = shape["expert"] * tokens
    else:
        visitors = rows
    found: dict[str, Any] = {
        "attention": layers * tokens * heads * (m.value_head_dim * item + 4),
        "experts_hidden": routed * rows * 2 * m.moe_intermediate_size // tensor * item,
        "mlp_gate_up": 2 * tokens * width * item,
        "mla_latent": layers * tokens * latent * item if m.attention_kind == "mla" else 0,
        "exchange": routed * visitors * m.hidden_size * item if shape["expert"] > 1 else 0,
        "mlp_hidden": tokens * width * item,
    }
    offloaded = config.offload.activations.split(",")
    return {name: 0 if name in offloaded else found[name] for name in ORDER}


def _rows(config: Config, shape: Mapping[str, int], tokens: int) -> int:
    """Rows of the experts of a device in a MoE layer, what is padded among them."""
    m = config.model
    if not m.has_experts:
        return 0
    padded = 1.0 if shape["expert"] == 1 else config.moe.capacity_factor
    experts = m.n_routed_experts // shape["expert"]
    return round(padded * tokens * m.num_experts_per_tok) + experts * BLOCK


def passing(config: Config, shape: Mapping[str, int], tokens: int) -> int:
    """The most that lives for a moment: the backward pass of a layer, or the loss."""
    m, item, tensor = config.model, ITEM_BYTES[config.train.dtype], shape["tensor"]
    heads = m.num_attention_heads // tensor
    # Queries, keys, values, result and the gradient of each; three times the scores of 512 queries.
    attention = tokens * heads * 4 * (m.qk_head_dim + m.value_head_dim) * item
    attention += 3 * 4 * tokens * heads * min(512, config.train.sequence_length)
    mlp = 6 * tokens * m.intermediate_size // tensor * item
    rows, width = _rows(config, shape, tokens), m.moe_intermediate_size // tensor
    # Rows there and back and the gradient of each; gate, up, their product and its gradients.
    experts = rows * (4 * m.hidden_size + 6 * width) * item
    if rows:  # gradients of the matrices, in float32
        experts += m.n_routed_experts // shape["expert"] * 3 * m.hidden_size * width * 4
    words = m.vocab_size // tensor
    loss = 3 * min(LOGIT_BYTES, 4 * tokens * words)  # logits, their exponentials and gradients
    loss += words * m.hidden_size * (2 * 4 + item)
    return max(attention + max(mlp, experts), loss) + 6 * tokens * m.hidden_size * item
