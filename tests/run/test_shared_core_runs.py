"""A run that trains a model with shared cores, from the guide's checkpoint-0 to a model that transformers
loads."""

import os
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from deepseek_jax import hf
from deepseek_jax.compress import __main__ as compress
from deepseek_jax.config.options import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    MoeConfig,
    OptimizerConfig,
    ShardingConfig,
    TrainConfig,
)
from deepseek_jax.hf import __main__ as commands
from deepseek_jax.inference.opener import open_model
from deepseek_jax.run.call import train
from tests.support import checkpoint0, compression, conversion, evaluation

IDS = np.random.default_rng(0).integers(0, 300, (2, 16))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(the torch student, its folder)."""
    folder = tmp_path_factory.mktemp("checkpoint-0")
    student = checkpoint0.build(evaluation.write_model(folder), 3, 0)
    checkpoint0.write(student, folder)
    return student, folder


@pytest.mark.slow
def test_from_checkpoint_0_to_transformers(source, tmp_path, monkeypatch):
    """Four devices; resumed from step 2 it is bit for bit the run that was not; every factor has moved."""
    student, folder = source
    four = jax.devices()[:4]
    monkeypatch.setattr(jax, "devices", lambda *_: four)
    options = Config(
        init_from=str(folder),
        mesh=MeshConfig(fsdp=2, expert=2),
        sharding=ShardingConfig(min_weight_size=0),
        moe=MoeConfig(bias_update_rate=0.0),
        data=DataConfig(path=compression.text(tmp_path / "text.jsonl", 200), eval_fraction=0.0),
        train=TrainConfig(steps=4, batch_size=8, sequence_length=32, dtype="float32"),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1, schedule="constant"),
        checkpoint=CheckpointConfig(every_steps=2, keep=0),
        eval=EvalConfig(every_steps=0, batches=1, sample_prompt="hello", sample_tokens=3),
        log=LogConfig(every_steps=1, trackers=""),
    )
    whole, again = str(tmp_path / "whole"), str(tmp_path / "again")
    result = train(options, whole)
    assert result.step == 4 and np.isfinite(list(result.losses.values())).all()
    shutil.copytree(whole, again)
    shutil.rmtree(os.path.join(again, "checkpoints", "4"))
    resumed = train(options, again)
    for a, b in zip(jax.tree.leaves(result.state), jax.tree.leaves(resumed.state), strict=True):
        np.testing.assert_array_equal(a, b)

    # Out again as factors, in the names of the other program, and multiplied out.
    commands.export(whole, str(tmp_path / "factors"))
    before = {n: t.numpy().copy() for n, t in student.state_dict().items()}
    after = safetensors.numpy.load_file(tmp_path / "factors" / "model.safetensors")
    student.load_state_dict({n: torch.tensor(a) for n, a in after.items()}, strict=True)
    assert all(np.any(after[n] != a) for n, a in before.items() if "shared_core" in n)
    trained = open_model(whole).model
    assert trained.config.shared_core_rank == 3
    with torch.no_grad():
        wanted = student(input_ids=torch.as_tensor(IDS), use_cache=False).logits.numpy()
    conversion.assert_close(trained(IDS), wanted, 1e-5, "logits")
    assert compress.main(["multiply-out", whole, str(tmp_path / "plain")]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        found = theirs(input_ids=torch.as_tensor(IDS), use_cache=False).logits.numpy()
    conversion.assert_close(found, wanted, 1e-5, "logits of transformers")
    conversion.assert_close(hf.load(str(tmp_path / "plain"))(IDS), wanted, 1e-5, "our logits")
