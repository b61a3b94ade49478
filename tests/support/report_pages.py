"""Reads a report as a browser would: its elements and its data."""

import json
from html.parser import HTMLParser
from typing import Any

import numpy as np


class Page(HTMLParser):
    """Attributes: elements: (tag, attributes) in order. texts: {tag: the texts in it, one per element}. text:
    all that is shown. data: of the element "data"."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[tuple[str, int]] = []
        self.shown: list[str] = []
        self.feed(source)
        self.close()
        blocks = [i for i, (_, a) in enumerate(self._of("script")) if a.get("id") == "data"]
        self.data: Any = json.loads(self.texts["script"][blocks[0]])

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        if tag not in ("meta", "br", "col", "input"):
            self._open.append((tag, len(self.texts[tag]) - 1))

    def handle_endtag(self, tag):
        assert self._open and self._open[-1][0] == tag, (tag, self._open[-3:])
        self._open.pop()

    def handle_data(self, data):
        for tag, index in self._open:
            self.texts[tag][index] += data
        if not self._open or self._open[-1][0] not in ("script", "style"):
            self.shown.append(data)

    def _of(self, tag: str) -> list[tuple[str, dict[str, str | None]]]:
        return [e for e in self.elements if e[0] == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.shown).split())

    def series(self, name: str, run: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """-> (steps, values) of a metric, NaN for null."""
        of = self.data["runs"][run]
        at, values = of["series"][name]
        return np.cumsum(of["steps"][at]), np.array(values, np.float64)

    def marks(self, run: int = 0) -> list[tuple[str, int]]:
        return [(kind, step) for kind, step, _ in self.data["runs"][run]["marks"]]
