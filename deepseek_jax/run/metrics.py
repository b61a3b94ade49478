"""Where numbers go: metrics.jsonl, TensorBoard events, the terminal."""

import contextlib
import json
import math
import os
import resource
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deepseek_jax.config.options import Config
from deepseek_jax.model.count import Count
from deepseek_jax.model.moe import Load
from deepseek_jax.train.step import StepMetrics

# Dense bfloat16 and float16 peak of one device in TFLOP/s, from the vendors' data sheets; the first name found in device_kind wins.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
}


def device_peak(config: Config) -> float | None:
    """Peak TFLOP/s of one device: config.log.peak_tflops, or known from its name, or None."""
    if config.log.peak_tflops:
        return config.log.peak_tflops
    kind = jax.devices()[0].device_kind
    return (
        next((v for k, v in PEAK_TFLOPS.items() if k in kind), None)
        if config.train.dtype in ("bfloat16", "float16")
        else None
    )


def memory_gb() -> float:
    """Peak GB: of the fullest local device, or of this process where devices do not say (CPU)."""
    peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in jax.local_devices()]
    return (max(peaks) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9


def short(x: Any) -> float:
    """A float32 as the float of its shortest text: equal text, equal number."""
    return float(str(np.float32(x)))


def row(
    metrics: StepMetrics,
    step: int,
    step_time: float,
    tokens_per_sec: float,
    tokens_seen: int,
    config: Config,
    count: Count,
) -> dict[str, Any]:
    """One row of metrics.jsonl from a step's metrics (on the host). `step` counts finished steps; `step_time` is in seconds."""
    parts = {name: short(value) for name, value in metrics.parts.items()}
    out = {
        "step": step,
        **{name: parts.pop(name) for name in ("loss", "lm_loss") if name in parts},
        "lr": short(metrics.lr),
        "grad_norm": short(metrics.grad_norm),
        "step_time_s": round(step_time, 6),
        "tokens_per_sec": round(tokens_per_sec, 2),
        "tokens_seen": tokens_seen,
        **parts,
        **routing(metrics.load, config.moe.drop),
        "skipped_steps": int(metrics.skipped_steps),
        "memory_gb": round(memory_gb(), 4),
    }
    achieved = count.flops_per_token * tokens_per_sec / 1e12 / jax.device_count()
    if metrics.loss_scale is not None:
        out["loss_scale"] = short(metrics.loss_scale)
    out["model_tflops_per_device"] = round(achieved, 6)
    if peak := device_peak(config):
        out["utilisation"] = round(achieved / peak, 4)
    return out


def routing(load: Load, drop: bool) -> dict[str, Any]:
    """The figures of a row that say where tokens went. `load` has leaves [L, ...], L = 0 without MoE layers.

    max_violation: the fullest expert's load / the mean - 1, in the worst layer.
    routing_entropy: 1 where every expert of a layer has the same load, 0 where one has all; mean over layers.
    dispatch_rounds: the most rounds that a device ran in a layer.
    left_device_share: of the assignments not dropped, those whose expert lies on another device than their token.
    device_imbalance: the most rows that a device's experts received / the mean - 1, in the worst layer.
    received_by_device: the rows that each device's experts received, over all layers.
    dropped_tokens: assignments dropped, over all layers; with `drop` also of each layer, by the device of their token.
    """
    load = jax.tree.map(lambda a: np.asarray(a, np.int64), load)
    out = {
        "max_violation": 0.0,
        "routing_entropy": 0.0,
        "dispatch_rounds": 0,
        "left_device_share": 0.0,
        "device_imbalance": 0.0,
        "received_by_device": load.received.sum(axis=0).tolist(),
        "dropped_tokens": int(load.dropped_counts.sum()),
    }
    if load.expert_counts.any():
        share = load.expert_counts / np.maximum(load.expert_counts.sum(axis=1, keepdims=True), 1)
        entropy = -(share * np.log(np.maximum(share, 1e-30))).sum(axis=1) / math.log(
            max(share.shape[1], 2)
        )
        received = load.received / np.maximum(load.received.mean(axis=1, keepdims=True), 1e-30)
        out["max_violation"] = round(float((share.max(axis=1) * share.shape[1] - 1).max()), 6)
        out["routing_entropy"] = round(float(entropy.mean()), 6)
        out["dispatch_rounds"] = int(load.rounds.max())
        out["left_device_share"] = round(float(load.left.sum() / max(load.received.sum(), 1)), 6)
        out["device_imbalance"] = round(float(received.max() - 1), 6)
    if drop:
        out["dropped_by_device"] = load.dropped_from.tolist()
    return out


class MetricsWriter:
    """Appends rows to WORKDIR/metrics.jsonl and TensorBoard events; only process 0 writes. Non-finite values are left out.

    A disk that is full, or gone, costs rows and one warning, never the run.
    """

    def __init__(self, workdir: str, config: Config, first_step: int):
        """`first_step`: finished steps of the restored state. Rows of later steps, which will be made again, are dropped."""
        self._path, self._fd, self._board, self._warned = (
            os.path.join(workdir, "metrics.jsonl"),
            None,
            None,
            False,
        )
        self._tensorboard = os.path.join(workdir, "tensorboard") if config.log.tensorboard else ""
        if jax.process_index() == 0:
            self._open(first_step)

    def _open(self, step: int) -> None:
        self._first_step = step
        with self._warning(self._path):
            self._open_rows()
        if self._tensorboard:
            with self._warning(self._tensorboard):
                self._board = _board(self._tensorboard, step + 1, self._warning)

    def _open_rows(self) -> None:
        if os.path.exists(self._path):
            _drop_rows_after(self._path, self._first_step)
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    @contextlib.contextmanager
    def _warning(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            if not self._warned:
                self._warned = True
                with contextlib.suppress(OSError):
                    print(
                        f"train.py: {what} cannot be written ({e.strerror or e}): metrics are being lost. Training goes on.",
                        file=sys.stderr,
                    )

    def write(self, values: dict[str, Any], load: Load | None = None) -> None:
        """Writes one row; `load`, with leaves [L, ...] on the host, goes to TensorBoard by layer."""
        if jax.process_index() != 0:
            return
        finite = {k: v for k, v in values.items() if not isinstance(v, float) or math.isfinite(v)}
        with self._warning(self._path):
            if self._fd is None:  # there may be room by now
                self._open_rows()
            self._append(json.dumps(finite).encode() + b"\n")
        if self._board is None:
            return
        step = values["step"]
        with self._warning(self._tensorboard):
            for name, value in finite.items():
                if name != "step" and isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, step)
            for layer in range(0 if load is None else len(load.rounds)):
                here = jax.tree.map(lambda a: np.asarray(a[layer], np.float64), load)
                if here.expert_counts.any():
                    share = here.expert_counts / here.expert_counts.mean()
                    self._board.add_scalar(
                        f"layer_max_violation/{layer:02d}", share.max() - 1, step
                    )
                    self._board.add_scalar(f"layer_rounds/{layer:02d}", here.rounds, step)
                    self._board.add_scalar(
                        f"layer_dropped/{layer:02d}", here.dropped_counts.sum(), step
                    )
                    self._board.add_histogram(
                        f"layer_expert_load/{layer:02d}", share, step, bins="auto"
                    )
                    self._board.add_histogram(
                        f"layer_device_rows/{layer:02d}", here.received, step, bins="auto"
                    )

    def _append(self, line: bytes) -> None:
        """The whole line or nothing: the next row, for which there may be room again, must not join a torn one."""
        size = os.fstat(self._fd).st_size
        try:
            if (written := os.write(self._fd, line)) != len(line):
                os.write(self._fd, line[written:])  # raises the reason
        except OSError:
            os.ftruncate(self._fd, size)
            raise

    def losses(self, most: int) -> list[float]:
        """The losses of the last rows, at most so many, oldest first."""
        try:
            with open(self._path, encoding="utf-8") as f:
                return [row["loss"] for row in map(json.loads, f) if "loss" in row][-most:]
        except (OSError, ValueError):
            return []

    def rewind(self, step: int) -> None:
        """Drops the rows after `step` finished steps."""
        if jax.process_index() == 0:
            self.close()
            self._open(step)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
        if self._board is not None:
            with self._warning(self._tensorboard):
                self._board.close()
        self._fd = self._board = None


def _board(
    folder: str, purge_step: int, warning: Callable[[str], contextlib.AbstractContextManager]
) -> Any:
    """TensorBoard's writer. Its thread would end with the first error of the disk, and its queue, once full, block the run."""
    from tensorboardX import SummaryWriter

    board = SummaryWriter(folder, purge_step=purge_step)
    records = board.file_writer.event_writer._ev_writer

    def guarded(call: Callable[..., Any]) -> Callable[..., Any]:
        def guard(*args: Any) -> Any:
            with warning(folder):
                return call(*args)

        return guard

    for name in ("write_event", "flush", "close"):
        setattr(records, name, guarded(getattr(records, name)))
    return board


def _drop_rows_after(path: str, step: int) -> None:
    kept = []
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            try:
                if line.endswith("\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # a row cut short by a kill
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.writelines(kept)
    os.replace(path + ".tmp", path)


class ProgressBar:
    """A bar on a terminal, a line every log interval elsewhere; silent on processes other than 0."""

    def __init__(self, total: int, done: int):
        self._console = Console(file=sys.stdout, quiet=jax.process_index() != 0, highlight=False)
        self._total = total
        self._bar = None
        if self._console.is_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console, refresh_per_second=4)
            self._task = self._bar.add_task("compiling", total=total, completed=done)
            self._bar.start()

    def update(self, values: dict[str, Any], seconds_left: float) -> None:
        """Shows a row of metrics; `seconds_left` for the whole run."""
        text = (
            f"loss {values['loss']:.4f}  {values['tokens_per_sec']:,.0f} tokens/s  max violation {values['max_violation']:.2f}"
            f"  rounds {values['dispatch_rounds']}"
        )
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.update(self._task, completed=values["step"], description=text)
        else:
            left = (
                f"{seconds_left / 60:.0f} min" if seconds_left >= 120 else f"{seconds_left:.0f} s"
            )
            self.say(f"step {values['step']:>6}/{self._total}  {text}  {left} left")

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def say(self, text: str) -> None:
        """A line above the bar. Nobody may be reading any more: that is no reason to stop training."""
        with contextlib.suppress(OSError, SystemExit):  # rich's answer to a closed pipe
            self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()
