"""The data layer against plain loops: packing, order, held-out split, sources, tokenizers and every
error message."""

import dataclasses
import json
import re
import sys
import threading
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from deepseek_jax.config.options import Config, DataConfig, ModelConfig, TrainConfig
from deepseek_jax.data import documents, formats, sources, tokenfile
from deepseek_jax.data.loader import Loader
from deepseek_jax.data.order import derive_seed
from deepseek_jax.data.packing import IGNORE, PackedRows
from deepseek_jax.data.prefetch import read_ahead
from deepseek_jax.data.sources import Corpus, Documents, Joined, open_corpora, split
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import UserError

EOS = 256
TEXT = "def f(x):\n    return 'héllo wörld ≠ 漢字'\n\n\nfor i in range(10):\n\tprint(i)  # <|endoftext|>\r\n"


def make_config(path="stdlib", batch=1, length=8, seed=0, vocab=320, **data):
    return Config(
        seed=seed,
        model=ModelConfig(vocab_size=vocab),
        data=DataConfig(path=str(path), **data),
        train=TrainConfig(batch_size=batch, sequence_length=length),
    )


def make_loader(config):
    return Loader(config, load_tokenizer(config.data.tokenizer))


def random_corpus(seed=0, documents=40, longest=30):
    """Documents of 1 to `longest` tokens, as (Corpus, list of arrays); no token but eos comes twice."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, documents)
    out, next_id = [], 1000
    for n in lengths:
        out.append(np.append(np.arange(next_id, next_id + n - 1), EOS).astype(np.int32))
        next_id += n
    return Corpus(np.concatenate(out), np.cumsum([0, *lengths]), "random"), out


def all_documents(corpus):
    return Documents(corpus.tokens, corpus.offsets[:-1], np.diff(corpus.offsets))


def write_docs(folder, count=60, seed=0):
    """`count` .txt files of lowercase words of different lengths."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i:03d}.txt").write_text(
            f"doc{i:03d} " + "".join(rng.choice(list("abcdef "), rng.integers(5, 60)))
        )
    return folder


