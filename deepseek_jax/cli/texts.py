"""Texts: numbers and tables for people to read, and text as people gave it."""

from collections.abc import Mapping, Sequence
from typing import Any


def clean_text(text: str) -> str:
    """The text with U+FFFD in place of lone surrogates.

    JSON and a command line can spell these, UTF-8 cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def printable(text: str) -> str:
    """The text with ? in place of what steers a terminal or cannot be seen."""
    return "".join(c if c.isprintable() else "?" for c in text)


def clean(value: Any) -> Any:
    """A value of JSON's types with every text and key in it cleaned."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, Mapping):
        return {clean(k): clean(v) for k, v in value.items()}
    return [clean(v) for v in value] if isinstance(value, (list, tuple)) else value


def human(n: float, units: Sequence[str] = ("", "k", "M", "B", "T")) -> str:
    """Three digits: 1234567 -> '1.23M'. `units`: of 1, 10^3, 10^6, 10^9 and 10^12."""
    n = float(f"{n:.3g}")
    for power in range(len(units) - 1, 0, -1):
        if n >= 1000**power:
            value = n / 1000**power
            return (f"{value:.4g}" if value < 1000 else f"{value:,.0f}") + units[power]
    return f"{n:.0f}{units[0]}"


def gb(n: float) -> str:
    """Bytes: 12345678901 -> '12.3 GB'."""
    return human(n, (" B", " kB", " MB", " GB", " TB"))


def plural(n: int, word: str) -> str:
    """1, host -> '1 host'; 2, host -> '2 hosts'."""
    if n == 1:
        return f"{n} {word}"
    return f"{n} {word}{'es' if word.endswith('ch') else 's'}"


def table(rows: Sequence[Sequence[str]], indent: str = "", right: bool = True) -> str:
    """Columns as wide as their cells; the first row is the heading.

    Args:
      indent: before every line.
      right: all columns but the first stand to the right; else to the left.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def cells(row: Sequence[str]) -> list[str]:
        columns = enumerate(zip(row, widths, strict=True))
        return [c.rjust(w) if right and i else c.ljust(w) for i, (c, w) in columns]

    return "\n".join((indent + "  ".join(cells(row))).rstrip() for row in rows)
