"""The folder of a run in Ray's storage: its checkpoints, its metrics, and its files brought to and fro.

`filesystem` is one of pyarrow's, as Ray has it: of a folder that all hosts see, or of a bucket. In a
bucket a run's files lie as they do in a --workdir; the processes work in a folder of their own host, and
write checkpoints straight into the bucket (config.checkpoint.dir).
"""

import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

from deepseek_jax.checkpoint.folder import is_step
from deepseek_jax.checkpoint.manifest import NAME as MANIFEST

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
_NOT_BROUGHT = {CHECKPOINTS, "lock"}
_TAIL = 1 << 20  # bytes of metrics.jsonl that are looked at


class Storage:
    """The folder of one run."""

    def __init__(self, filesystem: Any, folder: str):
        """
        Args:
          filesystem: a pyarrow.fs.FileSystem.
          folder: of the run, as that file system names it.
        """
        self.filesystem = filesystem
        self.folder = folder.rstrip("/")
        self._sent: dict[str, tuple[int, int]] = {}  # what was copied there, with size and time

    def checkpoint(self, step: int) -> str:
        """The folder of a checkpoint."""
        return f"{self.folder}/{CHECKPOINTS}/{step}"

    def steps(self) -> list[int]:
        """The steps that have a whole checkpoint, in order."""
        names = [name for name, kind in self._list(CHECKPOINTS) if kind == "Directory"]
        found = sorted(int(name) for name in names if is_step(name))
        return [step for step in found if self._has(f"{CHECKPOINTS}/{step}/{MANIFEST}")]

    def fetch(self, workdir: str) -> None:
        """Makes a folder of this host what the storage holds of the run, but for the checkpoints.

        The storage is right where they differ: another host may have gone on with the run.
        """
        shutil.rmtree(workdir, ignore_errors=True)
        os.makedirs(workdir)
        for name in self._files(""):
            path = os.path.join(workdir, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with self.filesystem.open_input_stream(f"{self.folder}/{name}") as source:
                with open(path, "wb") as f:
                    shutil.copyfileobj(source, f)
            self._sent[name] = _state(path)

    def send(self, workdir: str) -> None:
        """Copies the files of a run on this host to the storage, those that have changed since."""
        for name in _local_files(workdir):
            path = os.path.join(workdir, name)
            try:
                state = _state(path)
                if self._sent.get(name) == state:
                    continue
                with open(path, "rb") as f:
                    content = f.read(state[0])  # rows that come now are copied the next time
            except FileNotFoundError:
                continue
            self.filesystem.create_dir(os.path.dirname(f"{self.folder}/{name}"), recursive=True)
            with self.filesystem.open_output_stream(f"{self.folder}/{name}") as out:
                out.write(content)
            self._sent[name] = state

    def _files(self, below: str) -> Iterator[str]:
        for name, kind in self._list(below):
            path = f"{below}/{name}" if below else name
            if kind == "Directory" and path not in _NOT_BROUGHT:
                yield from self._files(path)
            elif kind == "File" and _is_brought(path):
                yield path

    def _list(self, below: str) -> list[tuple[str, str]]:
        from pyarrow import fs

        selector = fs.FileSelector(f"{self.folder}/{below}".rstrip("/"), allow_not_found=True)
        return [
            (info.base_name, info.type.name) for info in self.filesystem.get_file_info(selector)
        ]

    def _has(self, name: str) -> bool:
        from pyarrow import fs

        return self.filesystem.get_file_info(f"{self.folder}/{name}").type == fs.FileType.File


def metrics_at(workdir: str, step: int) -> dict[str, Any]:
    """What is reported to Ray with the checkpoint of a step: the last row of metrics.jsonl that has a
    loss, up to that step, with the last evaluation; "step" is the checkpoint's.

    Args:
      workdir: on this host.
    """
    loss: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}
    for row in _last_rows(os.path.join(workdir, METRICS)):
        if row.get("step", 0) <= step:
            if "loss" in row:
                loss = row
            elif "eval_loss" in row:
                evaluation = {k: v for k, v in row.items() if k.startswith("eval")}
    return {k: v for k, v in (evaluation | loss).items() if isinstance(v, (int, float))} | {
        "step": step
    }


def _last_rows(path: str) -> Iterator[dict[str, Any]]:
    try:
        with open(path, "rb") as f:
            f.seek(max(os.path.getsize(path) - _TAIL, 0))
            lines = f.read().split(b"\n")
    except OSError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # the first one may be cut, the last one not finished
            continue
        if isinstance(row, dict):
            yield row


def _local_files(workdir: str) -> Iterator[str]:
    for folder, folders, files in os.walk(workdir):
        below = os.path.relpath(folder, workdir)
        folders[:] = [
            n for n in folders if os.path.normpath(os.path.join(below, n)) not in _NOT_BROUGHT
        ]
        for file in files:
            name = os.path.normpath(os.path.join(below, file))
            if _is_brought(name) and not os.path.islink(os.path.join(folder, file)):
                yield name


def _is_brought(name: str) -> bool:
    file = os.path.basename(name)
    return name not in _NOT_BROUGHT and not file.startswith(".") and not file.endswith(".tmp")


def _state(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns
