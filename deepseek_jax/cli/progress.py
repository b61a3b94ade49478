"""Progress bars: of work that takes long, and of a run's steps."""

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from deepseek_jax.cli.texts import human

PATIENCE = 1.0  # seconds of silence before a bar appears


class TokensColumn(ProgressColumn):
    """How many tokens are done of how many, and how many a second."""

    def render(self, task: Task) -> Text:
        speed = f", {human(task.speed)}/s" if task.speed else ""
        return Text(f"{human(task.completed)} of {human(task.total or 0)} tokens{speed}")


HOW_MUCH: dict[str, Callable[[], tuple[ProgressColumn, ...]]] = {
    "bytes": lambda: (DownloadColumn(), TransferSpeedColumn()),
    "items": lambda: (MofNCompleteColumn(),),
    "tokens": lambda: (TokensColumn(),),
}


class Bar:
    """Progress of a piece of work, on stderr, as a context manager.

    Nothing is shown of work that takes less than a second.

    Args:
      title: what is being done.
      total: how much there is of it.
      show: False for no bar at all.
      unit: what `total` counts.
    """

    def __init__(
        self,
        title: str,
        total: float,
        show: bool,
        unit: Literal["bytes", "items", "tokens"] = "bytes",
    ):
        self._title = title
        self._total = total
        self._show = show
        self._unit = unit
        self._done = 0.0
        self._started = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def advance(self, count: float) -> None:
        self._done += count
        if not self._show:
            return
        if self._bar is None:
            if time.monotonic() - self._started < PATIENCE:
                return
            self._bar = self._start()
        self._bar.update(self._task, completed=min(self._done, self._total))

    def _start(self) -> Progress:
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            *HOW_MUCH[self._unit](),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        bar.start()
        self._task = bar.add_task(self._title, total=self._total)
        return bar

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()


class StepBar:
    """The steps of a run, on stdout: a bar on a terminal, a line per logged step elsewhere.

    A closed pipe or a full disk behind stdout costs what would have been said, never the run.

    Args:
      total, done: steps of the whole run, and those that are finished.
      show: False for nothing at all, in processes other than 0.
    """

    def __init__(self, total: int, done: int, show: bool = True):
        self._total = total
        self._console = Console(file=sys.stdout, quiet=not show, highlight=False)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self._console,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task("compiling", total=total, completed=done)
            self._bar.start()

    def update(self, step: int, text: str, seconds_left: float) -> None:
        """Shows a logged step.

        Args:
          text: its figures.
          seconds_left: until the end of the run.
        """
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.update(self._task, completed=step, description=text)
            return
        left = f"{seconds_left:.0f} s"
        if seconds_left >= 120:
            left = f"{seconds_left / 60:.0f} min"
        self.say(f"step {step:>6}/{self._total}  {text}  {left} left")

    def advance(self, step: int) -> None:
        """A step was finished that is not logged."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def say(self, text: str) -> None:
        """A line above the bar."""
        with contextlib.suppress(OSError, SystemExit):  # rich exits where stdout is a closed pipe
            self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()
