"""What the training loop costs beside the device program: data, batches to the device, metrics,
logging, the start of a checkpoint.

  python -m benchmarks overhead [--shape=mid] [--rounds=3] [--steps=8] [--json]
  python -m benchmarks overhead --config=configs/tiny.py [--config.KEY=...]

Runs the loop of train.py with the real step, a metrics row every step and one checkpoint in the
middle, `rounds` times `steps` steps. Two things can make it slower than the bare program. Each is
measured in the run itself, step by step: the difference of two large times would be noise.

idle        Time in which the device has no step to work on: from the end of a step (a thread waits
            for its result and notes the time, late by what the system takes to wake it) to the
            return of the call that starts the next one. 0 where the loop is ahead. The steps
            around the checkpoint count apart: its start, spread over
            config.checkpoint.every_steps, and with it the wait for the step before.
host CPU    CPU time of Python's threads: the loop, the reader of data, writers; not XLA's, which
            are the device here. (Linux only.) On CPUs the program has that much less of the cores:
            at most all of it is lost, if the program waits for that core, and at least its share
            of all cores. On GPUs none of it.

The bar, 2%, is on the larger bound: idle and all host CPU time (on GPUs idle alone), as a share of
a step of the loop. For comparison the bare compiled step, with one batch that is on the device
already, is run in turns: its wall time and the CPU time of the process. These differences are noise
where other programs run on the machine.
"""

import contextlib
import dataclasses
import os
import queue
import statistics
import sys
import tempfile
import threading
import time
from typing import Any

import jax

from benchmarks.support import shapes
from benchmarks.support.report import Parser, machine, report
from deepseek_jax import objectives
from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config.options import CheckpointConfig, Config, MeshConfig
from deepseek_jax.data.example_loader import ExampleLoader
from deepseek_jax.data.loader import Loader
from deepseek_jax.data.open import open_data
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.model.count import count
from deepseek_jax.parallel import xla_options
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.plan import options
from deepseek_jax.run.batches import LoaderBatches
from deepseek_jax.run.loop import Loop
from deepseek_jax.run.progress import Progress
from deepseek_jax.run.report import Report
from deepseek_jax.run.trackers.every import Trackers
from deepseek_jax.runtime.compile_cache import use_cache
from deepseek_jax.train.batch import put_batch
from deepseek_jax.train.compiled_step import CompiledStep
from deepseek_jax.train.state import TrainState, init_state, make_layout
from deepseek_jax.train.step import make_train_step

BAR = 0.02


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "--shape",
        choices=shapes.NAMES,
        default="mid",
        help="Of benchmarks/support/shapes.py, on one device; not with --config.",
    )
    parser.add_argument("--rounds", type=int, default=3, help="Runs of the loop.")
    parser.add_argument(
        "--steps",
        type=int,
        default=8,
        help="Steps of a run that count; a checkpoint starts in the middle.",
    )
    if any(a.startswith("--config") for a in sys.argv[1:]):
        own, config = options.read(parser, sys.argv[1:], "configs/tiny.py")
    else:
        own = parser.parse_args()
        config = dataclasses.replace(shapes.config(own.shape), mesh=MeshConfig(fsdp=1))
    result = measure(config, max(own.rounds, 1), max(own.steps, 4))
    report(own, result, text)
    return 0


class Timed:
    """A step for the loop that notes when it is called, when the call returns and when the device is done."""

    def __init__(self, step: CompiledStep):
        self._step = step
        self.called: list[float] = []
        self.returned: list[float] = []
        self.done: list[float] = []
        self.host_cpu: list[dict[int, float] | None] = []
        self._results: queue.SimpleQueue = queue.SimpleQueue()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def __call__(self, state: TrainState, batch: Any) -> Any:
        self.host_cpu.append(python_cpu_seconds(without=self._watcher))
        self.called.append(time.perf_counter())
        out = self._step(state, batch)
        self.returned.append(time.perf_counter())
        self._results.put(out[1].loss)  # metrics are not donated to the next step
        return out

    def _watch(self) -> None:
        while (result := self._results.get()) is not None:
            jax.block_until_ready(result)
            self.done.append(time.perf_counter())

    def close(self) -> None:
        """Waits for the last step."""
        self._results.put(None)
        self._watcher.join()

    def idle(self, i: int) -> float:
        """Seconds in which the device waited for call i."""
        return max(0.0, min(self.returned[i], self.done[i]) - self.done[i - 1])


