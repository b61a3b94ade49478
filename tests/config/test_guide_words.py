"""The words of MoE_Factorize_Compress's conf/ and of Ray Train, typed as options, and three faults of the
former's code in small."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import guide_words, suggestions
from deepseek_jax.config.options import Config, ModelConfig, OptimizerConfig
from deepseek_jax.errors import UserError
from deepseek_jax.model.divergences import divergence
from deepseek_jax.model.layout import abstract_model
from deepseek_jax.run import commandline
from deepseek_jax.train import trainable
from tests.support import ROOT

# Every key of its conf/distillation/default.yaml, and what the answer names.
ANSWERS = {
    "teacher.model_path": "config.distill.teacher here",
    "teacher.use_cached_logits": "config.distill.cache here",
    "teacher.cache_dir": "config.distill.cache here; made by a command of its own",
    "teacher.generation.top_k": "config.distill.top_k here; the rest of the vocabulary is one word",
    "teacher.generation.batch_size": "deepseek_jax.distill cache",
    "teacher.generation.force_regenerate": "refuses one of other data",
    "teacher.generation.worker_id": "--worker=0/8",
    "teacher.generation.total_workers": "--worker=0/8",
    "student.model_path": "config.init_from here",
    "loss.alpha": "config.distill.alpha here",
    "loss.temperature": "config.distill.temperature here",
    "loss.kl_reduction": "a mean over the scored tokens of the whole batch",
    "default_lr_multiplier": "config.optimizer.default_lr_multiplier",
    "parameter_lr_multipliers": "config.optimizer.lr_multipliers here",
    "stages.enabled": "config.distill.stages here",
    "stages.configs": "config.distill.stages here",
    "dataset.name": "data.path",
    "dataset.config_name": "data.path",
    "dataset.split": "data.path",
    "dataset.streaming": "files are read by pieces",
    "dataset.max_samples": "train.steps",
    "dataset.text_column": "the column is found",
    "dataset.max_length": "config.train.sequence_length here",
    "dataset.streaming_buffer_size": "files are read by pieces",
    "dataset.streaming_chunk_size": "files are read by pieces",
    "dataset.num_proc": "read ahead",
    "training.output_dir": "--workdir=DIR",
    "training.num_train_epochs": "config.train.epochs here",
    "training.per_device_train_batch_size": "train.batch_size / train.accumulation",
    "training.gradient_accumulation_steps": "config.train.accumulation here",
    "training.learning_rate": "config.optimizer.learning_rate",
    "training.warmup_steps": "config.optimizer.warmup_steps",
    "training.logging_steps": "config.log.every_steps here",
    "training.save_steps": "config.checkpoint.every_steps here",
    "training.save_total_limit": "config.checkpoint.keep here",
    "training.fp16": "config.train.dtype=float16 here",
    "training.bf16": "config.train.dtype=bfloat16 here",
    "training.dataloader_num_workers": "read ahead",
    "training.remove_unused_columns": "columns that nothing reads",
    "training.optim": "config.optimizer.name here",
    "training.weight_decay": "config.optimizer.weight_decay",
    "training.adam_beta1": "config.optimizer.b1 here",
    "training.adam_beta2": "config.optimizer.b2 here",
    "training.max_grad_norm": "config.optimizer.grad_clip here",
    "training.lr_scheduler_type": "config.optimizer.schedule here",
    "training.fsdp": "config.sharding.strategy here",
    "training.fsdp_config.fsdp_transformer_layer_cls_to_wrap": "one layer is gathered at a time",
    "training.fsdp_config.fsdp_backward_prefetch": "prefetch",
    "training.fsdp_config.fsdp_forward_prefetch": "prefetch",
    "training.fsdp_config.fsdp_auto_wrap_policy": "one layer is gathered at a time",
    "training.fsdp_config.fsdp_state_dict_type": "config.checkpoint.kind here",
    "training.fsdp_config.fsdp_offload_params": "config.offload.",
    "training.fsdp_config.fsdp_sync_module_states": "its own shards",
    "training.gradient_checkpointing": "config.train.remat=full here",
    "evaluation.eval_steps": "config.eval.every_steps here",
    "evaluation.per_device_eval_batch_size": "micro-batches of training",
    "evaluation.eval_dataset.name": "data.eval_fraction",
    "evaluation.eval_dataset.config_name": "data.eval_fraction",
    "evaluation.eval_dataset.split": "data.eval_fraction",
    "evaluation.eval_dataset.max_samples": "data.eval_fraction",
    "stage_name": "config.distill.stages here",
    "num_epochs": "config.distill.stages here",
}


@pytest.mark.parametrize("key", ANSWERS)
def test_every_word_is_answered(key):
    """With and without the name of its file before it, in one line, and never as an option that exists."""
    for name in (key, f"distillation.{key}", f"distill.{key}"):
        with pytest.raises(UserError) as error:
            commandline.parse(["train.py", "--config=configs/tiny.py", f"--config.{name}=1"])
        assert ANSWERS[key] in str(error.value) and "\n" not in str(error.value), str(error.value)
    assert ANSWERS[key] in suggestions.suggestion(key)


def test_every_word_is_in_the_document():
    page = (ROOT / "docs" / "guide_words.md").read_text(encoding="utf-8")
    for key in ANSWERS:
        path = key.split(".")
        told = f"`{key}`" in page or f"`{path[-1]}`" in page or f"`{'.'.join(path[-2:])}`" in page
        told = told or f"`{'.'.join(path[-2:-1])}.*`" in page
        told = told or f"`{'.'.join(path[:-1])}.*`" in page
        assert told, key


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("scaling_config.num_workers", "launch ray --num_workers=1 --gpus_per_worker=8"),
        ("run_config.storage_path", "launch ray --storage_path="),
        ("failure_config.max_failures", "launch ray --max_failures=3"),
        ("checkpoint_config.num_to_keep", "checkpoint.keep=3"),
        ("train_loop_config", "--config.train.epochs=3"),
        ("train_func", "deepseek_jax.launch.ray.fit"),
        ("parallel_strategy", "sharding.strategy"),
    ],
)
def test_rays_words_are_answered(key, answer):
    with pytest.raises(UserError) as error:
        commandline.parse(["train.py", "--config=configs/tiny.py", f"--config.{key}=1"])
    assert answer in str(error.value) and "\n" not in str(error.value), str(error.value)


def test_rays_words_are_in_the_document():
    page = (ROOT / "docs" / "ray.md").read_text(encoding="utf-8")
    for word in guide_words.RAY:
        for name in (re.sub(r"\(.*|=.*", "", w).split(".")[-1] for w in word.theirs):
            assert name in page, name


def test_an_override_of_hydra_is_answered():
    """As its scripts take them: without dashes."""
    with pytest.raises(UserError) as error:
        commandline.parse(
            ["train.py", "--config=configs/tiny.py", "distillation.teacher.model_path=DIR"]
        )
    said = "teacher.model_path (MoE_Factorize_Compress) is config.distill.teacher here."
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_pattern_of_the_router():
    """Its `.*gate.*` has projections of experts, too, as the table says; ours is of the router alone."""
    model = ModelConfig(n_routed_experts=4, num_experts_per_tok=2, hidden_size=32)

    def groups(rules: str) -> dict[str, tuple[str, ...]]:
        config = Config(model=model, optimizer=OptimizerConfig(lr_multipliers=rules))
        found = trainable.multipliers(config, abstract_model(config)[1])
        assert re.search(r"gate", "\n".join(found.table()))
        return {g.pattern: g.paths for g in found.groups}

    theirs = groups(".*gate.*=0.5")[".*gate.*"]
    assert any("experts/gate_up_proj" in path for path in theirs)
    ours = groups(r"mlp\.gate\.weight=0.5")[r"mlp\.gate\.weight"]
    assert ours and all(path.endswith("gate/kernel") for path in ours)


def test_a_filled_teacher_is_biased_and_a_bucket_is_not():
    """A student that is its teacher, of whose logits all but the 4 largest are set to -1e4: the divergence is
    the logarithm of what was cut off. With the rest as one word more, ours, it is exactly 0."""
    logits = np.random.default_rng(0).normal(0, 2, 64)

    def log_softmax(z):
        return z - z.max() - np.log(np.sum(np.exp(z - z.max())))

    top = np.argsort(logits)[-4:]
    filled = np.full_like(logits, -1e4)
    filled[top] = logits[top]
    student, teacher = log_softmax(logits), log_softmax(filled)
    kept = np.exp(student[top]).sum()
    theirs = np.sum(np.exp(teacher[top]) * (teacher[top] - student[top]))
    np.testing.assert_allclose(theirs, -np.log(kept), rtol=1e-12)
    assert theirs > 0.1
    bucket = jnp.asarray(np.append(student[top], np.log1p(-kept)), jnp.float32)[None]
    value, slope = divergence("forward", bucket, bucket, 0.0, lambda a: a.sum(-1, keepdims=True))
    assert float(value[0, 0]) == 0 and not np.any(slope)
