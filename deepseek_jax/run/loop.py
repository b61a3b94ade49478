"""The training loop around the jitted step: data in, metrics out, evaluation, checkpoints, signals, and what to do about bad numbers."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.cluster.signals import Stopper
from deepseek_jax.config.options import Config
from deepseek_jax.data.contents import Contents
from deepseek_jax.data.loader import Loader, Prefetcher
from deepseek_jax.data.windows import Skipping, Window, Windows
from deepseek_jax.model.count import Count
from deepseek_jax.objectives.base import Objective
from deepseek_jax.run.profile import Profiler
from deepseek_jax.run.report import Report
from deepseek_jax.run.watchdog import Watchdog
from deepseek_jax.train.batch import put_batch
from deepseek_jax.train.history import History
from deepseek_jax.train.state import TrainState, to_tree


class BadNumbers(Exception):
    """Too many updates in a row were skipped for a non-finite loss or gradient."""

    def __init__(self, text: str, step: int):
        super().__init__(text)
        self.step = step  # the last of them


class Result(NamedTuple):
    state: TrainState
    step: int
    eval: dict[str, Any]
    stopped_by: int | None  # the signal that ended the run early


class Progress(NamedTuple):
    """What a checkpoint holds besides the state: its `extra`."""

    tokens_seen: int = 0  # tokens that were not padding, in all steps so far
    skipped: Windows = Windows()  # rows of the data that rollbacks have left out
    rollbacks: int = 0
    history: History = History()  # which rows every step reads
    run: str = ""  # workdir.identity

    def to_extra(self) -> dict[str, Any]:
        out = {"tokens_seen": self.tokens_seen, "data": self.history.to_json(), "run": self.run}
        if self.rollbacks:
            out |= {
                "skipped_rows": [list(w) for w in self.skipped.skipped],
                "rollbacks": self.rollbacks,
            }
        return out

    @classmethod
    def of_extra(cls, extra: dict[str, Any]) -> "Progress":
        return cls(
            extra["tokens_seen"],
            Windows.of(extra.get("skipped_rows", ())),
            extra.get("rollbacks", 0),
            History.of_json(extra.get("data", ())),
            extra.get("run") or "",
        )

    def resumed(
        self, step: int, config: Config, contents: Contents | None, earlier: History | None = None
    ) -> "Progress":
        """For going on after `step` steps with these options and data; as History.resumed."""
        history = self.history.resumed(step, config, contents, earlier)
        skipped = Windows() if history.begins_order(step) else self.skipped
        return self._replace(history=history, skipped=skipped)


class Evaluator:
    """The objective's figures on held-out text."""

    def __init__(
        self,
        config: Config,
        mesh: jax.sharding.Mesh,
        loader: Loader,
        eval_step: Callable,
        objective: Objective,
        frozen: Any = None,
    ):
        """`eval_step`: train/step.py make_eval_step. `frozen`: its last argument."""
        self._loader = loader
        self._mesh = mesh
        self._step = jax.jit(eval_step)
        self._micro = config.micro_batch
        self._objective = objective
        self._frozen = frozen
        self._rows = min(loader.num_eval_rows, config.eval.batches * config.train.batch_size)
        self._bytes = loader.tokenizer.token_bytes
        self._compiled = False

    def __call__(self, state: TrainState, watchdog: Watchdog | None = None) -> dict[str, Any]:
        """{} without held-out text. `watchdog` hears of every batch but the first, which compiles."""
        sums = {"targets": 0.0, "text_bytes": 0.0}
        for start in range(0, self._rows, self._micro):
            rows = self._loader.eval_rows(start, self._micro)
            batch = jax.tree.map(lambda a: a[0], put_batch(rows, self._micro, self._mesh))
            with watchdog.paused() if watchdog and not self._compiled else contextlib.nullcontext():
                found = self._step(state.params, state.bias, batch, self._frozen)
                for name, value in found.items():
                    sums[name] = sums.get(name, 0.0) + float(value)
            self._compiled = True
            if watchdog:
                watchdog.beat(int(state.step))
            scored = rows["targets"][rows["targets"] >= 0]
            sums["targets"] += scored.size
            sums["text_bytes"] += self._bytes[scored].sum() if self._bytes is not None else 0
        return self._objective.figures(sums) if sums["targets"] else {}


