"""Evaluates the checkpoints of a run as they appear, beside the process that trains: a row each in a file.

The run's folder is read and never written to, but for the file of rows; nothing in it is locked. What the
file has is not evaluated again, so that a watcher which was killed goes on where it was.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from deepseek_jax.checkpoint import integrity
from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config.configdict import from_config_dict
from deepseek_jax.config.options import Config
from deepseek_jax.data import hub_cache
from deepseek_jax.data.row_file import RowFile
from deepseek_jax.errors import UserError
from deepseek_jax.hf import provenance
from deepseek_jax.train import workdir as workdirs

ROWS = "evaluations.jsonl"  # in RUN
Row = dict[str, Any]
# (folder of a model or run, step of its checkpoint or None) -> figures
Measure = Callable[[str, int | None], Row]


class Watch(NamedTuple):
    """What is watched, and how.

    Attributes:
      run: a run's workdir.
      interval: seconds from one look to the next.
      timeout: seconds without a new checkpoint after which it ends; 0: it waits as long as the run takes.
      measure: a model's figures.
      measured: what they are of, by option; every row says it.
      tell: is given every row.
    """

    run: str
    interval: float
    timeout: float
    measure: Measure
    measured: Mapping[str, Any]
    tell: Callable[[Row], None]

    def __call__(self, rows: RowFile) -> None:
        """Evaluates what is there and what comes, oldest first, until the last step of the run.

        Args:
          rows: where results go; those that it has are not made again.

        Raises:
          UserError: it holds rows of other figures; the run's folder or a model cannot be read.
        """
        done = self._done(rows)
        waited = _Clock(self.timeout)
        while not os.path.isfile(os.path.join(self.run, "config.json")):
            if not waited.rest(self.interval, f"waiting        for {self.run}/config.json"):
                return
        if 0 not in done:
            self._baseline(rows)
        passed: set[int] = set()  # steps that cannot be evaluated
        while True:
            config = from_config_dict(workdirs.read_config(self.run))
            new = [s for s in _steps(self.run, config) if s not in done | passed]
            if new:
                waited.begin()
                kept = self._checkpoint(rows, config, new[0])
                (done if kept else passed).add(new[0])
                continue
            if max(done | passed, default=0) >= config.train.steps:
                _say(f"done           the run has come to its last step, {config.train.steps}")
                return
            if not waited.rest(
                self.interval, f"waiting        for a checkpoint after {self.run}'s"
            ):
                return

    def _done(self, rows: RowFile) -> set[int]:
        done = set()
        for number, row in enumerate(rows.rows(), 1):
            if row.get("measured") != dict(self.measured):
                raise UserError(
                    f"--output={rows.path} holds rows of other figures, {row.get('measured')} and not "
                    f"{dict(self.measured)}. Name another --output."
                )
            if type(step := row.get("step")) is not int:
                raise UserError(
                    f"--output={rows.path}: line {number} has the step {step!r}, which is no number. Remove "
                    "that line, or name another file."
                )
            done.add(step)
        return done

    def _baseline(self, rows: RowFile) -> None:
        config = from_config_dict(workdirs.read_config(self.run))
        folder = baseline(self.run, config)
        if not folder:
            _say(
                "baseline       none: the run began with random weights, or they are not there any more"
            )
            return
        self._write(rows, 0, folder, self.measure(folder, None))

    def _checkpoint(self, rows: RowFile, config: Config, step: int) -> bool:
        """Evaluates a checkpoint; False, after a line, for one that is gone or damaged."""
        try:
            figures = self.measure(self.run, step)
        except Exception as e:
            if step not in _steps(self.run, config):
                # checkpoint.keep: the run goes on faster than it is evaluated
                _say(f"step {step:<10}skipped: it was deleted before it was read")
                return False
            path = os.path.join(workdirs.checkpoints(self.run, config), str(step))
            if os.path.isdir(path) and (verdict := integrity.inspect(path)).bad:
                _say(f"step {step:<10}skipped: it is damaged ({verdict.line()})")
                return False
            raise e
        self._write(rows, step, self.run, figures)
        return True

    def _write(self, rows: RowFile, step: int, model: str, figures: Row) -> None:
        row = {"step": step, "model": model, **figures, "measured": dict(self.measured)}
        rows.append([_finite(row)])
        self.tell(row)


def baseline(run: str, config: Config) -> str:
    """The folder of the weights that a run began with; "" of random ones, or where it is gone."""
    if config.init_from:
        folder = hub_cache.folder_of(os.path.expanduser(config.init_from))
        if os.path.isfile(os.path.join(folder, "config.json")):
            return folder
    return os.path.join(run, provenance.FOLDER) if provenance.has_weights(run) else ""


class _Clock:
    """Time without anything new."""

    def __init__(self, timeout: float):
        self._timeout = timeout
        self._said = ""
        self.begin()

    def begin(self) -> None:
        self._last = time.monotonic()
        self._said = ""

    def rest(self, seconds: float, what: str) -> bool:
        """Sleeps, after a line the first time; False, after a line, at the timeout."""
        waited = time.monotonic() - self._last
        if self._timeout and waited >= self._timeout:
            _say(
                f"timeout        nothing new for {waited:.0f} s (--watch-timeout={self._timeout:g})"
            )
            return False
        if self._said != what:
            _say(what)
            self._said = what
        left = self._timeout - waited if self._timeout else seconds
        time.sleep(max(0.0, min(seconds, left)))
        return True


def _steps(run: str, config: Config) -> list[int]:
    """Steps that have a whole checkpoint now, in order."""
    folder = workdirs.checkpoints(run, config)
    if "://" not in folder and not os.path.isdir(folder):
        return []
    return Checkpointer(folder, read_only=True, options=config.checkpoint, warn=_say).steps()


def _finite(value: Any) -> Any:
    """A row of JSON: None in place of numbers that are not finite, as after a diverged step."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_finite(v) for v in value]
    return value


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
