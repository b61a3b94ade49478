"""Formats of training data: what each file holds comes out as its documents, what is none is refused by name,
what is left out is said."""

import bz2
import gzip
import itertools
import json
import lzma
import os
import random
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from deepseek_jax.config import paths
from deepseek_jax.config.options import (
    CheckpointConfig,
    CompileConfig,
    Config,
    DataConfig,
    ModelConfig,
    TrainConfig,
    replaced,
)
from deepseek_jax.config.validation import validate
from deepseek_jax.data import formats
from deepseek_jax.data.__main__ import main
from deepseek_jax.data.documents import DataNotes, find_files
from deepseek_jax.data.formats import read_text
from deepseek_jax.data.loader import Loader
from deepseek_jax.data.sources import divided, open_corpora
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.run import commandline
from deepseek_jax.train.workdir import write_config
from tests.support import FILES, ROOT

FORMATS = os.path.join(FILES, "formats")
MEGATRON = os.path.join(FILES, "megatron")
CHATML = os.path.join(FORMATS, "chatml_tokenizer.json")
TEXTS = ["one é", 'two\nlines [ ] { } " \\', "", "three 漢字 😀", "x" * 300]
ROWS = [{"id": i, "text": t, "meta": {"text": ["no"]}} for i, t in enumerate(TEXTS)]
PRESENT = [t for t in TEXTS if t]


def config_of(path, tokenizer="bytes", vocab=50304, **data):
    return Config(
        model=ModelConfig(vocab_size=vocab),
        data=DataConfig(path=str(path), tokenizer=str(tokenizer), **data),
        train=TrainConfig(batch_size=1, sequence_length=8),
    )


def documents(path, notes=None):
    """The texts as training reads them, without what holds the place of a token."""
    tokenizer = load_tokenizer("bytes")
    corpora = open_corpora(config_of(path), tokenizer, notes=notes)
    return [
        tokenizer.decode(c.tokens[int(a) : int(b)])
        for c in corpora
        for a, b in zip(c.offsets[:-1], c.offsets[1:], strict=True)
    ]


def zstd(data):
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as f:
        f.write(data)
    return out.getvalue().to_pybytes()


LINES = "\n".join(json.dumps(r) for r in ROWS)
JSON = {
    "lines.json": LINES,
    "lines.ndjson": LINES,
    "lines.jsonl": LINES + "\n",
    "array.json": json.dumps(ROWS),
    "pretty.json": json.dumps(ROWS, indent=2),
    "objects.json": "\n".join(json.dumps(r, indent=1, ensure_ascii=False) for r in ROWS),
    "bom.json": "\ufeff " + json.dumps(ROWS),
    "bom.jsonl": "\ufeff" + LINES,
    "spaces.json": f"\n [\n{',  '.join(map(json.dumps, ROWS))}\t]\n",
}
PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize("name", JSON)
def test_json_in_every_form(name, block, tmp_path, monkeypatch):
    """However the blocks that are read cut it."""
    monkeypatch.setattr(formats, "BLOCK", block)
    (tmp_path / name).write_text(JSON[name], encoding="utf-8")
    assert documents(tmp_path / name) == PRESENT == documents(tmp_path)