def batches(
    config: Config,
    loader: Loader,
    mesh: jax.sharding.Mesh,
    first_step: int,
    progress: Progress = Progress(),
) -> Iterator[dict[str, jax.Array]]:
    """The batches of the steps from `first_step` on, read ahead by a thread. A pure function of (step,
    history, skipped windows).
    """
    history = (
        progress.history
        if progress.history.stretches
        else History().resumed(first_step, config, None)
    )
    requests = (
        (history.first_row(s), history.count(s)) for s in range(first_step, config.train.steps)
    )
    with Prefetcher(Skipping(loader, progress.skipped), requests) as rows:
        for r in rows:
            yield put_batch(r, config.micro_batch, mesh)


def run(
    config: Config,
    workdir: str,
    mesh: jax.sharding.Mesh,
    state: TrainState,
    train_step: Callable,
    evaluate: Evaluator,
    loader: Loader,
    checkpointer: Checkpointer,
    count: Count,
    progress: Progress = Progress(),
    profiler: Profiler | None = None,
    first_step: Callable[[], str] | None = None,
    restore: Callable[[], tuple[TrainState, Progress]] | None = None,
    stopper: Stopper | None = None,
    watchdog: Watchdog | None = None,
    frozen: Any = None,
) -> Result:
    """Trains from state.step to config.train.steps.

    Args:
      train_step: the jitted step. evaluate: (state, watchdog) -> held-out figures.
      checkpointer: of this workdir. count: sizes for the FLOP figures. progress: up to state.step.
      first_step: makes the line that is said after the first step.
      restore: reads the newest checkpoint, or makes the first state where there is none; only for config.train.on_bad_steps=rollback.
      stopper: says when a signal asks to stop. watchdog: is told of every step.
      frozen: weights of the objective's frozen model, an argument of every step.

    Returns:
      The last state and why the loop ended. A checkpoint of that state is on disk.

    Raises:
      BadNumbers: after config.train.max_bad_steps skipped updates in a row, and config.train.max_rollbacks rollbacks if they are asked for.
    """
    if not progress.history.stretches:
        progress = progress.resumed(int(state.step), config, getattr(loader, "contents", None))
    report = Report(config, workdir, int(state.step), progress.tokens_seen, count, first_step)
    loop = Loop(
        config,
        workdir,
        mesh,
        train_step,
        evaluate,
        loader,
        checkpointer,
        profiler,
        restore,
        stopper or Stopper(),
        watchdog or Watchdog(0),
        report,
        frozen,
    )
    try:
        while True:
            try:
                return loop.train(state, progress)
            except BadNumbers as bad:
                state = None  # before another one is read
                state, progress = loop.roll_back(bad)
    finally:
        loop.watchdog.close()
        if profiler:
            profiler.close()
        loop.report.close()


