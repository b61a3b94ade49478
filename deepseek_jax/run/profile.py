"""A trace of some steps, and where their time went: `config.profile`.

The trace is JAX's own, in WORKDIR/profile: TensorBoard with the profile plugin reads the folder,
https://ui.perfetto.dev the *.trace.json.gz in it. Its events have the names of a program's
instructions, on CPU as on GPU, and the text of the compiled program says which part of the model an
instruction was made for.
"""

import glob
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from deepseek_jax.config.options import Config
from deepseek_jax.train.compiled_step import CompiledStep
from deepseek_jax.xla import hlo, origin

# What the table always shows, in the order of a step; other parts of origin.SCOPES follow if they
# took time.
PARTS = ("embed", "attention", "route", "dispatch", "experts", "combine", "loss", "optimizer")
SUMMARY = os.path.join(
    "profile", "summary.json"
)  # in a workdir: seconds per device and step, by part
# Their events contain those of the computations that they run.
CONTAINERS = ("while", "conditional", "call", "async-start", "async-update", "async-done")


class Cost(NamedTuple):
    """Time on all devices of this process, by what it was spent for."""

    seconds: dict[
        tuple[str, str], float
    ]  # (part, phase of origin.phase_of) -> seconds of leaf instructions
    busy: float  # seconds in which at least one instruction ran
    devices: int
    steps: int

    def part(self, name: str, *phases: str) -> float:
        """Seconds per device and step."""
        total = sum(
            s
            for (part, phase), s in self.seconds.items()
            if part == name and (not phases or phase in phases)
        )
        return total / self.devices / self.steps

    @property
    def total(self) -> float:
        """Seconds per device and step, of all parts."""
        return sum(self.seconds.values()) / self.devices / self.steps

    def shares(self) -> dict[str, float]:
        """Shares of the time by part; they sum to 1."""
        names = [*PARTS, *sorted({part for part, _ in self.seconds} - {*PARTS, "other"}), "other"]
        return {name: self.part(name) / max(self.total, 1e-30) for name in names}


class NoProfiler:
    """Stands where no steps are to be traced."""

    def due(self, done: int) -> bool:
        return False

    def turn(self, done: int, state: Any) -> str:
        return ""

    def close(self) -> None: ...


class Profiler:
    """Traces the steps of `config.profile` and says where their time went.

    Args:
      step: the step that runs.
      last: the step after which another one runs, or none; None: the last of the run.
    """

    def __init__(self, config: Config, workdir: str, step: CompiledStep, last: int | None = None):
        first = config.profile.start
        self._before = first - 1
        self._last = min(first + config.profile.steps - 1, last or config.train.steps)
        self._step = step
        self._active = False
        self._workdir = workdir
        self._folder = os.path.join(workdir, "profile")
        # A trace is named after its host, which may have several processes.
        if jax.process_count() > 1:
            self._folder = os.path.join(self._folder, f"process_{jax.process_index()}")

    def due(self, done: int) -> bool:
        """Whether the trace begins or ends after `done` steps."""
        return done == self._last if self._active else done == self._before

    def turn(self, done: int, state: Any) -> str:
        """Begins or ends the trace, after `done` steps.

        Args:
          state: what the last step returned.

        Returns:
          At the end of the trace, the table and where the trace is; "" at its beginning.
        """
        jax.block_until_ready(state)
        if not self._active:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every Python call would be an event
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._active = True
            return ""
        self.close()
        steps = done - self._before
        where = (
            f"profile of steps {self._before + 1} to {done}: {self._folder} "
            f"(tensorboard --logdir, or ui.perfetto.dev)"
        )
        program = self._step.last
        assert program is not None, "no step has run"
        try:
            cost = read(self._folder, program.compiled.as_text(), steps)
            self._keep(cost, f"{self._before + 1} to {done}")
            return f"{table(cost)}\n{where}"
        except (OSError, ValueError) as e:  # no reason to stop training
            return f"{where}; the time of each part is not known ({e})"

    def _keep(self, cost: Cost, steps: str) -> None:
        """Writes what the table says to WORKDIR/profile/summary.json, for the run's report."""
        if jax.process_index() != 0:
            return
        parts: dict[str, dict[str, float]] = {name: {} for name in cost.shares()}
        for part, phase in sorted(cost.seconds):
            parts.setdefault(part, {})[phase] = cost.part(part, phase)
        path = os.path.join(self._workdir, SUMMARY)
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            json.dump({"steps": steps, "parts": parts}, f)
        os.replace(path + ".tmp", path)

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._active:
            self._active = False
            jax.profiler.stop_trace()


