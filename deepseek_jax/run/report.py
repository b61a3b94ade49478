"""What a run says of its steps: rows for the trackers, lines for the terminal, times, spikes of the loss."""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from deepseek_jax.cli.progress import StepBar
from deepseek_jax.config.options import Config
from deepseek_jax.data.windows import Window
from deepseek_jax.model.count import Count
from deepseek_jax.run import metrics
from deepseek_jax.run.figures import memory_gb, short
from deepseek_jax.run.stages import Stage
from deepseek_jax.run.trackers.every import Trackers
from deepseek_jax.train.process_state import ProcessState
from deepseek_jax.train.step import StepMetrics


class Speed(NamedTuple):
    """Of training, over some steps."""

    seconds_per_step: float
    tokens_per_sec: float
    samples_per_sec: float


class Clock:
    """Times steps by when their results arrive.

    Evaluations, checkpoints and the first step, which compiles, do not count.
    """

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._begun = False
        self._first = Speed(0.0, 0.0, 0.0)  # of the first step: all that is known until the second
        self._steps = 0
        self._tokens = 0
        self._samples = 0
        self._seconds = 0.0
        self._all_steps = 0
        self._all_seconds = 0.0

    def tick(self, tokens: int, samples: int) -> None:
        """A step of so many tokens, in so many sequences, has finished."""
        now = time.perf_counter()
        seconds = now - self._last
        self._last = now
        if not self._begun:
            self._begun = True
            self._first = Speed(seconds, tokens / seconds, samples / seconds)
            return
        self._steps += 1
        self._tokens += tokens
        self._samples += samples
        self._seconds += seconds
        self._all_steps += 1
        self._all_seconds += seconds

    def restart(self) -> None:
        """What came since the last step was not training."""
        self._last = time.perf_counter()

    def seconds_per_step(self) -> float:
        """Over the whole run so far."""
        return self._all_seconds / self._all_steps if self._all_steps else self._first[0]

    def read(self) -> Speed:
        """Since the last call, at least one step ago."""
        if not self._steps:
            return self._first
        out = Speed(
            seconds_per_step=self._seconds / self._steps,
            tokens_per_sec=self._tokens / self._seconds,
            samples_per_sec=self._samples / self._seconds,
        )
        self._steps = 0
        self._tokens = 0
        self._samples = 0
        self._seconds = 0.0
        return out


class Spikes:
    """Finds losses far above those of the steps before.

    A loss is a spike if it is more than `deviations` robust standard deviations above the median of
    the last 100 losses, of which there must be 20. The robust deviation is 1.4826 times the median
    distance from the median (a normal distribution's standard deviation), and at least 0.1% of the
    median, so that a loss that stands still has room to move. A spike is left out of what later
    ones are compared with.

    Args:
      deviations: 0 finds none.
      before: the losses of the last steps.
    """

    WINDOW = 100
    LEAST = 20

    def __init__(self, deviations: float, before: Iterable[float] = ()):
        self._deviations = deviations
        self._losses: deque[float] = deque(maxlen=self.WINDOW)
        for loss in before:
            self.add(loss)

    def add(self, loss: float) -> tuple[float, float] | None:
        """(the median before, deviations above it) if this loss is a spike."""
        if not self._deviations or not math.isfinite(loss):
            return None
        if len(self._losses) >= self.LEAST:
            median = statistics.median(self._losses)
            spread = max(
                1.4826 * statistics.median(abs(x - median) for x in self._losses),
                1e-3 * abs(median),
                1e-30,
            )
            if (above := (loss - median) / spread) > self._deviations:
                return median, above
        self._losses.append(loss)
        return None


