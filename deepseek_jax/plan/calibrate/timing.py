"""Times of a turn of a probe: medians, with how far apart the repetitions were."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

REPETITIONS = 5
LONGEST = 4096  # turns of one call
EMPTY = 3  # calls without a turn: what starting a program costs


class Probe(NamedTuple):
    """Something that devices do, all of them at once, so many turns in one call.

    Attributes:
      what: in a few words.
      amount: FLOPs, bytes or operations of one device in a turn.
      call: makes so many turns; its result is waited for.
      begin: seconds that its first call may take besides, for compiling.
    """

    what: str
    amount: float
    call: Callable[[int], Any]


class Time(NamedTuple):
    """Of one turn.

    Attributes:
      seconds: the median.
      spread: half of the distance between the second fastest and the second slowest repetition, as a share of
        the median.
      turns, repetitions: of a call, and calls.
    """

    seconds: float
    spread: float
    turns: int
    repetitions: int


def time_of(probe: Probe, budget: float) -> Time:
    """Seconds of a turn, without what a call costs that makes none.

    Args:
      budget: seconds that it should take, compiling not counted.
    """
    _wait(probe, 1)
    empty = min(_wait(probe, 0) for _ in range(EMPTY))
    turns, one = 1, 0.0
    while turns < LONGEST:  # a call that is too short to tell makes more turns
        one = max(_wait(probe, turns) - empty, 1e-9)
        wanted = budget / (REPETITIONS + 2)
        if one >= wanted / 4:
            turns = max(1, min(LONGEST, round(turns * wanted / one)))
            break
        turns = min(LONGEST, turns * 8)
    taken = sorted(max(_wait(probe, turns) - empty, 1e-9) / turns for _ in range(REPETITIONS))
    median = statistics.median(taken)
    return Time(median, (taken[-2] - taken[1]) / 2 / median, turns, REPETITIONS)


def _wait(probe: Probe, turns: int) -> float:
    started = time.perf_counter()
    jax.block_until_ready(probe.call(turns))
    return time.perf_counter() - started
