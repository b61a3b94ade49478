"""The loader of fine-tuning: order, epochs, held-out examples, what is left out, and what is said."""

import itertools

import numpy as np
import pytest

from deepseek_jax.config.options import IGNORE
from deepseek_jax.data import contents, fields
from deepseek_jax.data.example_loader import ExampleLoader
from deepseek_jax.data.sources import held_out_of
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import UserError
from tests.support.examples import (
    STOP,
    ByteEncoder,
    chat,
    make_config,
    make_loader,
    random_chats,
    write_jsonl,
)

PACKINGS = ("bfd", "bfd_split", "wrapped", "none")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("chats") / "a.jsonl", random_chats(200))


def examples_in(rows):
    """The ids of the segments of some rows [n, S]."""
    out = []
    for tokens, segments in zip(rows["tokens"], rows["segment_ids"], strict=True):
        out += [tuple(tokens[segments == s].tolist()) for s in range(1, segments.max() + 1)]
    return out


def number(ids):
    """Which example of `random_chats` it is: its question begins with that."""
    return int(bytes(i for i in ids[2:] if i < 256).decode().split()[0])


def test_messages_become_rows(tmp_path):
    """The whole way, by hand: two chats fit in one row, the answers and their stop tokens are scored."""
    rows = [chat("ab", "c"), chat("d", "ef"), chat("ghijk", "l")]
    config = make_config(write_jsonl(tmp_path / "a.jsonl", rows), batch=1, length=20)
    loader = make_loader(config)
    assert loader.num_train_rows == 2

    def row(texts, answers):
        ids = [[ord(c) if c != "." else STOP for c in t] for t in texts]
        targets = [[ord(c) if c != "." else STOP for c in t[1:]] + [IGNORE] for t in answers]
        n = sum(map(len, ids))
        return {
            "tokens": sum(ids, []) + [0] * (20 - n),
            "segment_ids": sum([[i] * len(t) for i, t in enumerate(ids, 1)], []) + [0] * (20 - n),
            "positions": sum([list(range(len(t))) for t in ids], []) + [0] * (20 - n),
            "targets": [IGNORE if t == ord("_") else t for t in sum(targets, [])]
            + [IGNORE] * (20 - n),
            "next_tokens": sum([t[1:] + [-1] for t in ids], []) + [-1] * (20 - n),
        }

    longest = row(["u:ghijk.a:l."], ["__________l."])
    others = row(["u:ab.a:c.", "u:d.a:ef."], ["_______c.", "______ef."])
    found = loader.train_rows(0, 2)
    got = [{k: found[k][i].tolist() for k in longest} for i in range(2)]
    assert sorted(got, key=str) == sorted([longest, others], key=str)
    assert found["row"].tolist() == [0, 1]
    assert {k: v.dtype for k, v in found.items()} == {k: np.int32 for k in fields.EXAMPLES}


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_epoch_has_every_example_once_in_a_new_order(path, packing):
    loader = make_loader(make_config(path, sft={"packing": packing}))
    n = loader.num_train_rows
    epochs = [loader.train_rows(e * n, n) for e in range(3)]
    as_rows = [[tuple(r.tolist()) for r in epoch["tokens"]] for epoch in epochs]
    assert sorted(as_rows[0]) == sorted(as_rows[1]) == sorted(as_rows[2])
    assert as_rows[0] != as_rows[1] != as_rows[2]
    assert epochs[2]["row"].tolist() == list(range(2 * n, 3 * n))
    if packing in ("bfd", "none"):
        assert len(examples_in(epochs[0])) == len(set(examples_in(epochs[0]))) == 200
    other = make_loader(make_config(path, seed=1, sft={"packing": packing})).train_rows(0, n)
    assert sorted(tuple(r.tolist()) for r in other["tokens"]) == sorted(as_rows[0])
    assert not np.array_equal(other["tokens"], epochs[0]["tokens"])


def test_rows_are_a_pure_function_of_their_number(path, tmp_path):
    """Whichever rows were read before, and whether the examples were kept."""
    config = make_config(path)
    whole = make_loader(config, tmp_path).train_rows(0, 90)
    loader = make_loader(config, tmp_path)
    for start, count in ((70, 20), (0, 1), (33, 7)):
        some = loader.train_rows(start, count)
        for name in fields.EXAMPLES:
            assert np.array_equal(some[name], whole[name][start : start + count])


