"""How fast devices are: what their data sheets promise, what programs are expected to reach, and where
each figure is from.

`ideal` is the data sheet's. `derated` is what a prediction should be planned with: mostly assumptions,
each said to be one, and corrected where something has been measured. Megatron-LM's and FlashAttention's
authors report such shares of an H100's peak for their own kernels.
"""

import re
from typing import Any, NamedTuple

from deepseek_jax.errors import UserError


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


def speed_of(hardware: str, given: str) -> Speed:
    """The rates of a kind of hardware, with those that the command line gives.

    Args:
      hardware: a key of SPEEDS, or another, of which every rate that is used must be given.
      given: of --rates, "bf16=750e12,memory=4.3e12": in place of the derated figures; where nothing
        is known of the hardware, of both.

    Raises:
      UserError: a name or number is none, or cpu is given no rates.
    """
    rates = _given(given)
    if hardware in SPEEDS:
        speed = SPEEDS[hardware]
        reasons = speed.reasons | dict.fromkeys(rates, "given by --rates")
        return speed._replace(derated=speed.derated._replace(**rates), reasons=reasons)
    missing = {"f32", "memory"} - rates.keys()
    if missing:
        raise UserError(
            f"--hardware={hardware} has no rates of its own for --roofline: how fast this machine is was not "
            "measured. Give them, for instance --rates=f32=150e9,memory=20e9 (FLOP/s and bytes/s)."
        )
    products = dict.fromkeys(
        (
            "bf16",
            "fp8",
            "tf32",
            "attention_forward",
            "attention_backward",
            "grouped",
            "grouped_fp8",
        )
    )
    known: dict[str, Any] = {name: rates["f32"] for name in products}
    known |= dict.fromkeys(("link", "network", "host_link"), rates["memory"])
    known |= {"launch": 0.0, "collective": 0.0, "host": 0.0} | rates
    both = Rates(**known)
    said = {name: "given by --rates" if name in rates else "follows from --rates" for name in known}
    return Speed(both, both, said, said)


def of_device(kind: str) -> Speed | None:
    """Of a device that is here, by its name for JAX ("NVIDIA H100 80GB HBM3"); None: not known."""
    return next((speed for name, speed in SPEEDS.items() if name.upper() in kind), None)


def _given(text: str) -> dict[str, float]:
    out = {}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        if name not in Rates._fields:
            raise UserError(
                f"--rates={text} names {name!r}, which is no rate. Choose from: {', '.join(Rates._fields)}."
            )
        is_number = re.fullmatch(r"\d+\.?\d*(?:e[+-]?\d+)?", value)
        if not is_number or (float(value) <= 0 and name not in ("launch", "collective", "host")):
            raise UserError(
                f"--rates={text} gives {name} the value {value!r}. Give a number above 0, such as 4e12."
            )
        out[name] = float(value)
    return out
