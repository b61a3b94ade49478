"""WORKDIR/starts.jsonl: every start of a run: the step it went on from, its mesh, model, data and what had
changed. metrics.jsonl does not tell: the rows that a start makes again replace those before."""

import contextlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

NAME = "starts.jsonl"
MOST = 1000  # that are kept
DEVICES = 1 << 20  # more in a file are not believed


def add(workdir: str, record: dict[str, Any]) -> None:
    """Adds a start, whole or not at all. What cannot be written is not missed: metrics.jsonl, on the same
    disk, says so.

    Args:
      record: of JSON's types, with "step", the finished steps that it goes on from.
    """
    path = os.path.join(workdir, NAME)
    with contextlib.suppress(OSError):
        kept = [*read(workdir), record][-MOST:]
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            f.writelines(json.dumps(r) + "\n" for r in kept)
        os.replace(path + ".tmp", path)


def read(workdir: str) -> list[dict[str, Any]]:
    """All starts in their order; [] of a run of an earlier version."""
    out = []
    try:
        with open(os.path.join(workdir, NAME), encoding="utf-8", errors="replace") as f:
            for line in f:
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
                    if isinstance(record, dict) and isinstance(record.get("step"), int):
                        out.append(record)
    except OSError:
        return []
    return out


def in_runs(processes: Sequence[int]) -> list[list[int]]:
    """[0, 0, 1, 1] -> [[0, 2], [1, 2]]: as a record has the processes of a mesh's devices."""
    return [[process, len(list(same))] for process, same in itertools.groupby(processes)]


def processes(record: Mapping[str, Any]) -> list[int]:
    """The process of each device of the mesh, in its order; [] where a record does not say."""
    out: list[int] = []
    found = record.get("processes")
    for run in found if isinstance(found, list) else []:
        try:
            process, count = run
        except (TypeError, ValueError):
            return []
        if type(process) is not int or type(count) is not int or len(out) + count > DEVICES:
            return []
        out += [process] * count
    return out