@dataclasses.dataclass
class Loop:
    """One call of `run`, whose arguments these are."""

    config: Config
    workdir: str
    mesh: jax.sharding.Mesh
    step: Callable
    evaluate: Evaluator
    loader: Loader
    checkpointer: Checkpointer
    profiler: Profiler | None
    restore: Callable[[], tuple[TrainState, Progress]] | None
    stopper: Stopper
    watchdog: Watchdog
    report: Report
    frozen: Any = None
    progress: Progress = Progress()

    def rows(self, step: int) -> list[Window]:
        """Where the data of the step that ends with `step` finished ones are in the global order."""
        history = self.progress.history
        return self.progress.skipped.rows(history.first_row(step - 1), history.count(step - 1))

    def train(self, state: TrainState, progress: Progress) -> Result:
        """Until the last step, a signal, or too many skipped updates."""
        c, last, profiler = self.config, self.config.train.steps, self.profiler
        self.progress, step = progress, int(state.step)
        eval_row: dict[str, Any] = {}
        stopped_by = None
        pending = None  # metrics of the step before, read while the device works on the next one

        def profile(done: int) -> None:
            if text := profiler.turn(done, state):
                self.report.say(text)

        if profiler and profiler.due(step):
            profile(step)
        with contextlib.closing(batches(c, self.loader, self.mesh, step, progress)) as data:
            for batch in data:
                state, device_metrics = self.step(state, batch, self.frozen)
                step += 1
                if pending:
                    self._finished(*pending)
                pending = (step, device_metrics)
                stopped_by = self.stopper.after(step)
                at = lambda every: every and step % every == 0
                saving = self.checkpointer.due(
                    step, c.checkpoint.every_steps, c.checkpoint.every_minutes
                )
                pause = (
                    step == last
                    or saving
                    or at(c.eval.every_steps)
                    or stopped_by
                    or profiler
                    and profiler.due(step)
                )
                if not pause:
                    continue
                updated = self._finished(*pending)
                pending = None
                if profiler and profiler.due(step):
                    profile(step)
                held_out = (
                    step == last or at(c.eval.every_steps) or saving and c.checkpoint.keep_best
                )
                if held_out and (figures := self.evaluate(state, self.watchdog)):
                    eval_row = self.report.evaluation(step, figures)
                # While updates are being skipped the older checkpoints are worth more than this state: they must not make room for it.
                if step == last or stopped_by or saving and updated:
                    extra = self.progress._replace(tokens_seen=self.report.tokens_seen).to_extra()
                    extra["model"] = dataclasses.asdict(c.model)
                    eval_loss = eval_row.get("eval_loss") if eval_row.get("step") == step else None
                    with self.watchdog.paused():
                        self.checkpointer.save(
                            step,
                            to_tree(state),
                            extra,
                            eval_loss,
                            final=step == last or bool(stopped_by),
                        )
                if stopped_by:
                    break
                self.report.clock.restart()
        with self.watchdog.paused():
            self.checkpointer.wait()
        self.stopper.end()
        return Result(state, step, eval_row, stopped_by if step < last else None)

    def _finished(self, done: int, device_metrics: Any) -> bool:
        """Logs a finished step; True if its update was made."""
        c = self.config
        m = self.report.step(done, device_metrics, self.rows(done))
        self.watchdog.beat(done)
        if m.bad_steps >= c.train.max_bad_steps:
            with self.watchdog.paused():
                self.checkpointer.wait()
            good = self.checkpointer.latest_step()
            where = (
                f"The last good checkpoint is step {good} in {self.workdir}/checkpoints."
                if good is not None
                else "There is no checkpoint yet."
            )
            raise BadNumbers(
                f"{int(m.bad_steps)} updates in a row had a non-finite loss or gradient, up to step {done} "
                f"(config.train.max_bad_steps={c.train.max_bad_steps}). {where} Lower config.optimizer.learning_rate, for instance.",
                done,
            )
        return not m.bad_steps

    def roll_back(self, bad: BadNumbers) -> tuple[TrainState, Progress]:
        """The newest checkpoint, to go on from with the data that follow the bad steps'.

        All data since that checkpoint are skipped, not those of the bad steps alone: the weights may have gone wrong before the numbers did
        (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1, skip the batches before a spike too).

        Raises:
          BadNumbers: rollbacks are not asked for, or there were too many.
        """
        c, before = self.config, self.progress
        if c.train.on_bad_steps != "rollback" or not self.restore:
            raise bad
        if before.rollbacks >= c.train.max_rollbacks:
            raise BadNumbers(
                f"{bad} It was rolled back {before.rollbacks} times (config.train.max_rollbacks).",
                bad.step,
            )
        with self.watchdog.paused():
            state, good = self.restore()
        if not good.history.stretches:
            good = good._replace(history=before.history)
        first = good.history.first_row(int(state.step))
        count = before.history.first_row(bad.step) - first
        skipped = before.skipped.without(first, count)
        progress = Progress(
            good.tokens_seen, skipped, before.rollbacks + 1, good.history, before.run
        )
        # All windows so far: this rollback may drop the row of the one before it.
        row = {
            "step": int(state.step) + 1,
            "rollback": progress.rollbacks,
            "rolled_back_from": bad.step,
            "skipped_rows": [list(w) for w in skipped.skipped],
        }
        text = ", ".join(f"{a} to {b - 1}" for a, b in before.skipped.rows(first, count))
        self.report.rolled_back(
            int(state.step),
            good.tokens_seen,
            row,
            f"step {bad.step}: {c.train.max_bad_steps} updates in a row were skipped. Back to step "
            f"{int(state.step)}, and on without rows {text} of the data (rollback {progress.rollbacks} of {c.train.max_rollbacks})",
        )
        return state, progress
