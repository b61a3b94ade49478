"""The loop around the compiled step: batches in, metrics out.

Between steps it evaluates, saves checkpoints, hears signals, and decides about bad numbers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.cluster.signals import Stopper
from deepseek_jax.config.options import Config
from deepseek_jax.errors import BadNumbers, ExitCode, stopped_by
from deepseek_jax.run import passes
from deepseek_jax.run.batches import Batch, Batches
from deepseek_jax.run.profile import NoProfiler, Profiler
from deepseek_jax.run.progress import Progress
from deepseek_jax.run.report import Report
from deepseek_jax.run.watchdog import Watchdog
from deepseek_jax.train.state import TrainState, saved, to_tree
from deepseek_jax.train.step import StepMetrics


class Result(NamedTuple):
    """How a run ended. Attributes:
    state: after the last step.
    step: steps that are finished, of this start and those before it.
    losses: {step: loss} of the steps that were logged, of this start only.
    evaluation: the last held-out figures; {} without.
    stopped_by: the signal that ended the run early, or None.
    checkpoint: the folder that holds `state`.
    sample: text that the model wrote at the end, "" if none was asked for.
    """

    state: TrainState
    step: int
    losses: dict[int, float]
    evaluation: dict[str, Any]
    stopped_by: int | None
    checkpoint: str
    sample: str = ""

    @property
    def exit_code(self) -> int:
        return ExitCode.DONE if self.stopped_by is None else stopped_by(self.stopped_by)


@dataclasses.dataclass
class Loop:
    """The loop of a run, `Loop(...).run(state, progress)`.

    Attributes:
      workdir: for messages.
      step: the compiled train step, (state, batch) -> (state, metrics).
      batches: where its batches come from.
      evaluate: makes held-out figures of a state; {} where there are none.
      checkpointer: of the run.
      report: is told of every step.
      restore: reads the newest good checkpoint, or makes the first state where there is none;
        without it a run is not rolled back.
      last: the step after which it ends; None: the last of the run. Stages of a run end before.
      rows_of_pass: of the training data, for what is done after passes over them.
      profiler, stopper, watchdog: as they are by default, they do nothing.
    """

    config: Config
    workdir: str
    step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    batches: Batches
    evaluate: Callable[[TrainState, Watchdog], dict[str, Any]]
    checkpointer: Checkpointer
    report: Report
    restore: Callable[[], tuple[TrainState, Progress]] | None = None
    last: int | None = None
    rows_of_pass: int = 0
    profiler: Profiler | NoProfiler = dataclasses.field(default_factory=NoProfiler)
    stopper: Stopper = dataclasses.field(default_factory=Stopper)
    watchdog: Watchdog = dataclasses.field(default_factory=lambda: Watchdog(0))
    _progress: Progress = dataclasses.field(default=Progress(), init=False)

    def run(self, state: TrainState, progress: Progress) -> Result:
        """Trains from state.step to `last`, or until a signal.

        Args:
          state: is donated to the first step.
          progress: up to state.step.

        Returns:
          The last state, of which a checkpoint is on disk.

        Raises:
          BadNumbers: after config.train.max_bad_steps skipped updates in a row, and
            config.train.max_rollbacks rollbacks if they are asked for.
          SaveFailed: the last checkpoint could not be written.
        """
        if not progress.history.stretches:
            progress = progress.resumed(int(state.step), self.config, None)
        try:
            while True:
                try:
                    return self._train(state, progress)
                except BadNumbers as bad:
                    # Frees the state, which the traceback holds too, before another one is read.
                    del state
                    state, progress = self._roll_back(bad.with_traceback(None))
        finally:
            self.batches.close()
            self.watchdog.close()
            self.profiler.close()
            self.report.close()

    def _train(self, state: TrainState, progress: Progress) -> Result:
        last = self.config.train.steps if self.last is None else self.last
        step = int(state.step)
        self._progress = progress
        self.batches.begin(progress)
        evaluation: dict[str, Any] = {}
        stopping = None
        # Metrics of the step before are read while the devices work on the next one.
        pending: tuple[int, StepMetrics] | None = None
        self._profile(step, state)
        while step < last and not stopping:
            state, step_metrics = self.step(state, self.batches.batch(step))
            step += 1
            if pending:
                self._finished(*pending)
            pending = (step, step_metrics)
            stopping = self.stopper.after(step)
            saving = self._save_is_due(step)
            evaluating = step == last or self._evaluation_is_due(step)
            if not (saving or evaluating or stopping or self.profiler.due(step)):
                continue
            updated = self._finished(*pending)
            pending = None
            self._profile(step, state)
            if evaluating or saving and self.config.checkpoint.keep_best:
                if figures := self.evaluate(state, self.watchdog):
                    evaluation = self.report.evaluation(step, figures)
            # While updates are being skipped the older checkpoints are worth more than this state
            # and must not be deleted for it.
            if step == last or stopping or saving and updated:
                self._save(step, state, evaluation, final=step == last or bool(stopping))
            self.report.clock.restart()
        with self.watchdog.paused():
            self.checkpointer.wait()
        self.stopper.end()
        return Result(
            state=state,
            step=step,
            losses=self.report.losses,
            evaluation=evaluation,
            stopped_by=stopping if step < self.config.train.steps else None,
            checkpoint=self.checkpointer.path(step),
        )

    def _ends_pass(self, every: float, step: int) -> bool:
        return passes.ends_pass(every, self.rows_of_pass, self._progress.history, step)

    def _profile(self, step: int, state: TrainState) -> None:
        if self.profiler.due(step) and (text := self.profiler.turn(step, state)):
            self.report.say(text)

    def _evaluation_is_due(self, step: int) -> bool:
        e = self.config.eval
        by_steps = bool(e.every_steps) and step % e.every_steps == 0
        return by_steps or self._ends_pass(e.every_epochs, step)

    def _save_is_due(self, step: int) -> bool:
        c = self.config.checkpoint
        due = self.checkpointer.due(step, c.every_steps, c.every_minutes)
        return due or self._ends_pass(c.every_epochs, step)

    def _save(self, step: int, state: TrainState, evaluation: dict[str, Any], final: bool) -> None:
        extra = self._progress._replace(tokens_seen=self.report.tokens_seen).to_extra()
        extra["model"] = dataclasses.asdict(self.config.model)
        eval_loss = evaluation.get("eval_loss") if evaluation.get("step") == step else None
        with self.watchdog.paused():
            self.checkpointer.save(
                step, to_tree(saved(state, self.config.lora)), extra, eval_loss, final=final
            )

    def _finished(self, step: int, step_metrics: StepMetrics) -> bool:
        """Logs a finished step; True if its update was made.

        Raises:
          BadNumbers: there were too many updates in a row that were not.
        """
        m = self.report.step(step, step_metrics, self.batches.rows(step - 1))
        self.watchdog.beat(step)
        most = self.config.train.max_bad_steps
        if m.bad_steps < most:
            return not m.bad_steps
        with self.watchdog.paused():
            self.checkpointer.wait()
        good = self.checkpointer.latest_step()
        where = "There is no checkpoint yet."
        if good is not None:
            where = f"The last good checkpoint is step {good} in {self.workdir}/checkpoints."
        raise BadNumbers(
            f"{int(m.bad_steps)} updates in a row had a non-finite loss or gradient, up to step {step} "
            f"(config.train.max_bad_steps={most}). {where} "
            f"Lower config.optimizer.learning_rate, for instance.",
            step,
        )

    def _roll_back(self, bad: BadNumbers) -> tuple[TrainState, Progress]:
        """The newest checkpoint, to go on from with the data that follow those of the bad steps.

        All data since that checkpoint are skipped, not those of the bad steps alone: the weights
        may have gone
        wrong before the numbers did (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1, skip the
        batches before a spike too).

        Raises:
          BadNumbers: rollbacks are not asked for, or there were too many.
        """
        c = self.config.train
        before = self._progress
        if c.on_bad_steps != "rollback" or not self.restore:
            raise bad
        if before.rollbacks >= c.max_rollbacks:
            raise BadNumbers(
                f"{bad} It was rolled back {before.rollbacks} times (config.train.max_rollbacks).",
                bad.step,
            )
        with self.watchdog.paused():
            state, good = self.restore()
        step = int(state.step)
        if not good.history.stretches:
            good = good._replace(history=before.history)
        first = good.history.first_row(step)
        count = before.history.first_row(bad.step) - first
        skipped = before.skipped.without(first, count)
        progress = good._replace(skipped=skipped, rollbacks=before.rollbacks + 1, run=before.run)
        row = {
            "step": step + 1,
            "rollback": progress.rollbacks,
            "rolled_back_from": bad.step,
            # All ranges so far: this rollback may drop the row of the one before it.
            "skipped_rows": [list(w) for w in skipped.skipped],
        }
        left_out = ", ".join(f"{a} to {b - 1}" for a, b in before.skipped.rows(first, count))
        self.report.rolled_back(
            step,
            good.tokens_seen,
            row,
            f"step {bad.step}: {c.max_bad_steps} updates in a row were skipped. Back to step {step}, and on "
            f"without rows {left_out} of the data (rollback {progress.rollbacks} of {c.max_rollbacks})",
        )
        return state, progress
