"""Texts: numbers and tables for people to read, and text as people gave it."""

from collections.abc import Mapping, Sequence
from typing import Any


def clean_text(text: str) -> str:
    """The text with lone surrogates, which JSON and a command line can spell but UTF-8 cannot, replaced by
    U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def clean(value: Any) -> Any:
    """A value of JSON's types with every text and key in it cleaned."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, Mapping):
        return {clean(k): clean(v) for k, v in value.items()}
    return [clean(v) for v in value] if isinstance(value, (list, tuple)) else value


def gb(n: float) -> str:
    """12345678901 -> '12.3 GB'."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= 0.9995 * size:
            return f"{n / size:.3g} {unit}" if n < 999.5 * size else f"{n / size:,.0f} {unit}"
    return f"{n:.0f} B"


def plural(n: int, word: str) -> str:
    """1, host -> '1 host'; 2, host -> '2 hosts'."""
    return f"{n} {word}{'' if n == 1 else 'es' if word.endswith('ch') else 's'}"


def table(rows: Sequence[Sequence[str]], indent: str = "", right: bool = True) -> str:
    """Columns wide enough for their cells; the first row is the heading; all but the first column to the right, or to the left too."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = lambda row: [
        c.rjust(w) if right and i else c.ljust(w)
        for i, (c, w) in enumerate(zip(row, widths, strict=True))
    ]
    return "\n".join((indent + "  ".join(cells(row))).rstrip() for row in rows)
