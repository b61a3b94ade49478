"""`python -m deepseek_jax.data`: what the two commands write is what training reads, whole or not at all."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from deepseek_jax.config.options import Config, DataConfig, ModelConfig, TrainConfig
from deepseek_jax.data import formats, token_writer, tokenfile
from deepseek_jax.data.__main__ import main
from deepseek_jax.data.loader import Loader
from deepseek_jax.data.sources import open_corpora
from deepseek_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from deepseek_jax.errors import UserError

TEXTS = [
    f"def f{i}(x):\n    return x * {i}  # héllo 漢字 <|endoftext|>\n\n" * (i % 4 + 1)
    for i in range(40)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """texts.jsonl and a tokenizer.json trained on it by the command."""
    path = tmp_path_factory.mktemp("commands")
    (path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    assert (
        main(
            [
                "tokenizer",
                f"--path={path}/texts.jsonl",
                "--vocab-size=300",
                f"--out={path}/tokenizer.json",
            ]
        )
        == 0
    )
    return path


def config_for(path, tokenizer, vocab=300, **data):
    return Config(
        model=ModelConfig(vocab_size=vocab),
        data=DataConfig(path=str(path), tokenizer=str(tokenizer), **data),
        train=TrainConfig(batch_size=1, sequence_length=16),
    )


def tokenize(folder, out, tokenizer=None, path="texts.jsonl", *more):
    tokenizer = tokenizer or folder / "tokenizer.json"
    return main(
        ["tokenize", f"--path={folder}/{path}", f"--tokenizer={tokenizer}", f"--out={out}", *more]
    )


def test_tokenizer_is_deterministic_and_fits(folder, tmp_path):
    assert (
        main(
            [
                "tokenizer",
                f"--path={folder}/texts.jsonl",
                "--vocab-size=300",
                f"--out={tmp_path}/again.json",
            ]
        )
        == 0
    )
    assert (tmp_path / "again.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    t = load_tokenizer(str(folder / "tokenizer.json"))
    assert t.vocab_size == 300 and t.decode([t.eos_id]) == ""
    for text in TEXTS:
        ids = t.encode(text)
        assert (
            t.decode(ids) == text
            and t.token_bytes[ids].sum() == len(text.encode())
            and t.eos_id not in ids
        )


def test_a_text_with_few_pairs_gives_a_smaller_tokenizer_and_says_so(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("ab")
    assert (
        main(
            [
                "tokenizer",
                f"--path={tmp_path}/a.txt",
                "--vocab-size=1000",
                f"--out={tmp_path}/t.json",
            ]
        )
        == 0
    )
    size = load_tokenizer(str(tmp_path / "t.json")).vocab_size
    out = capsys.readouterr().out
    assert size < 1000 and f"config.model.vocab_size={size}" in out and "fewer" in out


@pytest.mark.parametrize(
    "name, dtype", [("c.npy", "auto"), ("c.bin", "auto"), ("c.npy", "uint32"), ("c.bin", "uint32")]
)
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_round_trip(folder, tmp_path, name, dtype, tokenizer):
    spec = "bytes" if tokenizer == "bytes" else str(folder / "tokenizer.json")
    assert tokenize(folder, tmp_path / name, spec, "texts.jsonl", f"--dtype={dtype}") == 0
    t = load_tokenizer(spec)
    (corpus,) = open_corpora(config_for(tmp_path / name, spec), t)
    assert isinstance(corpus.tokens, np.memmap) and corpus.tokens.dtype == (
        "uint16" if dtype == "auto" else dtype
    )
    docs = [
        corpus.tokens[a:b] for a, b in zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True)
    ]
    assert [t.decode(d) for d in docs] == TEXTS and all(d[-1] == t.eos_id for d in docs)
    side = json.loads((tmp_path / "c.json").read_text())
    assert (side["tokenizer"], side["eos_id"], side["vocab_size"]) == (
        t.name,
        t.eos_id,
        t.vocab_size,
    )
    assert (side["tokens"], side["documents"], side["max_id"]) == (
        len(corpus.tokens),
        len(TEXTS),
        corpus.tokens.max(),
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, "c.json", "c.offsets"])

    # The loader gives the same rows from the text and from the file, with its sidecar or without.
    def rows_of(path):
        return Loader(config_for(path, spec, bin_dtype=side["dtype"]), t).train_rows(0, 50)

    read = [rows_of(folder / "texts.jsonl"), rows_of(tmp_path / name)]
    (tmp_path / "c.json").unlink()
    read.append(rows_of(tmp_path / name))
    for rows in read[1:]:
        for k in rows:
            np.testing.assert_array_equal(rows[k], read[0][k])


def test_npy_files_are_plain_npy_files(folder, tmp_path):
    tokenize(folder, tmp_path / "c.npy", "bytes")
    assert np.load(tmp_path / "c.npy", allow_pickle=False).tobytes() == b"".join(
        np.array([*t.encode(), 256], "<u2").tobytes() for t in TEXTS
    )


def test_a_sidecar_saves_the_scan(folder, tmp_path, monkeypatch):
    tokenize(folder, tmp_path / "c.npy", "bytes")

    def no_scan(*_):
        raise AssertionError("scanned")

    monkeypatch.setattr(tokenfile, "_scan", no_scan)
    open_corpora(config_for(tmp_path / "c.npy", "bytes"), load_tokenizer("bytes"))


def test_shards_with_sidecars_and_overwriting(folder, tmp_path):
    for i in range(2):
        assert tokenize(folder, tmp_path / f"s{i}.npy", "bytes") == 0
    (tmp_path / "more.txt").write_text("another text " * 10)
    assert (
        main(
            [
                "tokenize",
                f"--path={tmp_path}/more.txt",
                "--tokenizer=bytes",
                f"--out={tmp_path}/s1.npy",
            ]
        )
        == 0
    )
    (corpus,) = open_corpora(config_for(f"{tmp_path}/*.npy", "bytes"), load_tokenizer("bytes"))
    assert len(corpus.offsets) - 1 == len(TEXTS) + 1


def test_a_long_file_is_written_without_holding_it(tmp_path, monkeypatch):
    """With blocks far below the file's size, the tokenizer never sees more than a few blocks at once."""
    text = "".join(f"line {i}\n" for i in range(5000))
    (tmp_path / "long.txt").write_text(text)
    monkeypatch.setattr(formats, "BLOCK", 1000)
    monkeypatch.setattr("deepseek_jax.data.sources.BATCH_CHARACTERS", 2000)
    seen, encode_batch = [], ByteTokenizer.encode_batch

    def watched(self, texts):
        seen.append(sum(map(len, texts)))
        return encode_batch(self, texts)

    monkeypatch.setattr(ByteTokenizer, "encode_batch", watched)
    assert tokenize(tmp_path, tmp_path / "c.bin", "bytes", "long.txt") == 0
    assert max(seen) < 4000 and sum(seen) == len(text)
    assert np.fromfile(tmp_path / "c.bin", "<u2").tolist() == [*text.encode(), 256]


