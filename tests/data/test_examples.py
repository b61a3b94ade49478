"""Reading rows of every kind of file, and the tokenised examples that are kept on disk."""

import gzip
import json
import os
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepseek_jax.data import example_choice, example_files
from deepseek_jax.data.conversations import drop_none
from deepseek_jax.data.documents import DataNotes
from deepseek_jax.data.examples import open_examples
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import UserError
from tests.support.examples import ByteEncoder, chat, make_config, random_chats, write_jsonl

TOOL = {"name": "add", "parameters": {"x": {"type": "int"}}}


def read(path, folder=None, encoder=None, notes=None):
    tokenizer = load_tokenizer("bytes")
    folder = folder and str(folder)
    return open_examples(
        make_config(path), tokenizer, encoder or ByteEncoder(), folder, notes=notes
    )


def texts(examples):
    return [
        bytes(i for i in examples.tokens[a:b].tolist() if i < 256).decode()
        for a, b in zip(examples.offsets[:-1], examples.offsets[1:], strict=True)
    ]


def same(a, b):
    arrays = all(
        np.array_equal(getattr(a, n), getattr(b, n))
        for n in ("tokens", "scored", "offsets", "sources")
    )
    return arrays and a.facts == b.facts


class Rows(ByteEncoder):
    """Keeps the rows that it is given."""

    def __init__(self):
        super().__init__()
        self.rows = []
        self.arrow = None

    def encode_batch(self, rows, names=(), arrow=False):
        self.rows += rows
        self.arrow = arrow
        return super().encode_batch(rows, names)


def test_rows_come_with_all_their_columns_from_every_kind_of_file(tmp_path):
    rows = [
        chat("a", "b") | {"tools": [TOOL], "id": 7},
        chat("c", "é") | {"tools": [{"name": "sub"}]},
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "c.json").write_text(json.dumps(rows))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as f:
        f.write("".join(json.dumps(r) + "\n\n" for r in rows))
    with pa.CompressedOutputStream(str(tmp_path / "c.jsonl.zst"), "zstd") as f:
        f.write((tmp_path / "a.jsonl").read_bytes())
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "d.parquet")
    with pa.ipc.new_stream(str(tmp_path / "e.arrow"), table.schema) as f:
        f.write_table(table)
    with pa.ipc.new_file(str(tmp_path / "f.arrow"), table.schema) as f:
        f.write_table(table)
    for name in (
        "a.jsonl",
        "c.json",
        "b.jsonl.gz",
        "c.jsonl.zst",
        "d.parquet",
        "e.arrow",
        "f.arrow",
    ):
        encoder = Rows()
        examples = read(tmp_path / name, encoder=encoder)
        assert encoder.arrow == (name[0] in "def")
        # a table gives every row all keys, and the encoder is told
        assert (drop_none(encoder.rows) if encoder.arrow else encoder.rows) == rows, name
        assert texts(examples) == ["u:aa:b", "u:ca:é"]
        assert examples.scored.sum() == 2 + 3
    both = read(f"{tmp_path}/a.jsonl,{tmp_path}/[de].*")
    assert both.sources.tolist() == [0, 2, 6]


def test_a_folder_is_read_without_what_holds_no_examples(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", random_chats(3))
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "dataset_info.json").write_text('{"features": {}}')
    notes = DataNotes()
    examples = read(tmp_path, notes=notes)
    assert len(examples.lengths) == 3
    assert "README" in notes.lines()[0] or ".md" in notes.lines()[0]
    assert (
        ".json" in examples.facts.notes[0] and "without rows of examples" in examples.facts.notes[0]
    )


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", '{"messages": []}\n[1]\n', ["line 2 of", "no object"]),
        ("a.jsonl", '{"messages": []}\n{"messages": \n', ["line 2 of", "not valid JSON"]),
        ("a.jsonl", '{"messages": [{"role": "user"}]}\n', ["line 1 of", "no content"]),
        ("a.jsonl", "\n\n", ["holds no examples"]),
        ("a.txt", "text", ["learns from rows of examples"]),
        ("a.npy", "text", ["learns from rows of examples"]),
        ("a.parquet", "text", ["not a readable parquet file"]),
        ("a.jsonl.gz", "text", ["cannot be unpacked"]),
    ],
)
def test_mistakes_are_one_line_with_their_place(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as e:
        read(tmp_path / name)
    for word in ["config.data.path", *words]:
        assert word in str(e.value)
    assert "\n" not in str(e.value)


def test_the_place_of_a_mistake_within_a_batch(tmp_path):
    rows = random_chats(20)
    del rows[13]["messages"][1]["content"]
    with pytest.raises(UserError, match="line 14 of"):
        read(write_jsonl(tmp_path / "a.jsonl", rows))


def test_ids_that_the_tokenizer_has_not(tmp_path):
    class Beyond(ByteEncoder):
        def encode_batch(self, rows, names=(), arrow=False):
            return [e._replace(ids=e.ids + 100) for e in super().encode_batch(rows, names)]

    with pytest.raises(UserError, match="line 1 of .* token id 356, but .* 0 to 256"):
        read(write_jsonl(tmp_path / "a.jsonl", random_chats(2)), encoder=Beyond())


def test_lone_surrogates_become_replacement_characters(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "x\\ud800"}]}\n')
    examples = read(path)
    assert texts(examples) == ["u:x\ufffd"]
    assert "not Unicode" in examples.facts.notes[0]