@pytest.fixture(scope="module")
def bpe_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = tokenizers.decoders.ByteLevel()
    t.train_from_iterator(
        [TEXT] * 2 + ["x\n\n\n\n"] * 9,
        tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|endoftext|>"],
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    t.save(str(path))
    return path


# Packing


def plain_rows(docs, order, length, mask, pad_last):
    """The same rows from a stream that is written out, one position after the other."""
    stream = [(int(t), d) for d in order for t in docs[d]]
    rows = []
    for start in range(0, len(stream) - 1, length):
        if start + length >= len(stream) and not pad_last:
            break
        row = {"tokens": [], "targets": [], "segment_ids": [], "positions": []}
        segment, position, previous = 0, 0, None
        for p in range(start, start + length):
            if p >= len(stream):
                for k, v in zip(row, (0, IGNORE, 0, 0), strict=True):
                    row[k].append(v)
                continue
            token, d = stream[p]
            if previous is None or (mask and d != previous):
                segment, position = segment + 1, 0
            has_next = p + 1 < len(stream) and (not mask or stream[p + 1][1] == d)
            target = stream[p + 1][0] if has_next else IGNORE
            for k, v in zip(row, (token, target, segment, position), strict=True):
                row[k].append(v)
            position, previous = position + 1, d
        rows.append(row)
    return rows


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("pad_last", [True, False])
@pytest.mark.parametrize("length", [1, 7, 16, 64])
def test_rows_equal_a_loop_over_the_stream(mask, pad_last, length):
    corpus, docs = random_corpus()
    rows = PackedRows(all_documents(corpus), length, 5, mask, pad_last)
    order = sources.mix64(np.arange(len(docs), dtype=np.uint64) + sources.mix64(5)).argsort()
    expected = plain_rows(docs, order, length, mask, pad_last)
    assert len(rows) == len(expected)
    for i, want in enumerate(expected):
        got = rows.row(i)
        for k in want:
            assert got[k].dtype == np.int32
            np.testing.assert_array_equal(got[k], want[k], err_msg=f"{k} of row {i}")
    for outside in (-1, len(rows)):
        with pytest.raises(IndexError):
            rows.row(outside)


@pytest.mark.parametrize(
    "tokens, rows, rows_with_padding",
    [(10, 2, 3), (9, 2, 2), (8, 1, 2), (5, 1, 1), (4, 0, 1), (2, 0, 1), (1, 0, 0)],
)
def test_row_counts_at_the_edges(tokens, rows, rows_with_padding):
    """4 tokens a row need 5 of the stream; a padded row is there as soon as it predicts one token."""
    docs = Documents(np.arange(tokens), np.array([0]), np.array([tokens]))
    assert len(PackedRows(docs, 4, 0, True)) == rows
    assert len(PackedRows(docs, 4, 0, True, pad_last=True)) == rows_with_padding


def test_held_out_rows_predict_every_token_once():
    corpus, docs = random_corpus(1)
    rows = PackedRows(all_documents(corpus), 16, 0, True, pad_last=True)
    targets = np.concatenate([rows.row(i)["targets"] for i in range(len(rows))])
    # A document's first token has nothing before it; all others are predicted.
    assert sorted(targets[targets != IGNORE]) == sorted(np.concatenate([d[1:] for d in docs]))


def test_order_of_documents_depends_on_the_seed_only():
    corpus, _ = random_corpus()
    rows = [
        PackedRows(all_documents(corpus), 16, seed, True).row(0)["tokens"].tolist()
        for seed in (1, 1, 2)
    ]
    assert rows[0] == rows[1] != rows[2]


# Held-out split


def test_split_by_document_is_disjoint_complete_and_of_the_share():
    corpus, docs = random_corpus(documents=1000, longest=5)
    for fraction in (0.01, 0.1, 0.3, 0.7, 0.99):
        train, held = split(corpus, fraction)
        assert sorted([*train.starts, *held.starts]) == corpus.offsets[:-1].tolist()
        assert abs(len(held.starts) - 1000 * fraction) <= 1, fraction
    assert len(split(corpus, 0.0)[1].starts) == 0


def test_appended_documents_leave_the_split_as_it_was():
    corpus, _ = random_corpus(documents=1000, longest=5)
    short = Corpus(corpus.tokens, corpus.offsets[:637], "short")
    held, held_short = split(corpus, 0.03)[1], split(short, 0.03)[1]
    assert held_short.starts.tolist() == [s for s in held.starts if s < corpus.offsets[636]]


@pytest.mark.parametrize("fraction", [1e-300, 1e-6, 0.5, 0.999999])
@pytest.mark.parametrize("count", [2, 3, 50])
def test_both_sides_have_a_document(fraction, count):
    train, held = split(random_corpus(documents=count)[0], fraction)
    assert len(train.starts) and len(held.starts) and len(train.starts) + len(held.starts) == count


def test_a_single_document_is_cut_at_its_end(tmp_path):
    text = "".join(np.random.default_rng(0).choice(list("abcdef"), 1000))
    (tmp_path / "one.txt").write_text(text)
    loader = make_loader(make_config(tmp_path / "one.txt", eval_fraction=0.1))
    assert (loader.train_tokens, loader.eval_tokens) == (900, 101)
    rows = loader.eval_rows(0, loader.num_eval_rows)
    assert loader.tokenizer.decode(rows["tokens"][rows["segment_ids"] > 0]) == text[900:]
    epoch = loader.train_rows(0, loader.num_train_rows)["tokens"]
    assert {loader.tokenizer.decode(r) for r in epoch} == {
        text[i : i + 8] for i in range(0, 896, 8)
    }


def test_held_out_documents_never_depend_on_the_seed_and_are_not_trained_on(tmp_path):
    write_docs(tmp_path / "docs")
    loaders = [
        make_loader(make_config(tmp_path / "docs", length=512, seed=s, eval_fraction=0.1))
        for s in (0, 1)
    ]

    def names(rows):  # a name that a row's end cuts is not counted
        return {
            name
            for r in rows["tokens"]
            for name in re.findall(r"doc\d{3}", load_tokenizer("bytes").decode(r))
        }

    held = [names(loader.eval_rows(0, loader.num_eval_rows)) for loader in loaders]
    assert held[0] == held[1] and len(held[0]) == 6
    np.testing.assert_array_equal(
        loaders[0].eval_rows(0, 3)["tokens"], loaders[1].eval_rows(0, 3)["tokens"]
    )
    assert not held[0] & names(loaders[0].train_rows(0, loaders[0].num_train_rows))


# The loader's order


def equal_rows(a, b):
    assert a.keys() == b.keys()
    for k in a:
        np.testing.assert_array_equal(a[k], b[k])


def test_order_is_pure_and_any_requests_see_the_same_rows(tmp_path):
    write_docs(tmp_path / "a"), write_docs(tmp_path / "b", 20, seed=1)
    config = make_config(f"{tmp_path}/a,{tmp_path}/b", seed=3)
    loader, other = make_loader(config), make_loader(config)
    n = 3 * loader.num_train_rows
    whole = loader.train_rows(0, n)
    assert whole["tokens"].shape == (n, 8)
    cuts = sorted(np.random.default_rng(0).integers(0, n, 9).tolist())
    parts = {
        b: other.train_rows(a, b - a)
        for a, b in reversed(list(zip([0, *cuts], [*cuts, n], strict=True)))
    }  # backwards: no state
    equal_rows(whole, {k: np.concatenate([parts[b][k] for b in [*cuts, n]]) for k in whole})
    assert (
        make_loader(dataclasses.replace(config, seed=4)).train_rows(0, n)["tokens"].tolist()
        != whole["tokens"].tolist()
    )


def test_every_epoch_has_every_row_once_in_an_order_of_its_own(tmp_path):
    write_docs(tmp_path)
    loader = make_loader(make_config(tmp_path))
    n = loader.num_train_rows
    epochs = [loader.train_rows(e * n, n)["tokens"].tolist() for e in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] and epochs[1] != epochs[2]
    # All of the training stream but its last partial row, once.
    corpus = open_corpora(make_config(tmp_path), load_tokenizer("bytes"))[0]
    train = split(corpus, 0.01)[0]
    tokens = np.concatenate(
        [corpus.tokens[a : a + b] for a, b in zip(train.starts, train.lengths, strict=True)]
    )
    missing = np.bincount(tokens, minlength=257) - np.bincount(np.ravel(epochs[0]), minlength=257)
    assert missing.min() >= 0 and missing.sum() == len(tokens) - 8 * n <= 8


def test_seeds_are_unrelated(tmp_path):
    """Grain shuffles epoch e with seed + e; one document, so that the order of documents cannot hide that."""
    (tmp_path / "a.txt").write_text("".join(f"{i:04d}" for i in range(200)))
    first, second = (make_loader(make_config(tmp_path / "a.txt", seed=s)) for s in (0, 1))
    n = first.num_train_rows
    assert first.train_rows(n, n)["tokens"].tolist() != second.train_rows(0, n)["tokens"].tolist()
    seeds = [
        derive_seed(s, purpose, i) for s in (0, 1, 2, -1) for purpose in (1, 2) for i in (0, 1, 2)
    ]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**32 for s in seeds)


