"""What is written out as a tool's default is what the tool itself has where a file is silent."""

import dataclasses

import pytest

from tests.support.migration import migrate


def same(c, arguments):
    """TrainingArguments beside a config."""
    o = c.optimizer
    assert (o.learning_rate, o.weight_decay) == (arguments.learning_rate, arguments.weight_decay)
    assert (o.b1, o.b2, o.eps) == (
        arguments.adam_beta1,
        arguments.adam_beta2,
        arguments.adam_epsilon,
    )
    assert (o.grad_clip, o.schedule) == (arguments.max_grad_norm, arguments.lr_scheduler_type)
    assert (o.warmup_steps, o.name) == (arguments.warmup_steps, "adamw")
    assert str(arguments.optim).rpartition(".")[2].lower().startswith("adamw_torch")
    sequences = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    assert c.train.batch_size == sequences and c.train.epochs == arguments.num_train_epochs
    assert c.train.steps == 0 > arguments.max_steps
    assert (c.seed, c.log.every_steps) == (arguments.seed, arguments.logging_steps)
    assert arguments.save_strategy == "steps" and arguments.save_total_limit is None
    assert (c.checkpoint.every_steps, c.checkpoint.keep) == (arguments.save_steps, 0)
    assert arguments.eval_strategy == "no" and c.data.eval_fraction == 0
    assert (c.train.remat == "full") == bool(arguments.gradient_checkpointing)
    assert (c.train.dtype == "bfloat16") == bool(arguments.bf16)


def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    same(migrate("output_dir: out\nsave_steps: 500\n", tools="hf5", devices=1).config, arguments)


def test_trl():
    trl = pytest.importorskip("trl")
    fields = {f.name: f.default for f in dataclasses.fields(trl.SFTConfig)}
    c = migrate("model_name_or_path: m\ndataset_name: d\n", tools="trl", devices=1).config
    assert (c.optimizer.learning_rate, c.log.every_steps) == (
        fields["learning_rate"],
        fields["logging_steps"],
    )
    assert c.train.sequence_length == fields["max_length"]
    assert (c.train.remat == "full") == fields["gradient_checkpointing"]
    assert (c.sft.packing == "none") == (not fields["packing"])
    assert c.sft.assistant_only_loss == str(fields["assistant_only_loss"]).lower()
    assert fields["completion_only_loss"] is None and c.sft.completion_only_loss == "auto"
    assert (c.sft.loss_type, c.sft.truncation) == (fields["loss_type"], fields["truncation_mode"])
    model = {f.name: f.default for f in dataclasses.fields(trl.ModelConfig)}
    lora = migrate(
        "model_name_or_path: m\ndataset_name: d\nuse_peft: true\n", tools="trl", devices=1
    ).config.lora
    assert (lora.r, lora.alpha, lora.dropout) == (
        model["lora_r"],
        model["lora_alpha"],
        model["lora_dropout"],
    )


def test_every_key_of_transformers_and_trl_is_known():
    """Each field of theirs has its place in the table of its version."""
    transformers = pytest.importorskip("transformers")
    trl = pytest.importorskip("trl")
    from deepseek_jax.migrate.registry import TOOLS

    for cls, tool in (
        (transformers.TrainingArguments, "hf5"),
        (trl.SFTConfig, "trl"),
        (trl.ModelConfig, "trl"),
        (trl.ScriptArguments, "trl"),
    ):
        missing = [f.name for f in dataclasses.fields(cls) if TOOLS[tool].handler(f.name) is None]
        assert not missing, (cls.__name__, missing)
