"""The text of an answer, as its tokens come."""

from collections.abc import Sequence

from deepseek_jax.cli.texts import clean_text
from deepseek_jax.data.encoder import Encoder
from deepseek_jax.data.tokenizer import BROKEN


class Stream:
    """The text of one answer, as its tokens come.

    Characters of several tokens are given when they are whole, and no part of a stop string ever. Special
    tokens are not given; stop strings are looked for in the text with them and in the text without.

    Attributes:
      ids: the tokens. text: all that was given. stopped: a stop string was found; the text ends before it.
    """

    def __init__(self, encoder: Encoder, stop: Sequence[str] = (), before: Sequence[int] = ()):
        """A stream at its beginning.

        Args:
          encoder: of the model.
          stop: texts that end the answer.
          before: ids of the prompt: tokenizers like Llama 2's leave out the space that begins a text.
        """
        self._encoder = encoder
        self._stop = tuple(map(clean_text, stop))
        self.ids: list[int] = []
        self._window = encoder.tail(before)  # ids but special ones; those before _read are decoded
        self._read = len(self._window)
        self._held = ""  # decoded, and perhaps the beginning of a stop string
        self._shown: list[bool] = []  # of each character held; those of special tokens are not
        self.text = ""
        self.stopped = False

    def add(self, id: int) -> str:
        """Takes a token; returns the text that can be shown now."""
        self.ids.append(id)
        special = self._encoder.hidden.get(id)
        if special is None:
            self._window.append(id)
            self._decoded(last=False)
        elif not self.stopped:
            self._hold(special, shown=False)
        return self._give(last=False)

    def end(self) -> str:
        """What was held back, when no token comes any more."""
        self._decoded(last=True)
        return "" if self.stopped else self._give(last=True)

    def _decoded(self, last: bool) -> None:
        before = self._encoder.decode(self._window[: self._read])
        text = self._encoder.decode(self._window)
        if not self.stopped and len(text) > len(before) and (last or not text.endswith(BROKEN)):
            self._hold(text[len(before) :], shown=True)
            self._window = self._window[self._read :]
            self._read = len(self._window)

    def _hold(self, text: str, shown: bool) -> None:
        self._held += text
        self._shown += [shown] * len(text)

    def _give(self, last: bool) -> str:
        shown_at = [i for i, shown in enumerate(self._shown) if shown]
        visible = "".join(self._held[i] for i in shown_at)
        shown_at.append(len(self._held))
        found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        found += [shown_at[at] for s in self._stop if (at := visible.find(s)) >= 0]
        begun = [len(self._held) - _begun(self._held, s) for s in self._stop]
        begun += [shown_at[len(visible) - _begun(visible, s)] for s in self._stop]
        count = min(found or ([] if last else begun), default=len(self._held))
        out = "".join(c for c, shown in zip(self._held[:count], self._shown, strict=False) if shown)
        self._held = "" if found else self._held[count:]
        self._shown = [] if found else self._shown[count:]
        self.stopped = self.stopped or bool(found)
        self.text += out
        return out


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of the text begin the stop string."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
