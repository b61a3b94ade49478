"""A run that is interrupted is the run that is not.

Bit for bit on the same mesh, to float32 rounding on another.
"""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest

from deepseek_jax import objectives
from deepseek_jax.checkpoint.checkpoint import Checkpointer
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
from deepseek_jax.config.validation import validate
from deepseek_jax.data.loader import Loader
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.run import resume
from deepseek_jax.train import state, step
from deepseek_jax.train.compiled_step import CompiledStep
from tests.support.small_loops import make_loop
from tests.support.small_runs import ADAMW, TINY, Trainer, config_of, losses_of, same, trainer

# Everything that a state or a schedule could forget: two sources, micro-batches, MTP whose weight
# changes, the bias, which stops to move, WSD, a batch that grows, bfloat16 compute and moments.
EVERYTHING = Config(
    model=dataclasses.replace(
        TINY, vocab_size=320, num_nextn_predict_layers=1, aux_loss_alpha=0.01
    ),
    mesh=MeshConfig(fsdp=2),
    sharding=ShardingConfig(min_weight_size=0),
    moe=MoeConfig(bias_update_fraction=0.7),
    train=TrainConfig(
        steps=12,
        batch_size=16,
        sequence_length=16,
        accumulation=2,
        batch_ramp_start=8,
        batch_ramp_steps=5,
        dtype="bfloat16",
        remat="none",
        mtp_loss_weight=0.3,
        mtp_loss_weight_final=0.1,
        mtp_switch_fraction=0.6,
    ),
    optimizer=OptimizerConfig(
        schedule="wsd", warmup_steps=3, learning_rate=1e-2, moment_dtype="bfloat16"
    ),
    eval=EvalConfig(every_steps=0),
    checkpoint=CheckpointConfig(every_steps=1, keep=0),
    log=LogConfig(every_steps=1, trackers=""),
)


def fresh(layout: state.Layout) -> state.TrainState:
    """Some state: compiling the usual one's creation would take half of the time."""
    rng = np.random.default_rng(0)
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), layout.abstract)
    params = jax.tree.map(
        lambda a: (0.1 * rng.standard_normal(a.shape) + (a.ndim == 1)).astype(np.float32),
        layout.abstract.params,
    )
    return jax.device_put(zeros._replace(params=params), layout.shardings)


class Reading:
    """A loader that writes down what is read."""

    def __init__(self, loader: Loader, read: list):
        self._loader, self._read = loader, read

    def train_rows(self, start: int, count: int):
        self._read.append((start, count))
        return self._loader.train_rows(start, count)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A function that goes on with a folder's run, and the folder of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("resume")
    rng = np.random.default_rng(0)
    for name, words in (("a", ["route", "expert", "token"]), ("b", ["mesh", "shard", "layer"])):
        (folder / name).mkdir()
        for i in range(20):
            (folder / name / f"{i:02d}.txt").write_text(" ".join(rng.choice(words, 60)))
    config = dataclasses.replace(
        EVERYTHING,
        data=DataConfig(path=f"{folder}/a,{folder}/b", weights="0.3,0.7", eval_fraction=0.0),
    )
    validate(config)
    mesh = make_mesh(config, jax.devices()[:2])
    loader = Loader(config, load_tokenizer("bytes"))
    with jax.set_mesh(mesh):
        layout = state.make_layout(config, mesh)
        train_step = CompiledStep(
            step.make_train_step(config, layout, objectives.make(config)),
            mesh,
            {},
        )

    def train(workdir, read=None, **changed) -> state.TrainState:
        """Args:
        read: gets (first row, rows) of every batch.
        changed: options of train, none of which the step depends on.
        """
        checkpoints = Checkpointer(str(workdir / "checkpoints"))
        now = dataclasses.replace(config, train=dataclasses.replace(config.train, **changed))
        rows = loader if read is None else Reading(loader, read)
        with jax.set_mesh(mesh):
            step = checkpoints.latest_step()
            s = fresh(layout) if step is None else resume.restore(checkpoints, layout)[0]
            progress = resume.Continuation(
                checkpoints, str(workdir), now, loader.contents
            ).progress(step)
            begins = (s, progress)
            loop = make_loop(now, str(workdir), mesh, train_step, rows, checkpoints, begins)
            result = loop.run(*begins)
            checkpoints.close()
        return result.state

    (folder / "whole").mkdir()
    return train, folder / "whole", train(folder / "whole")


