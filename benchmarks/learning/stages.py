"""A demonstration of several commands, each printed before it runs so that it can be repeated by hand, and
skipped where its result lies in the folder already.
"""

import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks import ROOT
from deepseek_jax.cli.progress import Bar
from deepseek_jax.errors import Failure, UserError

SECONDS, SETTINGS = "seconds.json", "settings.json"


class CommandFailed(Failure):
    """A command has failed, and said why.

    Attributes:
      ended_with: its exit code.
    """

    def __init__(self, message: str, ended_with: int):
        super().__init__(message)
        self.ended_with = ended_with


class Stages:
    """What a demonstration does in its folder.

    Args:
      folder: of all that it makes.
      settings: flags that must not change while it goes on, by name.
    """

    def __init__(self, folder: pathlib.Path, settings: dict[str, Any]):
        self.folder = folder
        self._settings = settings
        self._seconds: dict[str, float] = {}

    def begin(self) -> None:
        """Makes the folder. Raises UserError: it is there, and of other settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / SETTINGS
        if file.exists() and (before := json.loads(file.read_text())) != self._settings:
            flags = " ".join(f"--{name}={value}" for name, value in before.items())
            raise UserError(
                f"--workdir={self.folder} was begun with {flags}. Give these, or name another folder."
            )
        file.write_text(json.dumps(self._settings))
        if (kept := self.folder / SECONDS).exists():
            self._seconds = json.loads(kept.read_text())

    @property
    def minutes(self) -> float:
        """Of all stages, those of earlier starts too."""
        return sum(self._seconds.values()) / 60

    def seconds_of(self, stage: str) -> float:
        return self._seconds.get(stage, 0.0)

    def stage(self, name: str, work: Callable[[], None]) -> None:
        """Does something and adds its seconds to those that it has taken before it was stopped."""
        started, before = time.monotonic(), self._seconds.get(name, 0.0)
        try:
            work()
        finally:
            self._seconds[name] = before + time.monotonic() - started
            (self.folder / SECONDS).write_text(json.dumps(self._seconds))

    def command(self, *words: str, grows: pathlib.Path | None = None, lines: int = 0) -> None:
        """Runs a Python program of the repository, printed first.

        Args:
          grows: a file to which it adds lines: a bar shows how many of `lines`.

        Raises:
          CommandFailed: it has failed, and said why.
        """
        print("$ python " + " ".join(words), file=sys.stderr, flush=True)
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT)
        try:
            if grows is not None:
                watch(process, grows, lines)
            code = process.wait()
        except KeyboardInterrupt:
            code = process.wait()  # it has the signal too, and writes its checkpoint
        if code:
            raise CommandFailed(f"{words[0]} ended with {code}. The same command goes on.", code)


def watch(process: subprocess.Popen, file: pathlib.Path, lines: int) -> None:
    """A bar of the lines in a file, until a process ends."""
    done = 0
    with Bar("answers", lines, True, unit="items") as bar:
        while process.poll() is None:
            found = file.read_bytes().count(b"\n") if file.exists() else 0
            bar.advance(found - done)
            done = found
            time.sleep(0.5)


def metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    text = (workdir / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
