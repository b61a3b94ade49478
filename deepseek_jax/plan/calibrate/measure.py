"""Rates of the devices of this machine, measured with all of them busy at the same time.

What cannot be measured here is said with its reason. Figures change with what else the machine does:
`Calibration.other_cores` says how much that was.
"""

import dataclasses
import datetime
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.cli.progress import Bar
from deepseek_jax.cli.texts import gb
from deepseek_jax.errors import one_line
from deepseek_jax.experts import implementations
from deepseek_jax.plan import host, rates, rates_file
from deepseek_jax.plan.calibrate import links, probes
from deepseek_jax.plan.calibrate.probes import Machine
from deepseek_jax.plan.calibrate.timing import Probe, time_of

SECONDS = 20.0  # of timing, if nobody says


class Row(NamedTuple):
    """What one probe showed, of one device.

    Attributes:
      what: it does.
      rate: the field of Rates that it is for.
      value: FLOP/s, bytes/s, or seconds of what costs seconds.
      spread, repetitions, turns: as timing.Time has them.
      amount, seconds: of one turn.
    """

    what: str
    rate: str
    value: float
    spread: float
    repetitions: int
    turns: int
    amount: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What was measured, and on what.

    Attributes:
      took: seconds, with compiling.
      other_cores: that other programs used meanwhile; None: this system does not say.
      rates: by field of Rates, of one device while all work.
      rows: every probe.
      missing: fields that were not measured, with the reason.
    """

    platform: str
    device: str
    devices: int
    cores: int
    jax: str
    date: str
    took: float
    other_cores: float | None
    rates: dict[str, float]
    rows: list[Row]
    missing: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Plain values: what `plan --rates=FILE` reads."""
        found = dataclasses.asdict(self) | {"rows": [row._asdict() for row in self.rows]}
        return {"format": rates_file.FORMAT, **found}


def measure(devices: Sequence[jax.Device], seconds: float = SECONDS) -> rates.Speed:
    """Rates of these devices for a prediction.

    Args:
      devices: of this process, all of one kind. They work at once, as in a step.
      seconds: of timing, in all; compiling comes on top.
    """
    found = calibrated(devices, seconds, show=False)
    return rates.of_measured(rates.hardware_of(found.device), found.as_json())


def calibrated(
    devices: Sequence[jax.Device], seconds: float = SECONDS, show: bool = True
) -> Calibration:
    """The same with all that was seen.

    Args:
      show: progress, on stderr.
    """
    machine = probes.machine_of(list(devices))
    others, started = host.Others(), time.perf_counter()
    work = _Work(machine, seconds)
    with Bar("calibrating", len(work.steps), show, unit="items") as bar:
        for name, step in work.steps.items():
            work.take(step)
            bar.advance(1, name)
    return Calibration(
        platform="cpu" if machine.on_cpu else "gpu",
        device=device_name(devices[0]),
        devices=len(devices),
        cores=host.cores(),
        jax=jax.__version__,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        took=time.perf_counter() - started,
        other_cores=others.cores(),
        rates=work.rates,
        rows=work.rows,
        missing={k: v for k, v in work.missing.items() if k not in work.rates},
    )


def device_name(device: jax.Device) -> str:
    """Of a GPU as JAX has it, of a CPU its model."""
    return host.cpu_name() or "CPU" if device.platform == "cpu" else device.device_kind


