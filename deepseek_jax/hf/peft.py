"""Adapters as PEFT writes them, in and out: adapter_config.json and adapter_model.safetensors in a folder.

Linear maps have `base_model.model.NAME.lora_A.weight` [r, in] and `.lora_B.weight` [out, r]. Of routed
experts there are three forms, all read:

    per expert     ...mlp.experts.7.gate_proj.lora_A.weight: what transformers 4 has, what servers read, and
                   what is written here
    ParamWrapper   ...mlp.experts.base_layer.lora_A.weight and ...mlp.experts.lora_A.weight, all experts in
                   one: A [E * r, in], an expert after the other; B [out, r * E], where the expert runs
                   fastest. Gate and up are one parameter, and share A. Before PEFT 0.19 in and out changed
                   places.
    converted      the same names, made by PEFT from the first form for transformers 5: A of gate and of up
                   one above the other, so rank 2 r, B block-diagonal, alpha doubled

Nothing of a folder is run: tensors come from safetensors, patterns of names are plain ones.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from deepseek_jax.config.lora_targets import EXPERTS
from deepseek_jax.config.options import LoraConfig, ModelConfig
from deepseek_jax.errors import UserError
from deepseek_jax.hf.adapter import Adapter, Factors, expert_names
from deepseek_jax.hf.peft_config import CONFIG, read_config, scale_of
from deepseek_jax.hf.tensors import FLOATS, finite
from deepseek_jax.tensorfile import files, header, regions
from deepseek_jax.tensorfile.arrays import TensorSpec
from deepseek_jax.tensorfile.bounded_json import BadFile

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
MAX_NAME = 300  # characters: patterns of adapter_config.json take long on longer ones
_EXPERTS = re.compile(
    r"(?P<module>model\.layers\.(?P<layer>\d{1,6})\.(.*\.)?experts)(\.base_layer)?"
)
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")


def read(folder: str, model: ModelConfig, family: str) -> Adapter:
    """The adapter in a folder, for a model.

    Args:
      folder: with adapter_config.json and adapter_model.safetensors.
      model: the options of the model.
      family: its family.

    Raises:
      UserError: it cannot be read, is none that this version computes, or is not of this model.
    """
    config, tensors = read_config(folder), _tensors(folder)
    factors: dict[str, Factors] = {}
    sides: dict[str, dict[str, np.ndarray]] = {}
    saved: dict[str, np.ndarray] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        found = _FACTOR.fullmatch(name) if len(name) <= MAX_NAME else None
        if found:
            sides.setdefault(found["module"], {})[found["side"]] = tensor
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            saved[name] = tensor
        else:
            raise UserError(
                f"{folder}/{WEIGHTS}: {key[:120]!r} is not known. It has lora_A and lora_B of linear maps, "
                f"and what modules_to_save names of embed_tokens and lm_head."
            )
    for module, pair in sides.items():
        if pair.keys() != {"A", "B"} or any(t.ndim != 2 for t in pair.values()):
            raise UserError(
                f"{folder}/{WEIGHTS}: {module[:120]} has not two matrices, lora_A and lora_B."
            )
        if experts := _EXPERTS.fullmatch(module):
            there = expert_names(model, family).get(int(experts["layer"]), {})
            factors |= _of_experts(config, experts, pair, model, there, folder)
            continue
        r = len(pair["A"])
        if pair["B"].shape[1] != r:
            raise _bad_rank(folder, module, pair["A"], pair["B"])
        factors[f"{module}.weight"] = Factors(
            pair["A"], pair["B"], scale_of(config, module, r, folder)
        )
    if not factors and not saved:
        raise UserError(f"{folder}/{WEIGHTS} holds nothing. Copy it again from where it came from.")
    lora = _options(config, factors, saved)
    adapter = Adapter(lora, factors, saved, str(config.get("base_model_name_or_path") or ""))
    adapter.check(model, family, folder)
    return adapter


def _tensors(folder: str) -> dict[str, np.ndarray]:
    """All tensors of a folder, float32."""
    folder = os.path.expanduser(folder)
    if not os.path.isfile(os.path.join(folder, WEIGHTS)):
        if os.path.exists(os.path.join(folder, PICKLE)):
            raise UserError(
                f"{folder}/{PICKLE} is a pickle, which may run code, and is not read. Save the adapter with "
                f"PEFT's safe_serialization=True."
            )
        raise UserError(f"{folder} holds no {WEIGHTS}. Copy the adapter again.")
    out = {}
    try:
        for name, stored in header.read(os.path.join(folder, WEIGHTS), WEIGHTS).items():
            if stored.spec.dtype not in FLOATS:
                raise UserError(
                    f"{folder}/{WEIGHTS}: {name[:120]} is of the dtype {stored.spec.dtype}."
                )
            whole = regions.whole(stored.spec.shape)
            tensor = files.read_region(epath.Path(folder), stored, whole).astype(np.float32)
            if not finite(tensor):
                raise UserError(
                    f"{folder}/{WEIGHTS}: {name[:120]} holds numbers that are not finite."
                )
            out[name] = tensor
    except (BadFile, OSError, EOFError) as e:
        raise UserError(f"{folder}: {e}. Copy it again from where the adapter came from.") from e
    return out


def _bad_rank(folder: str, module: str, a: np.ndarray, b: np.ndarray) -> UserError:
    return UserError(
        f"{folder}/{WEIGHTS}: {module[:120]} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, which do "
        f"not fit each other and this model. Name the model that it was trained on."
    )


def _of_experts(
    config: Mapping[str, Any],
    found: re.Match,
    pair: dict[str, np.ndarray],
    m: ModelConfig,
    names: dict[str, str],
    folder: str,
) -> dict[str, Factors]:
    """All experts of a layer from one pair: which parameter it is of, its shape says.

    Args:
      config: adapter_config.json.
      found: the name of the pair, as _EXPERTS.
      pair: A and B.
      m: the options of the model.
      names: of the tensors of an expert of this layer, as `expert_names`.
      folder: for messages.
    """
    e, d, f = m.n_routed_experts, m.hidden_size, m.moe_intermediate_size
    a, b, module = pair["A"], pair["B"], found["module"]
    if not names or len(a) % e or len(a) != b.shape[1]:
        raise _bad_rank(folder, module, a, b)
    r = len(a) // e
    a_ERI, b_EOR = a.reshape(e, r, -1), b.reshape(len(b), r, e).transpose(2, 0, 1)
    shape = a.shape[1], len(b)
    if shape in ((2 * f, d), (d, f)) and shape not in ((d, 2 * f), (f, d)):
        # of an old PEFT: what is A there is B here
        a_ERI, b_EOR = b_EOR.transpose(0, 2, 1), a_ERI.transpose(0, 2, 1)
        shape = shape[::-1]
    if shape == (f, d):
        scale = scale_of(config, f"{module}.down_proj", r, folder)
        down = names["down_proj"]
        return {down.format(e=i): Factors(a_ERI[i], b_EOR[i], scale) for i in range(e)}
    if shape != (d, 2 * f):
        raise _bad_rank(folder, module, a, b)
    scale = scale_of(config, f"{module}.gate_up_proj", r, folder)
    halves = b_EOR[:, :f], b_EOR[:, f:]
    # Block-diagonal: gate has the first half of the rank, up the second. B of a fresh adapter is zero.
    h = r // 2
    apart = not r % 2 and not bool(halves[0][:, :, h:].any() or halves[1][:, :, :h].any())
    apart = apart and (bool(b.any()) or r == 2 * config["r"])
    out = {}
    for j, (name, half) in enumerate(zip(("gate_proj", "up_proj"), halves, strict=True)):
        part = slice(j * h, (j + 1) * h) if apart and h else slice(None)
        for i in range(e):
            out[names[name].format(e=i)] = Factors(a_ERI[i, part], half[i][:, part], scale)
    return out


def _options(
    config: Mapping[str, Any], factors: dict[str, Factors], saved: dict[str, np.ndarray]
) -> LoraConfig:
    """The options of a run with such factors, but for its targets. Where ranks or scales differ, of the most
    frequent."""
    found = [(len(f.a), f.scale) for f in factors.values()] or [(int(config["r"]), 1.0)]
    r, scale = max(set(found), key=found.count)
    rank = bool(config.get("use_rslora"))
    alpha = scale * (math.sqrt(r) if rank else r)
    names = [name.removesuffix(".weight").rpartition(".")[2] for name in saved]
    return LoraConfig(r=r, alpha=alpha, use_rslora=rank, modules_to_save=",".join(sorted(names)))


def write(folder: str, adapter: Adapter, model: ModelConfig) -> int:
    """Writes an adapter, float32, with a tensor for each expert. Returns its bytes.

    Args:
      folder: it must exist, and is empty.
      adapter: what is written.
      model: the options of its model.

    Raises:
      OSError: a file cannot be written.
    """
    tensors = dict(_written(adapter))
    specs = {name: TensorSpec(t.shape, np.dtype(np.float32)) for name, t in tensors.items()}

    def read_one(name: str) -> Iterator[np.ndarray]:
        yield np.ascontiguousarray(tensors[name], np.float32)

    files.write(epath.Path(folder), {WEIGHTS: specs}, read_one)
    with open(os.path.join(folder, CONFIG), "w", encoding="utf-8") as f:
        json.dump(written_config(adapter, model), f, indent=2)
        f.write("\n")
    return os.path.getsize(os.path.join(folder, WEIGHTS))


def _written(adapter: Adapter) -> Iterator[tuple[str, np.ndarray]]:
    for name, factors in adapter.factors.items():
        module = PREFIX + name.removesuffix(".weight")
        yield f"{module}.lora_A.weight", factors.a
        yield f"{module}.lora_B.weight", factors.b
    for name, tensor in adapter.saved.items():
        yield PREFIX + name, tensor


def written_config(adapter: Adapter, model: ModelConfig) -> dict[str, Any]:
    """adapter_config.json of an adapter of one rank and scale.

    Names in target_modules that end in gate_proj, up_proj or down_proj stand for routed experts alone in PEFT
    with transformers 5: it would pass over the same maps of dense layers and shared experts without a word.
    These are named as target_parameters beside them. PEFT refuses dropout there, and takes the root of twice
    the rank of gate and up together for rsLoRA: the file says the same scale without it.
    """
    lora = adapter.lora
    r, scale = lora.r, lora.scale
    experts = model.num_hidden_layers > model.first_k_dense_replace
    modules, parameters = set(), set()
    for name in adapter.factors:
        path = re.sub(r"^model\.layers\.\d+\.", "", name.removesuffix(".weight"))
        last = path.rpartition(".")[2]
        if experts and path.startswith("mlp.") and not path.startswith(f"{EXPERTS}."):
            parameters.add(f"{path.removeprefix('mlp.') if 'shared' in path else path}.weight")
        else:
            modules.add(last)
    alpha = scale * r
    saved = [name.removesuffix(".weight").rpartition(".")[2] for name in adapter.saved]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base or None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "target_modules": sorted(modules) or None,
        "target_parameters": sorted(parameters) or None,
        "modules_to_save": sorted(saved) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
    }
