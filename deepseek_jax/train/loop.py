"""The training loop around the jitted step: data in, metrics out, evaluation, checkpoints, signals."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config import Config
from deepseek_jax.data.loader import Loader, Prefetcher
from deepseek_jax.model.count import Count
from deepseek_jax.train import metrics
from deepseek_jax.train.optimizer import first_sequence, sequences_at
from deepseek_jax.train.profile import Profiler
from deepseek_jax.train.state import TrainState, to_tree
from deepseek_jax.train.step import StepMetrics, put_batch


class BadNumbers(Exception):
    """Too many updates in a row were skipped for a non-finite loss or gradient."""


class Result(NamedTuple):
    state: TrainState
    step: int
    eval: dict[str, Any]
    stopped_by: int | None  # the signal that ended the run early


class Evaluator:
    """Cross-entropy on held-out text: nats a token, and bits a byte where the tokenizer knows its bytes."""

    def __init__(self, config: Config, mesh: jax.sharding.Mesh, loader: Loader, eval_step: Callable):
        self._loader, self._mesh, self._step, self._micro = loader, mesh, jax.jit(eval_step), config.micro_batch
        self._rows = min(loader.num_eval_rows, config.eval.batches * config.train.batch_size)
        self._bytes = loader.tokenizer.token_bytes

    def __call__(self, state: TrainState) -> dict[str, Any]:
        """{} without held-out text."""
        nll = targets = text_bytes = 0.0
        for start in range(0, self._rows, self._micro):
            rows = self._loader.eval_rows(start, self._micro)
            batch = jax.tree.map(lambda a: a[0], put_batch(rows, self._micro, self._mesh))
            nll += float(self._step(state.params, state.bias, batch))
            scored = rows["targets"][rows["targets"] >= 0]
            targets += scored.size
            text_bytes += self._bytes[scored].sum() if self._bytes is not None else 0
        if not targets:
            return {}
        out = {"eval_loss": nll / targets, "eval_tokens": int(targets)}
        if text_bytes:
            out["eval_bits_per_byte"] = nll / math.log(2) / text_bytes
        return out


class Clock:
    """Times steps by when their results arrive. Evaluations, checkpoints and the first step, which compiles, do not count."""

    def __init__(self):
        self._last = time.perf_counter()
        self._first: tuple[float, float] | None = None  # seconds a step and tokens a second of the first step
        self._steps = self._all_steps = self._tokens = 0
        self._seconds = self._all_seconds = 0.0

    def tick(self, tokens: int) -> None:
        """A step has finished."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if self._first is None:
            self._first = (seconds, tokens / seconds)
            return
        self._steps, self._tokens, self._seconds = self._steps + 1, self._tokens + tokens, self._seconds + seconds
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