@pytest.mark.parametrize("ending", PACK)
def test_compressed(ending, tmp_path):
    """Files of several members too, as pigz and pzstd write them; the bytes told for the progress bar are
    those of the file."""
    pack, half = PACK[ending], len(LINES) // 2
    for name, data in (
        ("a.jsonl", LINES),
        ("b.json", json.dumps(ROWS)),
        ("c.txt", PRESENT[2] * 1000),
        ("d.md", "text"),
    ):
        (tmp_path / (name + ending)).write_bytes(
            pack(data[:half].encode()) + pack(data[half:].encode())
        )
    expected = [*PRESENT, *PRESENT, PRESENT[2] * 1000, "text"]
    assert documents(tmp_path) == expected == documents(f"{tmp_path}/*{ending}")
    (file,) = find_files(str(tmp_path / f"c.txt{ending}"), "config.data.path")
    assert sum(p.read for p in read_text(file, "", "")) == file.size
    (tmp_path / f"a.jsonl{ending}").write_bytes(pack(b"{" + random.Random(0).randbytes(9999))[:-9])
    with pytest.raises(
        UserError, match=rf"a.jsonl\{ending} (cannot be unpacked|line 1)|line 1 of .*a.jsonl"
    ):
        documents(tmp_path / f"a.jsonl{ending}")


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone \xef\xbb\xbftwo")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "three"}')
    assert documents(tmp_path) == ["one \ufefftwo", "three"]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_arrow(kind, tmp_path):
    """A stream, as `datasets` saves it, and a file of Arrow's; Parquet with the same types."""
    table = pa.table({"n": range(5), "text": pa.array(TEXTS, pa.string()).cast(kind)})
    for name, writer in (("a.arrow", pa.ipc.new_stream), ("b.arrow", pa.ipc.new_file)):
        with writer(str(tmp_path / name), table.schema) as f:
            f.write_table(table, max_chunksize=2)
    pq.write_table(table, tmp_path / "c.parquet")
    assert documents(tmp_path) == PRESENT * 3


