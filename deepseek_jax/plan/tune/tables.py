"""What `plan tune` found, for a person: a table for each exercise, and the command line of its best row."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.cli.texts import gb, table
from deepseek_jax.plan import host
from deepseek_jax.plan.tune import changes, exercises


def text(r: Mapping[str, Any]) -> str:
    """All exercises."""
    lines = [
        f"{r['devices']} x {r['device']}, {r['cores']} cores, jax {r['jax']}; at most "
        f"{gb(r['room'])} of a device; tokens: {r['tokens']}; {host.said(r['other_cores'])}"
    ]
    for name, found in r["exercises"].items():
        lines += ["", *_exercise(name, found, r["flags"])]
    if r.get("interrupted"):
        lines += ["", "Interrupted: this is what there is."]
    return "\n".join(lines)


def _exercise(name: str, found: Mapping[str, Any], flags: Sequence[str]) -> list[str]:
    rows = found["rows"]
    head = ["sequences a device" if name == exercises.BATCH else name, "bytes of a device", "fits"]
    head += ["a step", "sequences/s", "tokens/s", "ratio"]
    with_rounds = any(r.get("padding") for r in rows)
    head += ["rounds", "padding"] if with_rounds else []
    cells = [head]
    first = next((r for r in rows if "seconds" in r), None)
    for r in rows:
        cells.append(_cells(r, first, with_rounds))
    lines = [f"{name}: {exercises.ABOUT[name]}", table(cells, "  ")]
    lines += [f"  {r['name']}: {r['refused']}" for r in rows if r.get("refused")]
    return lines + _best(name, found, flags)


def _cells(r: Mapping[str, Any], first: Mapping[str, Any] | None, with_rounds: bool) -> list[str]:
    out = [r["name"]]
    out += [gb(r["bytes"]), "yes" if r["fits"] else "NO"] if "bytes" in r else ["", ""]
    if "seconds" in r and first is not None:
        ratio = r["tokens_per_second"] / first["tokens_per_second"]
        out += [
            f"{r['seconds'] * 1e3:,.1f} ms",
            f"{r['samples_per_second']:,.2f}",
            f"{r['tokens_per_second']:,.0f}",
            f"{ratio:.2f}",
        ]
    else:
        refused = "refused" if r.get("refused") and "bytes" not in r else ""
        out += [refused, "", "", ""]
    if with_rounds:
        out += [str(r.get("rounds", "")), f"{r['padding']:.2f}" if r.get("padding") else ""]
    return out


def best(found: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The row with most tokens per second; None: none has run."""
    ran = [r for r in found["rows"] if "seconds" in r]
    return max(ran, key=lambda r: r["tokens_per_second"], default=None)


def _best(name: str, found: Mapping[str, Any], flags: Sequence[str]) -> list[str]:
    """The command lines to go on with."""
    lines = []
    if name == exercises.BATCH and "largest" in found:
        lines.append(_largest(found, flags))
    row = best(found)
    if row is not None and sum("seconds" in r for r in found["rows"]) > 1:
        lines.append(f"  most tokens per second: {row['name']}: {_command(row, flags)}")
    return lines


def _largest(found: Mapping[str, Any], flags: Sequence[str]) -> str:
    size = found["largest"]
    if not size:
        return "  not even one sequence of a device fits: divide the state over more devices, or offload it"
    row = next(r for r in found["rows"] if r["micro_batch"] == size)
    more = " (no more were tried: --most)" if found["ended"] else ""
    return f"  the largest that fits: {size}{more}: {_command(row, flags)}"


def _command(row: Mapping[str, Any], flags: Sequence[str]) -> str:
    """Of a run with the row's options: the flags as they were given, without those that the row sets."""
    new = {f"--config.{name}" for name in row["options"]}
    kept = [shlex.quote(flag) for flag in flags if flag.partition("=")[0] not in new]
    return " ".join(["python train.py", *kept, changes.said(row["options"])]).rstrip()