class StopSignal:
    """Remembers SIGINT and SIGTERM, so that the loop can finish its step and save. A second one acts as usual.

    With several processes JAX listens for SIGTERM, to any of them, and lets all agree on the step to stop after.
    """

    def __init__(self):
        self._number: int | None = None
        alone = jax.process_count() == 1
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM) if alone}

    def _handle(self, number, _frame):
        self._number = number
        self.restore()

    def after(self, step: int) -> int | None:
        """The signal to stop for after this step, the same in every process, or None."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            return signal.SIGTERM
        return self._number

    def restore(self):
        for s, handler in self._before.items():
            signal.signal(s, handler)


def batches(config: Config, loader: Loader, mesh: jax.sharding.Mesh, first_step: int) -> Iterator[dict[str, jax.Array]]:
    """The batches of the steps from `first_step` on, read ahead by a thread. A pure function of (seed, step)."""
    requests = ((first_sequence(config, s), sequences_at(config, s)) for s in range(first_step, config.train.steps))
    with Prefetcher(loader, requests) as rows:
        for r in rows:
            yield put_batch(r, config.micro_batch, mesh)


def run(config: Config, workdir: str, mesh: jax.sharding.Mesh, state: TrainState, train_step: Callable, evaluate: Evaluator,
        loader: Loader, checkpointer: Checkpointer, count: Count, tokens_seen: int, profiler: Profiler | None = None,
        first_step: Callable[[], str] | None = None) -> Result:
    """Trains from state.step to config.train.steps.

    Args:
      train_step: the jitted step. evaluate: state -> held-out figures.
      checkpointer: of this workdir. count: sizes for the FLOP figures. tokens_seen: before state.step.
      first_step: makes the line that is said after the first step.

    Returns:
      The last state and why the loop ended. A checkpoint of that state is on disk.

    Raises:
      BadNumbers: after config.train.max_bad_steps skipped updates in a row.
    """
    c, last = config, config.train.steps
    step = int(state.step)
    writer = metrics.MetricsWriter(workdir, config, step)
    bar = metrics.ProgressBar(last, step)
    stop = StopSignal()
    clock = Clock()
    eval_row: dict[str, Any] = {}
    stopped_by = None
    pending = None  # metrics of the step before, read while the device works on the next one

    def report(done: int, device_metrics: StepMetrics) -> bool:
        """Logs a finished step; True if its update was made."""
        nonlocal tokens_seen, first_step
        m = jax.device_get(device_metrics)
        tokens_seen += int(m.tokens)
        clock.tick(int(m.tokens))
        if first_step:
            bar.say(first_step())
            first_step = None
        if m.loss_scale is not None and not m.bad_steps and not math.isfinite(m.grad_norm):
            bar.say(f"step {done}: a gradient overflowed at the loss scale {float(m.loss_scale):g}: update skipped")
        if done % c.log.every_steps == 0 or done == last or m.bad_steps:
            values = metrics.row(m, done, *clock.read(), tokens_seen, config, count)
            writer.write(values, m.load)
            if m.bad_steps:
                bar.say(f"step {done}: loss {float(m.losses.loss)}, gradient norm {float(m.grad_norm)}: update skipped ({int(m.bad_steps)} in a row)")
            bar.update(values, clock.seconds_a_step() * (last - done))
        bar.advance(done)
        if m.bad_steps >= c.train.max_bad_steps:
            checkpointer.wait()
            good = checkpointer.latest_step()
            where = f"The last good checkpoint is step {good} in {workdir}/checkpoints." if good is not None else "There is no checkpoint yet."
            raise BadNumbers(f"{int(m.bad_steps)} updates in a row had a non-finite loss or gradient, up to step {done} "
                             f"(config.train.max_bad_steps={c.train.max_bad_steps}). {where} Lower config.optimizer.learning_rate, for instance.")
        return not m.bad_steps

    def profile(done: int) -> None:
        if text := profiler.turn(done, state):
            bar.say(text)

    try:
        if profiler and profiler.due(step):
            profile(step)
        for batch in batches(config, loader, mesh, step):
            state, device_metrics = train_step(state, batch)
            step += 1
            if pending:
                report(*pending)
            pending = (step, device_metrics)
            stopped_by = stop.after(step)
            at = lambda every: every and step % every == 0
            saving = checkpointer.due(step, c.checkpoint.every_steps, c.checkpoint.every_minutes)
            pause = step == last or saving or at(c.eval.every_steps) or stopped_by or profiler and profiler.due(step)
            if not pause:
                continue
            updated = report(*pending)
            pending = None
            if profiler and profiler.due(step):
                profile(step)
            if (step == last or at(c.eval.every_steps) or saving and c.checkpoint.keep_best) and (figures := evaluate(state)):
                eval_row = {"step": step, **figures}
                writer.write(eval_row)
                bits = f" = {figures['eval_bits_per_byte']:.4f} bits a byte" if "eval_bits_per_byte" in figures else ""
                bar.say(f"step {step}: held-out loss {figures['eval_loss']:.4f} nats a token{bits}")
            # While updates are being skipped the older checkpoints are worth more than this state: they must not make room for it.
            if step == last or stopped_by or saving and updated:
                held_out = eval_row.get("eval_loss") if eval_row.get("step") == step else None
                checkpointer.save(step, to_tree(state), {"tokens_seen": tokens_seen}, held_out, final=step == last or bool(stopped_by))
            if stopped_by:
                break
            clock.restart()
        checkpointer.wait()
        return Result(state, step, eval_row, stopped_by if step < last else None)
    finally:
        if profiler:
            profiler.close()
        bar.close()
        writer.close()
        stop.restore()
