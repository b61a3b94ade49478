"""All destinations of a run."""

import importlib.util
import json
import math
import os
import time
from typing import Any

import jax

from deepseek_jax.config.options import Config
from deepseek_jax.errors import UserError
from deepseek_jax.model.moe_statistics import Load
from deepseek_jax.run.trackers.base import LostRows, Row, Tracker
from deepseek_jax.run.trackers.destination import Run
from deepseek_jax.run.trackers.expert_load import ExpertLoad
from deepseek_jax.run.trackers.jsonl import JsonLines
from deepseek_jax.run.trackers.outside import Outside
from deepseek_jax.run.trackers.tensorboard import TensorBoard

TENSORBOARD = (
    "tensorboard"  # of config.log.trackers; the others are packages, and extras of this one
)


class Trackers:
    """All destinations of a run; none in processes other than 0.

    Args:
      workdir: gets metrics.jsonl, expert_load.npy, and what the destinations of config.log.trackers keep
        there.
      step: finished steps of the state that the run begins with. Rows of later steps are dropped.

    Attributes:
      workdir: as it was given.
    """

    def __init__(self, workdir: str, config: Config, step: int):
        self.workdir = workdir
        self._path = os.path.join(workdir, "metrics.jsonl")
        self._trackers: list[Tracker] = []
        self._outside: list[Outside] = []
        if jax.process_index() != 0:
            return
        warning = LostRows()
        self._trackers.append(JsonLines(self._path, step, warning))
        self._trackers.append(ExpertLoad(workdir, config, step, warning))
        for name in named(config):
            if name == TENSORBOARD:
                folder = os.path.join(workdir, "tensorboard")
                self._trackers.append(TensorBoard(folder, step, warning, config.log.names))
            else:
                self._outside.append(Outside(_run(name, workdir, config)))
        self._trackers += self._outside

    def write(self, values: Row, load: Load | None = None) -> None:
        """Writes one row, without what is not finite; `load` as in `Tracker.write`."""
        finite = {
            name: value
            for name, value in values.items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        for tracker in self._trackers:
            tracker.write(finite, load)

    def rewind(self, step: int) -> None:
        for tracker in self._trackers:
            tracker.rewind(step)

    def close(self) -> None:
        """Waits for slow destinations, for all of config.log.trackers' tools together as long as for one."""
        for tool in self._outside:
            tool.end()
        deadline = time.monotonic() + Outside.CLOSE_SECONDS
        for tracker in self._trackers:
            if isinstance(tracker, Outside):
                tracker.close(max(deadline - time.monotonic(), 0))
            else:
                tracker.close()

    def losses(self, most: int) -> list[float]:
        """The losses of the last rows, at most so many, oldest first; [] in processes other than 0."""
        if not self._trackers:
            return []
        try:
            with open(self._path, encoding="utf-8") as f:
                rows = [json.loads(line) for line in f]
        except (OSError, ValueError):
            return []
        return [row["loss"] for row in rows if "loss" in row][-most:]


def named(config: Config) -> list[str]:
    """The names in config.log.trackers, each once."""
    return list(dict.fromkeys(filter(None, config.log.trackers.split(","))))


def check_installed(config: Config) -> None:
    """Looks for the packages of config.log.trackers, and imports none.

    Raises:
      UserError: one is not installed.
    """
    for name in named(config):
        if name == TENSORBOARD:
            continue
        found = importlib.util.find_spec(name)
        # A folder ./wandb, as W&B itself makes, is found as a package without files.
        if found is None or found.origin is None:
            raise UserError(
                f"config.log.trackers={config.log.trackers}: the package {name} is not installed. "
                f"Install it (pip install 'deepseek_jax[{name}]'), or leave {name} out."
            )


def _run(tool: str, workdir: str, config: Config) -> Run:
    mesh = jax.sharding.get_abstract_mesh()
    facts: dict[str, Any] = {f"mesh/{axis}": size for axis, size in dict(mesh.shape).items()}
    facts["devices/count"] = jax.device_count()
    facts["devices/kind"] = jax.devices()[0].device_kind
    facts["devices/processes"] = jax.process_count()
    return Run(
        tool=tool,
        workdir=os.path.abspath(workdir),
        project=config.log.project,
        name=config.log.run_name,
        naming=config.log.names,
        config=config.to_json(),  # the mesh as it was asked for; the facts have what it came to
        facts=facts,
        pid=os.getpid(),
    )
