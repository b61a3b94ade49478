"""Defects of others in how rows of examples are made (docs/finetuning.md)."""

import numpy as np
import pytest

from tests.support.examples import ByteEncoder, chat, make_config, make_loader, write_jsonl

LENGTH = 32


@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_bug_16_cuts_are_at_the_end_and_nothing_predicts_a_first_token(packing, tmp_path):
    """ESFT joins examples without a mask, cuts one that is too long at its start, and has its first token as
    a target. Here a segment begins as its example does, and its targets are its own next tokens.
    """
    rows = [chat("q" * n, "a" * (3 * n)) for n in range(1, 13)]  # the last ones are too long
    path = write_jsonl(tmp_path / "chats.jsonl", rows)
    loader = make_loader(make_config(path, length=LENGTH, sft={"packing": packing}))
    expected = {
        tuple(e.ids[:LENGTH].tolist()): e.scored for e in ByteEncoder().encode_batch(rows, rows)
    }
    assert max(len(e.ids) for e in ByteEncoder().encode_batch(rows, rows)) > LENGTH
    seen = 0
    batch = loader.train_rows(0, loader.num_train_rows)
    for tokens, targets, segments in zip(
        batch["tokens"], batch["targets"], batch["segment_ids"], strict=True
    ):
        for segment in set(segments.tolist()) - {0}:
            (places,) = np.nonzero(segments == segment)
            ids = tokens[places]
            scored = expected[tuple(ids.tolist())][1 : len(ids)]
            assert np.array_equal(targets[places[:-1]], np.where(scored, ids[1:], -100))
            assert targets[places[-1]] == -100
            seen += 1
    assert seen == len(rows)
