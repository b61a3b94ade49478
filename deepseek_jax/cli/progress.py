"""A progress bar that shows up only when the work takes long enough to be worth one."""

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

PATIENCE = 1.0  # seconds of silence before a bar appears


class Bar:
    """Progress through `total` bytes, on stderr, as a context manager; does nothing when `show` is False."""

    def __init__(self, title: str, total: float, show: bool):
        self._title, self._total, self._show = title, total, show
        self._done, self._started, self._bar, self._task = 0.0, time.monotonic(), None, None

    def advance(self, count: float) -> None:
        self._done += count
        if not self._show:
            return
        if self._bar is None:
            if time.monotonic() - self._started < PATIENCE:
                return
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total)
        self._bar.update(self._task, completed=min(self._done, self._total))

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()
