"""What the folder of a run says of it, read again and again: only what is new of metrics.jsonl."""

import json
import os
import time
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.run import load_history, process_state
from deepseek_jax.train import workdir as workdirs

Row = dict[str, Any]


class Look(NamedTuple):
    """A run at one moment.

    Attributes:
      workdir: as it was given.
      time: when, in seconds since 1970.
      steps: of the whole run.
      first_layer: number of the layer that the first row of `counts_LE` is of.
      layers: of the model, without those that predict further tokens.
      rows: of metrics.jsonl that have a loss, in order.
      evaluations: rows with held-out figures, in order.
      events: rows of spikes and rollbacks, in order.
      load_step, counts_LE: the newest record of load_history; no rows without experts.
      processes: process_state.read.
    """

    workdir: str
    time: float
    steps: int
    first_layer: int
    layers: int
    rows: list[Row]
    evaluations: list[Row]
    events: list[Row]
    load_step: int
    counts_LE: np.ndarray
    processes: list[dict[str, Any]]


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
        config = workdirs.read_config(self._workdir)  # a restart may have changed it
        steps, counts_NLE = load_history.read(os.path.join(self._workdir, load_history.NAME))
        newest = len(steps) - 1
        return Look(
            workdir=self._workdir,
            time=time.time(),
            steps=config["train"]["steps"],
            first_layer=config["model"]["first_k_dense_replace"],
            layers=config["model"]["num_hidden_layers"],
            rows=[r for r in self._rows if "loss" in r],
            evaluations=[r for r in self._rows if "eval_loss" in r],
            events=[r for r in self._rows if "spike_loss" in r or "rollback" in r],
            load_step=int(steps[newest]) if len(steps) else 0,
            counts_LE=np.array(counts_NLE[newest]) if len(steps) else np.zeros((0, 0)),
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