@pytest.mark.parametrize("weights, share", [("3,1", 0.75), ("0.1,0.9", 0.1), ("", 2 / 3)])
def test_mixture_weights(tmp_path, weights, share):
    (tmp_path / "a.txt").write_text("a" * 8000), (tmp_path / "b.txt").write_text("b" * 4000)
    loader = make_loader(
        make_config(f"{tmp_path}/a.txt, {tmp_path}/b.txt", weights=weights, eval_fraction=0.2)
    )
    first = loader.train_rows(0, 400)["tokens"][:, 0] == ord("a")
    assert abs(first.mean() - share) < 0.01
    later = loader.train_rows(10**9, 400)["tokens"][:, 0] == ord("a")
    assert abs(later.mean() - share) < 0.01
    # Held-out rows alternate, so that an evaluation that stops early has seen both; all are there once.
    rows = loader.eval_rows(0, loader.num_eval_rows)
    assert (rows["targets"] >= 0).sum() == loader.eval_tokens - 2
    assert abs((rows["tokens"][:30, 0] == ord("a")).mean() - 2 / 3) < 0.05


def test_eval_rows_beyond_the_end_are_padding_and_no_evaluation_is_possible(tmp_path):
    write_docs(tmp_path)
    loader = make_loader(make_config(tmp_path))
    rows = loader.eval_rows(loader.num_eval_rows - 1, 3)
    assert (
        (rows["segment_ids"][1:] == 0).all()
        and (rows["targets"][1:] == IGNORE).all()
        and (rows["tokens"][1:] == 0).all()
    )
    assert rows["segment_ids"][0].any()
    none = make_loader(make_config(tmp_path, eval_fraction=0.0))
    assert none.num_eval_rows == none.eval_tokens == 0
    assert (none.eval_rows(0, 2)["targets"] == IGNORE).all()


