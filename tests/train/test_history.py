"""Resuming with other options and other files: which rows every step reads, and what is compared by content.
Nothing is compiled."""

import dataclasses
import itertools
import json
import os
import shutil
from typing import Any

import numpy as np
import pytest

from deepseek_jax.checkpoint import integrity
from deepseek_jax.config.options import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    TrainConfig,
)
from deepseek_jax.data import contents
from deepseek_jax.data.__main__ import main as data_main
from deepseek_jax.data.contents import check_tokenizer
from deepseek_jax.data.loader import Loader
from deepseek_jax.data.sources import open_corpora
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.data.windows import Windows
from deepseek_jax.errors import UserError
from deepseek_jax.inference.evaluation import perplexity
from deepseek_jax.inference.opener import Opened, tokenizer_of
from deepseek_jax.run import lock
from deepseek_jax.run.progress import Progress
from deepseek_jax.train import workdir
from deepseek_jax.train.history import History
from tests.support import FILES

TOKENIZERS = os.path.join(FILES, "resume")
CONTENTS: dict[str, Any] = {
    "tokenizer": "bytes",
    "sources": [{"tokens": 10, "documents": 2, "sha256": "00"}],
    "weights": [1.0],
}


def config_of(seed=0, data=None, **train):
    return Config(
        seed=seed,
        model=ModelConfig(vocab_size=320),
        data=DataConfig(**{"path": "a"} | (data or {})),
        train=TrainConfig(**train),
    )


def rows_of(history: History, steps: int) -> list[list[int]]:
    return [
        list(range(history.first_row(s), history.first_row(s) + history.count(s)))
        for s in range(steps)
    ]


def options_of(rng) -> dict:
    micro, accumulation = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    out = {"batch_size": micro * accumulation, "accumulation": accumulation}
    if rng.random() < 0.5:
        out |= {
            "batch_ramp_start": micro * int(rng.integers(1, accumulation + 1)),
            "batch_ramp_steps": int(rng.integers(1, 30)),
        }
    return out


