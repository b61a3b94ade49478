"""WORKDIR/processes/NNNNN.json: where each process of a run is, for `top` and `report`."""

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Callable
from typing import Any

from deepseek_jax.errors import UserError

FOLDER = "processes"
SECONDS = 2.0  # between two of a process


class ProcessState:
    """Writes the file of this process. What cannot be written is not missed: metrics.jsonl, on the same disk,
    says so.

    Args:
      workdir: of the run.
      process: number of this one.
      count: of all; files of processes that are no more go.
      memory_gb: asked for what metrics.METRICS means by it, when it is written.
    """

    def __init__(self, workdir: str, process: int, count: int, memory_gb: Callable[[], float]):
        self._folder = os.path.join(workdir, FOLDER)
        self._process = process
        self._memory_gb = memory_gb
        self._said = float("-inf")
        with contextlib.suppress(OSError):
            os.makedirs(self._folder, exist_ok=True)
            if process == 0:
                for number, path in _files(self._folder).items():
                    if number >= count:
                        os.remove(path)

    def write(self, step: int, state: str = "training") -> None:
        """Says where it is, if it has not just done so.

        Args:
          step: finished steps.
          state: "training", or how it ended, which is always written.
        """
        now = time.monotonic()
        if state == "training" and now - self._said < SECONDS:
            return
        self._said = now
        path = os.path.join(self._folder, f"{self._process:05d}.json")
        text = json.dumps(
            {
                "process": self._process,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "state": state,
                "step": step,
                "time": round(time.time(), 3),  # of this host's clock, since 1970
                "memory_gb": round(self._memory_gb(), 3),
            }
        )
        with contextlib.suppress(OSError):
            with open(path + ".tmp", "w", encoding="utf-8") as f:
                f.write(text + "\n")
            os.replace(path + ".tmp", path)


def read(workdir: str) -> list[dict[str, Any]]:
    """What each process has said last, by their numbers; [] where none has.

    Raises:
      UserError: a file is not what `ProcessState` writes.
    """
    found = []
    for _, path in sorted(_files(os.path.join(workdir, FOLDER)).items()):
        try:
            with open(path, encoding="utf-8") as f:
                said = json.load(f)
            said["time"] + said["step"] + said["memory_gb"]  # numbers, all three
            found.append(said | {name: str(said[name]) for name in ("host", "state")})
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise UserError(f"{path} cannot be read ({type(e).__name__}). Delete it.") from e
    return found


def _files(folder: str) -> dict[int, str]:
    """{process: path}"""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return {}
    return {
        int(name[:5]): os.path.join(folder, name)
        for name in names
        if re.fullmatch(r"[0-9]{5}\.json", name)
    }