@pytest.mark.parametrize("where", ["write", "finish", "rename"])
def test_a_torn_file_never_looks_finished(folder, tmp_path, monkeypatch, where):
    assert tokenize(folder, tmp_path / "c.npy", "bytes") == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    if where == "rename":  # killed between the renames: nothing cleans up
        replace, count = os.replace, [0]
        monkeypatch.setattr(
            os,
            "replace",
            lambda a, b: die() if count.append(0) or len(count) > 3 else replace(a, b),
        )
        monkeypatch.setattr(token_writer.TokenWriter, "__exit__", lambda *_: None)
    else:
        monkeypatch.setattr(token_writer.TokenWriter, where, die)
    with pytest.raises(Killed):
        tokenize(folder, tmp_path / "c.npy", None)
    if where == "rename":
        assert not (tmp_path / "c.npy").exists()  # new sidecar, no tokens: the path does not exist
    else:
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_full_disk_is_one_line_and_leaves_nothing(folder, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_writer.TokenWriter, "write", full)
    assert tokenize(folder, tmp_path / "c.npy", "bytes") == 2
    assert "No space left on device" in capsys.readouterr().err and not list(tmp_path.iterdir())


COMMAND_ERRORS = [  # (arguments, what stderr has to say)
    (
        "tokenizer --path={f}/texts.jsonl --vocab-size=256 --out={t}/x.json",
        ["--vocab-size=256", "257"],
    ),
    ("tokenizer --path={f}/nope --vocab-size=300 --out={t}/x.json", ["--path=", "does not exist"]),
    (
        "tokenizer --path={t}/blank.jsonl --vocab-size=300 --out={t}/x.json",
        ["--path=", "holds no text"],
    ),
    ("tokenizer --path={f}/texts.jsonl --vocab-size=300 --out={t}/no/x.json", ["--out=", "mkdir"]),
    ("tokenize --path={f}/texts.jsonl --tokenizer=bytes --out={t}/x.txt", ["--out=", ".npy"]),
    ("tokenize --path={f}/texts.jsonl --tokenizer=bytes --out={t}/no/x.npy", ["--out=", "mkdir"]),
    (
        "tokenize --path={f}/texts.jsonl --tokenizer={t}/no.json --out={t}/x.npy",
        ["--tokenizer=", "does not exist"],
    ),
    (
        "tokenize --path={f}/texts.jsonl,{t}/ids.npy --tokenizer=bytes --out={t}/x.npy",
        ["--path=", "ids.npy", "token ids"],
    ),
    (
        "tokenize --path={t}/blank.jsonl --tokenizer=bytes --out={t}/x.npy",
        ["--path=", "holds no text"],
    ),
    ("tokenize --path={t}/bad.jsonl --tokenizer=bytes --out={t}/x.npy", ["--path=", "line 1"]),
    (
        "tokenize --path={t}/y.json --tokenizer=bytes --out={t}/y.npy",
        ["--out=", "overwrite", "y.json"],
    ),
    (
        "tokenizer --path={t}/y.json --vocab-size=300 --out={t}/y.json",
        ["--out=", "overwrite", "y.json"],
    ),
    (
        "tokenizer --path={f}/texts.jsonl --vocab-size=300 --out=/dev/null",
        ["'/dev/null' is no file"],
    ),
    (
        "tokenize --path={f}/texts.jsonl --tokenizer={t}/large.json --out={t}/large.npy",
        ["--out=", "overwrite", "large.json"],
    ),
    (
        "tokenize --path={f}/texts.jsonl --tokenizer={t}/large.json --out={t}/link.npy",
        ["--out=", "overwrite", "large.json"],
    ),
    (
        "tokenize --path={f}/texts.jsonl --tokenizer=bytes --out={t}/y.npy",
        ["--out=", "y.json beside it"],
    ),
    (
        "tokenize --path={f}/texts.jsonl --tokenizer=bytes --out={t}/z.npy",
        ["--out=", "z.offsets beside it"],
    ),
    (
        "tokenize --path={f}/texts.jsonl --tokenizer=bytes --out={t}/other.bin",
        ["--out=", "other.json beside it"],
    ),
    (
        "tokenize --path={f}/texts.jsonl --tokenizer={t}/large.json --dtype=uint16 --out={t}/x.npy",
        ["--dtype=uint16", "70000"],
    ),
]