def sequences(options: dict, step: int) -> int:
    """The batch size of a step, as config.py describes it, from the options alone."""
    full, steps = options["batch_size"], options.get("batch_ramp_steps", 0)
    if step >= steps:
        return full
    micro, start = full // options["accumulation"], options["batch_ramp_start"]
    return max(int(start + (full - start) * step / steps) // micro, 1) * micro


@pytest.mark.parametrize("seed", range(20))
def test_no_row_is_skipped_or_repeated(seed):
    """Starts with other batch sizes, accumulation and ramps, some from an older checkpoint than the last:
    rows go on one after another.
    """
    rng = np.random.default_rng(seed)
    saved, sizes, step, history = {}, [], 0, History()
    for _ in range(8):
        options = options_of(rng)
        read = History.of_json(json.loads(json.dumps(history.to_json())))
        history = read.resumed(step, config_of(**options), CONTENTS)
        again = history.resumed(step + 1, config_of(**options), CONTENTS)
        assert again == history, "the same command must not make the list longer"
        del sizes[step:]
        end = step + int(rng.integers(1, 12))
        for s in range(step, end):
            saved[s] = history
            sizes.append(sequences(options, s))
        saved[end] = history
        assert list(itertools.chain(*rows_of(history, end))) == list(range(sum(sizes)))
        assert [history.count(s) for s in range(end)] == sizes
        assert history.tokens(end) == sum(sizes) * TrainConfig().sequence_length
        step = end if rng.random() < 0.5 else int(rng.integers(1, end + 1))
        history = saved[step] if step < end else history


def test_rows_that_a_rollback_left_out_stay_out():
    history = History().resumed(0, config_of(batch_size=4), CONTENTS)
    skipped = Windows().without(history.first_row(2), 8)  # rows 8 to 15
    progress = Progress(0, skipped, 1, history).resumed(3, config_of(batch_size=6), CONTENTS)
    # 12 read, 8 left out
    assert progress.skipped.rows(progress.history.first_row(3), progress.history.count(3)) == [
        (20, 26)
    ]
    new = dataclasses.replace(
        config_of(seed=1, batch_size=6), data=DataConfig("a", on_change="new_pass")
    )
    progress = progress.resumed(5, new, CONTENTS)
    # another order: those rows are others
    assert progress.skipped.rows(progress.history.first_row(5), 6) == [(0, 6)]
    again = progress.resumed(6, new, CONTENTS)
    assert (
        again == progress and Progress.of_extra(json.loads(json.dumps(again.to_extra()))) == again
    )


OTHER = [
    (dict(seed=1), CONTENTS, "config.seed=1 differs from 0 of the checkpoint of step 3"),
    (dict(sequence_length=64), CONTENTS, "config.train.sequence_length=64 differs from 512"),
    (
        dict(data={"eval_fraction": 0.1}),
        CONTENTS,
        "config.data.eval_fraction=0.1 differs from 0.01",
    ),
    ({}, CONTENTS | {"weights": [0.5]}, "config.data.weights='' mixes by 0.5 and not 1"),
    (
        {},
        CONTENTS | {"sources": CONTENTS["sources"] * 2},
        "config.data.path has 2 sources and not 1",
    ),
    (
        {},
        CONTENTS | {"sources": [CONTENTS["sources"][0] | {"sha256": "01"}]},
        r"config.data.path='a' holds 10 tokens in 2 documents \(sha256 01\) and",
    ),
]


@pytest.mark.parametrize("options, now, text", OTHER, ids=lambda v: v if isinstance(v, str) else "")
def test_other_rows_are_refused_or_a_new_pass(options, now, text):
    before = History().resumed(0, config_of(), CONTENTS)
    with pytest.raises(UserError, match=text) as refusal:
        before.resumed(3, config_of(**options), now)
    assert "config.data.on_change=new_pass" in str(refusal.value) and "\n" not in str(refusal.value)
    asked = config_of(**options | {"data": options.get("data", {}) | {"on_change": "new_pass"}})
    after = before.resumed(3, asked, now)
    assert (after.first_row(2), after.first_row(3), after.first_row(4)) == (16, 0, 8)
    assert after.resumed(5, asked, now) == after
    assert after.order(2) == (0, after.stretches[0]) and after.order(4) == (3, after.stretches[1])
    assert before.resumed(3, asked, CONTENTS | {"sources": now["sources"]}).at(3).first_row in (
        0,
        24,
    )
    # which no option allows
    with pytest.raises(UserError, match="is sha256:0123, but the run was trained with bytes"):
        before.resumed(3, asked, now | {"tokenizer": "sha256:0123"})


@pytest.mark.parametrize("was", [True, False])
def test_special_tokens_are_said_apart_from_the_tokenizer(was):
    names = {True: "sha256:0123+special_tokens", False: "sha256:0123"}
    with pytest.raises(
        UserError, match=f"special_tokens={not was} differs from {was} of the checkpoint"
    ):
        check_tokenizer({"tokenizer": names[was]}, names[not was], "t.json")
    check_tokenizer({"tokenizer": names[was]}, names[was], "t.json")


def test_checkpoints_of_an_earlier_version():
    """They have no list: the options in config.json tell, which are those of the start that wrote them;
    without it this start's.
    """
    old = Config(train=TrainConfig(batch_size=4), data=DataConfig("a")).to_json()
    old["data"] |= {"gone": 1}  # an option that a later version does not have
    history = History().resumed(5, config_of(batch_size=6), CONTENTS, History.of_options(old))
    assert (history.first_row(4), history.first_row(5), history.count(5)) == (16, 20, 6)
    assert History().resumed(5, config_of(batch_size=6), CONTENTS).first_row(5) == 30
    with pytest.raises(UserError, match="sequence_length=64 differs from 512"):
        History().resumed(5, config_of(sequence_length=64), CONTENTS, History.of_options(old))


def write_docs(folder, count=30):
    rng = np.random.default_rng(1)
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:02d}.txt").write_text(
            f"doc{i:02d} " + "".join(rng.choice(list("abcdef "), rng.integers(20, 90)))
        )
    return folder


def loader_of(path, length=16, batch=2, tokenizer="bytes", **data):
    config = Config(
        model=ModelConfig(vocab_size=320),
        data=DataConfig(path=str(path), tokenizer=tokenizer, **data),
        train=TrainConfig(batch_size=batch, sequence_length=length),
    )
    return Loader(config, load_tokenizer(tokenizer)), config


