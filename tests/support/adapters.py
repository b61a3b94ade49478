"""Adapters of random numbers, none of them zero, and how PEFT's names and shapes are taken apart.

config = adapted(model, r=4)                    # a float32 run with LoRA on everything
arrays = random_factors(config, seed=0)         # {path: array} of all factors
updates = of_peft(named, model)                 # {hub name: (A [r, in], B [out, r])}, one entry an expert
"""

import dataclasses
import re
from typing import Any

import numpy as np
from flax import nnx

from deepseek_jax.config.options import Config, LoraConfig, ModelConfig, MoeConfig
from deepseek_jax.model.layout import abstract_model
from deepseek_jax.model.lora import is_factor
from tests.support import conversion


def adapted(model: ModelConfig, moe: MoeConfig | None = None, **lora: Any) -> Config:
    """A float32 run of a model with LoRA."""
    small: dict[str, Any] = {"base_dtype": "float32", "r": 4, "alpha": 6.0}
    options = LoraConfig(**small | lora)
    moe = moe or MoeConfig(bias_update_rate=0.0)
    return conversion.config_of(model, lora=options, moe=moe)


def random_factors(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Factors that change what a weight makes of its input by some tenths."""
    rng = np.random.default_rng(seed)
    out = {}
    for path, variable in nnx.to_flat_state(abstract_model(config)[1]):
        if is_factor(path):
            shape = variable.get_value().shape
            out["/".join(map(str, path))] = (rng.standard_normal(shape) * 0.1).astype(np.float32)
    return out


def with_factors(params: nnx.State, arrays: dict[str, np.ndarray], config: Config) -> nnx.State:
    """The parameters of a model and these factors, as one state."""
    flat = nnx.to_flat_state(abstract_model(config)[1])
    factors = [(p, v.replace(arrays["/".join(map(str, p))])) for p, v in flat if is_factor(p)]
    return nnx.merge_state(params, nnx.from_flat_state(factors))


def of_peft(named: Any, model: ModelConfig) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A and B of every tensor of the hub, from (name, array) pairs of a PeftModel's LoRA parameters or
    their gradients: experts in the fused form that PEFT makes of one entry an expert."""
    sides: dict[str, dict[str, np.ndarray]] = {}
    for name, a in named:
        found = re.fullmatch(r"base_model\.model\.(.*)\.lora_([AB])\.\w+\.weight", name)
        if found:
            sides.setdefault(found[1], {})[found[2]] = np.asarray(a, np.float32)
    out = {}
    experts, width = model.n_routed_experts, model.moe_intermediate_size
    for module, pair in sides.items():
        a, b = pair["A"], pair["B"]
        fused = re.fullmatch(r"(.*\.experts)(\.base_layer)?", module)
        if not fused:
            out[f"{module}.weight"] = a, b
            continue
        a, b = a.reshape(experts, -1, a.shape[1]), b.reshape(len(b), -1, experts)
        for e in range(experts):
            if not fused[2]:
                out[f"{fused[1]}.{e}.down_proj.weight"] = a[e], b[:, :, e]
                continue
            half = a.shape[1] // 2
            out[f"{fused[1]}.{e}.gate_proj.weight"] = a[e, :half], b[:width, :half, e]
            out[f"{fused[1]}.{e}.up_proj.weight"] = a[e, half:], b[width:, half:, e]
    return out


def without_lora(config: Config) -> Config:
    return dataclasses.replace(config, lora=LoraConfig())
