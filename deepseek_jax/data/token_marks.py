"""Token ids as text with what of it is trained on, for people to see."""

import numpy as np

from deepseek_jax.data.tokenizer import Tokenizer


def marked(
    tokenizer: Tokenizer, ids: np.ndarray, scored: np.ndarray, before: np.ndarray
) -> tuple[tuple[str, bool], ...]:
    """The text of some ids in pieces, each with whether it is scored. Special tokens are spelt.

    Args:
      before: ids that stand before them.
    """
    kinds = scored * 2 + np.isin(ids, list(tokenizer.hidden))
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(ids)]
    out: list[tuple[str, bool]] = []
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        run = ids[first:last]
        if kinds[first:last].any() and kinds[first] % 2:
            text = "".join(token_text(tokenizer, int(i)) for i in run)
        else:
            text = tokenizer.decode(run, np.concatenate([before, ids[:first]])[-32:])
        is_scored = bool(len(run) and scored[first])
        if out and out[-1][1] == is_scored:
            text = out.pop()[0] + text
        out.append((text, is_scored))
    return tuple(out)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token by itself, spelt if it is special."""
    if token in tokenizer.hidden:
        return tokenizer.hidden[token] or f"<{token}>"
    return tokenizer.decode([token])
