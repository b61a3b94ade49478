"""Hugging Face models: checkpoints in and out, tokenizers and chat templates.

    from deepseek_jax import hf
    model = hf.load("Qwen3-30B-A3B")   # a folder with config.json and safetensors
    logits = model([[1, 2, 3]])        # float32 [B, S, V]
    hf.save(model, "copy")

    python -m deepseek_jax.hf import SRC WORKDIR
    python -m deepseek_jax.hf export WORKDIR DST
"""

from deepseek_jax.hf.chat import Chat
from deepseek_jax.hf.model import LoadedModel, load, save
from deepseek_jax.hf.start import initial_state, open_for_training

__all__ = ["Chat", "LoadedModel", "initial_state", "load", "open_for_training", "save"]
