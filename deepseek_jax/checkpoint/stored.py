"""Checkpoints of any kind below a folder that a user names: found, checked, opened, described."""

import os
from typing import Any, NamedTuple

from etils import epath

from deepseek_jax.checkpoint import integrity, kinds, manifest
from deepseek_jax.checkpoint.finder import LocalRun
from deepseek_jax.checkpoint.folder import DAMAGED, Folder, is_step
from deepseek_jax.checkpoint.kind import TensorReader
from deepseek_jax.errors import UserError
from deepseek_jax.tensorfile.bounded_json import BadFile

_PROCESS = "process_"  # what the folders of processes begin with, of kind local


class StoredCheckpoint(NamedTuple):
    """A checkpoint on the disk.

    Attributes:
      step: its step; -1 where its folder does not tell.
      name: of its folder.
      paths: its folder STEP/, or those of the processes whose pieces make it up.
    """

    step: int
    name: str
    paths: tuple[epath.Path, ...]

    def check(self) -> integrity.Verdict:
        """Reads all of its files.

        Raises:
          UserError: they are not what was written.
        """
        verdicts = [integrity.inspect(path) for path in self.paths]
        for path, verdict in zip(self.paths, verdicts, strict=True):
            if verdict.newer:
                raise UserError(f"The checkpoint {path} {verdict.newer}. Update this program.")
            if verdict.bad:
                raise UserError(
                    f"The checkpoint {path} is damaged ({verdict.line()}). Name another --step."
                )
        return verdicts[0]

    def open(self) -> TensorReader:
        """Its arrays.

        Raises:
          UserError: a file is not what it must be, or other processes have pieces.
        """
        try:
            reader = kinds.reader(self.paths)
        except BadFile as e:
            raise UserError(f"The checkpoint {self.paths[0]} cannot be read ({e}).") from e
        found = manifest.read(self.paths[0])
        count = len(self.paths)
        if found and found.kind == "local" and found.about.get("processes") != count:
            raise UserError(
                f"{self.paths[0]} holds the pieces of one of {found.about.get('processes')} processes. Put "
                f"the folders of all of them beside each other."
            )
        return reader

    def extra(self) -> dict[str, Any]:
        """What the run saved beside its state."""
        extra = integrity.read_extra(self.paths[0])
        return {key: value for key, value in extra.items() if key != integrity.MARK}

    def describe(self, verdict: integrity.Verdict) -> dict[str, Any]:
        """What `ls` prints of it.

        Args:
          verdict: of the first of its folders.
        """
        found = verdict.manifest
        about = found.about if found else {}
        files = found.files if found else {}
        problems = [f"{file}: {what}" for file, what in verdict.bad]
        if verdict.newer:
            problems.append(f"{manifest.NAME}: {verdict.newer}")
        state = "whole" if verdict.protected else "no checksums"
        return {
            "step": self.step,
            "name": self.name,
            "kind": found.kind if found else self._kind(),
            "bytes": about.get("bytes") or sum(size for size, _ in files.values()),
            "files": len(files) * len(self.paths),
            "mesh": _mesh(about.get("mesh")),
            "devices": about.get("devices"),
            "processes": about.get("processes"),
            "eval_loss": about.get("eval_loss"),
            "time": str(about.get("time", "")),
            "jax": about.get("jax"),
            "state": "damaged" if problems else state,
            "problems": problems,
        }

    def _kind(self) -> str:
        try:
            return kinds.of(self.paths[0]).name
        except BadFile:
            return "?"


def _mesh(mesh: Any) -> str:
    """ "fsdp 2 x expert 4" """
    if not isinstance(mesh, list) or not all(isinstance(m, list) and len(m) == 2 for m in mesh):
        return ""
    return " x ".join(f"{axis} {n}" for axis, n in mesh if n != 1) or "1 device"


def checkpoints_in(directory: str) -> list[StoredCheckpoint]:
    """The checkpoints below a folder, in the order of their steps, those put aside at the end.

    Args:
      directory: a run's workdir, its folder of checkpoints, one STEP folder, or of local checkpoints the
        folder of the run, here or remote.

    Raises:
      UserError: there are none.
    """
    path = epath.Path(directory if "://" in directory else os.path.abspath(directory))
    if not path.is_dir():
        raise UserError(
            f"{directory} is no folder. Name a run's workdir, its folder of checkpoints or one of its steps."
        )
    if (path / manifest.NAME).exists() or (path / "state").is_dir():
        return [_from_step_folder(path)]
    if path.name.startswith(_PROCESS):
        path = path.parent
    if any(p.name.startswith(_PROCESS) for p in path.iterdir()):
        out = _local(path)
    else:
        out = _shared(path / "checkpoints") or _shared(path)
    if not out:
        raise UserError(
            f"{directory} holds no checkpoint. Name a run's workdir, its folder of checkpoints or one of its "
            f"steps."
        )
    return out


def _from_step_folder(path: epath.Path) -> StoredCheckpoint:
    number = path.name.partition(".")[0]
    if not path.parent.name.startswith(_PROCESS):
        return StoredCheckpoint(int(number) if is_step(number) else -1, path.name, (path,))
    top = path.parent.parent
    found = LocalRun(os.fspath(top.parent), top.name, read_only=True).paths(int(number), None)
    return StoredCheckpoint(int(number), path.name, found or (path,))


def _local(path: epath.Path) -> list[StoredCheckpoint]:
    """Those of kind local, from the folder that holds the processes' ones."""
    run = LocalRun(os.fspath(path.parent), path.name, read_only=True)
    out = []
    for step in run.steps():
        some = sorted(p / str(step) for p in path.iterdir() if (p / str(step)).is_dir())
        out.append(StoredCheckpoint(step, str(step), run.paths(step, None) or tuple(some)))
    return out


def _shared(path: epath.Path) -> list[StoredCheckpoint]:
    """Those of other kinds, from the folder that holds the steps."""
    if not path.is_dir():
        return []
    folder = Folder(os.fspath(path), read_only=True)
    whole = [StoredCheckpoint(step, str(step), (folder.at(step),)) for step in folder.steps()]
    aside = [
        StoredCheckpoint(int(name.partition(DAMAGED)[0]), name, (folder.path / name,))
        for name in folder.damaged()
    ]
    return whole + aside


def checkpoint_of(directory: str, step: int | None) -> StoredCheckpoint:
    """The checkpoint of a step; None: the newest.

    Raises:
      UserError: there is none.
    """
    found = checkpoints_in(directory)
    whole = [c for c in found if DAMAGED not in c.name] or found
    if step is None:
        return whole[-1]
    for checkpoint in whole:
        if checkpoint.step == step:
            return checkpoint
    raise UserError(
        f"{directory} holds no checkpoint of step {step}. Name one of these steps: "
        f"{', '.join(str(c.step) for c in whole)}."
    )
