"""A tiny model: its run, its checkpoint on the hub, its tokenizers and its exports."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config.options import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
)
from deepseek_jax.hf import __main__ as commands
from deepseek_jax.hf import configuration
from deepseek_jax.inference.loaded import config_for
from deepseek_jax.train import workdir as workdirs
from deepseek_jax.train.state import abstract_model, to_tree

MODEL = ModelConfig(
    vocab_size=320,
    hidden_size=16,
    intermediate_size=16,
    moe_intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=128,
)


def save(workdir, data=None):
    """A checkpoint of a run, as far as export reads it."""
    data = data or DataConfig()
    _, params, bias = abstract_model(config_for(MODEL, None)[0])
    state = jax.tree.map(
        lambda a: jnp.full(a.shape, 0.5, a.dtype), {"params": params, "bias": bias}
    )
    if not os.path.exists(os.path.join(workdir, "checkpoints")):
        checkpoints = Checkpointer(os.path.join(workdir, "checkpoints"))
        checkpoints.save(1, to_tree(state), {})
        checkpoints.close()
    workdirs.write_config(str(workdir), Config(model=MODEL, mesh=MeshConfig(fsdp=1), data=data))


def exported(tmp_path, name="out", **options):
    commands.export(str(tmp_path / "w"), str(tmp_path / name), **options)

    def read(file):
        path = tmp_path / name / file
        return json.loads(path.read_text()) if path.exists() else {}

    return read("config.json"), read("generation_config.json"), read("tokenizer_config.json")


def bpe(path, special=("<s>", "<|im_end|>", "</s>"), bos=True, text="some words of a text"):
    """A byte-level BPE whose ids 0, 1, ... are the special tokens."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([text] * 9, trainer)
    if bos:
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{special[0]} $A", special_tokens=[(special[0], 0)]
        )
    os.makedirs(os.path.dirname(path), exist_ok=True)
    inner.save(str(path))
    return str(path)


def source(folder, config=(), generation=None, files=()):
    """A Hugging Face checkpoint of MODEL, all numbers zero."""
    import safetensors.numpy

    from deepseek_jax.hf import names

    os.makedirs(folder)
    _, params, bias = abstract_model(config_for(MODEL, None)[0])
    leaves = [
        *names.leaves(params, "deepseek_v3", MODEL),
        *names.leaves(bias, "deepseek_v3", MODEL),
    ]
    shapes = {n: s for leaf in leaves for n, s in names.tensors(leaf).items()}
    safetensors.numpy.save_file(
        {n: np.zeros(s, np.float32) for n, s in shapes.items()},
        os.path.join(folder, "model.safetensors"),
    )
    for file, value in {
        "config.json": configuration.from_model(MODEL, "deepseek_v3") | dict(config),
        "generation_config.json": generation,
        **dict(files),
    }.items():
        if value is not None:
            with open(os.path.join(folder, file), "w", encoding="utf-8") as f:
                f.write(value if isinstance(value, str) else json.dumps(value))
    return str(folder)