class Report:
    """Takes the metrics of every step, in order.

    Args:
      trackers: get the rows. Whoever made them closes them: stages share one set.
      step, tokens_seen: of the state that the run begins with.
      count: parameters and FLOPs of the model.
      first_step: makes the line that is said after the first step.
      stage: of a run with stages.

    Attributes:
      tokens_seen: so far, padding left out.
      clock: times the steps.
      losses: {step: loss} of the logged steps.
    """

    def __init__(
        self,
        config: Config,
        trackers: Trackers,
        step: int,
        tokens_seen: int,
        count: Count,
        first_step: Callable[[], str] | None = None,
        stage: Stage | None = None,
    ):
        self.tokens_seen = tokens_seen
        self.clock = Clock()
        self.losses: dict[int, float] = {}
        self._config = config
        self._count = count
        self._first_step = first_step
        self._stage = stage
        self._trackers = trackers
        self._step = step
        self._state = ProcessState(
            trackers.workdir, jax.process_index(), jax.process_count(), memory_gb
        )
        self._state.write(step)
        self._bar = StepBar(config.train.steps, step, show=jax.process_index() == 0)
        self._find_spikes()

    def _find_spikes(self) -> None:
        before = self._trackers.losses(Spikes.WINDOW)
        self._spikes = Spikes(self._config.log.spike_deviations, before)

    def step(self, step: int, device_metrics: StepMetrics, rows: list[Window]) -> StepMetrics:
        """Logs a finished step.

        Args:
          step: finished steps.
          device_metrics: what the step returned.
          rows: the ranges of the data order that it was trained on.

        Returns:
          Its metrics, on the host.
        """
        m = jax.device_get(device_metrics)
        self.tokens_seen += int(m.tokens)
        self.clock.tick(int(m.tokens), sum(last - first for first, last in rows))
        if self._first_step:
            self.say(self._first_step())
            self._first_step = None
        if m.loss_scale is not None and not m.bad_steps and not math.isfinite(m.grad_norm):
            self.say(
                f"step {step}: a gradient overflowed at the loss scale {float(m.loss_scale):g}: "
                f"update skipped"
            )
        last = self._config.train.steps
        if step % self._config.log.every_steps == 0 or step == last or m.bad_steps:
            self._log(step, m, rows)
        self._step = step
        self._state.write(step)
        self._bar.advance(step)
        if spike := self._spikes.add(float(m.loss)):
            self._log_spike(step, m, rows, *spike)
        return m

    def _log(self, step: int, m: StepMetrics, rows: list[Window]) -> None:
        speed = self.clock.read()
        values = metrics.row(
            metrics.Measured(
                step=step,
                metrics=m,
                step_time=speed.seconds_per_step,
                tokens_per_sec=speed.tokens_per_sec,
                samples_per_sec=speed.samples_per_sec,
                tokens_seen=self.tokens_seen,
                config=self._config,
                count=self._count,
                stage=self._stage,
            )
        )
        where = {"rows": [list(w) for w in rows]} if m.bad_steps else {}
        self._trackers.write(values | where, m.load)
        self.losses[step] = values["loss"]
        if m.bad_steps:
            self.say(
                f"step {step}: loss {float(m.loss)}, gradient norm {float(m.grad_norm)}: "
                f"update skipped ({int(m.bad_steps)} in a row)"
            )
        left = self.clock.seconds_per_step() * (self._config.train.steps - step)
        self._bar.update(step, metrics.terminal_text(values), left)

    def _log_spike(
        self, step: int, m: StepMetrics, rows: list[Window], median: float, above: float
    ) -> None:
        self._trackers.write(
            {
                "step": step,
                "spike_loss": short(m.loss),
                "median_loss": median,
                "deviations": round(above, 2),
                "rows": [list(w) for w in rows],
            }
        )
        self.say(
            f"step {step}: the loss {float(m.loss):.4f} is a spike, {above:.0f} deviations above the "
            f"median {median:.4f}. Its text: python -m deepseek_jax.data show "
            f"--workdir={self._trackers.workdir} --step={step}"
        )

    def evaluation(self, step: int, figures: dict[str, Any]) -> dict[str, Any]:
        """Logs held-out figures; returns their row."""
        of_stage = (
            {"stage": self._stage.number, "stage_name": self._stage.name} if self._stage else {}
        )
        row = {"step": step, **of_stage, **figures}
        self._trackers.write(row)
        self.say(f"step {step}: held-out loss {held_out_text(figures)}")
        return row

    def rolled_back(self, step: int, tokens_seen: int, row: dict[str, Any], text: str) -> None:
        """The run goes on after `step` finished steps: drops the rows of later ones, and writes `row`."""
        self.tokens_seen = tokens_seen
        self.losses = {s: loss for s, loss in self.losses.items() if s <= step}
        self._trackers.rewind(step)
        self._trackers.write(row)
        self._find_spikes()
        self.say(text)
        self.clock.restart()

    def say(self, text: str) -> None:
        self._bar.say(text)

    def close(self) -> None:
        self._state.write(self._step, "ended")
        self._bar.close()


def held_out_text(figures: dict[str, Any]) -> str:
    """Held-out figures for people."""
    text = f"{figures['eval_loss']:.4f} nats per token"
    if "eval_bits_per_byte" in figures:
        text += f" = {figures['eval_bits_per_byte']:.4f} bits per byte"
    if "eval_token_accuracy" in figures:
        text += f", accuracy {figures['eval_token_accuracy']:.3f}"
    return text
