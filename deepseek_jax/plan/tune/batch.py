"""The largest micro-batch that fits, by the bytes that the compiler plans with: nothing runs out of memory to
find it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from deepseek_jax.config.options import Config
from deepseek_jax.parallel.mesh import BATCH_AXES

MOST = 1024  # sequences of a device
GUESSES = (
    2  # by a line, one after the other: where it meets the room, and that one more does not fit
)


class Found(NamedTuple):
    """Attributes:
    largest: that fits; 0: not even one does.
    bytes: of every size that was compiled, in that order.
    ended: it would go on beyond `most`.
    """

    largest: int
    bytes: dict[int, int]
    ended: bool


def search(bytes_of: Callable[[int], int], room: int, most: int = MOST) -> Found:
    """The largest number from 1 to `most` whose bytes fit into `room`, where more never need less.

    Sizes double. Where the line through the two largest says that the double would not fit, its guess is
    tried and then the next size; what is left between the largest that fits and the smallest that does not
    is halved. So nothing is compiled that is more than twice as large as what fits, but for 1.

    Args:
      bytes_of: compiles a size.
    """
    seen: dict[int, int] = {}

    def fits(size: int) -> bool:
        seen[size] = bytes_of(size)
        return seen[size] <= room

    low, high = 0, most + 1  # the largest that fits, the smallest that does not
    size, guesses = 1, 0
    while high - low > 1:
        if fits(size):
            low = size
        else:
            high = size
        size = min(2 * low, most) if high > most else (low + high) // 2
        guess = _by_line(seen, room)
        # Not for ever: where memory rises by steps the line may be wrong by one each time.
        if guess is None or guesses >= GUESSES or (high > most and guess >= size):
            guesses = 0
        else:
            size, guesses = min(max(guess, low + 1), high - 1), guesses + 1
    return Found(low, seen, low == most)


def _by_line(seen: Mapping[int, int], room: int) -> int | None:
    """The size at which the line through the two largest sizes so far meets the room; None: no line rises."""
    if len(seen) < 2:
        return None
    a, b = sorted(seen)[-2:]
    slope = (seen[b] - seen[a]) / (b - a)
    return math.floor(a + (room - seen[a]) / slope) if slope > 0 else None


def divided(shape: Mapping[str, int]) -> int:
    """Devices of a mesh among which a micro-batch is divided."""
    return math.prod(shape[axis] for axis in BATCH_AXES)


def options_of(config: Config, shape: Mapping[str, int], size: int) -> dict[str, Any]:
    """Options with which every device has so many sequences in a micro-batch.

    Args:
      shape: of the mesh.
    """
    return {"train.batch_size": size * divided(shape) * config.train.accumulation}