# Prefetching


class FakeRows:
    def __init__(self, fail_at=None):
        self.calls, self.fail_at = [], fail_at

    def read(self, step):
        self.calls.append(step)
        if step == self.fail_at:
            raise UserError("the file is damaged")
        return {"tokens": np.full(2, step)}


def threads_end(before: int) -> bool:
    """Whether no more threads than these are left, soon."""
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    return threading.active_count() <= before


def test_reading_ahead_keeps_the_order_and_raises_in_its_place():
    threads = threading.active_count()
    ahead = read_ahead(FakeRows().read, 3, 20)
    assert [int(r["tokens"][0]) for r in ahead] == list(range(3, 20)) and list(ahead) == []
    assert list(read_ahead(FakeRows().read, 5, 5)) == []
    ahead, got = read_ahead(FakeRows(fail_at=3).read, 0, 20), []
    with pytest.raises(UserError, match="^the file is damaged") as error:
        for rows in ahead:
            got.append(int(rows["tokens"][0]))
    assert got == [0, 1, 2] and str(error.value) == "the file is damaged"
    with pytest.raises(StopIteration):
        next(ahead)
    assert threads_end(threads)


def test_reading_ahead_is_bounded_and_stops():
    source, threads = FakeRows(), threading.active_count()
    ahead = read_ahead(source.read, 0, 10**12, depth=3)
    next(ahead)
    assert threading.active_count() == threads + 1
    # It may be 3 ahead of the one taken and never more, however long we wait.
    time.sleep(0.2)
    assert source.calls == [0, 1, 2, 3]
    ahead.close()
    assert threads_end(threads) and source.calls == [0, 1, 2, 3]
    with pytest.raises(StopIteration):
        next(ahead)


# Sources


def decoded(config):
    """The documents of all sources as strings, checking that each ends with eos."""
    tokenizer, out = load_tokenizer("bytes"), []
    for corpus in open_corpora(config, tokenizer):
        for a, b in zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True):
            ids = corpus.tokens[int(a) : int(b)]
            assert ids[-1] == EOS and (ids[:-1] != EOS).all()
            out.append(tokenizer.decode(ids))
    return out


