"""Sequences of a step: what a device takes at once, micro-batches, and their product over the devices."""

import math

from deepseek_jax.errors import UserError
from deepseek_jax.migrate.arithmetic.devices import WORLD, Layout
from deepseek_jax.migrate.migration import Migration

BATCH = ("per_device_batch", "accumulation", "global_batch")


def settle(m: Migration, layout: Layout) -> None:
    """Sets config.train.batch_size, accumulation and sequence_length.

    Raises:
      UserError: the three batch sizes do not fit together, or the batch does not divide over the devices.
    """
    if m.fact("sequence_length"):
        m.set("train.sequence_length", int(m.fact("sequence_length")), "sequence_length")
    size, how = theirs(m, layout)
    if size is None:
        size = layout.data_ours * -(-8 // layout.data_ours)
        m.set("train.batch_size", size, how="no file says; 8 at least, as here by default")
        m.set("train.accumulation", 1)
        m.note("No file says how many sequences there are per step: set train.batch_size.")
        return
    names = BATCH + WORLD
    size, how = _matched(m, size, how, layout)
    if size % layout.data_ours:
        raise UserError(
            f"a step has {size} sequences ({how}), which {layout.data_ours} data parallel devices do not "
            f"divide. Give --devices that do."
        )
    m.set("train.batch_size", size, *names, how=how)
    times = _micro_batches(m, size, layout)
    all_of_them = layout.theirs != layout.ours or not m.said("accumulation")
    m.set("train.accumulation", times, *(names if all_of_them else ("accumulation",)))


def theirs(m: Migration, layout: Layout) -> tuple[int | None, str]:
    """Sequences of a step of their run, and the arithmetic; None: nobody says."""
    each, times, whole = (m.fact(n) for n in BATCH)
    d = layout.data_theirs
    gpus = f"{d} data parallel GPU{'s' if d != 1 else ''}"
    if whole and (m.said("global_batch") or not m.said("accumulation")):
        whole = int(whole)
        if each and m.said("per_device_batch"):
            each = int(each)
            expected = each * int(times) * d if times and m.said("accumulation") else None
            if expected is not None and expected != whole:
                raise UserError(
                    f"a step of {whole} sequences is not {each} per device x {int(times)} micro-batches x "
                    f"{d} data parallel GPUs, which is {expected}. Correct one of them, or give --devices."
                )
            if whole % (each * d):
                raise UserError(
                    f"a step of {whole} sequences is no multiple of {each} per device x {gpus}. Correct one "
                    f"of them, or give --devices={max(whole // each, 1) * layout.per_sequence} or a divisor."
                )
            return whole, f"{whole} = {_product(each, whole // (each * d))} x {gpus}"
        return whole, f"{whole} in all"
    if each is None:
        return (int(whole), f"{int(whole)} in all") if whole else (None, "")
    each, times = int(each), int(times or 1)
    return each * times * d, f"{_product(each, times)} x {gpus}"


def _product(each: int, times: int) -> str:
    return f"{each} per device x {times} micro-batch{'es' if times != 1 else ''}"


def _matched(m: Migration, size: int, how: str, layout: Layout) -> tuple[int, str]:
    """With --match=tokens: sequences that hold the tokens that their padded rows held."""
    if not m.match_tokens:
        return size, how
    length = m.fact("sequence_length") or 0
    if not m.fact("unpacked") or not length:
        raise UserError(
            "--match=tokens is for one example a row, padded, and these are packed: rows here hold as many "
            "tokens as theirs. Leave it out."
        )
    if m.mean_length is None:
        raise UserError(
            "--match=tokens needs to know how long examples are. Give --mean_length=TOKENS, which python -m "
            "deepseek_jax.data show prints."
        )
    wanted = size * min(m.mean_length, length) / length
    rows = max(round(wanted / layout.data_ours), 1) * layout.data_ours
    m.set("sft.packing", "bfd", "unpacked", how="--match=tokens")
    return rows, f"{size} x {m.mean_length:g} tokens in packed rows of {length}"


def _micro_batches(m: Migration, size: int, layout: Layout) -> int:
    """Micro-batches here: theirs on as many devices; else so few that a device holds no more than there."""
    each, times = m.fact("per_device_batch"), m.fact("accumulation")
    if each is None:
        wanted = int(times or 1)
        each = max(size // (wanted * layout.data_theirs), 1)
    rows = size // layout.data_ours  # of a device, in a step
    fewest = min(-(-rows // int(each)), rows)
    small = [n for n in range(1, math.isqrt(rows) + 1) if rows % n == 0]
    return min(n for d in small for n in (d, rows // d) if n >= fewest)
