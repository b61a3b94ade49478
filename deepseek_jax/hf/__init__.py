"""Hugging Face checkpoints: what their config.json and tensors mean, read and written.

    from deepseek_jax import hf
    model = hf.load("Qwen3-30B-A3B")   # a folder with config.json and safetensors
    logits = model([[1, 2, 3]])        # float32 [B, S, V]
    hf.save(model, "copy")

    python -m deepseek_jax.hf import SRC WORKDIR
    python -m deepseek_jax.hf export WORKDIR DST

In: a folder of the hub, or arrays of a model. Out: options and arrays of a model, or such a folder. Read
families/ first (one record for each kind of model), then configuration.py (config.json), names.py (from an
array to its tensors), reader.py and exporter.py.
"""

import importlib
from typing import Any

# The public face. Its names live above this package (imports point down), so they are looked up when they are
# asked for; reading a name table loads neither models nor a run.
_FACE = {
    "Chat": "deepseek_jax.data.chat",
    "LoadedModel": "deepseek_jax.inference.loaded",
    "load": "deepseek_jax.inference.loaded",
    "save": "deepseek_jax.inference.loaded",
}
__all__ = ["Chat", "LoadedModel", "load", "save"]


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_FACE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_FACE})
