"""A small model with a chat template, in a folder as on the hub, and chats that it can learn."""

import json
import os

import numpy as np
import safetensors.numpy

from deepseek_jax.hf.tokenizer_files import END_OF_BYTES, byte_tokenizer
from tests.support import hf_folders

START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
END_OF_TEXT_ID, START_ID, END_ID = 256, 257, 258


def model(folder, eos_token: str = END, **generation) -> str:
    """A checkpoint of hf_folders.MODEL with random weights, a tokenizer of bytes and TEMPLATE.

    Args:
      eos_token: that tokenizer_config.json names.
      generation: what generation_config.json says.
    """
    inner = byte_tokenizer()
    inner.add_special_tokens([START, END])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos_token,
        "pad_token": END_OF_BYTES,
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    files = {"tokenizer.json": inner.to_str(), "tokenizer_config.json": config}
    hf_folders.source(folder, generation=generation or None, files=files)
    path = os.path.join(folder, "model.safetensors")
    rng = np.random.default_rng(0)
    weights = {
        name: np.ones_like(a) if a.ndim == 1 else rng.normal(0, 0.1, a.shape).astype(np.float32)
        for name, a in safetensors.numpy.load_file(path).items()
    }
    safetensors.numpy.save_file(weights, path, {"format": "pt"})
    return str(folder)


def chats(path, count: int = 60) -> str:
    """A file of sums with their answers, as messages."""
    rng = np.random.default_rng(0)
    with open(path, "w", encoding="utf-8") as f:
        for a, b in rng.integers(1, 50, (count, 2)).tolist():
            messages = [
                {"role": "user", "content": f"{a}+{b}"},
                {"role": "assistant", "content": f"{a + b}"},
            ]
            f.write(json.dumps({"messages": messages}) + "\n")
    return str(path)
