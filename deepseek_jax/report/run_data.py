"""Everything that a page shows of one run, read once."""

import contextlib
import json
import os
from typing import Any, NamedTuple

from deepseek_jax.checkpoint import integrity
from deepseek_jax.checkpoint.stored import checkpoints_in
from deepseek_jax.errors import UserError
from deepseek_jax.report.charts import packed
from deepseek_jax.report.events import Event, events
from deepseek_jax.report.load_map import LoadMap, load_map
from deepseek_jax.report.run_files import Look, RunFiles
from deepseek_jax.report.series import Packed, Rows, by_kind
from deepseek_jax.tensorfile.bounded_json import BadFile
from deepseek_jax.train import starts

POINTS = 2000  # of a series; with several runs on a page fewer
ANSWERS, SAMPLES = "answers", "samples.jsonl"  # of run/answers.py
PROFILE = os.path.join("profile", "summary.json")  # run/profile.py
_EVALUATIONS = 20  # of which answers are shown: the first and the last ones
_PROMPTS = 4  # of each
_TEXT = 1500  # characters of a prompt or an answer


class RunData(NamedTuple):
    """Attributes:
    name: of the run, unlike that of any other run of the page.
    start: the newest record of train/starts.py; {} of a run of an earlier version.
    checkpoints: of StoredCheckpoint.describe; None: they are elsewhere, or cannot be read.
    where: folder of checkpoints, as config.checkpoint.dir has it; "" in the workdir.
    answers: [(step, rows of run/answers.py)].
    samples: [(step, text)] that the run printed at its end.
    profile: of run/profile.py; None without.
    """

    name: str
    look: Look
    rows: Rows
    series: Packed
    events: list[Event]
    load: LoadMap | None
    start: dict[str, Any]
    checkpoints: list[dict[str, Any]] | None
    where: str
    answers: list[tuple[int, list[dict[str, Any]]]]
    samples: list[tuple[int, str]]
    profile: dict[str, Any] | None


def read(workdir: str, name: str, runs: int) -> RunData:
    """Reads the folder of a run; nothing in it is changed.

    Args:
      runs: how many the page has.

    Raises:
      UserError: it holds no run, or a file is damaged.
    """
    look = RunFiles(workdir).look()
    rows = by_kind(look.all_rows)
    names = [look.layer_name(i) for i in range(look.counts_NLE.shape[1])]
    where = look.config.get("checkpoint", {}).get("dir") or ""
    return RunData(
        name=name,
        look=look,
        rows=rows,
        series=packed(rows, max(POINTS // runs, 400)),
        events=events(workdir, rows),
        load=load_map(look.load_steps_N, look.counts_NLE, names, runs),
        start=(starts.read(workdir) or [{}])[-1],
        checkpoints=_checkpoints(where or workdir),
        where=where,
        answers=_answers(os.path.join(workdir, ANSWERS)),
        samples=_samples(os.path.join(workdir, SAMPLES)),
        profile=_profile(os.path.join(workdir, PROFILE)),
    )


def _checkpoints(folder: str) -> list[dict[str, Any]] | None:
    """By names and sizes of files: their contents are not read."""
    if "://" in folder:
        return None
    out = []
    try:
        for stored in checkpoints_in(folder):
            verdict = integrity.inspect(stored.paths[0], contents=False)
            out.append(stored.describe(verdict))
    except (UserError, BadFile, OSError):
        return out
    return out


def _answers(folder: str) -> list[tuple[int, list[dict[str, Any]]]]:
    try:
        names = [n for n in os.listdir(folder) if n.endswith(".jsonl") and n[:-6].isdigit()]
    except OSError:
        return []
    steps = sorted(int(n[:-6]) for n in names)
    kept = steps if len(steps) <= _EVALUATIONS else [steps[0], *steps[1 - _EVALUATIONS :]]
    return [(step, _answers_of(os.path.join(folder, f"{step}.jsonl"))) for step in kept]


def _answers_of(path: str) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    texts = {k: str(row.get(k, "")) for k in ("prompt", "answer", "reference")}
                    out.append({k: _shortened(v) for k, v in texts.items()})
            if len(out) == _PROMPTS:
                break
    return out


def _samples(path: str) -> list[tuple[int, str]]:
    out: list[tuple[int, str]] = []
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                out.append((int(row["step"]), _shortened(str(row["text"]))))
    return out[-_PROMPTS:]


def _shortened(text: str) -> str:
    return text if len(text) <= _TEXT else text[:_TEXT] + " ..."


def _profile(path: str) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as f:
        value = json.load(f)
        if isinstance(value, dict) and isinstance(value.get("parts"), dict):
            return value
    return None
