"""Nothing of the user's is overwritten or deleted unasked.

Not inputs, files beside an output, nor what is in the folder of a run or a checkpoint.

What `python -m deepseek_jax.data` writes is in test_data_commands.py; export and import beside
folders of other names in test_hf_runs.py.
"""

import os

import pytest

from deepseek_jax import evaluate, generate
from deepseek_jax.checkpoint.folder import Folder
from deepseek_jax.cli.command import exit_code
from deepseek_jax.config import paths
from deepseek_jax.config.options import Config
from deepseek_jax.errors import UserError
from deepseek_jax.hf import provenance
from deepseek_jax.run import init_from, lock
from deepseek_jax.train import workdir


def contents(folder):
    return {
        os.path.join(here, n): open(os.path.join(here, n), "rb").read()
        for here, _, names in os.walk(folder)
        for n in names
    }


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder that looks like a run, text, prompts and questions; the current folder is beside them."""
    run = tmp_path / "run"
    (run / "checkpoints" / "3" / "state").mkdir(parents=True)
    (run / "checkpoints" / "3" / "state" / "params").write_text("weights")
    for name, text in (
        ("run/config.json", '{"model": {}}'),
        ("run/metrics.jsonl", '{"step": 1}\n'),
        ("p.jsonl", '{"prompt": "a"}\n'),
        ("q.jsonl", '{"prompt": "a", "choices": ["b", "c"], "answer": 0}\n'),
        ("text/a.txt", "some text"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "link").symlink_to("p.jsonl")
    os.link(tmp_path / "q.jsonl", tmp_path / "hard")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


@pytest.mark.parametrize(
    "command, line, wanted",
    [
        (
            generate,
            "--prompts={f}/p.jsonl --output={f}/p.jsonl",
            "p.jsonl, which this command reads",
        ),
        (generate, "--prompts={f}/p.jsonl --output=../link", "p.jsonl, which this command reads"),
        (
            generate,
            "--prompts=../p.jsonl --output={f}/run/config.json",
            "run/config.json, which this command reads",
        ),
        (
            generate,
            "--prompts=../p.jsonl --output={f}/run/metrics.jsonl",
            "run/metrics.jsonl, which",
        ),
        (
            generate,
            "--prompts=../p.jsonl --output={f}/run/checkpoints/3/state/params",
            "state/params, which",
        ),
        (generate, "--prompts=../p.jsonl --output={f}/none/out.jsonl", "does not exist"),
        (
            evaluate,
            "--questions={f}/q.jsonl --output=../q.jsonl",
            "q.jsonl, which this command reads",
        ),
        (evaluate, "--questions={f}/q.jsonl --output=../hard", "q.jsonl, which this command reads"),
        (evaluate, "--text={f}/text --output=../text/a.txt", "a.txt, which this command reads"),
        (
            evaluate,
            "--text={f}/text --output=../run/config.json",
            "config.json, which this command reads",
        ),
        (evaluate, "--text={f}/text --output={f}/text", "is a folder"),
    ],
)
def test_answers_and_results_never_replace_what_is_read(
    command, line, wanted, files, monkeypatch, capsys
):
    before = contents(files)
    monkeypatch.setattr(
        "sys.argv", ["command", f"--model={files}/run", *line.format(f=files).split()]
    )
    assert exit_code("command", command.main) == 2
    err = capsys.readouterr().err
    assert wanted in err and "--output=" in err and err.count("\n") == 1
    assert contents(files) == before


def test_outputs_that_may_be_written(files):
    """A file that is named and not read is replaced, in a run's folder too; ~ is the home folder."""
    (files / "run" / "answers.jsonl").write_text("old")
    paths.check_output(
        "--output", str(files / "run" / "answers.jsonl"), provenance.model_files(str(files / "run"))
    )
    paths.check_output("--output", "new.jsonl", ["../p.jsonl", "not there"])
    paths.check_output("--output", "~/new.jsonl")
    paths.check_output("--output", "/dev/null")
    assert paths.temporary("a") != paths.temporary("a")


def test_a_workdir_with_files_of_somebody_else(tmp_path):
    """A run would replace a checkpoint's config.json, a metrics.jsonl, a lock and a folder hf."""
    for name, text, message in (
        ("config.json", '{"model_type": "qwen3_moe"}', "cannot be read as the config of a run"),
        ("metrics.jsonl", '{"mine": 1}\n', "no config.json of a run"),
        ("lock", "mine", "is not the lock of a run"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(text)
        with pytest.raises(UserError, match=message):
            workdir.prepare(str(folder), Config())
            with lock.locked(str(folder)):
                pass
        assert contents(folder) == {str(folder / name): text.encode()}
    (tmp_path / "w" / "hf").mkdir(parents=True)
    with pytest.raises(UserError, match="holds a folder hf that is not of a run"):
        init_from.open_for_training(Config(init_from=str(tmp_path)), str(tmp_path / "w"))


def test_a_checkpoint_folder_with_numbers_that_are_no_checkpoints(tmp_path):
    """Old checkpoints are deleted by their number: a folder 2024 of photographs is not one of them.

    Half-made checkpoints go, photographs stay.
    """
    (tmp_path / "2024").mkdir()
    assert Folder(str(tmp_path), read_only=False).steps() == [2024]  # empty: nothing can be lost
    (tmp_path / "2024" / "photo.jpg").write_text("mine")
    with pytest.raises(UserError, match="holds 2024, which is no checkpoint"):
        Folder(str(tmp_path), read_only=False)
    (tmp_path / "2024").rename(tmp_path / "2024.tmp")
    (tmp_path / "3.tmp" / "state").mkdir(parents=True)
    Folder(str(tmp_path), read_only=False).clean()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2024.tmp"]


def test_names_of_folders_that_are_made_first():
    assert (
        paths.scratch("a/out/")
        == os.path.abspath("a/.out.deepseek_jax.tmp")
        == paths.scratch(os.path.abspath("a/out"))
    )