@pytest.mark.parametrize("packing", PACKINGS)
def test_held_out_examples_are_never_trained_on(path, packing):
    config = make_config(path, data={"eval_fraction": 0.1}, sft={"packing": packing})
    loader = make_loader(config)
    train = loader.train_rows(0, loader.num_train_rows)
    held = loader.eval_rows(0, loader.num_eval_rows + 3)
    everything = make_loader(make_config(path, length=8192, batch=1)).train_rows(0, 1)
    all_examples = examples_in(everything)
    assert len(all_examples) == 200

    def tokens(rows):
        return np.sort(rows["tokens"][rows["segment_ids"] > 0])

    expected = [e[:48] if packing in ("bfd", "none") else e for e in all_examples]
    mask = held_out_of(200, 0.1)
    numbers = [number(e) for e in all_examples]
    sides = [
        sorted(
            itertools.chain(*(e for e, n in zip(expected, numbers, strict=True) if mask[n] == side))
        )
        for side in (False, True)
    ]
    assert tokens(train).tolist() == sides[0]
    assert tokens(held).tolist() == sides[1]
    assert (held["row"] == -1).all() and not held["segment_ids"][-3:].any()
    assert (held["targets"][-3:] == IGNORE).all()
    assert loader.eval_tokens == len(sides[1]) and loader.train_tokens == len(sides[0])
    ids, scored = loader.eval_examples(2)[1]
    second = int(np.flatnonzero(mask)[1])
    assert number(ids.tolist()) == second
    assert scored[-1] and not scored[:4].any()


def test_who_is_held_out_does_not_depend_on_what_is_left_out(tmp_path):
    """An example stays on its side when the row length, and with it what is dropped, changes."""
    path = write_jsonl(tmp_path / "a.jsonl", random_chats(200, longest=40))

    def held(length):
        config = make_config(
            path, length=length, data={"eval_fraction": 0.1}, sft={"truncation": "drop"}
        )
        return {tuple(ids.tolist()) for ids, _ in make_loader(config).eval_examples(200)}

    assert held(40) < held(60) < held(200)


def test_sources_are_one_without_weights_and_mixed_with_them(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", random_chats(50, 0))
    b = write_jsonl(tmp_path / "b.jsonl", random_chats(150, 1))
    joined = write_jsonl(tmp_path / "c.jsonl", random_chats(50, 0) + random_chats(150, 1))
    one, two = (make_loader(make_config(p)) for p in (joined, f"{a},{b}"))
    assert np.array_equal(one.train_rows(0, 50)["tokens"], two.train_rows(0, 50)["tokens"])
    mixed = make_loader(make_config(f"{a},{b}", data={"weights": "0.75,0.25"}))
    spans = [mixed.origin(i) for i in range(400)]
    assert all(len({s.source for s in row}) == 1 for row in spans)
    share = np.mean([row[0].source == a for row in spans])
    assert abs(share - 0.75) < 0.02
    with pytest.raises(UserError, match=r"config.train.epochs=2.0.*config.data.weights='3,1'"):
        make_loader(make_config(f"{a},{b}", data={"weights": "3,1"}, steps=0, epochs=2.0))


def test_bug_07_an_answer_that_is_cut_off_is_counted_and_left_out(tmp_path):
    """trl #3927, #6668, #5662: with keep_start an example whose answer lies behind the row's end has no
    scored token: loss 0 or NaN. It is left out, also where rows are packed, and so said.
    """
    rows = [chat("q" * 60, "a")] * 3 + random_chats(30, longest=10)
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    for packing in ("bfd", "none"):
        loader = make_loader(make_config(path, length=40, sft={"packing": packing}))
        assert len(examples_in(loader.train_rows(0, loader.num_train_rows))) == 30
        assert "3 left out without a trained token" in loader.summary[0]
        rows = loader.train_rows(0, loader.num_train_rows)
        assert (rows["targets"] != IGNORE).any(axis=1).all()
    dropped = make_loader(make_config(path, length=40, sft={"truncation": "drop"}))
    assert "3 left out as longer than 40" in dropped.summary[0]
    split = make_loader(make_config(path, length=40, sft={"packing": "bfd_split"}))
    # nothing of these is cut off
    assert (
        "33 to train on" in split.summary[0]
        and "3 longer than 40 tokens are split" in split.summary[0]
    )


def test_bug_07_nothing_but_cut_off_answers_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [chat("q" * 60, "a")] * 30)
    with pytest.raises(UserError, match=r"no trained token in the first .*sequence_length=40"):
        make_loader(make_config(path, length=40))
    with pytest.raises(UserError, match=r"longer than .*=40.*truncation=drop"):
        make_loader(make_config(path, length=40, sft={"truncation": "drop"}))