def test_text_that_is_not_unicode_is_cleaned_the_same_in_every_format(tmp_path):
    """A byte of Latin-1, half of a surrogate pair: U+FFFD, and said. Text files as a whole have an encoding:
    that is to be converted."""
    assert documents(f"{FORMATS}/badutf8.parquet")[7] == "caf\ufffd is latin " * 5
    wanted = ["caf\ufffd", "a\ufffdb", "fine"]
    lines = [b'{"text": "caf\xe9"}', b'{"text": "a\\ud800b"}', b'{"text": "fine"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.json").write_bytes(b"[" + b",".join(lines) + b"]")
    raw = pa.array(
        [b"caf\xe9", b"a\xffb", b"fine"]
    )  # Arrow does not check what it is told to be a string
    strings = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"text": strings}), tmp_path / "c.parquet")
    with pa.ipc.new_stream(str(tmp_path / "d.arrow"), pa.schema({"text": pa.string()})) as f:
        f.write_table(pa.table({"text": strings}))
    notes = DataNotes()
    assert documents(tmp_path, notes) == wanted * 4
    assert notes.lines() == [
        "8 documents held bytes or characters that are not Unicode text: U+FFFD stands "
        "in their place"
    ]
    (tmp_path / "e.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="e.txt is not UTF-8 text at byte 3"):
        documents(tmp_path / "e.txt")


def test_what_a_folder_holds_beside_text_is_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    for name, data in (
        ("b.png", b"\x89PNG\0"),
        ("c.csv", b"text\nx\n"),
        ("d.zip", b"PK"),
        ("e.txt", b"\xff"),
        ("f.json", b'{"name": "x"}'),
        ("g.json", b"{oops"),
        ("h.bin", b"\0\0"),
        ("i.parquet.gz", b"x"),
        ("j.png", b"\0" * 995),
        ("tokens.json", b"{}"),
        ("tokens.npy", b"x"),
    ):
        (tmp_path / name).write_bytes(data)
    notes = DataNotes()
    assert documents(tmp_path, notes) == ["text"]
    (line,) = notes.lines()
    for part in (
        "2 .png, 1 kB (not UTF-8 text)",
        "1 .csv, 7 B (a table)",
        "1 .zip, 2 B (an archive)",
        "1 .txt, 1 B (not UTF-8 text)",
        "1 .json, 13 B (JSON without objects that have a string 'text')",
        "1 .json, 5 B (not JSON)",
        "1 .bin, 2 B (token ids",
        "1 .parquet.gz",
        "1 .npy",
    ):
        assert part in line, (part, line)
    (tmp_path / "a.txt").write_text("text " * 9)
    assert Loader(config_of(tmp_path), load_tokenizer("bytes")).notes == [line]
    assert (
        main(["tokenize", f"--path={tmp_path}", "--tokenizer=bytes", f"--out={tmp_path}/out.npy"])
        == 0
    )
    assert line in capsys.readouterr().out
    for name in ("a.txt", "out.npy", "out.json", "out.offsets"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"holds no text \(skipped: .*2 .png"):
        documents(tmp_path)


@pytest.mark.parametrize(
    "name, data, wanted",
    [
        ("a.csv", b"text\nx\n", ["is a table", ".jsonl"]),
        ("a.csv.gz", b"x", ["is a table", "Write its text as .jsonl"]),
        ("a.jsonl.zstd", b"x", ["is an archive", "Unpack"]),
        ("a.zip", b"PK", ["is an archive", "Unpack"]),
        ("a.tar.gz", b"x", ["is an archive", "Unpack"]),
        ("a.parquet.zst", b"x", ["is a compressed .parquet file", "Unpack"]),
        ("a.idx", b"x", ["a.bin is not there"]),
        ("a.json", b'[{"text": "x"}, {"text": "y"', ["item 2", "not valid JSON"]),
        ("a.json", b'[{"text": "x"} {"text": "y"}]', ["item 2", "',' or ']' expected"]),
        ("a.json", b'[{"text": "x"}', ["item 2", "no end"]),
        ("a.json", b'[{"text": "x"}] {}', ["item 2", "more after"]),
        ("a.json", b'{"text": "x"}\n{"body": 1}', ["item 2", "no string 'text'"]),
        ("a.json", b'["x"]', ["item 1", "no string 'text'"]),
        ("a.json", b"[" * 100_000, ["item 1", "not valid JSON"]),
        ("a.ndjson", b'{"text": 1}', ["line 1", "no string 'text'"]),
        ("a.gz", b"no gzip", ["cannot be unpacked"]),
        ("a.arrow", b"no arrow", ["not a readable Arrow file"]),
    ],
)
def test_what_is_refused_by_name(name, data, wanted, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as info:
        documents(tmp_path / name)
    assert name.split(".")[0] in str(info.value) and "\n" not in str(info.value)
    for text in wanted:
        assert text in str(info.value), str(info.value)


# Token files of others


@pytest.mark.parametrize(
    "spec",
    ["mega_text_document.bin", "mega_text_document.idx", "mega_text_document", "mega*", "*.idx"],
)
def test_megatron(spec):
    """By file, index, Megatron's own prefix or a glob; documents are those of the index."""
    (corpus,) = open_corpora(config_of(f"{FORMATS}/{spec}"), load_tokenizer("bytes"))
    assert isinstance(corpus.tokens, np.memmap) and corpus.tokens.dtype == np.int32
    assert documents(f"{FORMATS}/{spec}") == [
        f"document {i} says hello to the world, and again. " * 3 for i in range(40)
    ]


def write_megatron(
    stem,
    sequences,
    firsts,
    code=8,
    dtype="<u2",
    version=1,
    magic=b"MMIDIDX\0\0",
    modes=b"",
    places=None,
):
    """As IndexedDatasetBuilder does."""
    lengths = np.array([len(s) for s in sequences], "<i4")
    ids = np.concatenate(sequences).astype(dtype)
    ids.tofile(f"{stem}.bin")
    places = (np.cumsum([0, *lengths[:-1]]) if places is None else np.array(places)).astype(
        "<i8"
    ) * ids.itemsize
    with open(f"{stem}.idx", "wb") as f:
        f.write(magic + version.to_bytes(8, "little") + bytes([code]))
        f.write(len(lengths).to_bytes(8, "little") + len(firsts).to_bytes(8, "little"))
        f.write(lengths.tobytes() + places.tobytes() + np.array(firsts, "<i8").tobytes() + modes)


SEQUENCES = [np.arange(5), np.arange(7, 9), np.arange(20, 31), np.array([256])]


@pytest.mark.parametrize("code, dtype", [(8, "<u2"), (4, "<i4"), (5, "<i8"), (3, "<i2")])
def test_megatron_documents_of_several_sequences(code, dtype, tmp_path):
    write_megatron(tmp_path / "a", SEQUENCES, [0, 2, 2, 4], code, dtype, modes=bytes(4))
    (corpus,) = open_corpora(
        config_of(tmp_path / "a.bin", bin_dtype="uint32"), load_tokenizer("bytes")
    )
    assert (
        corpus.offsets.tolist() == [0, 7, 7, 19]
        and corpus.tokens.tolist() == np.concatenate(SEQUENCES).tolist()
    )
    write_megatron(
        tmp_path / "b", SEQUENCES, [0], code, dtype
    )  # a writer that never ended a document
    assert open_corpora(config_of(tmp_path / "b.bin"), load_tokenizer("bytes"))[
        0
    ].offsets.tolist() == [0, 5, 7, 18, 19]


@pytest.mark.parametrize(
    "changes, wanted",
    [
        (dict(magic=b"TNTIDX\0\0\0"), "does not begin with MMIDIDX"),
        (dict(version=2), "version 2"),
        (dict(code=6), "dtype code 6"),
        (
            dict(code=4),
            "is of another file: it tells of 19 tokens of int32, which are 76 bytes, and there are "
            "38",
        ),
        (dict(modes=b"x"), "is damaged: it has"),
        (dict(places=[0, 5, 8, 18]), "sequences do not follow"),
        (dict(firsts=[0, 3, 2, 4]), "documents do not follow"),
        (dict(firsts=[0, 3]), "documents do not"),
    ],
)
def test_megatron_indexes_that_cannot_be_right(changes, wanted, tmp_path):
    given = dict(firsts=[0, 2, 4]) | changes
    if changes.get("code") == 4:
        given["places"] = [0, 10, 14, 36]  # of four bytes per token, in units of two
    write_megatron(tmp_path / "a", SEQUENCES, **given)
    with pytest.raises(UserError, match=wanted):
        open_corpora(config_of(tmp_path / "a.bin"), load_tokenizer("bytes"))


def in_megatrons_words(split: str, count: int) -> list[tuple[int, int]]:
    """Where Megatron-Core divides `count` sequences (blended_megatron_dataset_config.py and _builder.py)."""
    given = [float(n) for n in split.split(",")] + [0.0, 0.0]
    shares = [n / sum(given) for n in given[:3]]
    bounds = [0.0, shares[0], shares[0] + shares[1]]
    return [(int(round(a * count)), int(round(b * count))) for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("split", ["969,30,1", "99,1,0", "900,50,50", "90,10", "1", "1,0,1"])
@pytest.mark.parametrize("count", [1, 7, 25, 100])
def test_megatrons_split(split, count, tmp_path):
    """The same documents on each side, in their order; of every source."""
    documents = [np.arange(1 + i % 5) + 7 * i % 200 for i in range(count)]
    for name in "ab":
        write_megatron(tmp_path / name, documents, [*range(count + 1)])
    config = config_of(f"{tmp_path}/a,{tmp_path}/b", split=split)
    for corpus in open_corpora(config, load_tokenizer("bytes")):
        for side, (begin, end) in zip(
            divided(corpus, config.data), in_megatrons_words(split, count), strict=True
        ):
            assert side.starts.tolist() == corpus.offsets[begin:end].tolist()
            assert side.lengths.tolist() == [1 + i % 5 for i in range(begin, end)]


@pytest.mark.parametrize("name", ["core_uint16", "core_int32"])
def test_what_megatron_core_wrote(name):
    """25 documents, of which every fifth is two sequences."""
    (corpus,) = open_corpora(config_of(f"{MEGATRON}/{name}"), load_tokenizer("bytes"))
    assert corpus.tokens.dtype == name.removeprefix("core_") and len(corpus.offsets) == 26
    assert documents(f"{MEGATRON}/{name}") == [
        f"document {i} of {name}. " * (1 + i % 3) for i in range(25)
    ]


def test_megatrons_blend(tmp_path):
    """--data-path 0.3 A 0.7 B --split 80,10,10: weights of prefixes, and a split of each."""
    prefixes = [f"{MEGATRON}/core_uint16", f"{MEGATRON}/core_int32"]
    config = config_of(",".join(prefixes), weights="0.3,0.7", split="80,10,10")
    loader = Loader(config, load_tokenizer("bytes"))
    assert "30% " in loader.description and "70% " in loader.description
    assert loader.notes == ["config.data.split=80,10,10: 6 documents that nothing reads"]
    lengths = [
        [len(f"document {i} of {os.path.basename(p)}. ") * (1 + i % 3) + 1 for i in range(25)]
        for p in prefixes
    ]
    assert loader.train_tokens == sum(sum(n[:20]) for n in lengths)
    assert loader.eval_tokens == sum(sum(n[20:22]) for n in lengths)


def test_a_split_that_is_none():
    for split, wanted in (
        ("a,b", "is no list of the shares"),
        ("0,1", "is no list of the shares"),
        ("1,2,3,4", "is no list of the shares"),
        ("-1,2", "is no list of the shares"),
        ("nan", "is no list of the shares"),
    ):
        with pytest.raises(UserError, match=wanted):
            validate(replaced(Config(), "data.split", split))
    both = replaced(replaced(Config(), "data.split", "9,1"), "data.eval_fraction", 0.1)
    with pytest.raises(UserError, match="data.split=9,1 and config.data.eval_fraction=0.1 both"):
        validate(both)
    examples = replaced(replaced(Config(), "data.split", "9,1"), "objective", "sft")
    with pytest.raises(UserError, match="divides documents, and config.objective=sft reads exam"):
        validate(examples)
    best = replaced(replaced(Config(), "data.split", "9,0,1"), "checkpoint.keep_best", 1)
    with pytest.raises(UserError, match="keep_best=1 needs held-out text, but config.data.split=9"):
        validate(best)


def test_ids_are_checked_against_the_tokenizer_before_training(tmp_path):
    """Evaluation and documents go by the tokenizer, not by the model, whose vocabulary may be larger:
    nanoGPT's files, and Megatron's."""
    ids = np.random.default_rng(0).integers(0, 5000, 10_000).astype("<u2")
    ids[-1] = 4999
    ids.tofile(tmp_path / "train.bin")
    np.save(tmp_path / "train.npy", ids)
    write_megatron(tmp_path / "mega", [ids], [0, 1])
    for name in ("train.bin", "train.npy", "mega.bin"):
        with pytest.raises(
            UserError,
            match=r"has the token id 4999, but config.data.tokenizer='bytes' has "
            r"257 ids \(0 to 256\). Set config.data.tokenizer",
        ):
            Loader(config_of(tmp_path / name), load_tokenizer("bytes"))


def test_ids_of_a_wider_type_are_not_read_by_halves(tmp_path):
    path, ids = tmp_path / "a.bin", np.arange(3000) % 250
    for written, given in (("<u4", "uint16"), ("<i8", "uint16"), ("<i8", "uint32")):
        ids.astype(written).tofile(path)
        with pytest.raises(
            UserError, match=f"every second id of .*a.bin is 0, .* wider than {given}"
        ):
            Loader(config_of(path, bin_dtype=given), load_tokenizer("bytes"))
    ids.astype("<u4").tofile(path)
    loader = Loader(config_of(path, bin_dtype="uint32"), load_tokenizer("bytes"))
    assert loader.train_tokens + loader.eval_tokens == 3000


def test_documents_that_end_with_another_token_are_said(tmp_path):
    ids = np.tile(np.arange(10, 30), 20).astype("<u2")
    ids.tofile(tmp_path / "a.bin")
    write_megatron(tmp_path / "mega", [ids[:20], ids[20:]], [0, 1, 2])
    for name in ("a", "mega"):
        path = tmp_path / f"{name}.bin"
        assert Loader(config_of(path), load_tokenizer("bytes")).notes == [
            f"{path}: no document ends with the token 256; if another one ends them, set "
            f"config.data.eos_token_id"
        ]
        assert Loader(config_of(path, eos_token_id=29), load_tokenizer("bytes")).notes == []


# Special tokens


CHATS = [
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>",
    "first<|endoftext|>second",
    "third<|endoftext|>",
    "no markup",
]


def test_special_tokens_in_text(tmp_path, capsys):
    """Ids against the `tokenizers` library; documents end at each eos; from text, from a token file, with its
    sidecar or without."""
    reference = tokenizers.Tokenizer.from_file(CHATML)
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in CHATS))
    out = tmp_path / "chats.npy"
    expected = [
        [*reference.encode(t).ids, *([] if t.endswith("<|endoftext|>") else [0])]
        for t in (CHATS[0], "first<|endoftext|>", "second", *CHATS[2:])
    ]
    assert expected[0].count(1) == expected[0].count(2) == 2
    special = load_tokenizer(CHATML, special_tokens=True)

    def held(path, tokenizer=special):
        (corpus,) = open_corpora(
            config_of(path, CHATML, special_tokens=tokenizer.special_tokens), tokenizer
        )
        return [
            corpus.tokens[int(a) : int(b)].tolist()
            for a, b in zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True)
        ]

    assert held(tmp_path / "chats.jsonl") == expected
    tokenize = [
        "tokenize",
        f"--path={tmp_path}/chats.jsonl",
        f"--tokenizer={CHATML}",
        f"--out={out}",
    ]
    assert main([*tokenize, "--special-tokens"]) == 0
    assert "--config.data.special_tokens=True" in capsys.readouterr().out and held(out) == expected
    with pytest.raises(
        UserError,
        match="written with --special-tokens, but "
        "config.data.special_tokens=False. Set "
        "config.data.special_tokens=True",
    ):
        held(out, load_tokenizer(CHATML))
    (tmp_path / "chats.json").unlink()
    assert held(out) == expected

    # Without the option text is text, as ever.
    plain = load_tokenizer(CHATML)
    texts = held(tmp_path / "chats.jsonl", plain)
    assert [plain.decode(d) for d in texts] == CHATS and not any(
        i in d[:-1] for d in texts for i in (0, 1, 2)
    )
    assert special.name != plain.name
    (tmp_path / "chats.offsets").unlink()
    assert main(tokenize) == 0 and held(out, plain) == texts
    with pytest.raises(
        UserError, match="written without --special-tokens, but config.data.special_tokens=True"
    ):
        held(out)


