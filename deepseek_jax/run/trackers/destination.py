"""What a destination in a process of its own is given, and what it does. Imports nothing heavy."""

import contextlib
import dataclasses
import json
import os
import secrets
from collections.abc import Callable, Mapping
from typing import Any, Protocol

FOLDER = "trackers"  # of a workdir: the ids of runs, and what the tools' packages print
PROJECT = "deepseek_jax"  # where neither config.log.project nor the tool's environment names one
Say = Callable[[str], None]  # takes a line for the user


@dataclasses.dataclass(frozen=True)
class Run:
    """The run, as a tool sees it.

    Attributes:
      tool: "wandb", as in config.log.trackers.
      workdir: absolute.
      project, name, naming: config.log.project, run_name and names; "" where nothing is set.
      config: all options, by section.
      facts: what else identifies the run, by "group/name": mesh, devices, versions, commit.
      pid: of the training process.
    """

    tool: str
    workdir: str
    project: str
    name: str
    naming: str
    config: Mapping[str, Any]
    facts: Mapping[str, Any]
    pid: int

    @property
    def default_name(self) -> str:
        return os.path.basename(self.workdir) or self.tool

    def project_or(self, variable: str) -> str:
        """config.log.project, or what the tool's environment variable says, or PROJECT."""
        return self.project or os.environ.get(variable) or PROJECT

    def name_or(self, variable: str) -> str:
        """config.log.run_name, or what the tool's environment variable says, or the workdir's."""
        return self.name or os.environ.get(variable) or self.default_name

    def settings(self, separator: str) -> dict[str, Any]:
        """Options and facts in one level: "train/steps", with `separator` between section and name."""
        flat = _flat(self.config, separator)
        return flat | {name.replace("/", separator): value for name, value in self.facts.items()}

    def kept(self, where: str) -> str | None:
        """The id that this run has in the tool, if it has begun there.

        Args:
          where: the server and the project. In another one it is another run.
        """
        with contextlib.suppress(OSError, ValueError, AttributeError):
            with open(self._path, encoding="utf-8") as f:
                written = json.load(f)
            if written.get("where") == where and isinstance(written.get("id"), str):
                return written["id"]
        return None

    def keep(self, where: str, id: str, say: Say) -> None:
        """Writes down the id, whole or not at all, for the next start with this workdir."""
        if self.kept(where) == id:
            return
        try:
            with open(f"{self._path}.tmp", "w", encoding="utf-8") as f:
                json.dump({"where": where, "id": id}, f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(f"{self._path}.tmp", self._path)
        except OSError as e:
            say(
                f"{self._path} cannot be written ({e.strerror}): when the run resumes, it begins anew there"
            )

    @property
    def _path(self) -> str:
        return os.path.join(self.workdir, FOLDER, f"{self.tool}.json")


class Destination(Protocol):
    """One tool. Methods may raise anything, and hang: the training process does not notice.

    It is made with the `Run` and a `Say`, and imports its package in `open`.
    """

    def open(self) -> None:
        """Begins the run, or goes on with it where `Run.kept` knows it. Called again after it raised."""

    def log(self, row: Mapping[str, Any], time: float) -> None:
        """One row, with seconds since the epoch. Steps fall where a run resumes or is rolled back."""

    def close(self, failed: bool) -> None:
        """All is sent before it returns. `failed`: the training process is gone without a word."""


def new_id() -> str:
    return secrets.token_hex(4)


def _flat(tree: Mapping[str, Any], separator: str) -> dict[str, Any]:
    out = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            inner = _flat(value, separator)
            out.update({f"{name}{separator}{key}": leaf for key, leaf in inner.items()})
        else:
            out[name] = value
    return out