def test_every_kind_of_text_source(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "a.txt").write_bytes("é one\r\n".encode())
    (tmp_path / "b.jsonl").write_text(
        '{"text": "two"}\n\n{"text": "th\\u00e9\\ud800", "id": 3}\n{"text": ""}\n'
    )
    pq.write_table(
        pa.table({"id": [1, 2, 3], "text": ["four", None, "five"]}), tmp_path / "sub" / "c.parquet"
    )
    (tmp_path / "sub" / "d.md").write_text("six")
    # Skipped in a folder: hidden, binary, not UTF-8, empty, and token files with what belongs to them.
    (tmp_path / ".git" / "x").write_text("hidden")
    (tmp_path / "e.dat").write_bytes(b"a\0b")
    (tmp_path / "f.txt").write_bytes(b"caf\xe9")
    (tmp_path / "g.txt").write_text("")
    np.save(tmp_path / "h.npy", np.arange(5))
    (tmp_path / "h.json").write_text("{}")
    texts = ["é one\r\n", "two", "thé\ufffd", "four", "five", "six"]
    assert decoded(make_config(tmp_path)) == texts
    assert decoded(make_config(f"{tmp_path}/b.jsonl,{tmp_path}/a.txt")) == [
        texts[1],
        texts[2],
        texts[0],
    ]
    assert decoded(make_config(f"{tmp_path}/**/*.[mp]*")) == texts[3:]
    np.save(tmp_path / "a2.npy", np.array([120, EOS]))
    (tmp_path / "a3.txt").write_text("last")
    assert decoded(make_config(f"{tmp_path}/a*")) == ["é one\r\n", "x", "last"]
    (tmp_path / "a2.npy").unlink(), (tmp_path / "a3.txt").unlink()
    # Of a glob's matches, only what belongs to a token file is left out.
    assert [f.path[-5:] for f in documents.find_files(f"{tmp_path}/[ah]*", "config.data.path")] == [
        "a.txt",
        "h.npy",
    ]


def test_stdlib_is_sorted_and_without_tests():
    names = [f.path for f in documents.find_files("stdlib", "config.data.path")]
    assert names == [f.path for f in documents.find_files("stdlib", "config.data.path")]
    assert all(n.endswith(".py") for n in names) and any(
        n.endswith("json/decoder.py") for n in names
    )
    assert not any(
        part in n
        for n in names
        for part in ("/test/", "/tests/", "site-packages", "idle_test", "__pycache__")
    )


@pytest.mark.parametrize("block", [1, 3, 16, 1 << 20])
def test_long_text_in_pieces_is_one_document(tmp_path, monkeypatch, block, bpe_path):
    text = TEXT * 3 + "漢" * 50 + TEXT
    (tmp_path / "a.txt").write_bytes(text.encode())
    monkeypatch.setattr(formats, "BLOCK", block)
    assert decoded(make_config(tmp_path / "a.txt")) == decoded(make_config(tmp_path)) == [text]
    if block >= 16:  # where a piece can end at a line, the pieces' tokens are those of the whole
        bpe = load_tokenizer(str(bpe_path))
        lines = "".join(f"line {i} = 'x'\n\n  indented\n\nnext line\n漢字\n字\n" for i in range(30))
        (tmp_path / "a.txt").write_text(lines)
        monkeypatch.setattr(formats, "BLOCK", 64)
        corpus = open_corpora(make_config(tmp_path / "a.txt", tokenizer=str(bpe_path)), bpe)[0]
        np.testing.assert_array_equal(corpus.tokens[:-1], bpe.encode(lines))


@pytest.mark.parametrize("dtype", ["uint16", "int32", ">i8", "uint8"])
def test_npy_files_stay_memory_maps_and_are_cut_at_eos(tmp_path, monkeypatch, dtype):
    eos = 7
    ids = np.random.default_rng(0).integers(0, 20, 500).astype(dtype)
    ids[-1] = 3  # the last document is not ended
    np.save(tmp_path / "x.npy", ids)
    monkeypatch.setattr(tokenfile, "CHUNK", 64)
    (corpus,) = open_corpora(
        make_config(tmp_path / "x.npy", eos_token_id=eos), load_tokenizer("bytes")
    )
    assert isinstance(corpus.tokens, np.memmap)
    docs, current = [], []
    for t in ids.tolist():
        current.append(t)
        if t == eos:
            docs.append(current)
            current = []
    docs.append(current)
    assert [
        corpus.tokens[a:b].tolist()
        for a, b in zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True)
    ] == docs
    loader = make_loader(make_config(tmp_path / "x.npy", eos_token_id=eos))
    assert loader.train_rows(0, 3)["tokens"].dtype == np.int32


