"""How fast the devices of this machine are, measured: what `plan --rates` takes.

  python -m deepseek_jax.plan calibrate --out=rates.json
  python -m deepseek_jax.plan calibrate --devices=8 --out=rates.json        (8 virtual devices of this CPU)
  python -m deepseek_jax.plan --config=... --devices=8 --roofline --rates=rates.json

Times matrix products (large and narrow; float32, bfloat16, and TF32 and float8 where they exist),
attention, grouped products of experts, memory, collectives of several kinds and sizes, the way to
the host's memory, and what a kernel, a collective and a number that the host reads cost besides. All
devices work at the same time, as in a step: virtual CPU devices share the cores, so their rates are
for that many devices. Medians of five repetitions; +- is half the distance between the second
fastest and the second slowest. How much of the machine other programs used meanwhile is said:
rates of a busy machine are those of a busy machine.

Exit codes: 0; 2 a mistake in the options.
"""

import json
from typing import Any

from deepseek_jax.cli import arguments
from deepseek_jax.cli.texts import human, table
from deepseek_jax.config.paths import check_output
from deepseek_jax.errors import UserError
from deepseek_jax.plan import host, options, present, rates_file
from deepseek_jax.plan.calibrate import measure


def main(argv: list[str]) -> int:
    """The command. Arguments: without the program's name."""
    parser = options.Parser(__doc__)
    parser.prog = "deepseek_jax.plan calibrate"
    parser.add_argument("--devices", type=arguments.whole(1), help="How many; all by default.")
    parser.add_argument(
        "--seconds",
        type=arguments.number(0),
        default=measure.SECONDS,
        help="Of timing; compiling comes on top.",
    )
    parser.add_argument(
        "--out", type=arguments.path, metavar="FILE.json", help="Where to keep the rates."
    )
    own = parser.parse_args(argv)
    if own.out and not own.out.endswith(".json"):
        raise UserError(
            f"--out={own.out}: --rates knows a file by its name. Let it end in .json, for instance "
            f"--out={own.out}.json."
        )
    if own.out:
        check_output("--out", own.out)
    devices = present.devices(own.devices)
    found = measure.calibrated(devices, own.seconds, show=not own.json).as_json()
    if own.out:
        rates_file.write(own.out, found)
    print(json.dumps(found, indent=1) if own.json else text(found, own.out))
    return 0


def text(found: dict[str, Any], out: str | None) -> str:
    """What was measured, for a person."""
    rows = [["what", "rate", "one device", "+-"]]
    for r in found["rows"]:
        rows.append([r["what"], r["rate"], said(r["rate"], r["value"]), f"{r['spread']:.0%}"])
    rates = [["rate", "one device"]]
    rates += [[name, said(name, value)] for name, value in found["rates"].items()]
    lines = [
        f"{found['devices']} x {found['device']}, {found['cores']} cores, jax {found['jax']}, "
        f"{found['took']:.0f} s; {host.said(found['other_cores'])}",
        "",
        table(rows, right=False),
        "",
        table(rates, right=False),
    ]
    lines += ["", *(f"not measured: {name}: {why}" for name, why in found["missing"].items())]
    if out:
        lines += [
            "",
            f"Kept: {out}. Use it: python -m deepseek_jax.plan ... --roofline --rates={out}",
        ]
    return "\n".join(lines)


def said(rate: str, value: float) -> str:
    """A rate with its unit."""
    if rate in rates_file.SECONDS:
        return f"{value * 1e6:.3g} us"
    unit = "B/s" if rate in rates_file.OF_BYTES else "FLOP/s"
    return human(value, tuple(f" {prefix}{unit}" for prefix in ("", "k", "M", "G", "T")))
