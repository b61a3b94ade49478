"""HTML as text in which nothing but what the page itself writes is markup."""

import html
from collections.abc import Iterable, Sequence
from typing import Union

from deepseek_jax.cli.texts import clean_text

_VOID = ("br", "col", "input", "meta")


class Markup(str):
    """Text that is HTML already. Any other text is escaped where it enters a tag."""


Child = Union[str, None, "Iterable[Child]"]


def visible(text: str) -> str:
    """The text with U+FFFD in place of what cannot be seen, or turns the order of the text around it."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in clean_text(text))


def joined(*children: Child) -> Markup:
    """One after the other; lists are taken apart, None is nothing."""
    out: list[str] = []
    for child in children:
        if isinstance(child, Markup):
            out.append(child)
        elif isinstance(child, str):
            out.append(html.escape(visible(child)))
        elif child is not None:
            out.append(joined(*child))
    return Markup("".join(out))


def tag(name: str, /, *children: Child, **attributes: object) -> Markup:
    """An element. Of attributes, class_ is class and data_x data-x; None is left out, True has no value."""
    text = ""
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            text += f" {key}"
        elif value is not None and value is not False:
            text += f' {key}="{html.escape(visible(str(value)))}"'
    if name in _VOID:
        return Markup(f"<{name}{text}>")
    return Markup(f"<{name}{text}>{joined(*children)}</{name}>")


def table(heads: Sequence[str], rows: Iterable[Sequence[Child]], caption: str = "") -> Markup:
    """A table that scrolls by itself where it is wider than the page. Cells that are numbers stand to the
    right, by their text."""
    head = tag("tr", [tag("th", h, scope="col") for h in heads])
    body = [tag("tr", [_cell(cell, i) for i, cell in enumerate(row)]) for row in rows]
    whole = tag(
        "table",
        tag("caption", caption) if caption else None,
        tag("thead", head),
        tag("tbody", body),
    )
    return tag(
        "div",
        whole,
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=caption or ", ".join(heads),
    )


def _cell(cell: Child, index: int) -> Markup:
    numeric = (
        isinstance(cell, str)
        and not isinstance(cell, Markup)
        and cell[:1].isdigit()
        and cell.replace(",", "").replace(".", "").replace(" ", "").replace("%", "").isalnum()
    )
    if index == 0:
        return tag("th", cell, scope="row")
    return tag("td", cell, class_="n" if numeric else None)
