"""`optimizer.lr_multipliers` as text: "experts=1.0,embed|lm_head=0.1,norm|gate=0" to patterns and factors.

What a pattern means for a model's weights is in train/trainable.py.
"""

import math
import re

from deepseek_jax.errors import UserError

OPTION = "config.optimizer.lr_multipliers"
# A factor ends an entry, so that a pattern may contain commas and equals signs of its own.
_ENTRY = re.compile(r"\s*(?P<pattern>.+?)\s*=\s*(?P<factor>[^=,\s]+)\s*(?:,|$)")
_EXAMPLE = 'Write PATTERN=FACTOR, separated by commas: "experts=1.0,embed|lm_head=0.1,norm=0".'


def parse(text: str) -> tuple[tuple[str, float], ...]:
    """(regular expression, factor) of each entry, in order.

    Raises:
      UserError: an entry is no PATTERN=FACTOR, its pattern no regular expression, or its factor no number of
        0 or more.
    """
    out, at = [], 0
    while text[at:].strip():
        entry = _ENTRY.match(text, at)
        if entry is None:
            raise UserError(f"{OPTION}={text!r}: {text[at:].strip()!r} has no factor. {_EXAMPLE}")
        out.append((entry["pattern"], _factor(text, entry)))
        at = entry.end()
    return tuple(out)


def _factor(text: str, entry: re.Match) -> float:
    try:
        re.compile(entry["pattern"])
    except re.error as e:
        raise UserError(
            f"{OPTION}={text!r}: {entry['pattern']!r} is no regular expression ({e}). {_EXAMPLE}"
        ) from e
    try:
        factor = float(entry["factor"])
    except ValueError:
        factor = math.nan
    if not 0 <= factor < math.inf:
        raise UserError(
            f"{OPTION}={text!r}: the factor of {entry['pattern']!r} is {entry['factor']}, and not a number "
            f"of 0 or more. {_EXAMPLE}"
        )
    return factor