def figures(workdir) -> list[dict]:
    """Rows of metrics.jsonl without times and memory."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not k.endswith(("_s", "_sec", "_gb", "_device"))}
        for row in rows
    ]


@pytest.mark.slow  # test_train.py resumes the program itself
@pytest.mark.parametrize("at", [1, 3, 7, 11])
def test_any_step_with_everything(whole, at, tmp_path):
    train, folder, expected = whole
    shutil.copytree(folder, tmp_path / "run")
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        if int(checkpoint.name) > at:
            shutil.rmtree(checkpoint)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as f:
        f.write('{"step": 12, "lo')  # a row that the kill cut short
    assert same(train(tmp_path / "run"), expected)
    rows = figures(tmp_path / "run")
    assert rows == figures(folder)
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, 13))
    assert len({r["lr"] for r in rows}) > 4


@pytest.mark.slow
def test_another_batch_size_goes_on_with_the_next_row(whole, tmp_path):
    """Twice, the second time from a checkpoint that the first wrote.

    Micro-batches stay as large, so that nothing is compiled.
    """
    train, folder, _ = whole
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copytree(folder / "checkpoints" / "3", tmp_path / "run" / "checkpoints" / "3")
    ramp = [8, 8, 8]  # 8, 9.6 and 11.2 sequences, in whole micro-batches of 8
    read = []
    train(
        tmp_path / "run",
        read,
        batch_size=8,
        accumulation=1,
        batch_ramp_start=0,
        batch_ramp_steps=0,
        steps=5,
    )
    assert read == [(sum(ramp), 8), (sum(ramp) + 8, 8)]
    read = []
    train(tmp_path / "run", read, steps=8)  # the ramp again: its steps are those of the run
    assert read == [(40, 16), (56, 16), (72, 16)]
    extra = Checkpointer(str(tmp_path / "run" / "checkpoints"), read_only=True).read_extra(8)
    assert [
        (s["first_step"], s["first_row"], s["options"]["train"]["batch_size"])
        for s in extra["data"]
    ] == [(0, 0, 16), (3, 24, 8), (5, 40, 16)]
    assert [r["step"] for r in figures(tmp_path / "run") if "loss" in r] == [4, 5, 6, 7, 8]


def go_on(t: Trainer, checkpoints: Checkpointer, steps: int):
    with jax.set_mesh(t.mesh):
        s, _ = resume.restore(checkpoints, t.layout)
    return t.run(s, steps, int(s.step))


@pytest.mark.slow
def test_any_step_with_muon_and_compressed_gradients(tmp_path):
    """Restored after every one of five steps; the residual of compressed gradients with it."""
    config = config_of(dataclasses.replace(ADAMW, name="muon"), MeshConfig(data=2, fsdp=1))
    t = trainer(
        dataclasses.replace(
            config,
            sharding=ShardingConfig("hybrid_shard", min_weight_size=0, gradient_compression="int8"),
        )
    )
    with jax.set_mesh(t.mesh):
        s = fresh(t.layout)
        for at in range(1, 6):
            s, _ = t.run(s, 1, at - 1)
            checkpoints = Checkpointer(str(tmp_path / str(at)))
            checkpoints.save(at, state.to_tree(s), {})
            checkpoints.wait()
    expected, metrics = t.run(s, 2, 5)
    for at in range(1, 6):
        again, same_metrics = go_on(t, Checkpointer(str(tmp_path / str(at))), 7 - at)
        assert same(again, expected) and same(same_metrics[-2:], metrics)


SLOW = OptimizerConfig(learning_rate=1e-3, warmup_steps=20)  # see tests/invariance.py


def of_mesh(strategy: str = "full_shard", dispatch: str = "all_to_all", **mesh: int) -> Config:
    config = config_of(SLOW, MeshConfig(**{"fsdp": 1} | mesh))
    return dataclasses.replace(
        config,
        sharding=ShardingConfig(strategy, min_weight_size=0),
        moe=MoeConfig(dispatch=dispatch),
    )


MOVES = {
    "8 devices to 4": (of_mesh(fsdp=8), of_mesh(fsdp=4)),
    "full_shard to hybrid_shard": (of_mesh(fsdp=8), of_mesh("hybrid_shard", data=2, fsdp=4)),
    "1 device to 8": (of_mesh(), of_mesh(fsdp=8)),
    "4x2 to 2x4, all_to_all to ring": (
        of_mesh(fsdp=4, expert=2),
        of_mesh(dispatch="ring", fsdp=2, expert=4),
    ),
}


@functools.cache
def first_ten(config: Config, folder) -> tuple[Checkpointer, np.ndarray]:
    """A checkpoint after ten steps, and the losses of 20 that are not interrupted."""
    t = trainer(config)
    with jax.set_mesh(t.mesh):
        s, before = t.run(t.start(), 10)
        checkpoints = Checkpointer(str(folder / str(len(list(folder.iterdir())))))
        checkpoints.save(10, state.to_tree(s), {})
        checkpoints.wait()
    _, after = t.run(s, 10, 10)
    return checkpoints, losses_of(before + after)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("moves")


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.slow
def test_another_mesh(move, shared):
    """20 steps, the second half on another mesh: within 1e-5, well above what other orders of sums do."""
    there, here = MOVES[move]
    checkpoints, expected = first_ten(there, shared)
    _, metrics = go_on(trainer(here), checkpoints, 10)
    np.testing.assert_allclose(losses_of(metrics), expected[10:], rtol=1e-5)
    assert expected[-1] < expected[0] - 0.01 and losses_of(metrics)[-1] != expected[9]