def python_cpu_seconds(without: threading.Thread | None = None) -> dict[int, float] | None:
    """CPU time so far of each thread that Python started, by its id; None where the system does not tell."""
    seconds: dict[int, float] = {}
    for thread in threading.enumerate():
        # A worker of XLA's that once called Python is a "dummy" to it: what it computes is the device's.
        if thread is without or thread.name.startswith("Dummy-") or thread.native_id is None:
            continue
        try:
            with open(f"/proc/self/task/{thread.native_id}/schedstat") as f:
                seconds[thread.native_id] = int(f.read().split()[0]) / 1e9
        except FileNotFoundError:
            if not os.path.exists("/proc/self/schedstat"):
                return None  # else it has just ended
    return seconds


def _between(before: dict[int, float] | None, after: dict[int, float] | None) -> float | None:
    """CPU seconds between the two readings, of the threads that exist in the second."""
    if before is None or after is None:
        return None
    return sum(s - before.get(thread, 0.0) for thread, s in after.items())


def measure(config: Config, rounds: int, steps: int) -> dict[str, Any]:
    """Medians over the steps of all rounds, in seconds per step."""
    use_cache(config.compile.cache_dir, warn=lambda line: print(line, file=sys.stderr))
    mesh = make_mesh(config, jax.devices()[:1] if config.mesh.fsdp == 1 else None)
    tokenizer = load_tokenizer(config.data.tokenizer, special_tokens=config.data.special_tokens)
    loader = open_data(config, tokenizer, objectives.make(config).fields)
    loops: list[dict[str, Any]] = []
    bare: list[tuple[float, float]] = []
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as workdir:
        layout = make_layout(config, mesh)
        sizes = count(config.model, layout.abstract.params, config.train.sequence_length)
        xla = xla_options.xla_options(
            config,
            mesh.devices.flat[0].platform,
            xla_options.bytes_of_a_layer(config, layout.abstract.params, mesh),
        )
        step = CompiledStep(make_train_step(config, layout, objectives.make(config)), mesh, xla)
        state = init_state(config, layout)
        batch = put_batch(loader.train_rows(0, config.train.batch_size), config.micro_batch, mesh)
        checkpoints = Checkpointer(
            os.path.join(workdir, "checkpoints"), options=CheckpointConfig(keep=1)
        )
        for number in range(rounds):
            print(
                f"{'compiling and ' if number == 0 else ''}round {number + 1} of {rounds} ...",
                file=sys.stderr,
            )
            state, alone = _bare(step, state, batch, max(steps // 2, 2))
            bare.append(alone)
            state, taken = _loop(
                config, workdir, mesh, state, step, loader, checkpoints, sizes, steps
            )
            loops.append(taken)
        checkpoints.close()

    def median(key: str) -> float | None:
        """None where this system does not tell."""
        values = [v for r in loops for v in r[key]]
        return None if None in values else statistics.median(values)

    out: dict[str, Any] = {
        key: median(key) for key in ("step_s", "cpu_s", "idle_s", "host_cpu_s", "dispatch_s")
    }
    out["idle_s"] = statistics.mean(v for r in loops for v in r["idle_s"])  # rare pauses count too
    out["checkpoint_s"] = statistics.median(r["checkpoint_s"] for r in loops)
    every = config.checkpoint.every_steps or config.train.steps
    idle = out["idle_s"] + out["checkpoint_s"] / every
    on_cpu = jax.default_backend() == "cpu"
    overhead = (idle + (out["host_cpu_s"] or 0) * on_cpu) / out["step_s"]
    return out | {
        "checkpoint_every_steps": every,
        "overhead": overhead,
        "idle_share": idle / out["step_s"],
        "bar": BAR,
        "met": overhead <= BAR,
        "bare_step_s": statistics.median(s for s, _ in bare),
        "bare_cpu_s": statistics.median(c for _, c in bare),
        "rounds": rounds,
        "steps": steps,
        "tokens": config.train.batch_size * config.train.sequence_length,
        "machine": machine(),
    }


def _bare(
    step: CompiledStep, state: TrainState, batch: Any, steps: int
) -> tuple[TrainState, tuple[float, float]]:
    """Wall and CPU seconds per step, called back to back, after a first one."""
    state, _ = jax.block_until_ready(step(state, batch))
    started, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    return state, ((time.perf_counter() - started) / steps, (time.process_time() - cpu) / steps)


def _loop(
    config: Config,
    workdir: str,
    mesh: jax.sharding.Mesh,
    state: TrainState,
    step: CompiledStep,
    loader: Loader | ExampleLoader,
    checkpoints: Checkpointer,
    sizes: Any,
    steps: int,
) -> tuple[TrainState, dict[str, Any]]:
    """Runs the loop for `steps` steps that count, with two before and one after them, and measures each."""
    first, timed = int(state.step), Timed(step)
    # The loop is told where to stop; the compiled step has its own copy of the options.
    until = dataclasses.replace(config.train, steps=first + steps + 3)
    middle = 2 + steps // 2  # the number of the call that follows the checkpoint
    checkpoint = dataclasses.replace(config.checkpoint, every_steps=first + middle)
    config = dataclasses.replace(
        config,
        train=until,
        checkpoint=checkpoint,
        eval=dataclasses.replace(config.eval, every_steps=0),
        log=dataclasses.replace(config.log, every_steps=1),
    )
    cpu = time.process_time()
    trackers = Trackers(workdir, config, first)
    with open(os.devnull, "w") as quiet, contextlib.closing(trackers):
        before, sys.stdout = sys.stdout, quiet
        try:
            result = Loop(
                config=config,
                workdir=workdir,
                step=timed,
                batches=LoaderBatches(config, loader, mesh),
                evaluate=lambda state, _: {},
                checkpointer=checkpoints,
                report=Report(config, trackers, first, 0, sizes),
            ).run(state, Progress())
        finally:
            sys.stdout = before
    timed.close()
    cpu = time.process_time() - cpu
    counted = [i for i in range(2, 2 + steps) if i != middle]
    # The host's work from one call to the next is that of a step; what the last one does, waiting
    # for its checkpoint, is not.
    host = [_between(*timed.host_cpu[i : i + 2]) for i in counted if i + 1 != middle]
    return result.state, {
        "step_s": [timed.done[i] - timed.done[i - 1] for i in counted],
        "cpu_s": [cpu / len(timed.called)],
        "idle_s": [timed.idle(i) for i in counted],
        "host_cpu_s": host,
        "dispatch_s": [timed.returned[i] - timed.called[i] for i in counted],
        "checkpoint_s": timed.idle(middle),
    }


def text(r: dict[str, Any]) -> str:
    def ms(s: float | None) -> str:
        return "not known here" if s is None else f"{s * 1e3:,.2f} ms"

    def share(s: float | None) -> str:
        return "" if s is None else f", {s / r['step_s']:.3%}"

    return "\n".join(
        (
            f"a step of {r['tokens']} tokens on {r['machine']['device']}, {r['machine']['cores']} "
            f"cores: {r['rounds']} runs of {r['steps']} steps",
            f"  a step in the loop      {ms(r['step_s'])}, {r['cpu_s']:.2f} CPU seconds (with the "
            "checkpoint)",
            f"  a bare step             {ms(r['bare_step_s'])}, {r['bare_cpu_s']:.2f} CPU seconds",
            f"  idle device, per step   {ms(r['idle_s'])}{share(r['idle_s'])}; the call that "
            f"starts a step takes {ms(r['dispatch_s'])}",
            f"  at a checkpoint         {ms(r['checkpoint_s'])} idle, once in "
            f"{r['checkpoint_every_steps']} steps"
            f"{share(r['checkpoint_s'] / r['checkpoint_every_steps'])}",
            f"  CPU of Python, per step {ms(r['host_cpu_s'])}{share(r['host_cpu_s'])}",
            f"overhead at most {r['overhead']:.2%}; bar {r['bar']:.0%}: {'met' if r['met'] else 'MISSED'}",
        )
    )
