"""Measured rates: that probes count what their programs do, the file, and what a prediction makes of it."""

import json
import math
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.plan import __main__ as plan
from deepseek_jax.plan import rates, rates_file
from deepseek_jax.plan.calibrate import command, links, measure, probes, timing
from deepseek_jax.plan.rates import Rates
from deepseek_jax.plan.timeline import Program, Timeline
from deepseek_jax.xla import program

FOUND: dict[str, Any] = {
    "format": rates_file.FORMAT,
    "platform": "cpu",
    "device": "Some CPU",
    "devices": 8,
    "rates": {"f32": 5e9, "bf16": 6e9, "memory": 1e9, "link": 2e8, "collective": 1e-4},
}
OF_H200 = FOUND | {"platform": "gpu", "device": "NVIDIA H200", "devices": 1}
SMALL = probes.ON_CPU._replace(
    rows=16, large=(32, 64), narrow=(32, 16), memory=2**16, length=16, expert_rows=64
)


def kept(tmp_path, content) -> str:
    path = str(tmp_path / "rates.json")
    rates_file.write(path, content)
    return path


def test_a_file_of_a_gpu_replaces_the_derated_rates(tmp_path):
    path = kept(tmp_path, OF_H200)
    speed = rates.speed_of("h200", path)
    assert speed.derated.bf16 == 6e9 and speed.derated.link == 2e8
    assert speed.derated.network == rates.SPEEDS["h200"].derated.network
    assert speed.ideal == rates.SPEEDS["h200"].ideal
    assert speed.reasons["bf16"] == "measured by plan calibrate on 1 x NVIDIA H200"
    numbers = rates.speed_of("h200", f"bf16=7e14,{path},memory=4e12")
    assert numbers.derated.bf16 == 7e14 and numbers.derated.memory == 4e12
    assert numbers.derated.link == 2e8 and numbers.reasons["bf16"] == "given by --rates"
    assert speed == rates.of_measured("h200", OF_H200)


def test_a_file_of_a_cpu_is_both_ideal_and_derated(tmp_path):
    speed = rates.speed_of("cpu", kept(tmp_path, FOUND), 8)
    assert speed.ideal == speed.derated and speed.derated.collective == 1e-4
    assert speed.derated.tf32 == 5e9 and speed.derated.host_link == 1e9  # follow
    assert "follows" in speed.reasons["tf32"] and "Some CPU" in speed.reasons["f32"]
    assert rates.speed_of("cpu", f"{tmp_path / 'rates.json'},f32=9e9", 8).derated.f32 == 9e9


@pytest.mark.parametrize(
    "hardware, content, said",
    [
        ("h200", FOUND, "--hardware=cpu"),
        ("cpu", OF_H200, "--hardware=h200"),
        ("h100", OF_H200, "--hardware=h200"),
        ("cpu", FOUND | {"devices": 2}, "calibrate --devices=8"),
        ("cpu", FOUND | {"format": "another"}, "no file of measured rates"),
        ("cpu", FOUND | {"rates": {"bf16": 1.0}}, "no file of measured rates"),
        ("cpu", FOUND | {"rates": FOUND["rates"] | {"f32": -1}}, "gives f32 the value -1"),
        ("cpu", FOUND | {"rates": FOUND["rates"] | {"f32": "quick"}}, "the value 'quick'"),
        ("cpu", FOUND | {"rates": FOUND["rates"] | {"f32": True}}, "the value True"),
        ("cpu", FOUND | {"device": 3}, "does not say of which devices"),
        ("cpu", [1], "no file of measured rates"),
    ],
)
def test_files_that_are_refused(tmp_path, hardware, content, said):
    with pytest.raises(UserError, match=said) as error:
        rates.speed_of(hardware, kept(tmp_path, content), 8)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="cannot be read .*calibrate --out="):
        rates.speed_of("cpu", str(tmp_path / "none.json"))
    torn = tmp_path / "torn.json"
    torn.write_text('{"format": ', encoding="utf-8")
    with pytest.raises(UserError, match="no file of measured rates"):
        rates.speed_of("cpu", str(torn))
    with pytest.raises(UserError, match="cannot be written"):
        rates_file.write(str(tmp_path), FOUND)
    assert [p.name for p in tmp_path.iterdir()] == ["torn.json"]


def of_one_turn(run: probes.Repeated, devices: int = 1):
    """(FLOPs, bytes) of one turn of a program's loop, as the planner reads it."""
    shape = {"data": 1, "stage": 1, "fsdp": devices, "expert": 1, "context": 1, "tensor": 1}
    compiled = Program(run.text(), shape, shape, on_gpu=False)
    unit = Rates(**dict.fromkeys(Rates._fields, 1.0))
    costs = Timeline(compiled, unit).run().costs
    inside = [c for c in costs if c.of.computation != compiled.module.entry]
    flops = sum(c.times * n for c in inside for n in c.work.flops.values())
    return flops, sum(c.times * c.work.bytes for c in inside), compiled


@pytest.fixture(scope="module")
def one_device() -> probes.Machine:
    return probes.machine_of(jax.devices()[:1])._replace(sizes=SMALL)


@pytest.mark.parametrize("what", ["large", "narrow"])
def test_flops_of_products(one_device, what):
    probe = probes.product(one_device, what, jnp.float32)
    flops, _, _ = of_one_turn(probe.call)
    d, f = getattr(SMALL, what)
    assert flops == probe.amount == 2 * 2 * 16 * d * f