def test_bin_shards_are_one_source_without_copying(tmp_path):
    rng = np.random.default_rng(0)
    shards = [np.append(rng.integers(0, 256, n), EOS).astype("<u4") for n in (50, 3, 200)]
    for i, shard in enumerate(shards):
        shard.tofile(tmp_path / f"s{i}.bin")
    (corpus,) = open_corpora(
        make_config(f"{tmp_path}/s*.bin", bin_dtype="uint32"), load_tokenizer("bytes")
    )
    whole = np.concatenate(shards)
    assert isinstance(corpus.tokens, Joined) and all(
        isinstance(p, np.memmap) for p in corpus.tokens.parts
    )
    assert corpus.offsets.tolist() == [0, *(np.flatnonzero(whole == EOS) + 1)]
    for a, b in [(0, len(whole)), (49, 56), (51, 55), (60, 60), (200, 256), (51, 51)]:
        np.testing.assert_array_equal(corpus.tokens[a:b], whole[a:b])


# Tokenizers


def test_bytes():
    t = load_tokenizer("bytes")
    assert (t.vocab_size, t.eos_id, t.name) == (257, 256, "bytes")
    assert t.encode(TEXT).tolist() == list(TEXT.encode()) and t.encode(TEXT).dtype == np.int32
    assert t.decode([256, -1, 300, *TEXT.encode(), 256]) == TEXT
    assert t.decode([0xC3, 65]) == "\ufffdA"
    assert t.token_bytes.tolist() == [1] * 256 + [0]
    assert t.encode("").shape == (0,)


def test_byte_level_bpe(bpe_path):
    t = load_tokenizer(str(bpe_path))
    ids = t.encode(TEXT)
    assert ids.dtype == np.int32 and len(ids) < len(TEXT.encode()) and t.eos_id == 0
    assert t.token_bytes.shape == (t.vocab_size,) and t.token_bytes[ids].sum() == len(TEXT.encode())
    # The text of a special token is text; the token itself stands for no text.
    assert t.eos_id not in ids and t.token_bytes[t.eos_id] == 0
    assert t.decode([t.eos_id, *ids, -5, 10**6, t.eos_id]) == TEXT
    for a, b in zip(t.encode_batch([TEXT, "", "x"]), [TEXT, "", "x"], strict=True):
        np.testing.assert_array_equal(a, t.encode(b))
    assert t.decode(t.encode("a\ud800b")) == "a\ufffdb"


def test_saved_truncation_padding_and_templates_do_not_touch_documents(bpe_path, tmp_path):
    inner = tokenizers.Tokenizer.from_file(str(bpe_path))
    inner.enable_truncation(4)
    inner.enable_padding(length=64)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    inner.add_tokens(["<added>"])
    inner.save(str(tmp_path / "t.json"))
    t, plain = load_tokenizer(str(tmp_path / "t.json")), load_tokenizer(str(bpe_path))
    np.testing.assert_array_equal(t.encode(TEXT), plain.encode(TEXT))
    assert t.name != plain.name and t.name == load_tokenizer(str(tmp_path / "t.json")).name
    ids = t.encode("x<added>y")
    assert (
        len(ids) == 3 and t.token_bytes[ids].tolist() == [1, 7, 1] and t.decode(ids) == "x<added>y"
    )


def test_eos_names_holes_and_tokenizers_whose_bytes_are_unknown(tmp_path):
    vocab = {"<unk>": 0, "</s>": 2, "▁a": 9}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    inner.save(str(tmp_path / "t.json"))
    t = load_tokenizer(str(tmp_path / "t.json"))
    assert (t.vocab_size, t.eos_id, t.token_bytes) == (10, 2, None)


# Errors: every message is one line that names the option, the value and the repair


