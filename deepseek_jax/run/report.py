"""What the loop tells about its steps: rows of metrics.jsonl, lines on the terminal, times, spikes of the loss."""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import jax

from deepseek_jax.config.options import Config
from deepseek_jax.data.windows import Window
from deepseek_jax.model.count import Count
from deepseek_jax.run import metrics
from deepseek_jax.train.step import StepMetrics


class Clock:
    """Times steps by when their results arrive. Evaluations, checkpoints and the first step, which compiles, do not count."""

    def __init__(self):
        self._last = time.perf_counter()
        self._first: tuple[float, float] | None = (
            None  # seconds a step and tokens a second of the first step
        )
        self._steps = self._all_steps = self._tokens = 0
        self._seconds = self._all_seconds = 0.0

    def tick(self, tokens: int) -> None:
        """A step has finished."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if self._first is None:
            self._first = (seconds, tokens / seconds)
            return
        self._steps, self._tokens, self._seconds = (
            self._steps + 1,
            self._tokens + tokens,
            self._seconds + seconds,
        )
        self._all_steps, self._all_seconds = self._all_steps + 1, self._all_seconds + seconds

    def restart(self) -> None:
        """What came since the last step was not training."""
        self._last = time.perf_counter()

    def seconds_a_step(self) -> float:
        """Over the whole run so far."""
        return self._all_seconds / self._all_steps if self._all_steps else self._first[0]

    def read(self) -> tuple[float, float]:
        """(seconds a step, tokens a second) since the last call, at least one step ago."""
        if not self._steps:
            return self._first
        out = (self._seconds / self._steps, self._tokens / self._seconds)
        self._steps, self._tokens, self._seconds = 0, 0, 0.0
        return out


class Spikes:
    """Finds losses far above those of the steps before.

    A loss is a spike if it is more than `deviations` robust standard deviations above the median of the last 100 losses, of which there must
    be 20. The robust deviation is 1.4826 times the median distance from the median (a normal distribution's standard deviation), and at
    least 0.1% of the median, so that a loss that stands still has room to move. A spike is left out of what later ones are compared with.

    Args:
      deviations: 0 finds none. before: the losses of the last steps.
    """

    WINDOW, LEAST = 100, 20

    def __init__(self, deviations: float, before: Iterable[float] = ()):
        self._deviations, self._losses = deviations, deque(maxlen=self.WINDOW)
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
      step, tokens_seen: of the state that the run begins with. count: sizes for the FLOP figures.
      first_step: makes the line that is said after the first step.
    """

    def __init__(
        self,
        config: Config,
        workdir: str,
        step: int,
        tokens_seen: int,
        count: Count,
        first_step: Callable[[], str] | None,
    ):
        self.tokens_seen, self.clock = tokens_seen, Clock()
        self._config, self._workdir, self._count, self._first_step = (
            config,
            workdir,
            count,
            first_step,
        )
        self._writer = metrics.MetricsWriter(workdir, config, step)
        self._bar = metrics.ProgressBar(config.train.steps, step)
        self._find_spikes()

    def _find_spikes(self) -> None:
        self._spikes = Spikes(
            self._config.log.spike_deviations,
            self._writer.losses(Spikes.WINDOW) if jax.process_index() == 0 else (),
        )

    def step(self, done: int, device_metrics: StepMetrics, rows: list[Window]) -> StepMetrics:
        """Logs a finished step, which was trained on these rows of the global order. Returns its metrics, on the host."""
        c, last = self._config, self._config.train.steps
        m = jax.device_get(device_metrics)
        self.tokens_seen += int(m.tokens)
        self.clock.tick(int(m.tokens))
        if self._first_step:
            self.say(self._first_step())
            self._first_step = None
        where = {"rows": [list(w) for w in rows]}
        if m.loss_scale is not None and not m.bad_steps and not math.isfinite(m.grad_norm):
            self.say(
                f"step {done}: a gradient overflowed at the loss scale {float(m.loss_scale):g}: update skipped"
            )
        if done % c.log.every_steps == 0 or done == last or m.bad_steps:
            values = metrics.row(m, done, *self.clock.read(), self.tokens_seen, c, self._count)
            self._writer.write(values | where if m.bad_steps else values, m.load)
            if m.bad_steps:
                self.say(
                    f"step {done}: loss {float(m.loss)}, gradient norm {float(m.grad_norm)}: update skipped ({int(m.bad_steps)} in a row)"
                )
            self._bar.update(values, self.clock.seconds_a_step() * (last - done))
        self._bar.advance(done)
        if spike := self._spikes.add(float(m.loss)):
            median, above = spike
            self._writer.write(
                {
                    "step": done,
                    "spike_loss": metrics.short(m.loss),
                    "median_loss": median,
                    "deviations": round(above, 2),
                    **where,
                }
            )
            self.say(
                f"step {done}: the loss {float(m.loss):.4f} is a spike, {above:.0f} deviations above the median {median:.4f}. "
                f"Its text: python -m deepseek_jax.data show --workdir={self._workdir} --step={done}"
            )
        return m

    def evaluation(self, step: int, figures: dict[str, Any]) -> dict[str, Any]:
        """Logs held-out figures; returns their row."""
        row = {"step": step, **figures}
        self._writer.write(row)
        bits = (
            f" = {figures['eval_bits_per_byte']:.4f} bits a byte"
            if "eval_bits_per_byte" in figures
            else ""
        )
        self.say(f"step {step}: held-out loss {figures['eval_loss']:.4f} nats a token{bits}")
        return row

    def rolled_back(self, step: int, tokens_seen: int, row: dict[str, Any], text: str) -> None:
        """The run goes on after `step` finished steps: drops the rows of later ones, and writes `row`."""
        self.tokens_seen = tokens_seen
        self._writer.rewind(step)
        self._writer.write(row)
        self._find_spikes()
        self.say(text)
        self.clock.restart()

    def say(self, text: str) -> None:
        self._bar.say(text)

    def close(self) -> None:
        self._bar.close()
        self._writer.close()
