"""A small run that benchmarks and tests disturb: its command, its process, its losses, and a tally of
what each fault did to it."""

import collections
import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from benchmarks import ROOT

INTERVAL = 5  # steps between checkpoints
# Losses do not depend on how many steps are planned, so that runs of different lengths can be compared.
OPTIONS = {
    "model.hidden_size": 32,
    "model.intermediate_size": 64,
    "model.moe_intermediate_size": 16,
    "model.num_hidden_layers": 1,
    "model.first_k_dense_replace": 0,
    "model.num_attention_heads": 2,
    "model.kv_lora_rank": 16,
    "train.batch_size": 8,
    "train.sequence_length": 32,
    "optimizer.warmup_steps": 2,
    "optimizer.schedule": "constant",
    "data.eval_fraction": 0.0,
    "checkpoint.every_steps": INTERVAL,
    "checkpoint.keep": 3,
    "log.every_steps": 1,
    "log.trackers": "",
    "eval.every_steps": 0,
    "eval.sample_tokens": 0,
}


@dataclasses.dataclass
class Tally:
    """What became of one kind of fault."""

    tried: int = 0
    # Reported by the program: the step it resumes from, the lost process, the damaged file.
    detected: int = 0
    survived: int = 0  # the run resumed from the newest whole checkpoint
    steps_lost: int = 0  # the most steps that were made, logged and made again
    # Losses that differ from the undisturbed run's, steps logged twice, checkpoints passed over.
    wrong: int = 0

    def lost(self, steps: int) -> None:
        self.steps_lost = max(self.steps_lost, steps)


Tallies = dict[str, Tally]


def tallies() -> Tallies:
    return collections.defaultdict(Tally)


def corpus(folder: pathlib.Path) -> pathlib.Path:
    """A text that is read quickly."""
    path = folder / "corpus.txt"
    rng = random.Random(0)
    path.write_text(
        " ".join(
            rng.choices(
                ["route", "expert", "token", "mesh", "shard", "layer", "loss", "gate"], k=40_000
            )
        )
    )
    return path


def environment(folder: pathlib.Path, devices: int = 1) -> dict[str, str]:
    """The environment of a process: CPU devices, and a cache of programs, so that restarts do not compile."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "cache"),
        # Programs this small spend their time in the compiler.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }


def train(workdir: pathlib.Path, text: pathlib.Path, **options: Any) -> list[str]:
    """The arguments of a run: ["train.py", ...]."""
    values = OPTIONS | {name.replace("__", "."): v for name, v in options.items()}
    return [
        "train.py",
        "--config=configs/tiny.py",
        f"--workdir={workdir}",
        f"--config.data.path={text}",
        *(f"--config.{name}={value}" for name, value in values.items()),
    ]


class Process:
    """A run, in a process group of its own, whose output is read as it comes."""

    def __init__(self, arguments: list[str], env: dict[str, str], cwd: pathlib.Path = ROOT):
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self.popen = subprocess.Popen(
            [sys.executable, "-u", *arguments],
            cwd=cwd,
            env=env | {"PYTHONPATH": str(ROOT)},
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        self.began = time.monotonic()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None  # a pipe, see above
        for line in self.popen.stdout:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()

    def wait_for(self, pattern: str, timeout: float, first: int = 0) -> re.Match | None:
        """The first line from number `first` on that matches; None if the process ends or the time is
        over without one."""
        deadline, seen = time.monotonic() + timeout, first
        while True:
            with self._changed:
                while seen < len(self.lines):
                    if found := re.search(pattern, self.lines[seen]):
                        return found
                    seen += 1
                ended = self.popen.poll() is not None and not self._reader.is_alive()
                if ended or time.monotonic() > deadline:
                    return None
                self._changed.wait(0.05)

    def wait_for_step(self, step: int, timeout: float) -> bool:
        """Waits until a step of at least this number is reported; False if none will be."""
        deadline, seen = time.monotonic() + timeout, 0
        while time.monotonic() < deadline:
            with self._changed:
                for line in self.lines[seen:]:
                    if (found := re.match(r"step +(\d+)/", line)) and int(found[1]) >= step:
                        return True
                seen = len(self.lines)
                if self.popen.poll() is not None and not self._reader.is_alive():
                    return False
                self._changed.wait(0.05)
        return False

    def resumed_from(self) -> int | None:
        """The step it reported to resume from; 0 if it began anew; None if it did not get that far."""
        for line in self.lines:
            if found := re.search(r"^workdir +\S+, resuming after step (\d+)", line):
                return int(found[1])
            if line.startswith("workdir "):
                return 0
        return None

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.popen.poll() is None:
            self.popen.send_signal(number)

    def wait(self, timeout: float) -> int | None:
        """The exit code; None if it takes longer, and then the process is killed."""
        try:
            code = self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            code = None
        self._reader.join(10)
        return code

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.wait(10)


# Loss, gradient norm, tokens seen. Equal text in the file means equal numbers.
Row = tuple[float, float, int]


def rows(workdir: pathlib.Path) -> tuple[dict[int, Row], int]:
    """(rows of metrics.jsonl by step, how many steps it has twice). A last row that a kill cut short
    does not count."""
    out: dict[int, Row] = {}
    twice = 0
    path = workdir / "metrics.jsonl"
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if not line.endswith("\n"):
            continue
        row = json.loads(line)
        if "loss" in row:
            twice += row["step"] in out
            out[row["step"]] = (row["loss"], row["grad_norm"], row["tokens_seen"])
    return out, twice


def differing(workdir: pathlib.Path, reference: dict[int, Row]) -> int:
    """Steps of a folder that are not as in the undisturbed run, or logged twice."""
    found, twice = rows(workdir)
    return twice + sum(row != reference.get(step) for step, row in found.items())


def newest_save(logged: int) -> int:
    """The step of the newest checkpoint that must have been begun when step `logged` was logged.

    A step is logged before its checkpoint begins, and a checkpoint first waits for the one before it.
    The newest may be lost unfinished, so a run with asynchronous checkpoints resumes at most one
    interval earlier.
    """
    return max(logged - 1, 0) // INTERVAL * INTERVAL


def newest_checkpoint(workdir: pathlib.Path) -> int:
    """The newest checkpoint with a final name; 0 if there is none."""
    folder = workdir / "checkpoints"
    return (
        max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=0)
        if folder.exists()
        else 0
    )
