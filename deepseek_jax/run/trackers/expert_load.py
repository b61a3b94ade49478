"""expert_load.npy: what the experts of each layer got, over the run."""

import os

import numpy as np

from deepseek_jax.config.options import Config
from deepseek_jax.model.moe_statistics import Load
from deepseek_jax.run.trackers.base import LostRows, Row
from deepseek_jax.train import load_history
from deepseek_jax.train.load_history import LoadHistory


class ExpertLoad:
    """Takes the counts of the steps that load_history.interval keeps. The file comes with the first of them:
    a model without experts has none.

    Args:
      workdir: gets the file.
      config: of the run.
      step: finished steps; records of later ones are dropped.
    """

    def __init__(self, workdir: str, config: Config, step: int, warning: LostRows):
        self._path = os.path.join(workdir, load_history.NAME)
        self._every = load_history.interval(config.train.steps, config.log.every_steps)
        self._step = step
        self._warning = warning
        self._history: LoadHistory | None = None

    def write(self, row: Row, load: Load | None) -> None:
        if load is None or not len(load.rounds):
            return
        counts_LE = np.asarray(load.expert_counts)
        with self._warning.about(self._path):
            if self._history is None:
                kind = load_history.record(*counts_LE.shape)
                self._history = LoadHistory(self._path, kind, self._step, self._every)
            self._history.add(row["step"], counts_LE)

    def rewind(self, step: int) -> None:
        self._step = step
        if self._history is not None:
            with self._warning.about(self._path):
                self._history.rewind(step)

    def close(self) -> None:
        if self._history is not None:
            with self._warning.about(self._path):
                self._history.close()
