"""Layers with experts around a shared core as layers whose experts have weights of their own: what decoding
reads, which would multiply every expert out for a handful of tokens.
"""

import functools

import jax
from flax import nnx
from jax import lax

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.model.decoder import DecoderLayer
from deepseek_jax.model.moe import Experts, MoE
from deepseek_jax.model.shared_core import SharedCoreExperts


def multiply_out(layer: DecoderLayer, config: ModelConfig) -> None:
    """Gives a layer, or a stack of layers, the experts that its shared cores stand for, in the dtype of these
    and laid out as they are used. Other layers stay as they are. Under `jax.set_mesh`.

    Args:
      layer: with arrays in it; it loses cores and wrappers.
      config: the options of the model.
    """
    if not isinstance(layer.mlp, MoE) or not isinstance(layer.mlp.experts, SharedCoreExperts):
        return
    core = layer.mlp.experts.gate_shared_core.core
    stacked = core.get_metadata()["out_sharding"][0] == "layers"
    dtype = core.get_value().dtype
    graphdef, state = nnx.split(layer.mlp.experts)

    def of_one(state: nnx.State):
        return nnx.merge(graphdef, state).multiplied_out(dtype)

    made = jax.jit(functools.partial(lax.map, of_one) if stacked else of_one)(state)
    plain = nnx.eval_shape(lambda: Experts(config, nnx.Rngs(0)))
    for name, w in (("gate_up_proj", made.gate_up_GDPF), ("down_proj", made.down_GFD)):
        axes = getattr(plain, name).get_metadata()["out_sharding"]
        axes = ("layers", *axes) if stacked else axes
        setattr(plain, name, nnx.Param(w, out_sharding=axes, eager_sharding=False))
    layer.mlp.experts = plain