def test_bug_03_a_stop_token_that_is_never_trained_is_refused(path):
    """trl #1623, #3091; open-r1 #492: a model that never learns to stop answers without end."""
    with pytest.raises(UserError, match=r"stop token <256>.*never"):
        make_loader(make_config(path), encoder=ByteEncoder(trains_stop=False))
    said = "\n".join(make_loader(make_config(path, length=64)).summary)
    assert "stop token <256> is trained in 200 of 200 examples" in said


def test_too_few_examples_for_a_batch(path):
    with pytest.raises(UserError, match=r"makes 3 rows .*batch_size=4 needs"):
        make_loader(make_config(path, batch=4, length=2500))


def test_what_is_said_before_the_first_step(path):
    loader = make_loader(make_config(path, length=64, data={"eval_fraction": 0.1}))
    lines = loader.summary
    rows = loader.train_rows(0, loader.num_train_rows)
    tokens = int((rows["segment_ids"] > 0).sum())
    trained = int((rows["targets"] != IGNORE).sum())
    assert lines[0] == "200 examples: 180 to train on, 20 held out"
    assert f"({trained / tokens:.0%})" in lines[1]
    assert f"{1 - tokens / rows['tokens'].size:.1%} padding" in lines[-1]
    assert "assistant messages are trained" in lines
    assert "200 examples" in loader.description


def test_changed_options_and_data_are_noticed(path, tmp_path):
    """What a resumed run compares: options of packing and encoding by name, else the data."""

    def of(path=path, encoder=None, **sft):
        return make_loader(make_config(path, sft=sft), encoder=encoder).contents

    before = of()
    assert contents.difference(before, of()) == ""
    assert contents.difference(before, of(packing="wrapped")) == (
        "config.sft.packing='wrapped' differs from 'bfd'"
    )
    assert contents.difference(of(packing="bfd-requeue"), of(packing="bfd_split")) == ""

    class System(ByteEncoder):
        def encode_batch(self, rows, names=(), arrow=False):
            extra = {"role": "system", "content": "be brief"}
            rows = [{"messages": [extra, *r["messages"]]} for r in rows]
            return super().encode_batch(rows, names)

    assert contents.difference(before, of(encoder=System(), system_prompt="be brief")) == (
        "config.sft.system_prompt='be brief' differs from ''"
    )
    other = write_jsonl(tmp_path / "b.jsonl", random_chats(200, seed=1))
    assert "'b' holds" in contents.difference(before, of(other), ["b"])
    text = {k: v for k, v in before.items() if k not in ("rows", "encoding")}
    assert contents.difference(before, text) == "config.objective='pretrain' differs from 'sft'"
    assert contents.difference(text, before) == "config.objective='sft' differs from 'pretrain'"


def test_origin_says_what_is_trained(path):
    loader = make_loader(make_config(path))
    row = loader.train_rows(7, 1)
    spans = loader.origin(7)
    assert [s.tokens for s in spans] == np.bincount(row["segment_ids"][0])[1:].tolist()
    assert len(spans) > 1
    targets = [row["targets"][0][row["segment_ids"][0] == i] for i in range(1, len(spans) + 1)]
    assert [s.trained for s in spans] == [int((t != IGNORE).sum()) for t in targets]
    for span in spans:
        assert [trained for _, trained in span.parts] == [False, True]
        asked, answer = (text for text, _ in span.parts)
        assert asked.startswith(f"u:{span.document} ") and asked.endswith("<256>a:")
        assert answer.endswith("<256>") and span.text == asked + answer


def test_fields_that_examples_have_not(path):
    wanted = fields.EXAMPLES | {"teacher_ids": fields.Field(np.int32)}
    with pytest.raises(UserError, match="gives no teacher_ids"):
        ExampleLoader(make_config(path), load_tokenizer("bytes"), ByteEncoder(), fields=wanted)
