"""What became of every key: three lists, batch and steps of theirs and of ours, the launch command."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from deepseek_jax.errors import UserError
from deepseek_jax.migrate import config_file
from deepseek_jax.migrate.migration import Migration, Setting, Verdict
from deepseek_jax.migrate.source import Entry


@dataclass
class Lists:
    """Every entry of every source, in exactly one of these."""

    became: list[tuple[Entry, dict[str, Setting]]] = field(default_factory=list)
    no_effect: list[tuple[Entry, str]] = field(default_factory=list)
    refused: list[tuple[Entry, Verdict]] = field(default_factory=list)
    left_out: list[tuple[Entry, str]] = field(default_factory=list)  # refused, and --allow names it


def lists(m: Migration, allow: Iterable[str] = ()) -> Lists:
    """The verdict on each entry.

    Args:
      m: the migration, done.
      allow: patterns of --allow.

    Raises:
      UserError: a pattern of --allow names nothing that is refused.
    """
    out, allow = Lists(), list(allow)
    unused = set(allow)
    for reading in m.readings:
        for entry in reading.source.all_keys():
            verdict = m.verdict(entry)
            if verdict is None:
                out.became.append((entry, m.became(entry)))
            elif not verdict.refused:
                out.no_effect.append((entry, verdict.why))
            elif named := [p for p in allow if m.allowed(entry, [p])]:
                unused -= set(named)
                out.left_out.append((entry, f"left out on request: {verdict.why}"))
            else:
                out.refused.append((entry, verdict))
    for entry in m.absent:
        verdict = m.verdicts[entry]
        if named := [p for p in allow if m.allowed(entry, [p])]:
            unused -= set(named)
            out.left_out.append((entry, f"left out on request: {verdict.why}"))
        else:
            out.refused.append((entry, verdict))
    if unused:
        raise UserError(
            f"--allow={sorted(unused)[0]} names no key that is refused here. Refused are: "
            f"{', '.join(e.key for e, _ in out.refused) or 'none'}."
        )
    return out


def text(m: Migration, found: Lists, launch: str, rows: int | None = None) -> str:
    """The whole report."""
    parts = [
        _list(
            "Became",
            [
                (e, ", ".join(f"{n}={_short(s.value)}" for n, s in to.items()))
                for e, to in found.became
            ],
        ),
        _list("No effect here", found.no_effect),
    ]
    if found.left_out:
        parts.append(_list("Left out (--allow)", found.left_out))
    if found.refused:
        parts.append(
            _list("Refused", [(e, f"{v.why}. {v.repair}".strip(". ")) for e, v in found.refused])
        )
    defaults = [
        (f"config.{name}={_short(s.value)}", config_file.origins(s))
        for name, s in m.settings.items()
        if not any(t.entry for t in s.because)
    ]
    if defaults:
        parts.append(_table("Written out, as no key says so", defaults))
    parts.append("\n".join(["Batch and length", *(f"  {line}" for line in amounts(m, rows))]))
    if m.notes:
        parts.append("\n".join(["Mind", *(f"  {note}" for note in m.notes)]))
    parts.append("\n".join(["Launch", *(f"  {line}" for line in launch.splitlines())]))
    return "\n\n".join(p for p in parts if p)


def as_json(m: Migration, found: Lists, launch: str) -> dict[str, Any]:
    """The same for programs."""

    def place(entry: Entry) -> dict[str, Any]:
        return {"key": entry.key, "value": entry.value, "where": entry.where}

    return {
        "became": [
            {**place(e), "options": {n: s.value for n, s in to.items()}} for e, to in found.became
        ],
        "no_effect": [{**place(e), "why": why} for e, why in found.no_effect],
        "left_out": [{**place(e), "why": why} for e, why in found.left_out],
        "refused": [{**place(e), "why": v.why, "repair": v.repair} for e, v in found.refused],
        "options": {
            n: {"value": s.value, "origin": config_file.origins(s)} for n, s in m.settings.items()
        },
        "notes": m.notes,
        "launch": launch,
    }


def amounts(m: Migration, rows: int | None = None) -> list[str]:
    """Sequences and tokens of a step, steps of the run: theirs beside ours.

    Args:
      m: the migration, done.
      rows: examples or documents of the data, of --rows; None: not known.
    """
    size = m.settings["train.batch_size"].value
    found = m.settings.get("train.sequence_length")
    length = found.value if found else None
    out = [f"a step has {size} sequences: {m.settings['train.batch_size'].how or size}"]
    if length:
        unpacked = m.fact("unpacked")
        at_most = "at most " if unpacked else ""
        out.append(f"tokens per step: {at_most}{size * length:,} here, rows of {length}")
        if unpacked and "sft.packing" not in m.settings:
            out.append(
                "theirs are padded, one example a row: fewer tokens per step by mean length / row; "
                "--match=tokens keeps their number"
            )
    steps = m.settings["train.steps"].value
    if steps:
        out.append(f"steps: {steps} theirs and here")
        if length:
            at_most = "at most " if m.fact("unpacked") else ""
            out.append(f"tokens of the run: {at_most}{steps * size * length:,}")
    else:
        epochs = m.settings["train.epochs"].value
        passes = f"{epochs:g} epoch{'s' * (epochs != 1)}"
        out.append(f"{passes}: steps follow from the data and are in the first lines of the run")
        if rows:
            each = -(-rows // size)
            out.append(
                f"of {rows:,} rows: {round(each * epochs):,} steps theirs; as many here where a row holds "
                f"one example, fewer where they are packed"
            )
    return out


def refusal(found: Lists) -> str:
    """One line about what is refused."""
    first, verdict = found.refused[0]
    keys = list(dict.fromkeys(e.key for e, _ in found.refused))
    rest = (
        f" Refused as well: {', '.join(keys[1:8])}{' ...' if len(keys) > 8 else ''}."
        if keys[1:]
        else ""
    )
    repair = f"{verdict.repair}, or" if verdict.repair else "Take it out, or"
    allow = f"{repair} give --allow={first.key} to leave it out."
    return f"{first.label}: {verdict.why}. {allow}{rest}"


def _list(title: str, rows: Iterable[tuple[Entry, str]]) -> str:
    return _table(title, [(e.label, why) for e, why in rows])


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    width = min(max((len(left) for left, _ in rows), default=0), 56)
    lines = [f"  {left:<{width}}  {right}" for left, right in rows]
    return "\n".join([f"{title}: {len(rows)}", *lines])


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return (text[:47] + "...") if len(text) > 50 else text or "''"