def test_examples_are_tokenised_once(tmp_path):
    path, folder = write_jsonl(tmp_path / "a.jsonl", random_chats(300)), tmp_path / "kept"
    encoder = ByteEncoder()
    first = read(path, folder, encoder)
    assert encoder.calls == 300
    assert same(read(path, folder, encoder), first) and encoder.calls == 300
    assert same(read(path), first)  # nowhere kept
    assert first.tokens.dtype == np.uint16 and first.facts.about == (
        "assistant messages are trained",
    )
    endings = sorted(name.split(".", 1)[1] for name in os.listdir(folder))
    assert endings == ["json", "lock", "offsets", "scored", "tokens"]
    os.rename(path, tmp_path / "b.jsonl")  # what it is called is not what it holds
    assert same(read(tmp_path / "b.jsonl", folder, encoder), first) and encoder.calls == 300
    # another file, template or tokenizer: other examples
    read(tmp_path / "b.jsonl", folder, other := ByteEncoder(name="other"))
    assert other.calls == 300
    read(write_jsonl(tmp_path / "c.jsonl", random_chats(300, seed=1)), folder, encoder)
    assert encoder.calls == 600


def test_kept_examples_that_are_damaged_are_made_anew(tmp_path):
    path, folder = write_jsonl(tmp_path / "a.jsonl", random_chats(30)), tmp_path / "kept"
    first = read(path, folder)

    def put(file, data):  # beside the file that `first` maps
        file.unlink()
        file.write_bytes(data)

    def flip(file):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        put(file, data)

    def cut(file):
        put(file, file.read_bytes()[:-1])

    def change(file):
        head = json.loads(file.read_text())
        put(file, json.dumps(head | {"sources": [0, 31]}).encode())

    def foreign(file):
        put(file, b"[" * 100_000)

    for ending, damages in (
        ("tokens", (flip, cut, os.unlink)),
        ("scored", (flip, cut, os.unlink)),
        ("offsets", (flip, cut, os.unlink)),
        ("json", (cut, change, foreign, os.unlink)),
    ):
        for damage in damages:
            (file,) = folder.glob(f"*.{ending}")
            damage(file)
            encoder = ByteEncoder()
            assert same(read(path, folder, encoder), first)
            assert encoder.calls == 30, (ending, damage)
            read(path, folder, encoder)
            assert encoder.calls == 30


def test_nothing_appears_of_examples_that_were_not_all_made(tmp_path):
    rows = random_chats(30)
    del rows[29]["messages"][1]["content"]
    with pytest.raises(UserError):
        read(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "kept")
    assert [n for n in os.listdir(tmp_path / "kept") if not n.endswith(".lock")] == []


def test_a_folder_that_cannot_be_written(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", random_chats(3))
    (tmp_path / "kept").write_text("a file")
    with pytest.raises(UserError, match="kept cannot be written"):
        read(path, tmp_path / "kept")


def test_memory_does_not_grow_with_the_examples(tmp_path):
    """Twice as many, 3 MB of arrays more: no more memory than a few numbers of each need."""

    def peak(count):
        path = write_jsonl(tmp_path / f"{count}.jsonl", [chat("a" * 1000, "b" * 1000)] * count)
        tracemalloc.start()
        examples = read(path, tmp_path / "kept")
        example_choice.choose(examples, make_config(path, length=4096), {256})
        out = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return out

    peak(10)
    few, many = peak(500), peak(1000)
    assert many - few < 500 * 200  # bytes; the arrays have 6 kB of each


def test_kept_files_hold_plain_arrays(tmp_path):
    """No pickle: raw little-endian integers, and JSON."""
    examples = read(write_jsonl(tmp_path / "a.jsonl", random_chats(5)), tmp_path / "kept")
    (stem,) = [p.with_suffix("") for p in (tmp_path / "kept").glob("*.json")]
    assert np.array_equal(np.fromfile(f"{stem}.tokens", "<u2"), examples.tokens)
    assert np.array_equal(np.fromfile(f"{stem}.scored", "u1"), examples.scored)
    assert np.array_equal(np.fromfile(f"{stem}.offsets", "<i8"), examples.offsets)
    assert (
        json.loads((tmp_path / "kept" / f"{stem.name}.json").read_text())["format"]
        == example_files.FORMAT
    )
