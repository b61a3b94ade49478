"""The text of an answer, piece by piece as its tokens come."""

from collections.abc import Sequence

from deepseek_jax.hf.encoder import Encoder

BROKEN = "\ufffd"  # at the end: a character of several tokens that is not whole yet


class Stream:
    """The text of one answer, as its tokens come.

    Characters of several tokens are given when they are whole, and no part of a stop string ever.

    Attributes:
      ids: the tokens. text: all that was given. stopped: a stop string was found; the text ends before it.
    """

    def __init__(self, encoder: Encoder, stop: Sequence[str] = ()):
        self._encoder, self._stop = encoder, tuple(stop)
        self.ids: list[int] = []
        self._first = self._read = 0  # ids before _read are decoded; those from _first on are decoded with newer ones, for the spaces between
        self._held = ""  # decoded, and perhaps the beginning of a stop string
        self.text, self.stopped = "", False

    def add(self, id: int) -> str:
        """Takes a token; returns the text that can be shown now."""
        self.ids.append(id)
        return self._decoded(self._encoder.decode(self.ids[self._first :]))

    def end(self) -> str:
        """What was held back, when no token comes any more."""
        return "" if self.stopped else self._decoded(self._encoder.decode(self.ids[self._first :]), last=True)

    def _decoded(self, text: str, last: bool = False) -> str:
        before = self._encoder.decode(self.ids[self._first : self._read])
        if not self.stopped and len(text) > len(before) and (last or not text.endswith(BROKEN)):
            self._held += text[len(before) :]
            self._first, self._read = self._read, len(self.ids)
        return self._give(last)

    def _give(self, last: bool) -> str:
        found = min((at for s in self._stop if (at := self._held.find(s)) >= 0), default=None)
        if found is not None:
            self.stopped, out, self._held = True, self._held[:found], ""
        else:
            keep = 0 if last else max((_begun(self._held, s) for s in self._stop), default=0)
            out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.text += out
        return out


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of the text begin the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
