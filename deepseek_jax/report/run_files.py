"""What the folder of a run says of it, read again and again: only what is new of metrics.jsonl."""

import dataclasses
import functools
import json
import os
import time
from typing import Any

import numpy as np

from deepseek_jax.train import load_history, process_state
from deepseek_jax.train import workdir as workdirs

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Look:
    """A run at one moment.

    Attributes:
      workdir: as it was given.
      time: when, in seconds since 1970.
      config: its options, by section.
      all_rows: of metrics.jsonl, in the order of the file.
      load_steps_N, counts_NLE: load_history.read.
      processes: process_state.read.
    """

    workdir: str
    time: float
    config: dict[str, Any]
    all_rows: list[Row]
    load_steps_N: np.ndarray
    counts_NLE: np.ndarray
    processes: list[dict[str, Any]]

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.config["train"]["steps"]

    @property
    def first_layer(self) -> int:
        """Number of the layer that the first row of `counts_LE` is of."""
        return self.config["model"]["first_k_dense_replace"]

    @property
    def layers(self) -> int:
        """Of the model, without those that predict further tokens."""
        return self.config["model"]["num_hidden_layers"]

    @functools.cached_property
    def rows(self) -> list[Row]:
        """Those that have a loss."""
        return [r for r in self.all_rows if "loss" in r]

    @functools.cached_property
    def evaluations(self) -> list[Row]:
        """Rows with held-out figures."""
        return [r for r in self.all_rows if "eval_loss" in r]

    @functools.cached_property
    def events(self) -> list[Row]:
        """Rows of spikes and rollbacks."""
        return [r for r in self.all_rows if "spike_loss" in r or "rollback" in r]

    @property
    def load_step(self) -> int:
        """Of `counts_LE`."""
        return int(self.load_steps_N[-1]) if len(self.load_steps_N) else 0

    @functools.cached_property
    def counts_LE(self) -> np.ndarray:
        """The newest record of load_history; no rows without experts."""
        return np.array(self.counts_NLE[-1]) if len(self.counts_NLE) else np.zeros((0, 0))

    def layer_name(self, index: int) -> str:
        """Of a row of `counts_LE`."""
        number = self.first_layer + index
        ahead = number - self.layers + 1
        return f"layer {number}" if ahead < 1 else f"predicts {ahead + 1} ahead"


class RunFiles:
    """The files of a run.

    Args:
      workdir: of the run.

    Raises:
      UserError: it holds no run.
    """

    def __init__(self, workdir: str):
        self._workdir = workdir
        self._path = os.path.join(workdir, "metrics.jsonl")
        self._rows: list[Row] = []
        self._read = 0  # bytes of the file that `_rows` are of
        self._inode = -1
        workdirs.read_config(workdir)

    def look(self) -> Look:
        """Raises UserError: a file is damaged."""
        self._read_rows()
        steps_N, counts_NLE = load_history.read(os.path.join(self._workdir, load_history.NAME))
        return Look(
            workdir=self._workdir,
            time=time.time(),
            config=workdirs.read_config(self._workdir),  # a restart may have changed it
            all_rows=list(self._rows),
            load_steps_N=steps_N,
            counts_NLE=counts_NLE,
            processes=process_state.read(self._workdir),
        )

    def _read_rows(self) -> None:
        """A restart and a rollback write the file anew; else it only grows."""
        try:
            with open(self._path, "rb") as f:
                there = os.fstat(f.fileno())
                if there.st_ino != self._inode or there.st_size < self._read:
                    self._rows, self._read, self._inode = [], 0, there.st_ino
                f.seek(self._read)
                new = f.read()
        except FileNotFoundError:
            return
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # cut short by a kill: the next start of the run drops it
            if isinstance(row, dict):
                self._rows.append(row)
