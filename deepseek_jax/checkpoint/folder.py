"""The folders STEP/ of a run: made under another name, renamed when whole, renamed before they are deleted.

A plain number is a checkpoint that was whole when it got its name; STEP.tmp is being written or deleted, or
was when a process was killed; STEP.damaged was found damaged later and stays for its owner to look at. In a
remote folder (gs://, s3://) nothing is renamed: there a step is whole when it has a manifest, which is
written last and deleted first.
"""

import os
import shutil
import tempfile
import time

import fsspec
from etils import epath

from deepseek_jax.checkpoint import manifest
from deepseek_jax.errors import UserError

_TMP = ".tmp"
_OLD_TMP = ".orbax-checkpoint-tmp"  # of earlier versions
DAMAGED = ".damaged"
_PARTS = {
    "state",
    "extra",
    manifest.NAME,
}  # what a checkpoint, or the beginning of one, consists of


class Folder:
    """One folder of checkpoints, on a disk or remote."""

    def __init__(self, path: str, read_only: bool):
        """Opens the folder, and creates it unless `read_only`.

        Raises:
          UserError: it cannot be created, read or, unless `read_only`, written.
        """
        self.remote = "://" in path
        self.path = epath.Path(path if self.remote else os.path.abspath(path))
        try:
            if self.remote:
                # Other processes write there, and TensorStore does: a listing is never that of before.
                for protocol in ("s3", "gcs"):
                    fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False
                if not read_only:
                    self.path.mkdir(parents=True, exist_ok=True)
                self.steps()
            elif read_only:
                os.listdir(self.path)
            else:
                os.makedirs(os.fspath(self.path), exist_ok=True)
                with tempfile.TemporaryFile(dir=os.fspath(self.path)):
                    pass
        except (OSError, ImportError) as e:
            access, repair = (
                ("read", "holds checkpoints") if read_only else ("written", "you may write to")
            )
            reason = getattr(e, "strerror", None) or (str(e).splitlines() or [type(e).__name__])[0]
            raise UserError(
                f"The checkpoint folder {self.path} cannot be {access} ({reason}). Name a --workdir that "
                f"{repair}."
            ) from e
        # A folder with the name of a step is renamed when it is damaged and deleted when it is old.
        theirs = [] if read_only else [s for s in self.steps() if self._is_foreign(str(s))]
        if theirs:
            raise UserError(
                f"The checkpoint folder {self.path} holds {theirs[0]}, which is no checkpoint. "
                f"Name an empty folder, or move it away."
            )

    def steps(self) -> list[int]:
        """The steps that have a whole checkpoint, in order."""
        found = sorted(int(n) for n in self._names() if is_step(n))
        return (
            [s for s in found if (self.path / str(s) / manifest.NAME).exists()]
            if self.remote
            else found
        )

    def at(self, step: int) -> epath.Path:
        """Where a whole checkpoint of this step is, or would be."""
        return self.path / str(step)

    def draft(self, step: int) -> epath.Path:
        """Where a checkpoint of this step is written."""
        return self.at(step) if self.remote else self.path / f"{step}{_TMP}"

    def begin(self, step: int) -> None:
        """Makes an empty draft."""
        self.discard(step)
        self.draft(step).mkdir(parents=True)

    def commit(self, step: int) -> None:
        """Gives a draft, which is on the disk with its manifest, its name."""
        if not self.remote:
            os.rename(self.draft(step), self.at(step))
            manifest.sync_folder(self.path)

    def discard(self, step: int) -> None:
        """Removes a draft."""
        draft = self.draft(step)
        if self.remote:
            if draft.exists():
                draft.rmtree()
        else:
            _remove(draft)

    def delete(self, step: int) -> None:
        """Deletes a checkpoint, in an order that never leaves a part of it under its name."""
        if self.remote:
            (self.at(step) / manifest.NAME).unlink(missing_ok=True)
            self.at(step).rmtree()
            return
        trash = self.path / f"{step}.old{_TMP}"
        _remove(trash)
        os.rename(self.at(step), trash)
        _remove(trash)

    def put_aside(self, step: int) -> str:
        """Renames a damaged checkpoint, so that it no longer counts; returns its new name."""
        for name in (f"{step}{DAMAGED}{end}" for end in ("", *(f".{i}" for i in range(1, 10000)))):
            if not (self.path / name).exists():
                break
        if self.remote:
            _move(os.fspath(self.at(step)), os.fspath(self.path / name))
        else:
            os.rename(self.at(step), self.path / name)
            manifest.sync_folder(self.path)
        return name

    def damaged(self) -> list[str]:
        """Names of the checkpoints that were put aside."""
        return sorted(n for n in self._names() if is_step(n.partition(DAMAGED)[0]) and DAMAGED in n)

    def _names(self) -> list[str]:
        if not self.remote:
            return os.listdir(self.path)
        # In a bucket a folder is there when something is in it.
        return [p.name for p in self.path.iterdir()] if self.path.exists() else []

    def _is_foreign(self, name: str) -> bool:
        """Whether this is surely no checkpoint: a file, or a folder with other things in it."""
        if self.remote:
            return False
        path = os.path.join(os.fspath(self.path), name)
        inside = os.listdir(path) if os.path.isdir(path) else ["a file"]
        return bool(inside) and _PARTS.isdisjoint(inside)

    def clean(self) -> None:
        """Deletes what killed saves and deletions left, which would fill the disk.

        Only the writer of this folder may call it: what another one is writing would go too.
        """
        for name in [] if self.remote else os.listdir(self.path):
            ours = (name.endswith(_TMP) or _OLD_TMP in name) and is_step(name.partition(".")[0])
            if ours and not self._is_foreign(name):
                _remove(self.path / name)


def _remove(folder: epath.Path) -> None:
    """Deletes a folder, if it can be. After a failed save TensorStore's threads still end what they had
    begun: a file that one of them made since the folder was listed would let it stay, on a full disk.
    """
    for _ in range(10):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def _move(old: str, new: str) -> None:
    """Moves a folder of a bucket, copied by its server. fsspec's own fails where folders are no objects."""
    files, old = fsspec.core.url_to_fs(old)
    _, new = fsspec.core.url_to_fs(new)
    for file in files.find(old):
        files.cp_file(file, new + file.removeprefix(old))
    files.rm(old, recursive=True)


def steps_in(path: str) -> list[int]:
    """The steps of the checkpoints in a folder, here or remote, that need not exist."""
    try:
        return Folder(path, read_only=True).steps()
    except UserError:
        return []


def is_step(name: str) -> bool:
    """Whether this is the name of a whole checkpoint."""
    return name.isascii() and name.isdigit() and len(name) < 19


def keepers(
    steps: list[int], losses: dict[int, float], keep: int, keep_best: int, keep_every: int
) -> set[int]:
    """The steps that stay.

    Args:
      steps: that have a checkpoint.
      losses: the held-out loss of those that have one.
      keep: so many of the newest stay; 0: all.
      keep_best: so many with the lowest loss stay.
      keep_every: multiples of this stay; 0: none.
    """
    if not keep:
        return set(steps)
    best = sorted((s for s in steps if s in losses), key=lambda s: (losses[s], -s))[:keep_best]
    return {
        *sorted(steps)[-keep:],
        *best,
        *(s for s in steps if keep_every and s % keep_every == 0),
    }