def test_special_tokens_where_there_are_none(capsys):
    with pytest.raises(
        UserError,
        match="config.data.special_tokens=True has no effect with config.data.tokenizer=bytes",
    ):
        validate(Config(data=DataConfig(special_tokens=True, tokenizer="bytes")))
    assert (
        main(["tokenize", "--path=x", "--tokenizer=bytes", "--out=x.npy", "--special-tokens"]) == 2
    )
    assert "--special-tokens has no effect with --tokenizer=bytes" in capsys.readouterr().err


@pytest.mark.parametrize("cut", range(1, 24, 3))
def test_eos_at_the_end_of_a_piece_ends_a_document_once(cut, tmp_path, monkeypatch):
    """A long text comes in pieces; wherever these end, no document is a lone eos."""
    monkeypatch.setattr(formats, "BLOCK", cut)
    (tmp_path / "a.txt").write_text("word\nword<|endoftext|>\nmore\nword<|endoftext|>")
    (corpus,) = open_corpora(
        config_of(tmp_path / "a.txt", CHATML, special_tokens=True),
        load_tokenizer(CHATML, special_tokens=True),
    )
    assert np.diff(corpus.offsets).min() > 1 and corpus.offsets[-1] == len(corpus.tokens)


# Seen through `data show`, and from another folder


