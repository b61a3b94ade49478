"""The command deepseek-jax, and the wheel that brings it."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest

from deepseek_jax.cli import __main__ as commands
from deepseek_jax.cli import packaged
from tests.support import ROOT


def run(*args, cwd, env=None) -> subprocess.CompletedProcess:
    env = {"JAX_PLATFORMS": "cpu"} | os.environ | {"PYTHONPATH": str(ROOT)} | (env or {})
    return subprocess.run(args, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def test_configs_that_come_with_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny, v3 = (str(ROOT / "configs" / name) for name in ("tiny.py", "v3.py"))
    assert packaged.with_config_file(["train", "--config=tiny"]) == ["train", f"--config={tiny}"]
    assert packaged.with_config_file(["--config=configs/tiny.py"]) == [f"--config={tiny}"]
    assert packaged.with_config_file(["-config", "v3:yarn"]) == ["-config", f"{v3}:yarn"]
    same = [
        "--config=../x",
        "--config=absent.py",
        "--config.train.steps=3",
        "--configs=tiny",
        "tiny",
    ]
    assert packaged.with_config_file(same) == same
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.py").touch()  # a file here wins
    here = ["--config=configs/tiny.py"]
    assert packaged.with_config_file(here) == here
    assert packaged.train_py() == str(ROOT / "train.py")


def test_commands(capsys, monkeypatch):
    for _, module in commands.COMMANDS.values():
        assert module == "train.py" or importlib.util.find_spec(module), module
    monkeypatch.setattr(sys, "argv", ["deepseek-jax", "trian"])
    assert commands.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("deepseek-jax: 'trian' is not a command. Commands: train, generate, ")
    monkeypatch.setattr(sys, "argv", ["deepseek-jax", "--help"])
    assert commands.main() == 0 and "  checkpoint  " in capsys.readouterr().out


def test_a_mistake_through_the_command(tmp_path):
    done = run(
        *(sys.executable, "-m", "deepseek_jax.cli", "train", "--config=tiny"),
        "--config.train.stepz=3",
        cwd=tmp_path,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "'stepz' is not an option" in done.stderr


def without_index() -> list[str]:
    """For pip: build with what is installed here, if that is new enough for pyproject.toml."""
    try:
        major = int(importlib.metadata.version("setuptools").split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return []
    return ["--no-build-isolation"] if major >= 77 else []


@pytest.mark.slow
def test_the_wheel_trains_where_there_is_no_checkout(tmp_path):
    source, wheels, site, empty = (tmp_path / n for n in ("source", "wheels", "site", "empty"))
    source.mkdir()
    empty.mkdir()
    files = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "train.py")
    for name in files:
        shutil.copy(ROOT / name, source)
    for name in ("configs", "deepseek_jax"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    built = run(*pip, "wheel", "--no-deps", *without_index(), "-w", wheels, source, cwd=empty)
    assert built.returncode == 0, built.stderr
    (wheel,) = wheels.iterdir()
    installed = run(*pip, "install", "--no-deps", "--target", site, wheel, cwd=empty)
    assert installed.returncode == 0, installed.stderr
    assert not (site / "train.py").exists() and not (site / "configs").exists()

    command = site / "bin" / "deepseek-jax"
    env = {"PYTHONPATH": str(site)}
    trained = run(
        *(command, "train", "--config=tiny", "--workdir=run", "--config.train.steps=2"),
        *("--config.train.batch_size=2", "--config.train.sequence_length=32"),
        *("--config.model.num_hidden_layers=2", "--config.log.every_steps=1"),
        *("--config.eval.batches=1", "--config.eval.sample_tokens=2"),
        cwd=empty,
        env=env,
    )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    rows = [json.loads(line) for line in (empty / "run/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == [1, 2]
    assert (empty / "run/report.html").stat().st_size > 100_000 and not trained.stderr.count(
        "report"
    )
    shown = run(command, "checkpoint", "ls", "run", cwd=empty, env=env)
    assert shown.returncode == 0 and "2" in shown.stdout, shown.stdout + shown.stderr
    where = "import deepseek_jax; print(deepseek_jax.__file__)"
    found = run(sys.executable, "-c", where, cwd=empty, env=env)
    assert found.stdout.startswith(str(site)), "the checkout was run, not the wheel"
