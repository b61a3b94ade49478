"""How fast devices are: what their data sheets promise, what programs are expected to reach, and where
each figure is from.

`ideal` is the data sheet's. `derated` is what a prediction should be planned with: mostly assumptions,
each said to be one, and corrected where something has been measured. Megatron-LM's and FlashAttention's
authors report such shares of an H100's peak for their own kernels.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from deepseek_jax.errors import UserError
from deepseek_jax.plan import rates_file

GIVEN = "given by --rates"


class Rates(NamedTuple):
    """What a device does per second, and what things cost that are no work.

    FLOP/s of the kinds of xla/kernels.py, bytes per second, and seconds.
    """

    bf16: float
    fp8: float
    tf32: float
    f32: float
    attention_forward: float
    attention_backward: float
    grouped: float
    grouped_fp8: float
    memory: float  # bytes/s read or written
    link: float  # bytes/s received from devices of the same host
    network: float  # bytes/s received from other hosts
    host_link: float  # bytes/s between the device and its host's memory
    launch: float  # s from one kernel to the next
    collective: float  # s of a collective beside its bytes
    host: float  # s until the host has read a number and gone on


class Speed(NamedTuple):
    """A kind of device.

    Attributes:
      ideal, derated: see the top of this file.
      sources: of the ideal figures, by field of Rates. Those it does not name are not the device's.
      reasons: of the derated figures, by field.
    """

    ideal: Rates
    derated: Rates
    sources: dict[str, str]
    reasons: dict[str, str]


_HOPPER = {
    "bf16": 989e12,
    "fp8": 1979e12,
    "tf32": 494e12,
    "f32": 67e12,
    "attention_forward": 989e12,
    "attention_backward": 989e12,
    "grouped": 989e12,
    "grouped_fp8": 1979e12,
    "link": 450e9,
    "network": 50e9,
    "host_link": 64e9,
    "launch": 3e-6,
    "collective": 8e-6,
    "host": 0.0,
}
_HOPPER_DERATED = {
    "bf16": 700e12,
    "fp8": 1400e12,
    "tf32": 350e12,
    "f32": 50e12,
    "attention_forward": 560e12,
    "attention_backward": 450e12,
    "grouped": 550e12,
    "grouped_fp8": 825e12,
    "link": 360e9,
    "network": 40e9,
    "host_link": 50e9,
    "launch": 3e-6,
    "collective": 8e-6,
    "host": 15e-6,
}
_DGX = "DGX H100/H200 data sheet: one 400 Gb/s adapter a GPU"
_ASSUMED = "assumed"


def _sources(sheet: str) -> dict[str, str]:
    dense = f"{sheet}: half of the figure with sparsity"
    return {
        "bf16": dense,
        "fp8": dense,
        "tf32": dense,
        "f32": sheet,
        "attention_forward": "as bf16",
        "attention_backward": "as bf16",
        "grouped": "as bf16",
        "grouped_fp8": "as fp8",
        "memory": sheet,
        "link": f"{sheet}: NVLink 900 GB/s, half of it each way",
        "network": _DGX,
        "host_link": f"{sheet}: PCIe Gen5 128 GB/s, half of it each way",
        "launch": _ASSUMED,
        "collective": _ASSUMED,
    }


_SHARED = "beside other programs on the card (benchmarks/results/gpu_h200.json, 2026-11-28)"
_REASONS = {
    "bf16": f"assumed, 71% of peak; 624 TFLOP/s measured on an H200 forward, 569 both gradients, {_SHARED}",
    "fp8": "assumed, as bf16",
    "tf32": "assumed, as bf16",
    "f32": "assumed",
    "attention_forward": "assumed for head widths of 192 and 128",
    "attention_backward": "assumed for head widths of 192 and 128",
    "grouped": f"assumed; 474 TFLOP/s measured on an H200 forward with jax.experimental's kernel, {_SHARED}",
    "grouped_fp8": "assumed, 1.5 times grouped; never measured",
    "memory": "assumed, 83% of peak",
    "link": "assumed, 80% of peak",
    "network": "assumed, 80% of peak",
    "host_link": "assumed, 78% of peak",
    "launch": _ASSUMED,
    "collective": _ASSUMED,
    "host": _ASSUMED,
}

SPEEDS = {
    "h200": Speed(
        Rates(memory=4.8e12, **_HOPPER),
        Rates(memory=4.0e12, **_HOPPER_DERATED),
        _sources("NVIDIA H200 data sheet (SXM), November 2023"),
        _REASONS,
    ),
    "h100": Speed(
        Rates(memory=3.35e12, **_HOPPER),
        Rates(memory=2.8e12, **_HOPPER_DERATED),
        _sources("NVIDIA H100 data sheet (SXM), March 2023"),
        _REASONS,
    ),
}


def speed_of(hardware: str, given: str, devices: int | None = None) -> Speed:
    """The rates of a kind of hardware, with those that the command line gives.

    Args:
      hardware: a key of SPEEDS, or another, of which every rate that is used must be given.
      given: of --rates, in place of the derated figures, and where nothing is known of the hardware, of
        both: "bf16=750e12,memory=4.3e12", or files that `plan calibrate` has written. Numbers win over files.
      devices: that are planned for; None: of no concern.

    Raises:
      UserError: a name or number is none, a file is none or of other devices, or cpu is given no rates.
    """
    items = list(filter(None, given.split(",")))
    files = [item for item in items if "=" not in item and item.endswith(".json")]
    speed = SPEEDS.get(hardware)
    for path in files:
        found = rates_file.read(path)
        _check(path, found, hardware, devices)
        speed = of_measured(hardware, found)
    rates = _given(given, [item for item in items if item not in files])
    if speed is not None:
        reasons = speed.reasons | dict.fromkeys(rates, GIVEN)
        derated = speed.derated._replace(**rates)
        ideal = speed.ideal if hardware in SPEEDS else derated
        return Speed(ideal, derated, speed.sources, reasons)
    missing = {"f32", "memory"} - rates.keys()
    if missing:
        raise UserError(
            f"--hardware={hardware} has no rates of its own for --roofline: how fast this machine is was not "
            "measured. Measure it, python -m deepseek_jax.plan calibrate --out=rates.json, and say "
            "--rates=rates.json; or give them: --rates=f32=150e9,memory=20e9 (FLOP/s and bytes/s)."
        )
    return _whole(rates, GIVEN)


def of_measured(hardware: str | None, found: Mapping[str, Any]) -> Speed:
    """Measured rates in place of the derated ones; of devices that are not in SPEEDS, of all.

    Args:
      hardware: a key of SPEEDS, or not.
      found: what `plan calibrate` has written.
    """
    measured = {name: found["rates"][name] for name in Rates._fields if name in found["rates"]}
    reason = f"measured by plan calibrate on {found['devices']} x {found['device']}"
    speed = SPEEDS.get(hardware or "")
    if speed is None:
        return _whole(measured, reason)
    reasons = speed.reasons | dict.fromkeys(measured, reason)
    return speed._replace(derated=speed.derated._replace(**measured), reasons=reasons)


def _whole(rates: Mapping[str, float], reason: str) -> Speed:
    """A Speed of some rates, f32 and memory among them: the others follow from these."""
    products = (
        "bf16",
        "fp8",
        "tf32",
        "attention_forward",
        "attention_backward",
        "grouped",
        "grouped_fp8",
    )
    known: dict[str, float] = dict.fromkeys(products, rates["f32"])
    known |= dict.fromkeys(("link", "network", "host_link"), rates["memory"])
    known |= {"launch": 0.0, "collective": 0.0, "host": 0.0} | dict(rates)
    both = Rates(**known)
    follows = "follows from f32 or memory" if reason != GIVEN else "follows from --rates"
    said = {name: reason if name in rates else follows for name in known}
    return Speed(both, both, said, said)


def of_device(kind: str) -> Speed | None:
    """Of a device that is here, by its name for JAX ("NVIDIA H100 80GB HBM3"); None: not known."""
    return SPEEDS.get(hardware_of(kind) or "")


def hardware_of(device: str) -> str | None:
    """The key of SPEEDS of a device by its name for JAX; None: not known."""
    return next((name for name in SPEEDS if name.upper() in device), None)


def _check(path: str, found: Mapping[str, Any], hardware: str, devices: int | None) -> None:
    """Raises UserError: the file is of other devices than those that are planned for."""
    device, of = found["device"], hardware_of(found["device"])
    on_cpu = found.get("platform") == "cpu"
    if on_cpu != (hardware == "cpu") or (of is not None and of != hardware):
        meant = "cpu" if on_cpu else (of or "that of its GPU")
        raise UserError(
            f"--rates={path} was measured on {device}, and --hardware={hardware} is another device. "
            f"Set --hardware={meant}, or leave --rates out."
        )
    if on_cpu and devices is not None and devices != found["devices"]:
        raise UserError(
            f"--rates={path} was measured with {found['devices']} devices at once, which share this "
            f"machine's cores, and --devices={devices}. Measure it again: python -m "
            f"deepseek_jax.plan calibrate --devices={devices} --out={path}"
        )


def _given(text: str, items: list[str]) -> dict[str, float]:
    """NAME=NUMBER of --rates."""
    out = {}
    for item in items:
        name, _, value = item.partition("=")
        if name not in Rates._fields:
            raise UserError(
                f"--rates={text} names {name!r}, which is no rate and no file of them (*.json). "
                f"Choose from: {', '.join(Rates._fields)}."
            )
        is_number = re.fullmatch(r"\d+\.?\d*(?:e[+-]?\d+)?", value)
        if not is_number or (float(value) <= 0 and name not in rates_file.SECONDS):
            raise UserError(
                f"--rates={text} gives {name} the value {value!r}. Give a number above 0, such as 4e12."
            )
        out[name] = float(value)
    return out