def test_bytes_of_the_triad(one_device):
    probe = probes.triad(one_device, "memory")
    _, moved, _ = of_one_turn(probe.call)
    # Beside it the loop counts its turns: some numbers of 4 bytes.
    assert probe.amount == 3 * 2**16 <= moved <= probe.amount + 64
    a = np.asarray(probe.call(3))
    first, second = (np.asarray(one_device.array((2**14,), jnp.float32, seed=i)) for i in (0, 1))
    for _ in range(3):
        first = second + np.float32(0.5) * first
    np.testing.assert_allclose(a, first, rtol=1e-6)  # the same float32 operations, fused or not


def test_launches_are_kernels_of_their_own(one_device):
    _, _, compiled = of_one_turn(probes.launches(one_device).call)
    dots = [
        i
        for name, body in compiled.module.computations.items()
        for i in body.values()
        if i.opcode in ("dot", "custom-call", "fusion") and name != compiled.module.entry
    ]
    assert len(dots) >= probes.LAUNCHES


@pytest.mark.parametrize("kind", links.KINDS)
def test_bytes_of_collectives(kind):
    machine = probes.machine_of(jax.devices()[:4])
    probe = links.collective(machine, kind, 3 * 2**10)
    assert abs(probe.amount - 3 * 2**10) <= 16
    text = probe.call.text()  # type: ignore[attr-defined]
    (found,) = program.collectives(text, machine.mesh.shape)
    assert (found.kind, found.bytes, found.group) == (kind, probe.amount, 4)
    assert not np.asarray(probe.call(2)).any()


def test_the_line_through_sizes():
    bytes_ = [1e3, 1e5, 1e7]
    line = links.fitted(bytes_, [1e-4 + b / 2e9 for b in bytes_])
    assert line.latency == pytest.approx(1e-4) and line.rate == pytest.approx(2e9)
    # Times that fall below nothing at no bytes: no latency, and the rate of the whole.
    line = links.fitted(bytes_, [b / 2e9 * (0.5 if b < 1e6 else 1) for b in bytes_])
    assert line.latency >= 0 and 1e9 < line.rate < 5e9


def test_times_are_of_a_turn_alone(monkeypatch):
    """A clock that moves by 2 s for a call and 10 ms for a turn: the call's own cost is taken off."""
    now = 0.0

    def call(turns: int) -> None:
        nonlocal now
        now += 2.0 + 0.01 * turns

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    found = timing.time_of(timing.Probe("sleep", 1.0, call), budget=1.0)
    assert found.seconds == pytest.approx(0.01) and found.spread == pytest.approx(0, abs=1e-9)
    assert found.turns == 14 and found.repetitions == timing.REPETITIONS  # 1 s / 7 calls / 10 ms


def made_up() -> measure.Calibration:
    row = measure.Row("float32 products", "f32", 5e9, 0.02, 5, 10, 1e6, 2e-4)
    return measure.Calibration(
        "cpu",
        "Some CPU",
        2,
        2,
        "0.10.2",
        "2026-01-01",
        3.0,
        0.0,
        FOUND["rates"],
        [row],
        {"fp8": "?"},
    )


def test_the_command(tmp_path, monkeypatch, capsys):
    seen = {}

    def calibrated(devices, seconds, show):
        seen.update(devices=len(devices), seconds=seconds)
        return made_up()

    monkeypatch.setattr(measure, "calibrated", calibrated)
    out = tmp_path / "rates.json"
    assert plan.main(["calibrate", "--devices=2", "--seconds=3", f"--out={out}"]) == 0
    assert seen == {"devices": 2, "seconds": 3.0}
    said = capsys.readouterr().out
    assert "5 GFLOP/s" in said and "100 us" in said and f"--rates={out}" in said
    assert rates.speed_of("cpu", str(out), 2).derated.bf16 == 6e9
    assert plan.main(["calibrate", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rates"] == FOUND["rates"]
    for flags, why in (
        (["--out=rates"], "end in .json"),
        ([f"--out={tmp_path}/no/rates.json"], "does not exist"),
        (["--seconds=0"], "not a number above 0"),
        (["--devices=0"], "whole number of 1 or more"),
        (["--hardware=h200"], "unrecognized"),
    ):
        with pytest.raises(UserError, match=why):
            command.main(flags)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_everything_is_measured(devices):
    """On virtual devices of this CPU: finite and positive, every field that a CPU has."""
    found = measure.calibrated(jax.devices()[:devices], seconds=1.0, show=False)
    has = {"f32", "bf16", "attention_forward", "attention_backward", "grouped"}
    has |= {"memory", "cached", "launch", "host"} | (
        {"link", "collective"} if devices > 1 else set()
    )
    assert has <= found.rates.keys(), found.missing
    assert found.missing.keys() == {"tf32", "fp8", "host_link"} | (
        {"link", "collective"} if devices == 1 else set()
    )
    values = {k: v for k, v in found.rates.items() if k not in rates_file.SECONDS}
    assert all(math.isfinite(v) and v > 0 for v in values.values())
    assert statistics.median(row.repetitions for row in found.rows) == timing.REPETITIONS
    speed = rates.of_measured(None, json.loads(json.dumps(found.as_json())))
    assert speed.derated.f32 == found.rates["f32"]