@pytest.mark.parametrize(
    "name", ["array.json", "a.jsonl.gz", "mega_text_document.idx", "chats.jsonl", "badutf8.parquet"]
)
def test_show_prints_the_documents_of_every_format(name, tmp_path, monkeypatch, capsys):
    """What rows of a run's data hold, by a config.json as train.py writes it: with paths that hold in any
    folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "array.json").write_text(
        json.dumps([{"text": f"text {i} of an array"} for i in range(9)])
    )
    lines = "".join(json.dumps({"text": f"text {i} of a gzip"}) + "\n" for i in range(9))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps({"text": f"<|im_start|>{i}<|im_end|>"}) + "\n" for i in range(50))
    )
    for file in ("mega_text_document.idx", "mega_text_document.bin", "badutf8.parquet"):
        shutil.copy(os.path.join(FORMATS, file), tmp_path / file)
    shutil.copy(CHATML, tmp_path / "tok.json")
    chats = name == "chats.jsonl"
    config = paths.absolute_config(
        config_of(name, "tok.json" if chats else "bytes", special_tokens=chats)
    )
    (tmp_path / "run").mkdir()
    write_config(str(tmp_path / "run"), config)
    monkeypatch.chdir("/")
    rows = Loader(
        config, load_tokenizer(config.data.tokenizer, special_tokens=chats)
    ).num_train_rows
    assert main(["show", f"--workdir={tmp_path}/run", f"--rows=0-{rows - 1}"]) == 0
    out, err = capsys.readouterr()
    wanted = {
        "array.json": "of an a",
        "a.jsonl.gz": "of a gz",
        "mega_text_document.idx": "hello",
        "chats.jsonl": "\n1",
        "badutf8.parquet": "caf\ufffd",
    }[name]
    assert wanted in out and f"{tmp_path}/{name}, document " in out
    assert ("U+FFFD" in err) == (name == "badutf8.parquet")


def test_paths_are_absolute_in_the_options(tmp_path, monkeypatch):
    """Every option that is a path; words that are none stay, and so does what `init_from` may mean besides a
    folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tok.json").write_text("{}")
    (tmp_path / "model").mkdir()
    here = os.getcwd()
    data = DataConfig(path="text, ~/more/*.jsonl,stdlib,/abs", tokenizer="tok.json")
    given = Config(
        init_from="model",
        data=data,
        checkpoint=CheckpointConfig(dir="ckpt", local_dir="../nvme"),
        compile=CompileConfig("cache"),
    )
    c = paths.absolute_config(given)
    assert (
        c.data.path == f"{here}/text,{os.path.expanduser('~')}/more/*.jsonl,stdlib,/abs"
        and c.data.tokenizer == f"{here}/tok.json"
    )
    assert c.init_from == f"{here}/model" and c.compile.cache_dir == f"{here}/cache"
    assert (c.checkpoint.dir, c.checkpoint.local_dir) == (
        f"{here}/ckpt",
        f"{os.path.dirname(here)}/nvme",
    )
    assert paths.absolute_config(c) == c
    words = Config(
        init_from="Qwen/Qwen3-0.6B",
        checkpoint=CheckpointConfig(dir="gs://bucket/x"),
        compile=CompileConfig("off"),
    )
    assert paths.absolute_config(words) == words and paths.absolute_config(Config()) == Config()


def test_a_command_line_with_relative_paths(tmp_path, monkeypatch):
    """train.py's own way to the options."""
    root = str(ROOT)
    monkeypatch.chdir(tmp_path)
    argv = [
        "train.py",
        f"--config={root}/configs/tiny.py",
        "--config.data.path=text",
        "--config.data.tokenizer=tok.json",
        "--config.checkpoint.dir=c",
    ]
    config = commandline.read_config(commandline.parse(argv))
    here = os.getcwd()
    assert (config.data.path, config.data.tokenizer, config.checkpoint.dir) == (
        f"{here}/text",
        f"{here}/tok.json",
        f"{here}/c",
    )
    with pytest.raises(UserError, match="relative paths start in"):
        load_tokenizer("tok.json")