def test_a_new_pass_with_another_length_reads_every_token_once(tmp_path):
    """A pass over rows of 16 is broken off; the one over rows of 24 that follows has every row of its own,
    and every token, once.
    """
    write_docs(tmp_path / "docs")
    old, config = loader_of(tmp_path / "docs", eval_fraction=0.0)
    new, longer = loader_of(
        tmp_path / "docs", length=24, batch=3, eval_fraction=0.0, on_change="new_pass"
    )
    history = History().resumed(0, config, old.contents).resumed(4, longer, new.contents)
    steps = 4 + -(-new.num_train_rows // 3)
    rows = list(itertools.chain(*rows_of(history, steps)[4:]))[: new.num_train_rows]
    places = {
        (s.document, s.first_token + i)
        for row in rows
        for s in new.origin(row)
        for i in range(s.tokens)
    }
    assert len(places) == new.num_train_rows * 24 and new.train_tokens - len(places) <= 24


def test_contents_not_names(tmp_path, monkeypatch):
    docs = write_docs(tmp_path / "docs")

    def of(path, **options) -> dict[str, Any]:
        return loader_of(path, **options)[0].contents

    first = of(docs)
    shutil.copytree(docs, tmp_path / "moved")
    os.utime(tmp_path / "moved" / "00.txt", (1, 1))
    moved = of(tmp_path / "moved")
    assert moved == first and contents.digest(moved) == contents.digest(first)
    assert (
        data_main(
            [
                "tokenize",
                f"--path={docs}",
                "--tokenizer=bytes",
                f"--out={tmp_path}/t.npy",
                "--dtype=uint32",
            ]
        )
        == 0
    )
    assert of(tmp_path / "t.npy") == first  # the same tokens, as a file

    def changed(name, change):
        folder = tmp_path / name
        shutil.copytree(docs, folder)
        change(folder)
        return contents.difference(first, of(folder), [str(folder)])

    text = (docs / "07.txt").read_text()
    assert "tokens in 30 documents" in changed(
        "letter", lambda f: (f / "07.txt").write_text(text[:-1] + "Z")
    )
    assert "tokens in 30 documents" in changed(
        "order",
        lambda f: (
            (f / "07.txt").rename(f / "x"),
            (f / "09.txt").rename(f / "07.txt"),
            (f / "x").rename(f / "09.txt"),
        ),
    )
    assert "in 31 documents" in changed("more", lambda f: (f / "99.txt").write_text("and more"))
    assert "in 29 documents" in changed("less", lambda f: (f / "08.txt").unlink())

    monkeypatch.setattr(contents, "BLOCKS", 4)
    # of more than 400 tokens a part is looked at, the first and the last always
    monkeypatch.setattr(contents, "BLOCK", 100)
    config = loader_of(docs)[1]
    (corpus,) = open_corpora(config, load_tokenizer("bytes"))
    tokens = np.array(corpus.tokens)
    assert len(tokens) > 800
    for place in (0, -1):
        other = tokens.copy()
        other[place] += 1
        assert contents.fingerprint(corpus._replace(tokens=other)) != contents.fingerprint(corpus)
    same = corpus._replace(tokens=tokens.astype(np.int64))
    assert contents.fingerprint(same) == contents.fingerprint(corpus)


def test_show_tells_what_past_steps_read(tmp_path, capsys):
    """Batches of 2, of 3, then a new pass with other rows and moved files: row numbers and texts of each are
    those of its own loader.
    """
    docs, run = write_docs(tmp_path / "docs"), tmp_path / "run"
    first, config = loader_of(docs, eval_fraction=0.0)
    history = History().resumed(0, config, first.contents)
    history = history.resumed(2, loader_of(docs, batch=3, eval_fraction=0.0)[1], first.contents)
    shutil.move(docs, tmp_path / "moved")
    second, moved = loader_of(tmp_path / "moved", batch=3, eval_fraction=0.0)
    history = history.resumed(4, moved, second.contents)
    third, new = loader_of(
        tmp_path / "moved", length=24, batch=3, eval_fraction=0.0, on_change="new_pass"
    )
    history = history.resumed(5, new, third.contents)
    run.mkdir()
    workdir.write_config(str(run), new, None, "r", history.to_json())
    shown = {}
    for step in range(1, 8):
        assert data_main(["show", f"--workdir={run}", f"--step={step}", "--characters=0"]) == 0
        shown[step] = capsys.readouterr().out
    rows = {
        step: list(
            dict.fromkeys(
                int(line.split()[1][:-1]) for line in text.splitlines() if line.startswith("row ")
            )
        )
        for step, text in shown.items()
    }
    assert rows == {
        1: [0, 1],
        2: [2, 3],
        3: [4, 5, 6],
        4: [7, 8, 9],
        5: [10, 11, 12],
        6: [0, 1, 2],
        7: [3, 4, 5],
    }
    for step, loader in ((1, second), (4, second), (7, third)):
        for row in rows[step]:
            for s in loader.origin(row):
                piece = f"document {s.document}, {s.tokens} tokens from {s.first_token}\n{s.text}\n"
                assert piece in shown[step]
    (tmp_path / "moved" / "03.txt").write_text("other text")
    assert data_main(["show", f"--workdir={run}", "--step=1"]) == 2
    assert "what it was trained on is no longer there" in capsys.readouterr().err
    config_json = json.loads((run / "config.json").read_text())
    del config_json["data_history"]  # as of an earlier version
    (run / "config.json").write_text(json.dumps(config_json))
    assert data_main(["show", f"--workdir={run}", "--step=1"]) == 0
    assert "of an earlier version" in capsys.readouterr().err


def test_held_out_text_is_that_of_the_run(tmp_path):
    loader, config = loader_of(write_docs(tmp_path / "docs"), eval_fraction=0.1)
    (tmp_path / "docs" / "99.txt").write_text("one more")
    with pytest.raises(UserError, match="in 31 documents .* what it held out is no longer known"):
        perplexity.of_held_out(Opened(None, config, True, None, "bytes", loader.contents), None, 1)


def test_the_tokenizer_of_a_run(tmp_path):
    """Replaced in place, at resume and in generate: refused. Moved, or kept in WORKDIR/hf: found."""
    a, b = (os.path.join(TOKENIZERS, f"tokenizer_{x}.json") for x in "ab")
    run = tmp_path / "w"
    given = tmp_path / "tok.json"
    shutil.copy(a, given)
    config = config_of(data={"tokenizer": str(given)})
    trained = CONTENTS | {"tokenizer": load_tokenizer(a).name}
    save(run / "checkpoints", 4, {"data": History().resumed(0, config, trained).to_json()})
    workdir.write_config(str(run), config)
    assert workdir.prepare(str(run), config, load_tokenizer(str(given)).name) == []
    assert tokenizer_of(str(run), config, trained) == str(given)
    shutil.copy(b, given)
    for check in (
        lambda: workdir.prepare(str(run), config, load_tokenizer(str(given)).name),
        lambda: tokenizer_of(str(run), config, trained),
    ):
        with pytest.raises(
            UserError,
            match=r"tok.json' is sha256:\w{12}, but the run was trained with "
            r"sha256:\w{12}: .* Put that tokenizer back",
        ):
            check()
    assert tokenizer_of(str(run), config, None) == str(
        given
    )  # of an earlier version: nothing is known
    (run / "hf").mkdir()
    shutil.copy(a, run / "hf" / "tokenizer.json")
    assert tokenizer_of(str(run), config, trained) == str(run / "hf" / "tokenizer.json")
    given.unlink()
    for known in (trained, None):
        assert tokenizer_of(str(run), config, known) == str(run / "hf" / "tokenizer.json")
    assert tokenizer_of(str(run), config, trained | {"tokenizer": "bytes"}) == "bytes"


def save(folder, step, extra):
    """As much of a checkpoint as is looked at before one is restored."""
    os.makedirs(folder / str(step))
    integrity.write_extra(folder / str(step), extra)


def test_whose_checkpoints(tmp_path):
    """config.checkpoint.dir: found by what they say of their run, wherever they lie."""
    mine, other, ck = tmp_path / "mine", tmp_path / "other", tmp_path / "ck"
    config = dataclasses.replace(
        config_of(data={"tokenizer": "bytes"}), checkpoint=CheckpointConfig(dir=str(ck))
    )
    assert workdir.prepare(str(mine), config, "bytes") == []
    run = workdir.identity(str(mine), config, {})
    workdir.write_config(str(mine), config, None, run)
    save(ck, 5, {"run": run, "model": dataclasses.asdict(config.model)})
    assert workdir.prepare(str(mine), config, "bytes") == []

    with pytest.raises(
        UserError, match="holds checkpoints of another run than --workdir=.*other"
    ) as refusal:
        workdir.prepare(str(other), config, "bytes")
    assert "config.checkpoint.take_over=True" in str(refusal.value)
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, hidden_size=96))
    # escaped before: no WORKDIR/checkpoints
    with pytest.raises(UserError, match="hidden_size=96 differs from"):
        workdir.prepare(str(mine), wider, "bytes")

    def taking(c: Config) -> Config:
        return dataclasses.replace(c, checkpoint=dataclasses.replace(c.checkpoint, take_over=True))

    # the checkpoint says it, where there is no config.json
    with pytest.raises(UserError, match="hidden_size=96 differs from"):
        workdir.prepare(str(other), taking(wider), "bytes")
    theta = dataclasses.replace(config.model, rope_theta=7.0)
    assert workdir.prepare(
        str(other), taking(dataclasses.replace(config, model=theta)), "bytes"
    ) == ["config.model.rope_theta: 10000.0 -> 7.0"]
    assert workdir.identity(str(mine), config, {"run": run}) == run
    new = workdir.identity(str(other), taking(config), {"run": run})
    workdir.write_config(str(other), taking(config), None, new)
    save(ck, 6, {"run": new})
    assert new != run and workdir.prepare(str(other), config, "bytes")
    assert workdir.identity(str(other), taking(config), {"run": new}) == new
    with pytest.raises(UserError, match="of another run"):  # taken away
        workdir.prepare(str(mine), config, "bytes")

    shutil.rmtree(ck / "6")
    here = dataclasses.replace(config, checkpoint=CheckpointConfig())
    with pytest.raises(
        UserError, match=f"mine has them, up to step 5, in {ck}"
    ):  # would begin anew
        workdir.prepare(str(mine), here, "bytes")
    shutil.move(ck, tmp_path / "moved")
    there = dataclasses.replace(config, checkpoint=CheckpointConfig(dir=str(tmp_path / "moved")))
    assert workdir.prepare(str(mine), there, "bytes")

    old = (
        tmp_path / "old"
    )  # an earlier version's: config.json names the folder, and nothing else does
    save(ck, 7, {"tokens_seen": 1})
    workdir.prepare(str(old), here, "bytes")
    workdir.write_config(str(old), config)
    assert workdir.prepare(str(old), config, "bytes") == []
    with pytest.raises(UserError, match="of another run"):
        workdir.prepare(str(tmp_path / "empty"), config, "bytes")