def setup_files(tmp_path, bpe_path):
    """Everything that is wrong in some way."""
    f = tmp_path
    (f / "empty.txt").write_text("")
    (f / "none").mkdir()
    (f / "ok.txt").write_text("some text " * 20)
    (f / "latin.txt").write_bytes(b"caf\xe9")
    (f / "nojson.jsonl").write_text('{"text": "a"}\n{oops\n')
    (f / "nokey.jsonl").write_text('{"text": "a"}\n\n{"body": "b"}\n')
    (f / "number.jsonl").write_text('{"text": 3}\n')
    (f / "blank.jsonl").write_text('\n{"text": ""}\n')
    pq.write_table(pa.table({"body": ["a"]}), f / "nocolumn.parquet")
    pq.write_table(pa.table({"text": [1]}), f / "ints.parquet")
    (f / "bad.parquet").write_text("not a parquet file")
    np.save(f / "big.npy", np.array([5, 400, 3]))
    np.save(f / "negative.npy", np.array([5, -2, 3]))
    np.save(f / "matrix.npy", np.zeros((3, 3), np.int32))
    np.save(f / "floats.npy", np.zeros(3))
    np.save(f / "objects.npy", np.array([{}, 1], object), allow_pickle=True)
    np.save(f / "nothing.npy", np.zeros(0, np.int32))
    (f / "bad.npy").write_text("not an array")
    with open(f / "zip.npy", "wb") as zipped:
        np.savez(zipped, a=np.zeros(3, np.int32))
    np.save(f / "side.npy", np.array([5, 3]))
    (f / "side.json").write_text("{")
    (f / "odd.bin").write_bytes(b"abc")
    np.full(10, 999, np.uint16).tofile(f / "big.bin")
    (f / "garbage.json").write_text("[1, 2")
    (f / "binary.json").write_bytes(b"\xff\xfe")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(
        str(f / "noeos.json")
    )
    (f / "bpe.json").write_bytes(bpe_path.read_bytes())


# (changes to data and the rest, what the message has to say)
ERRORS: list[tuple[dict[str, Any], list[str]]] = [
    (dict(path="{}/nope.txt"), ["does not exist"]),
    (dict(path="{}/nope*.txt"), ["matches no file"]),
    (dict(path="{}/empty.txt"), ["is empty"]),
    (dict(path="{}/none"), ["holds no text", "*.npy"]),
    (dict(path="{}/blank.jsonl"), ["holds no text"]),
    (dict(path="{}/ok.txt,,"), ["empty source"]),
    (dict(path=""), ["empty source"]),
    (dict(path="{}/latin.txt"), ["latin.txt", "byte 3", "iconv"]),
    (dict(path="{}/nojson.jsonl"), ["line 2", "JSON"]),
    (dict(path="{}/nokey.jsonl"), ["line 3", "'text'"]),
    (dict(path="{}/number.jsonl"), ["line 1", "'text'"]),
    (dict(path="{}/nocolumn.parquet"), ["no column 'text'", "body"]),
    (dict(path="{}/ints.parquet"), ["holds int"]),
    (dict(path="{}/bad.parquet"), ["parquet"]),
    (dict(path="{}/big.npy"), ["token id 400", "has 257 ids"]),
    (dict(path="{}/negative.npy"), ["token id -2", "has 257 ids"]),
    (dict(path="{}/matrix.npy"), ["2-D int32"]),
    (dict(path="{}/floats.npy"), ["1-D float64"]),
    (dict(path="{}/objects.npy"), ["Python objects"]),
    (dict(path="{}/nothing.npy"), ["holds no text"]),
    (dict(path="{}/bad.npy"), ["damaged"]),
    (dict(path="{}/zip.npy"), ["archive of arrays"]),
    (dict(path="{}/side.npy"), ["side.json"]),
    (dict(path="{}/odd.bin"), ["3 bytes", "config.data.bin_dtype"]),
    (dict(path="{}/big.bin"), ["token id 999", "has 257 ids"]),
    (dict(path="/dev/null"), ["neither a file nor a folder"]),
    (
        dict(path="{}/ok.txt", weights="1,2"),
        ["config.data.weights='1,2'", "2 numbers", "1 sources"],
    ),
    (dict(path="{0}/ok.txt,{0}/ok.txt", weights="1"), ["config.data.weights"]),
    (dict(path="{0}/ok.txt,{0}/ok.txt", weights="1,x"), ["config.data.weights='1,x'", "numbers"]),
    (dict(path="{0}/ok.txt,{0}/ok.txt", weights="1,0"), ["config.data.weights='1,0'", "above 0"]),
    (dict(path="{0}/ok.txt,{0}/ok.txt", weights="1,nan"), ["config.data.weights='1,nan'"]),
    (
        dict(path="{}/ok.txt", eos_token_id=257),
        ["config.data.eos_token_id=257", "257 ids", "config.data.tokenizer="],
    ),
    (
        dict(path="{}/ok.txt", tokenizer="bytes", vocab=200),
        ["config.data.tokenizer='bytes'", "257", "config.model.vocab_size=200"],
    ),
    (
        dict(path="{}/ok.txt", length=500),
        ["198 training tokens", "501", "config.train.sequence_length"],
    ),
    (
        dict(path="{}/ok.txt", batch=100),
        ["198 training tokens", "801", "config.train.batch_size=100"],
    ),
    (
        dict(path="{}/ok.txt", tokenizer="{}/nope.json"),
        ["config.data.tokenizer=", "does not exist", "bytes"],
    ),
    (
        dict(path="{}/ok.txt", tokenizer="{}"),
        ["config.data.tokenizer=", "folder", "tokenizer.json"],
    ),
    (
        dict(path="{}/ok.txt", tokenizer="{}/garbage.json"),
        ["config.data.tokenizer=", "not a tokenizer.json"],
    ),
    (
        dict(path="{}/ok.txt", tokenizer="{}/binary.json"),
        ["config.data.tokenizer=", "not a tokenizer.json"],
    ),
    (
        dict(path="{}/ok.txt", tokenizer="{}/noeos.json"),
        ["config.data.tokenizer=", "<|endoftext|>"],
    ),
]


