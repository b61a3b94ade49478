"""What the table of metrics is made of (metrics.py): one metric, and what the row of a step is made from."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax

from deepseek_jax.config.options import Config
from deepseek_jax.model.count import Count
from deepseek_jax.run.figures import routing, short
from deepseek_jax.run.stages import Stage
from deepseek_jax.train.step import StepMetrics


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the row of a step is made from."""

    step: int  # finished steps
    metrics: StepMetrics  # on the host
    step_time: float  # seconds per step since the last row
    tokens_per_sec: float
    tokens_seen: int
    config: Config
    count: Count
    stage: Stage | None = None  # of a run with stages
    samples_per_sec: float = 0.0

    @functools.cached_property
    def routing(self) -> dict[str, Any]:
        return routing(self.metrics.load, self.config.moe.drop)

    def part(self, name: str) -> float | None:
        """A named part of the loss; None where the objective does not report it."""
        if name == "mtp_loss" and not self.config.model.num_nextn_predict_layers:
            return None
        value = self.metrics.parts.get(name)
        return None if value is None else short(value)

    @property
    def tflops_per_device(self) -> float:
        return self.count.flops_per_token * self.tokens_per_sec / 1e12 / jax.device_count()


@dataclasses.dataclass(frozen=True)
class Metric:
    """One name in the rows of metrics.jsonl.

    Attributes:
      unit: of the number; "" where it has none.
      over_steps: how one number stands for the rows of several steps.
      over_processes: "same" where every process has the number of the whole step; "first" where it
        is process 0's own, as its clock.
      row: the kind of row that has it.
      present: when, in words; "" in every row of its kind.
      contract: tools outside this repository rely on it.
      terminal: how the terminal shows it, as a format of the number; "" not at all.
      of: makes the number of a step's row, None where it is absent. Rows of other kinds bring their
        numbers.
    """

    name: str
    unit: str
    help: str
    over_steps: Literal["mean", "max", "sum", "last"] = "last"
    over_processes: Literal["same", "first"] = "same"
    row: Literal["step", "evaluation", "spike", "rollback"] = "step"
    present: str = ""
    contract: bool = False
    terminal: str = ""
    of: Callable[[Measured], Any] | None = None


def of_part(name: str) -> Callable[[Measured], Any]:
    return lambda m: m.part(name)


def of_routing(name: str) -> Callable[[Measured], Any]:
    return lambda m: m.routing.get(name)