def test_checkpoints_on_local_disks_are_compared_too(tmp_path):
    run = tmp_path / "w"
    config = dataclasses.replace(
        config_of(data={"tokenizer": "bytes"}),
        checkpoint=CheckpointConfig(kind="local", local_dir=str(tmp_path / "disk")),
    )
    os.makedirs(run / "checkpoints")
    (run / "checkpoints" / "run_id").write_text("abc")
    workdir.write_config(str(run), config)
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, hidden_size=96))
    assert workdir.prepare(str(run), wider, "bytes") == []  # nothing is saved yet
    os.makedirs(tmp_path / "disk" / "abc" / "process_00000" / "3")
    with pytest.raises(UserError, match="hidden_size=96 differs from"):
        workdir.prepare(str(run), wider, "bytes")


def test_the_lock_covers_the_checkpoints(tmp_path):
    """From whichever workdir a second run comes, and whether the folder is a workdir's own or elsewhere."""

    def of(folder) -> Config:
        checkpoint = CheckpointConfig(dir=str(folder) if folder else "")
        return dataclasses.replace(config_of(), checkpoint=checkpoint)

    for name in "abc":
        (tmp_path / name).mkdir()
    a, b, c = (str(tmp_path / name) for name in "abc")
    (tmp_path / "link").symlink_to(tmp_path / "ck")
    with lock.all_locked(a, of(tmp_path / "ck")):
        with pytest.raises(UserError, match=f"config.checkpoint.dir={tmp_path}/ck is in use"):
            with lock.all_locked(b, of(tmp_path / "link"), wait=0.0):
                pytest.fail("two runs with one folder of checkpoints")
        with lock.all_locked(b, of(None)):
            with pytest.raises(UserError, match="is in use"):
                with lock.all_locked(c, of(f"{b}/checkpoints"), wait=0.0):
                    pytest.fail("two runs with one folder of checkpoints")
            assert os.listdir(f"{b}/checkpoints") == []
    with lock.all_locked(b, of(tmp_path / "ck")):
        pass