def make_profiler(
    config: Config, workdir: str, step: CompiledStep, last: int
) -> Profiler | NoProfiler:
    """The profiler that `config.profile` asks for. Arguments: as Profiler."""
    return Profiler(config, workdir, step, last) if config.profile.start else NoProfiler()


class Event(NamedTuple):
    """One time that an instruction ran."""

    name: str
    part: str
    phase: str  # of origin.phase_of
    device: Any
    start: float  # seconds
    seconds: float


def read(folder: str, text: str, steps: int) -> Cost:
    """What the newest trace in a folder says of a program.

    Args:
      text: `compiled.as_text()` of the program.
      steps: how often it ran in the trace.

    Raises:
      ValueError: there is no trace, or none of this program.
    """
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    events = instructions(folder, text)
    for e in events:
        seconds[e.part, e.phase] += e.seconds
    return Cost(
        dict(seconds),
        _union([(e.start, e.start + e.seconds) for e in events]),
        len({e.device for e in events}),
        steps,
    )


def instructions(folder: str, text: str) -> list[Event]:
    """What a program ran in the newest trace of a folder; containers of instructions are left out.

    Arguments and errors: as `read`.
    """
    found = glob.glob(os.path.join(folder, "plugins", "profile", "*", "*.xplane.pb"))
    if not found:
        raise ValueError(f"{folder} holds no trace")
    module = hlo.Module(text)
    sources = origin.by_name(module)
    out = []
    for device, name, start, duration in _events(max(found, key=os.path.getmtime), module.name):
        part, phase, opcode = sources.get(name, ("other", "other", ""))
        if opcode and opcode not in CONTAINERS:
            out.append(Event(name, part, phase, device, start / 1e9, duration / 1e9))
    if not out:
        raise ValueError(f"no instruction of {module.name} is in the trace")
    return out


def _events(path: str, module: str) -> Iterator[tuple[Any, str, float, float]]:
    """(device, instruction, start, duration) in nanoseconds of the events of a program."""
    for plane in jax.profiler.ProfileData.from_file(path).planes:
        lines = list(plane.lines)
        # Where XLA's own line is, the lines of streams hold the same events once more.
        lines = [line for line in lines if line.name == "XLA Ops"] or lines
        for line in lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats and stats.get("hlo_module", "").split("(")[0] == module:
                    yield (
                        (plane.name, stats.get("device_ordinal")),
                        stats["hlo_op"],
                        event.start_ns,
                        event.duration_ns,
                    )


def _union(spans: list[tuple[float, float]]) -> float:
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def table(cost: Cost) -> str:
    """Time per device and step, by part and by pass over the model."""
    columns = (
        ("forward", ("forward",)),
        ("recompute", ("recompute",)),
        ("backward", ("backward",)),
    )
    lines = [f"{'part':<12}{'ms':>10}{'share':>8}" + "".join(f"{name:>11}" for name, _ in columns)]
    for name, share in cost.shares().items():
        cells = "".join(f"{cost.part(name, *phases) * 1e3:>11.2f}" for _, phases in columns)
        lines.append(f"{name:<12}{cost.part(name) * 1e3:>10.2f}{share:>8.1%}{cells}")
    busy = cost.busy / cost.steps * 1e3
    lines.append(
        f"{'all':<12}{cost.total * 1e3:>10.2f}{1:>8.1%}   "
        f"(per device and step; at least one instruction ran in {busy:.2f} ms of a step)"
    )
    return "\n".join(lines)
