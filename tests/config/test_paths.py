"""`~` in what a user names: every path flag of every command, every path option, once and the same."""

import argparse
import importlib
import os
import pathlib
import sys

import pytest

from deepseek_jax import generate
from deepseek_jax.cli import arguments
from deepseek_jax.config import __main__ as config_command
from deepseek_jax.config import options as configs
from deepseek_jax.config import paths
from deepseek_jax.config.options import Config, DataConfig
from deepseek_jax.data import __main__ as data
from deepseek_jax.errors import UserError
from deepseek_jax.run import commandline
from tests.support import ROOT


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return str(tmp_path)


def test_expanded(home):
    for path in ("x", "./~", "a/~/b", "gs://bucket/~", "bytes", "", "-"):
        assert paths.expanded(path, "--out") == path
    assert (
        paths.expanded("~", "--out") == home and paths.expanded("~/a/b", "--out") == f"{home}/a/b"
    )
    assert paths.expanded("~root", "--out") == os.path.expanduser("~root") != "~root"
    assert (
        paths.each_expanded("stdlib, ~/a,~/b.txt,c~", "--path")
        == f"stdlib,{home}/a,{home}/b.txt,c~"
    )
    with pytest.raises(
        UserError,
        match=r"^--out=~nobody-here/x: there is no user nobody-here. Write ./~nobody-here/x ",
    ):
        paths.expanded("~nobody-here/x", "--out")


def test_options_of_a_run(home):
    """--workdir, the config file and every option that is a path, as train.py, plan and the benchmarks read
    them."""
    config = pathlib.Path(home, "mine.py")
    config.write_text(pathlib.Path(ROOT, "configs/tiny.py").read_text())
    argv = [
        "train.py",
        "--config=~/mine.py",
        "--workdir=~/run",
        "--config.data.path=stdlib,~/text",
        "--config.data.tokenizer=~/tokenizer.json",
        "--config.checkpoint.dir=~/checkpoints",
        "--config.compile.cache_dir=~/cache",
    ]
    flags = commandline.parse(argv)
    read = commandline.read_config(flags)
    assert (
        flags.workdir == f"{home}/run"
        and read.data.path == f"stdlib,{home}/text"
        and read.data.tokenizer == f"{home}/tokenizer.json"
    )
    assert (
        read.checkpoint.dir == f"{home}/checkpoints" and read.compile.cache_dir == f"{home}/cache"
    )
    with pytest.raises(UserError, match="config.data.path=~nobody-here/x"):
        paths.absolute_config(Config(data=DataConfig(path="stdlib,~nobody-here/x")))


def test_every_path_option_is_known():
    """The options whose help speaks of a file, folder or path are those that are expanded."""
    known = {name for name, option in configs.OPTIONS.items() if option.path}
    named = {
        name
        for name, option in configs.OPTIONS.items()
        if any(w in option.help.lower() for w in ("folder", "path of", "file, folder"))
    }
    assert known == named >= {"data.path", "checkpoint.dir", "init_from"}
    for name in known:
        assert configs.replaced(Config(), name, "~/x") != Config()


class Found(Exception):
    pass


def parsers():
    """(command, its argparse parser), of all programs that have one."""
    yield "generate", generate.parser()
    yield "data", data._parser()
    yield "config", config_command.parser()
    programs = [
        "deepseek_jax.evaluate",
        "deepseek_jax.hf.__main__",
        "deepseek_jax.checkpoint.__main__",
        "deepseek_jax.esft.__main__",
        "deepseek_jax.launch.__main__",
        *(
            f"benchmarks.{p.parent.name}.{p.stem}"
            for p in sorted((ROOT / "benchmarks").glob("*/*.py"))
            if "arse_args(" in p.read_text()
        ),
    ]
    for name in programs:
        module = importlib.import_module(name)
        caught = []

        def catch(self, *_, caught=caught, **__):
            caught.append(self)
            raise Found

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Found):
            patch.setattr(argparse.ArgumentParser, "parse_args", catch)
            patch.setattr(argparse.ArgumentParser, "parse_known_args", catch)
            patch.setattr(sys, "argv", [name])
            module.parse([]) if ".launch." in name else module.main()
        yield name, caught[0]


def flags_of(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in dict.fromkeys(action.choices.values()):
                yield from flags_of(sub)
        else:
            yield action


NAMES = {
    "model",
    "workdir",
    "out",
    "output",
    "path",
    "questions",
    "prompts",
    "source",
    "target",
    "dir",
    "dir2",
    "folder",
    "gguf",
    "tokenizer",
    "restore",
    "peer",
    "program",
}


def test_every_path_flag_of_every_command():
    """By its name or metavar: an argument that names a file or folder has the type that expands it."""
    seen = 0
    for command, parser in parsers():
        for action in flags_of(parser):
            if action.dest in NAMES or action.metavar in (
                "DIR",
                "DIR2",
                "PATH",
                "FILE",
                "SRC",
                "DST",
                "WORKDIR",
                "OUT",
            ):
                seen += 1
                assert action.type in (arguments.path, arguments.path_list), (command, action.dest)
    assert seen >= 25


def test_a_workdir_below_home(home, monkeypatch, tmp_path):
    """A writer: no folder named ~ is made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("to be or not to be " * 50)
    assert (
        data.main(["tokenizer", "--path=~/text.txt", "--vocab-size=260", "--out=~/made.json"]) == 0
    )
    assert (tmp_path / "made.json").exists() and not (tmp_path / "~").exists()
    assert (
        data.main(
            ["tokenizer", "--path=~/text.txt", "--vocab-size=260", "--out=~nobody-here/made.json"]
        )
        == 2
    )
