"""What --hardware stands for: a GPU by name, or memory, FLOP/s and links as numbers."""

import re
from typing import NamedTuple

from deepseek_jax.errors import UserError
from deepseek_jax.plan import rates, topology
from deepseek_jax.plan.rates import Rates, Speed

# What data sheets say of GPUs that XLA has no description of here, and whose description stands in. FLOP/s
# without sparsity, links one way; an A100 has no FP8.
_SHEETS = {
    "a100": (
        topology.Hardware("NVIDIA A100", 80_000_000_000, topology.HARDWARE["h100"].description),
        "NVIDIA A100 80GB SXM data sheet",
        {"bf16": 312e12, "fp8": 312e12, "tf32": 156e12, "f32": 19.5e12, "memory": 2.039e12}
        | {"link": 300e9, "network": 25e9, "host_link": 32e9},
    ),
    "b200": (
        topology.Hardware("NVIDIA B200", 180_000_000_000, topology.HARDWARE["h200"].description),
        "NVIDIA HGX B200 data sheet",
        {"bf16": 2250e12, "fp8": 4500e12, "tf32": 1100e12, "f32": 75e12, "memory": 7.7e12}
        | {"link": 900e9, "network": 50e9, "host_link": 64e9},
    ),
    "gb200": (
        topology.Hardware("NVIDIA GB200", 186_000_000_000, topology.HARDWARE["h200"].description),
        "NVIDIA GB200 NVL72 data sheet",
        {"bf16": 2500e12, "fp8": 5000e12, "tf32": 1250e12, "f32": 80e12, "memory": 8e12}
        | {"link": 900e9, "network": 50e9, "host_link": 450e9},
    ),
}
_STANDS_IN = {"a100": "h100", "b200": "h200", "gb200": "h200"}
NAMES = (*rates.SPEEDS, *_SHEETS, "cpu")
_OWN = ("capacity", "bf16", "memory", "link", "network")  # what numbers alone must say


class Known(NamedTuple):
    """Hardware to plan for.

    Attributes:
      key: "h200"; "" for numbers.
      hardware: its memory, and what XLA compiles for.
      speed: its rates.
      stands_in: whose description XLA compiles for; "" where it is its own.
    """

    key: str
    hardware: topology.Hardware
    speed: Speed
    stands_in: str


def find(text: str, given: str) -> Known:
    """What a name or numbers stand for; not of "cpu", whose rates are measured.

    Args:
      text: a key of NAMES, or "capacity=80e9,bf16=312e12,memory=2e12,link=300e9,network=25e9": bytes, FLOP/s,
        bytes per second of its memory, to devices of its host and to other hosts; and other names of Rates.
      given: of --rates.

    Raises:
      UserError: it is neither.
    """
    if text in rates.SPEEDS:
        return Known(text, topology.HARDWARE[text], rates.speed_of(text, given), "")
    if text in _SHEETS:
        hardware, sheet, figures = _SHEETS[text]
        speed = _scaled(figures, f"{sheet}", "as on an H100, by the ratio of the data sheets")
        return Known(text, hardware, _with(speed, given), _STANDS_IN[text])
    if "=" not in text:
        raise UserError(
            f"--hardware={text} is not known. Choose from: {', '.join(NAMES)}, or give "
            "--hardware=capacity=80e9,bf16=312e12,memory=2e12,link=300e9,network=25e9 (bytes, bytes/s)."
        )
    figures = _numbers(text)
    if missing := [name for name in _OWN if name not in figures]:
        raise UserError(
            f"--hardware={text} does not say {', '.join(missing)}. Give all of {', '.join(_OWN)}: bytes of a "
            "device, FLOP/s, bytes/s of its memory, to its host's other devices and to other hosts."
        )
    capacity = int(figures.pop("capacity"))
    hardware = topology.Hardware("device", capacity, topology.HARDWARE["h200"].description)
    speed = _scaled(figures, "given by --hardware", "as on an H100, by the ratio of the peaks")
    return Known("", hardware, _with(speed, given), "h200")


def _scaled(figures: dict[str, float], source: str, reason: str) -> Speed:
    """An H100's rates, each by the ratio of what is known of both; products by that of bf16."""
    h100 = rates.SPEEDS["h100"]
    by_bf16 = figures["bf16"] / h100.ideal.bf16
    ideal, derated = {}, {}
    for name in Rates._fields:
        base = getattr(h100.ideal, name)
        products = name in ("fp8", "tf32", "f32") or name.startswith(("attention", "grouped"))
        by = figures[name] / base if name in figures else by_bf16 if products else 1.0
        if name == "grouped_fp8" and "fp8" in figures:
            by = figures["fp8"] / h100.ideal.fp8
        ideal[name] = base * by
        derated[name] = getattr(h100.derated, name) * by
    sources = {name: source if name in figures else "as bf16, or an H100's" for name in ideal}
    return Speed(Rates(**ideal), Rates(**derated), sources, dict.fromkeys(ideal, reason))


def _with(speed: Speed, given: str) -> Speed:
    if not given:
        return speed
    own = rates.speed_of("h100", given)
    names = [n for n in Rates._fields if own.reasons.get(n) != rates.SPEEDS["h100"].reasons.get(n)]
    changed = {name: getattr(own.derated, name) for name in names}
    reasons = speed.reasons | {name: own.reasons[name] for name in names}
    return speed._replace(derated=speed.derated._replace(**changed), reasons=reasons)


def _numbers(text: str) -> dict[str, float]:
    out = {}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        if name not in ("capacity", *Rates._fields):
            raise UserError(
                f"--hardware={text} names {name!r}. Choose from: capacity, {', '.join(Rates._fields)}."
            )
        if not re.fullmatch(r"\d+\.?\d*(?:e[+-]?\d+)?", value) or float(value) <= 0:
            raise UserError(
                f"--hardware={text} gives {name} the value {value!r}. Give a number above 0, such as 80e9."
            )
        out[name] = float(value)
    return out
