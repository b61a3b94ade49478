"""Recipes of two guides, migrated and trained for three steps on small models."""

import dataclasses
import functools
import math

import jax
import pytest

from deepseek_jax import run
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.run import job
from tests.support import chat_folders
from tests.support.migration import loaded, migrate
from tests.support.stopped_runs import rows

FSDP = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_sharding_strategy: FULL_SHARD
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_forward_prefetch: true
  fsdp_backward_prefetch: BACKWARD_PRE
  fsdp_state_dict_type: FULL_STATE_DICT
num_processes: 2
mixed_precision: bf16
"""
SFT = """\
model_name_or_path: {model}
dataset_name: {data}
eos_token: <|im_end|>
bf16: true
gradient_checkpointing: true
gradient_accumulation_steps: 2
per_device_train_batch_size: 1
learning_rate: 4.0e-05
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs:
  min_lr_rate: 0.1
max_grad_norm: 0.2
max_length: 80
packing: false
logging_steps: 1
warmup_ratio: 0.03
save_strategy: epoch
"""
DISTILLATION = """\
training:
  fsdp: "full_shard"
  gradient_checkpointing: true
  bf16: true
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 2
  learning_rate: 5e-5
  logging_steps: 1
  max_steps: 3
"""


def train(config, workdir, monkeypatch):
    two = functools.partial(make_mesh, devices=jax.devices()[:2])
    monkeypatch.setattr(job, "make_mesh", two)
    run.train(config, workdir)
    found = [row for row in rows(workdir) if "lm_loss" in row]
    assert [row["step"] for row in found] == [1, 2, 3]
    assert all(math.isfinite(row["loss"]) for row in found)


@pytest.mark.slow
def test_open_r1_with_fsdp(tmp_path, monkeypatch):
    recipe = SFT.format(
        model=chat_folders.model(tmp_path / "model"),
        data=chat_folders.chats(tmp_path / "chats.jsonl"),
    )
    done = migrate(
        recipe, FSDP, command="accelerate launch src/open_r1/sft.py --max_steps 3", tools="open-r1"
    )
    config = loaded(str(tmp_path / "mine.py"), done)
    assert (config.train.batch_size, config.train.accumulation) == (4, 2)
    train(config, str(tmp_path / "run"), monkeypatch)


@pytest.mark.slow
def test_fsdp_for_distillation(tmp_path, monkeypatch):
    model = chat_folders.model(tmp_path / "model")
    done = migrate(DISTILLATION, command="torchrun --nproc_per_node=2 scripts/run_distillation.py")
    config = loaded(str(tmp_path / "mine.py"), done)
    config = dataclasses.replace(
        config,
        init_from=model,
        distill=dataclasses.replace(config.distill, teacher=model),
        data=dataclasses.replace(config.data, path=chat_folders.chats(tmp_path / "chats.jsonl")),
        train=dataclasses.replace(config.train, sequence_length=80),
    )
    train(config, str(tmp_path / "run"), monkeypatch)