@pytest.mark.parametrize(
    "changes, wanted", ERRORS, ids=[f"{i}:{c['path']}" for i, (c, _) in enumerate(ERRORS)]
)
def test_errors(tmp_path, bpe_path, changes, wanted):
    setup_files(tmp_path, bpe_path)
    changes = {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(UserError) as info:
        make_loader(make_config(**changes))
    message = str(info.value)
    assert "\n" not in message and "config." in message and message.endswith((".", ").")), message
    for text in wanted:
        assert text in message, message
    if (
        "tokenizer" not in changes
        and "weights" not in changes
        and "vocab" not in changes
        and "eos_token_id" not in changes
    ):
        assert "config.data.path='" in message, message


def test_unreadable_files(tmp_path, monkeypatch):
    """The tests may run as root, whom no permission stops: open() refuses instead."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "t.json").write_text("{}")

    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(
        UserError, match=r"config.data.path=.*a.txt cannot be read \(Permission denied\)"
    ):
        make_loader(make_config(tmp_path / "a.txt"))
    with pytest.raises(
        UserError, match=r"config.data.tokenizer=.*cannot be read \(Permission denied\)"
    ):
        make_loader(make_config(tokenizer=str(tmp_path / "t.json")))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="config.data.path=.*a.parquet needs pyarrow.*pip install"):
        make_loader(make_config(tmp_path / "a.parquet"))


def test_a_file_damaged_after_start_up_is_caught_when_its_rows_are_read(tmp_path):
    ids = np.full(200, 5, np.uint16)
    np.save(tmp_path / "x.npy", ids)
    loader = make_loader(make_config(tmp_path / "x.npy"))
    np.save(tmp_path / "y.npy", np.full(200, 60000, np.uint16))
    with open(tmp_path / "x.npy", "r+b") as f:  # the map sees what is written to the same file
        f.write((tmp_path / "y.npy").read_bytes())
    with pytest.raises(
        UserError, match="token id 60000, but config.data.tokenizer='auto' has 257 ids"
    ):
        loader.train_rows(0, 4)


def test_description_and_json_safety(tmp_path):
    write_docs(tmp_path / "a")
    loader = make_loader(make_config(tmp_path / "a"))
    assert (
        "60 documents" in loader.description
        and "held out" in loader.description
        and "bytes" in loader.description
    )
    json.dumps(
        [loader.num_train_rows, loader.num_eval_rows, loader.train_tokens, loader.eval_tokens]
    )
