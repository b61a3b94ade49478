"""The files of an export beside its weights: config.json, tokenizer, chat template, licence."""

import os
from typing import Any

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.hf import configuration, provenance, rotation, tokenizer_files
from deepseek_jax.hf.families import FAMILIES
from deepseek_jax.hf.tensors import dump, read_config
from deepseek_jax.hf.tokenizer_files import Companions

# Keys of the checkpoint's own config.json that an export does not keep: the weights are other ones, and the
# options say how q and k are rotated.
_DROPPED = (
    "auto_map",
    "quantization_config",
    "dtype",
    "torch_dtype",
    "_name_or_path",
    "num_mtp_layers",
    *rotation.KEYS,
)


def write(
    folder: str,
    model: ModelConfig,
    family: str,
    companions: Companions,
    before: ModelConfig | None,
    dtype: str,
) -> None:
    """Writes them.

    Args:
      folder: of the export.
      model: its options.
      family: that it is saved as.
      companions: files that go with it.
      before: the model of their config.json.
      dtype: what most of the weights are stored as.

    Raises:
      UserError: the tokenizer is missing or cannot be read.
      OSError: a file cannot be written.
    """
    config = configuration.from_model(model, family)
    if companions.files_from is not None:
        provenance.copy_files(companions.files_from, folder)
        then = configuration.from_model(before, family) if before else {}
        config = merged(read_config(companions.files_from), config, then)
    config |= {
        "torch_dtype": dtype,
        "dtype": dtype,
        "num_nextn_predict_layers": model.num_nextn_predict_layers,
    }
    if "num_nextn_predict_layers" not in FAMILIES[family].options:
        del config["num_nextn_predict_layers"]
    config = tokenizer_files.write(folder, config, companions, model.max_position_embeddings)
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:
        f.write(dump(config))


def merged(original: dict[str, Any], now: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    """The config.json that a checkpoint came with, changed where the model's options changed since.

    A key that it has in one of several forms (rope_parameters, num_local_experts, mlp_layer_types of
    transformers 5; rope_theta, num_experts, first_k_dense_replace before) is written in all: a reader of
    another age would take its default for a form that is missing.

    Args:
      original: that config.json.
      now: what the options of the model say (configuration.from_model).
      then: the same of the model that the checkpoint had.
    """
    renamed = tuple(key for key in FAMILIES[now["model_type"]].renamed if key not in now)
    out = {
        k: v
        for k, v in original.items()
        if k not in (*_DROPPED, *renamed) and (v is not None or now.get(k) is None)
    }
    changed = {k for k in now.keys() | then.keys() if now.get(k) != then.get(k)}
    for key in changed | ({"layer_types"} if "num_hidden_layers" in changed else set()):
        out.pop(key, None)
    return (
        {k: v for k, v in now.items() if k not in out}
        | out
        | {"model_type": now["model_type"], "architectures": now["architectures"]}
    )