@pytest.mark.parametrize("line, wanted", COMMAND_ERRORS)
def test_command_errors(folder, tmp_path, capsys, line, wanted):
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "bad.jsonl").write_text("{}\n")
    (tmp_path / "y.json").write_text('{"text": "text"}')
    (tmp_path / "z.offsets").write_text("mine")
    (tmp_path / "other.json").write_text(
        json.dumps({"format": tokenfile.FORMAT, "file": "other.npy"})
    )  # of another token file
    (tmp_path / "link.json").symlink_to("large.json")
    np.save(tmp_path / "ids.npy", np.arange(4))
    large = json.loads((folder / "tokenizer.json").read_text())
    large["model"]["vocab"]["zzz"] = 69999
    (tmp_path / "large.json").write_text(json.dumps(large))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    capsys.readouterr()
    assert main(line.format(f=folder, t=tmp_path).split()) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("data: ") and err.count("\n") == 1
    for text in wanted:
        assert text in err, err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_relative_path_to_an_input_is_seen(folder, tmp_path, monkeypatch, capsys):
    text = (folder / "tokenizer.json").read_text()
    (tmp_path / "tok.json").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert tokenize(folder, "../" + tmp_path.name + "/tok.npy", "tok.json") == 2
    assert "would overwrite tok.json" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["tok.json"] and (
        tmp_path / "tok.json"
    ).read_text() == text


def damage(path, change):
    side = json.loads((path / "c.json").read_text())
    if change == "tokens":
        with open(path / "c.bin", "ab") as f:
            f.write(b"\0\0")
    elif change == "offsets":
        (path / "c.offsets").write_bytes((path / "c.offsets").read_bytes()[:-8])
    elif change == "no offsets":
        (path / "c.offsets").unlink()
    elif change == "max_id":
        (path / "c.json").write_text(json.dumps({**side, "max_id": 300}))
    elif change in ("dtype", "documents"):
        (path / "c.json").write_text(
            json.dumps(
                {**side, "dtype": "float16"}
                if change == "dtype"
                else {k: v for k, v in side.items() if k != change}
            )
        )


@pytest.mark.parametrize(
    "change, wanted",
    [
        ("tokenizer", ["config.data.tokenizer='bytes' is bytes", "sha256:"]),
        ("tokens", ["tokens of uint16", "c.json says"]),
        ("offsets", ["c.offsets does not fit"]),
        ("no offsets", ["c.offsets cannot be read"]),
        ("max_id", ["token id 300", "has 300 ids"]),
        ("dtype", ["c.json", "is damaged", "dtype='float16'"]),
        ("documents", ["c.json", "is damaged", "documents=None"]),
    ],
)
def test_sidecar_errors(folder, tmp_path, change, wanted):
    assert tokenize(folder, tmp_path / "c.bin") == 0
    damage(tmp_path, change)
    spec = "bytes" if change == "tokenizer" else folder / "tokenizer.json"
    with pytest.raises(UserError) as info:
        open_corpora(config_for(tmp_path / "c.bin", spec), load_tokenizer(str(spec)))
    message = str(info.value)
    assert "config.data.path='" in message and "\n" not in message
    for text in wanted:
        assert text in message, message


def test_the_program_itself():
    """Help and an error, as a user sees them."""

    def run(*args):
        return subprocess.run(
            [sys.executable, "-m", "deepseek_jax.data", *args], capture_output=True, text=True
        )

    shown = run("tokenize", "--help")
    assert shown.returncode == 0 and all(
        o in shown.stdout for o in ("--path", "--tokenizer", "--out", "--dtype", "example:")
    )
    wrong = run("tokenize", "--path=/nope", "--tokenizer=bytes", "--out=x.npy")
    assert (
        wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "Traceback" not in wrong.stderr
    )
