"""LoRA (Hu et al. 2021, arXiv:2106.09685): factors that learn, next to weights that do not.

A weight W [in, out] that config.lora.target_modules names gets A [in, r] and B [r, out], float32, and acts
as W + scale * A B: in linear maps as a second, narrow path (layers.Linear), in routed experts by two more
grouped products (experts/low_rank.py). A begins as PEFT's does, B with zeros, so that the first step computes
what the base computes. Layers of multi-token prediction get none: no adapter file has a place for them.

The base is held in config.lora.base_dtype and nothing trains it (train/trainable.py): norms, router, biases
and the selection bias stay float32; embedding and output head are not brought below bfloat16.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config.lora_targets import EXPERTS, linear_maps, targets
from deepseek_jax.config.options import LoraConfig, ModelConfig
from deepseek_jax.model.layers import LowRank, param
from deepseek_jax.parallel.quantized import KINDS, Axes, QuantizedWeight, inputs_of, quantize

A, B = "lora_A", "lora_B"  # how the names of factors end
# A weight of routed experts: its variable, what its factors' names begin with, and the linear maps in it.
EXPERT_WEIGHTS = {
    "gate_up_proj": ("gate_up_", ("gate_proj", "up_proj")),
    "down_proj": ("down_", ("down_proj",)),
}
Path = Sequence[Any]  # of a variable in a state: ("layers", "self_attn", "q_proj", "kernel")


class LoraParam(nnx.Param):
    """A factor."""


def adapt(layer: nnx.Module, model: ModelConfig, lora: LoraConfig, rngs: nnx.Rngs) -> None:
    """Gives the weights of a decoder layer, not stacked yet, their factors."""
    if not lora.r:
        return
    chosen = targets(model, lora.target_modules)
    for site, path in enumerate(linear_maps(model)):
        module = _find(layer, path)
        if path in chosen and module is not None:
            module.lora = LowRank(lora.scale, lora.dropout, site)
            axes = module.kernel.get_metadata()["out_sharding"]
            shape = module.kernel.get_value().shape
            _add(module, "", shape, lora.r, ((axes[0], "lora"), ("lora", axes[1])), rngs)
    experts = getattr(layer.mlp, "experts", None)
    if experts is None:
        return
    for weight, (prefix, maps) in EXPERT_WEIGHTS.items():
        if f"{EXPERTS}.{maps[0]}" in chosen:
            experts.lora = LowRank(lora.scale)
            shape = getattr(experts, weight).get_value().shape
            _add(experts, prefix, shape, lora.r, _expert_axes(weight), rngs)


def _find(layer: Any, path: str) -> Any:
    """The linear map at a path, if this layer has it; None of routed experts."""
    for name in path.split("."):
        layer = getattr(layer, name, None)
    return layer if hasattr(layer, "kernel") else None


def _expert_axes(weight: str) -> tuple[Axes, Axes]:
    """The logical axes of the factors of all experts."""
    if weight == "gate_up_proj":
        a: Axes = ("experts", "expert_embed", "pair", "lora")
        return a, ("experts", "pair", "lora", "lora_expert_mlp")
    return ("experts", "lora_expert_mlp", "lora"), ("experts", "lora", "expert_embed")


def _add(
    module: Any,
    prefix: str,
    shape: tuple[int, ...],
    r: int,
    axes: tuple[Axes, Axes],
    rngs: nnx.Rngs,
) -> None:
    """The factors of one weight: of [I, O], or of experts [E, I, O] or [E, I, 2, O]."""
    *lead, i, o = shape
    a, b = (*lead, i, r), (*lead, r, o)
    if len(shape) == 4:
        e, i, pair, o = shape
        a, b = (e, i, pair, r), (e, pair, r, o)
    init = _uniform(i**-0.5)
    setattr(module, prefix + A, param(rngs, init, a, axes[0], LoraParam))
    setattr(module, prefix + B, param(rngs, nnx.initializers.zeros, b, axes[1], LoraParam))


def _uniform(bound: float) -> Callable:
    """U(-bound, bound). PEFT's kaiming_uniform_(a=sqrt(5)) has the bound 1 / sqrt(inputs)."""

    def init(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def is_factor(path: Path) -> bool:
    """Whether a path in a state is of a factor."""
    return str(path[-1]).endswith((A, B))


def adapted(path: str) -> str:
    """A factor's path without its end, "layers/mlp/experts/gate_up"; another path as it is."""
    return re.sub(rf"[/_]({A}|{B})$", "", path)


def learns(path: Path, lora: LoraConfig) -> bool:
    """Whether a parameter of a LoRA run learns: factors do, and what modules_to_save names."""
    return is_factor(path) or path[0] in lora.saved


def held(lora: LoraConfig, params: nnx.State) -> nnx.State:
    """Parameters as a run holds them: those that learn float32, the others in config.lora.base_dtype.

    To be jitted, or called under `jax.eval_shape`.
    """
    return in_base_dtype(lora, params) if lora.r else params


def in_base_dtype(lora: LoraConfig, params: nnx.State) -> nnx.State:
    """Parameters of which those that do not learn are in config.lora.base_dtype, as `held`; without factors
    all are of that kind: a frozen model's.
    """
    flat = nnx.to_flat_state(params)
    return nnx.from_flat_state([(path, _held(path, v, lora)) for path, v in flat])


def _held(path: Path, variable: nnx.Variable, lora: LoraConfig) -> nnx.Variable:
    w = variable.get_value()
    if isinstance(w, QuantizedWeight) or not is_base_matrix(path, variable, lora):
        return variable
    axes = variable.get_metadata()["out_sharding"]
    if lora.base_dtype not in KINDS:
        return variable.replace(w.astype(lora.base_dtype))
    if "vocab" in axes:
        return variable.replace(w.astype(jnp.bfloat16))
    return variable.replace(quantize(lora.base_dtype, w, inputs_of(axes)))


def is_base_matrix(path: Path, variable: nnx.Variable, lora: LoraConfig) -> bool:
    """Whether a parameter is of what base_dtype is about: frozen matrices, but the router's."""
    axes = variable.get_metadata()["out_sharding"]
    sides = [name for name in axes if name not in ("layers", "experts", "pair")]
    return not learns(path, lora) and len(sides) == 2 and "router" not in sides


def base_of(params: nnx.State) -> nnx.State:
    """The parameters without factors: those of the model alone."""
    flat = nnx.to_flat_state(params)
    return nnx.from_flat_state([(path, v) for path, v in flat if not is_factor(path)])


def factors_of(params: nnx.State) -> nnx.State:
    """The factors alone."""
    flat = nnx.to_flat_state(params)
    return nnx.from_flat_state([(path, v) for path, v in flat if is_factor(path)])