class _Work:
    """The steps of a calibration and what they have found so far."""

    def __init__(self, machine: Machine, seconds: float) -> None:
        self.machine = machine
        self.rates: dict[str, float] = {}
        self.rows: list[Row] = []
        self.missing: dict[str, str] = {}
        compute = jnp.float32 if machine.on_cpu else jnp.bfloat16
        self.steps: dict[str, tuple[str, Callable[[], None]]] = {
            "float32": ("f32", lambda: self._products("f32", jnp.float32, "highest")),
            "bfloat16": ("bf16", lambda: self._products("bf16", jnp.bfloat16)),
            "tf32": ("tf32", self._tf32),
            "float8": ("fp8", self._fp8),
            "attention": ("attention_forward", lambda: self._attention(compute)),
            "experts": ("grouped", lambda: self._one("grouped", probes.grouped, compute)),
            "memory": ("memory", lambda: self._one("memory", probes.triad, "memory")),
            "caches": ("cached", lambda: self._one("cached", probes.triad, "cached")),
            "launches": ("launch", lambda: self._cost("launch", probes.launches(machine))),
            "collectives": ("link", self._collectives),
            "host link": ("host_link", self._host_link),
            "host": ("host", lambda: self._cost("host", links.read_back(machine))),
        }
        timings = len(self.steps) + 3 + len(links.KINDS) * len(machine.sizes.messages)
        self.budget = seconds / timings

    def take(self, step: tuple[str, Callable[[], None]]) -> None:
        """One step. What this device or its compiler refuses must not hide what the others show."""
        field, act = step
        try:
            act()
        except Exception as e:  # XLA, cuDNN and Pallas raise what they like
            self.missing[field] = one_line(e)

    def _time(self, probe: Probe, field: str, seconds_are_it: bool = False) -> Row:
        t = time_of(probe, self.budget)
        value = t.seconds / probe.amount if seconds_are_it else probe.amount / t.seconds
        row = Row(
            probe.what, field, value, t.spread, t.repetitions, t.turns, probe.amount, t.seconds
        )
        self.rows.append(row)
        return row

    def _one(self, field: str, make: Callable[..., Probe], *given: Any) -> None:
        self.rates[field] = self._time(make(self.machine, *given), field).value

    def _cost(self, field: str, probe: Probe) -> None:
        self.rates[field] = self._time(probe, field, seconds_are_it=True).value

    def _products(self, field: str, dtype: Any, precision: str | None = None) -> None:
        """Large and narrow: as many FLOPs of both, one after the other."""
        found = [
            self._time(probes.product(self.machine, what, dtype, precision), field).value
            for what in ("large", "narrow")
        ]
        self.rates[field] = len(found) / sum(1 / value for value in found)

    def _tf32(self) -> None:
        if self.machine.on_cpu:
            raise ValueError("CPUs have no tf32")
        self._products("tf32", jnp.float32)

    def _fp8(self) -> None:
        with jax.set_mesh(self.machine.mesh):
            if not implementations.has_fp8():
                raise ValueError("these devices do not multiply float8")
        self._one("fp8", probes.fp8_product)

    def _attention(self, dtype: Any) -> None:
        forward, both = probes.attention(self.machine, dtype)
        there = self._time(forward, "attention_forward")
        row = self._time(both, "attention_backward")
        back = max(row.seconds - there.seconds, 0.1 * row.seconds)
        self.rates["attention_forward"] = there.value
        self.rates["attention_backward"] = (row.amount - there.amount) / back

    def _collectives(self) -> None:
        """Latency and bytes per second: of each kind by a line through its sizes, of all the mean."""
        if self.machine.mesh.size == 1:
            self.missing["collective"] = "one device has no partners"
            raise ValueError("one device has no partners")
        lines = []
        for kind in links.KINDS:
            rows = [
                self._time(links.collective(self.machine, kind, size), "link")
                for size in self.machine.sizes.messages
            ]
            lines.append(links.fitted([r.amount for r in rows], [r.seconds for r in rows]))
            self.rows[-len(rows) :] = [r._replace(what=f"{kind} of {gb(r.amount)}") for r in rows]
        self.rates["link"] = len(lines) / sum(1 / line.rate for line in lines)
        self.rates["collective"] = math.fsum(line.latency for line in lines) / len(lines)

    def _host_link(self) -> None:
        probe = links.to_host(self.machine)
        if probe is None:
            raise ValueError("these devices share their host's memory")
        self.rates["host_link"] = self._time(probe, "host_link").value
