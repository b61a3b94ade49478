"""A migrated recipe trains as transformers' Trainer does: the same losses, step by step."""

import json
import os

import jax
import numpy as np
import pytest

from deepseek_jax import run
from deepseek_jax.hf.tokenizer_files import byte_tokenizer
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.run import job
from tests.support.migration import loaded, of_files
from tests.support.stopped_runs import rows

ROWS, LENGTH, STEPS = 8, 32, 10
RECIPE = """\
model_name_or_path: {model}
dataset_name: {data}
output_dir: {out}
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
num_train_epochs: {steps}
learning_rate: 1e-3
warmup_ratio: 0.2
weight_decay: 0.1
max_grad_norm: 0.5
lr_scheduler_type: cosine
logging_steps: 1
save_strategy: 'no'
report_to: none
max_seq_length: {length}
packing: false
seed: 0
"""


def llama(folder):
    """A tiny Llama with a tokenizer, as on the hub."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        eos_token_id=256,
        bos_token_id=None,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    with open(os.path.join(folder, "tokenizer.json"), "w", encoding="utf-8") as f:
        f.write(byte_tokenizer().to_str())
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as f:
        json.dump({"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}, f)
    return model


def examples(path):
    """As many rows as a step has, all of one length: an epoch is a step, and its order is no matter."""
    ids = np.random.default_rng(0).integers(0, 256, (ROWS, LENGTH))
    ids[:, -1] = 256
    out = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids]
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in out)
    return out


@pytest.mark.slow
def test_ten_steps_of_a_tiny_llama(tmp_path, monkeypatch):
    """Losses and norms of gradients of transformers' Trainer, to 1e-5: both compute in float32, in another
    order.
    """
    transformers = pytest.importorskip("transformers")
    model = llama(str(tmp_path / "model"))
    data = examples(tmp_path / "rows.jsonl")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(
            model=tmp_path / "model",
            data=tmp_path / "rows.jsonl",
            out=tmp_path / "run",
            steps=STEPS,
            length=LENGTH,
        )
    )
    done = of_files([str(recipe)], devices=1)
    config = loaded(str(tmp_path / "mine.py"), done)
    one = [jax.devices()[0]]
    monkeypatch.setattr(job, "make_mesh", lambda c: make_mesh(c, devices=one))
    run.train(config, str(tmp_path / "run"))
    found = [row for row in rows(str(tmp_path / "run")) if "lm_loss" in row]

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "theirs"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=STEPS,
        learning_rate=1e-3,
        warmup_steps=0.2,
        weight_decay=0.1,
        max_grad_norm=0.5,
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    micro = []

    class Trainer(transformers.Trainer):
        """Its log rounds losses to 4 digits."""

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            micro.append(float(loss))
            return loss

    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    norms = [row["grad_norm"] for row in trainer.state.log_history if "loss" in row]
    losses = np.array(micro).reshape(STEPS, 2).sum(axis=1)
    np.testing.assert_allclose([row["loss"] for row in found], losses, rtol=1e-5)
    np.testing.assert_allclose([row["grad_norm"] for row in found], norms, rtol=1e-4)
    assert len(found) == STEPS and losses[-1] < losses[0] - 0.1
