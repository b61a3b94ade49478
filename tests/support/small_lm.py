"""A small transformers model with a tokenizer, and what it says of text."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import tokenizers
import torch
import transformers

from tests.support import hf_variants


def write_tokenizer(folder, bos):
    """A byte-level BPE of 300 ids."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer, inner.decoder = (
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        tokenizers.decoders.ByteLevel(),
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator(["hello world, be kind and sunny"] * 9, trainer)
    if bos:
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        )
    )


def save(folder):
    """Writes a checkpoint with routed experts and grouped-query attention, and a tokenizer.

    Returns:
      The transformers model and the folder.
    """
    config = transformers.Qwen3MoeConfig(
        vocab_size=304,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        max_position_embeddings=64,
        mlp_only_layers=[0],
    )
    theirs = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    hf_variants.randomise(theirs, 0)
    theirs.save_pretrained(folder)
    write_tokenizer(folder, bos=True)
    return theirs.eval(), folder


def log_p(theirs, ids):
    """float64 [n, vocabulary]: log-probabilities of the token after each."""
    with torch.no_grad():
        return torch.log_softmax(
            theirs(torch.tensor([ids]), use_cache=False).logits[0].double(), -1
        ).numpy()
