"""Packing of examples beside trl.pack_dataset, and the rows that are made of it against plain loops."""

import numpy as np
import pytest

from deepseek_jax.config.options import IGNORE
from deepseek_jax.data.example_files import ExampleSet, Facts
from deepseek_jax.data.example_packing import PACKERS, ExampleRows, pack

STRATEGIES = tuple(PACKERS)


def random_lengths(seed, count=60, longest=30):
    rng = np.random.default_rng(seed)
    return rng.integers(1, longest, count)


def set_of(lengths, seed=0):
    """Examples of these lengths in which no token comes twice, about half of them scored."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    scored = np.random.default_rng(seed).integers(0, 2, offsets[-1]).astype(np.uint8)
    scored[offsets[:-1][lengths > 0]] = 0
    tokens = np.arange(1000, 1000 + offsets[-1], dtype=np.int32)
    return ExampleSet(tokens, scored, offsets, np.array([0, len(lengths)]), Facts())


def rows_of(examples, length, strategy):
    lengths = examples.lengths
    return ExampleRows(examples, np.arange(len(lengths)), lengths, length, strategy)


def of_trl(examples, length, strategy):
    """Token ids and seq_lengths of each row."""
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    ids = [
        examples.tokens[a:b].tolist()
        for a, b in zip(examples.offsets[:-1], examples.offsets[1:], strict=True)
    ]
    data = datasets.Dataset.from_dict({"input_ids": ids})
    packed = trl.pack_dataset(data, length, strategy, {"keep_in_memory": True})
    if strategy == "wrapped":  # which says nothing of where examples begin
        return packed["input_ids"], None
    return packed["input_ids"], packed["seq_lengths"]


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
@pytest.mark.parametrize(
    "count, longest, length", [(60, 30, 16), (2_345, 50, 32), (1_000, 9, 100), (7, 3, 1)]
)
def test_rows_are_those_of_trl(strategy, count, longest, length):
    """The same rows in the same order, with more than one window of 1,000 examples, ties and overflow."""
    lengths = random_lengths(count, count, longest)
    lengths[::11] = 0  # examples without tokens
    examples = set_of(lengths)
    ids, seq_lengths = of_trl(examples, length, strategy)
    rows = rows_of(examples, length, strategy)
    assert len(rows) == len(ids)
    for i, (tokens, sizes) in enumerate(zip(ids, seq_lengths or ids, strict=True)):
        row = rows.row(i)
        assert row["tokens"][: len(tokens)].tolist() == tokens
        assert not row["segment_ids"][len(tokens) :].any()
        if seq_lengths is not None:
            assert np.bincount(row["segment_ids"])[1:].tolist() == sizes
            assert [p.tokens for p in rows.pieces(i)] == sizes


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("seed", range(4))
def test_every_token_is_in_one_row(strategy, seed):
    """Pieces cover every example once, up to where it is cut off, and rows are no longer than they may be."""
    lengths, length = random_lengths(seed), 12
    packed = pack(lengths, length, strategy)
    seen = [np.zeros(n, int) for n in lengths]
    for example, first, size in zip(*packed[1:], strict=True):
        assert size > 0
        seen[example][first : first + size] += 1
    kept = np.minimum(lengths, length) if strategy in ("bfd", "none") else lengths
    for counts, n in zip(seen, kept, strict=True):
        assert counts[:n].all() and not counts[n:].any() and counts.max() == 1
    per_row = np.add.reduceat(packed.lengths, packed.starts[:-1])
    assert per_row.max() <= length
    assert packed.starts[-1] == len(packed.example)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bug_05_nothing_leaks_across_packed_examples(strategy):
    """trl #3067, #1230, #784, #805: every piece is a segment with positions from 0, and predicts only what
    follows in its own example; nothing at the example's end.
    """
    lengths, length = random_lengths(3), 12
    examples = set_of(lengths)
    rows = rows_of(examples, length, strategy)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for i in range(len(rows)):
        row = rows.row(i)
        at = 0
        for segment, piece in enumerate(rows.pieces(i), 1):
            here = slice(at, at + piece.tokens)
            ids = row["tokens"][here] - 1000
            assert (owner[ids] == piece.example).all()
            assert (row["segment_ids"][here] == segment).all()
            assert row["positions"][here].tolist() == list(range(piece.tokens))
            for j, token in enumerate(ids, at):
                follows = token + 1 < len(owner) and owner[token + 1] == piece.example
                cut = strategy in ("bfd", "none") and row["positions"][j] == length - 1
                if not follows or cut:
                    assert (row["targets"][j], row["next_tokens"][j]) == (IGNORE, -1)
                    continue
                assert row["next_tokens"][j] == token + 1001
                scored = examples.scored[token + 1]
                assert row["targets"][j] == (token + 1001 if scored else IGNORE)
            at += piece.tokens
        for name, nothing in (("segment_ids", 0), ("targets", IGNORE), ("next_tokens", -1)):
            assert (row[name][at:] == nothing).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bug_06_packed_rows_have_the_targets_of_unpacked_ones(strategy):
    """trl #3910: the same (position's tokens so far, target) pairs, whatever stands beside an example.

    Those of bfd and none are of the examples up to where they are cut; bfd_split and wrapped predict every
    scored token once.
    """
    lengths, length = random_lengths(5), 12
    examples = set_of(lengths)
    rows = rows_of(examples, length, strategy)
    found = np.concatenate(
        [r["targets"][r["targets"] != IGNORE] for r in map(rows.row, range(len(rows)))]
    )
    scored = examples.scored != 0
    if strategy in ("bfd", "none"):
        scored &= np.concatenate([np.arange(n) < length for n in lengths])
    assert sorted(found) == examples.tokens[scored].tolist()


def test_a_row_that_is_not_there():
    rows = rows_of(set_of(random_lengths(0)), 12, "bfd")
    for index in (-1, len(rows)):
        with pytest.raises(IndexError):
            rows.row(index)


def test_no_examples_make_no_rows():
    for strategy in STRATEGIES:
        assert len(pack(np.zeros(3, np.int64), 8, strategy).starts) == 1
        assert len(pack(np.zeros(0, np.int64), 8, strategy).starts) == 1
