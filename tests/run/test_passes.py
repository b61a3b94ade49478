"""What is done after passes over the data: at which steps, and that a run that goes on keeps them."""

import dataclasses
import types
from fractions import Fraction
from typing import Any, NamedTuple

import pytest

from deepseek_jax.config.options import CheckpointConfig, Config, EvalConfig, TrainConfig, replaced
from deepseek_jax.errors import UserError
from deepseek_jax.run import passes
from deepseek_jax.run.loop import Loop
from deepseek_jax.run.progress import Progress
from deepseek_jax.train.history import History


def config_of(**train) -> Config:
    return Config(train=TrainConfig(steps=40, **{"batch_size": 8} | train))


def steps_of(every: float, rows: int, history: History, first: int = 1, last: int = 40) -> list:
    return [n for n in range(first, last + 1) if passes.ends_pass(every, rows, history, n)]


@pytest.mark.parametrize("every", [1.0, 2.0, 0.5, 0.3, 0.07])
@pytest.mark.parametrize(
    "train", [{}, dict(batch_ramp_start=2, batch_ramp_steps=9, accumulation=4)], ids=["", "ramp"]
)
def test_the_first_step_after_each_pass(every, train):
    """Against counting the rows of every step; 0.3 is three tenths, and several passes may end in a step."""
    history, rows = History().resumed(0, config_of(**train), None), 37
    expected, read, wanted = [], 0, Fraction(repr(every)) * rows
    for step in range(1, 41):
        read += history.count(step - 1)
        if read >= wanted:
            expected.append(step)
            while read >= wanted:
                wanted += Fraction(repr(every)) * rows
    assert steps_of(every, rows, history) == expected and expected


def test_a_run_that_goes_on_with_another_batch_keeps_its_place_in_the_pass():
    before = config_of()
    history = History().resumed(0, before, None)
    assert steps_of(1.0, 40, history) == [5, 10, 15, 20, 25, 30, 35, 40]
    goes_on = history.resumed(7, config_of(batch_size=12), None)
    # 56 rows, then 12 a step: 80 after 9, 120 after 13
    assert steps_of(1.0, 40, goes_on)[:4] == [5, 9, 13, 16]
    assert not steps_of(0.0, 40, history) and not passes.ends_pass(1.0, 40, history, 0)


def test_they_are_those_that_epochs_end_at():
    config = replaced(replaced(config_of(), "train.steps", 0), "train.epochs", 3.0)
    history, rows = History().resumed(0, config, None), 37
    ends = [passes.first_step_after(history, passes.rows_of(n, rows)) for n in (1.0, 2.0, 3.0)]
    assert ends == [5, 10, 14] == steps_of(1.0, rows, history, last=14)


class State(NamedTuple):
    step: int


class Recorded:
    """Stands for the checkpointer, the report and the batches of a loop."""

    def __init__(self):
        self.saved: list[int] = []
        self.evaluated: list[int] = []
        self.clock = types.SimpleNamespace(restart=lambda: None)
        self.tokens_seen, self.losses = 0, {}

    def due(self, step, every_steps, every_minutes):
        return bool(every_steps) and step % every_steps == 0

    def save(self, step, tree, extra, eval_loss, final):
        self.saved.append(step)

    def evaluation(self, step, figures):
        self.evaluated.append(step)
        return figures | {"step": step}

    def step(self, step, metrics, rows):
        return types.SimpleNamespace(bad_steps=0)

    def path(self, step):
        return str(step)

    def nothing(self, *_: Any, **__: Any) -> None: ...

    wait = close = begin = batch = rows = nothing


def run(config: Config, begin: int, progress: Progress) -> Recorded:
    recorded: Any = Recorded()

    def step(state, batch) -> Any:
        return State(state.step + 1), None

    loop = Loop(
        config=config,
        workdir="",
        step=step,
        batches=recorded,
        evaluate=lambda state, watchdog: {"eval_loss": 1.0},
        checkpointer=recorded,
        report=recorded,
        rows_of_pass=20,
    )
    state: Any = State(begin)
    loop.run(state, progress)
    return recorded


def test_a_loop_saves_and_evaluates_there():
    """8 rows per step, 20 per pass; beside what is done by steps, and the same after a start in between."""
    config = dataclasses.replace(
        config_of(),
        train=TrainConfig(steps=10, batch_size=8),
        checkpoint=CheckpointConfig(every_steps=0, every_epochs=1.0),
        eval=EvalConfig(every_steps=0, every_epochs=0.5),
    )
    progress = Progress().resumed(0, config, None)
    whole = run(config, 0, progress)
    assert whole.saved == [3, 5, 8, 10] and whole.evaluated == [2, 3, 4, 5, 7, 8, 9, 10]
    again = run(config, 4, progress.resumed(4, config, None))
    assert again.saved == [5, 8, 10] and again.evaluated == [5, 7, 8, 9, 10]
    both = dataclasses.replace(config, checkpoint=CheckpointConfig(every_steps=4, every_epochs=2.0))
    assert run(both, 0, progress).saved == [4, 5, 8, 10]
    off = dataclasses.replace(config, checkpoint=CheckpointConfig(0), eval=EvalConfig(0))
    nothing = run(off, 0, progress)
    assert nothing.saved == [10] == nothing.evaluated


def test_a_hold_that_is_longer_than_the_passes_is_refused(tmp_path):
    config = replaced(replaced(config_of(), "train.steps", 0), "train.epochs", 1.0)
    contents: Any = {"tokenizer": "", "sources": [], "weights": []}
    config = replaced(config, "optimizer.warmup_steps", 1)
    held = replaced(config, "optimizer.hold_steps", 3)
    assert passes.with_steps(held, str(tmp_path), 37, contents).train.steps == 5
    held = replaced(config, "optimizer.hold_steps", 5)
    with pytest.raises(UserError, match="hold_steps=5 and a warmup of 1 steps leave nothing"):
        passes.with_steps(held, str(tmp_path), 37, contents)
