"""The Makefile: environments of another Python are made anew and no other folder is touched; what
is checked."""

import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from tests.support import ROOT

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


def planned(venv: pathlib.Path, *variables: str) -> str:
    """What `make venv` would run."""
    done = subprocess.run(
        ["make", "--dry-run", "venv", f"VENV={venv}", *variables],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=os.environ | {"MAKEFLAGS": ""},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def environment(folder: pathlib.Path, version: str | None, installed: bool = True) -> pathlib.Path:
    """As `python -m venv` and an installation leave it; version None: its interpreter is gone."""
    (folder / "bin").mkdir(parents=True)
    (folder / "pyvenv.cfg").touch()
    python = folder / "bin" / "python"
    python.write_text(f"#!/bin/sh\necho {version}\n" if version else "#!/nowhere/python\n")
    python.chmod(0o755)
    if installed:
        (folder / ".installed").touch()
    return folder


@pytest.mark.parametrize(
    "version, variables, anew",
    [
        (HERE, [], False),
        (HERE, [f"PYTHON={sys.executable}"], False),
        ("3.9", [f"PYTHON={sys.executable}"], True),
        ("3.9", [], True),
        (None, [], True),
        (None, [f"PYTHON={sys.executable}"], True),
    ],
)
def test_an_environment_of_another_python_is_made_anew(version, variables, anew, tmp_path):
    venv = environment(tmp_path / "venv", version)
    text = planned(venv, *variables)
    assert (f"rm -rf {venv}" in text) == anew
    assert ("-m venv" in text and "pip install" in text) == anew, (
        "the stamp of the old one must not count"
    )


def test_a_folder_that_is_no_environment_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "making it anew" not in planned(tmp_path / "mine")


def test_jax_has_the_same_bounds_everywhere():
    """Private parts of it are used, so that the newest version that was tested is an upper bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    every = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    assert {re.sub(r"^jax(\[.*\])?", "", r) for r in every if re.match(r"jax\W", r)} == {
        ">=0.10.2,<0.13"
    }


def test_every_file_is_checked():
    """No tool is told of files, or to leave some out, and .ci/run runs them all."""
    recipe = (ROOT / "Makefile").read_text().partition("\ncheck:")[2].partition("\n\n")[0]
    assert all(f'"{tool}"' in recipe for tool in ("ruff format --check", "ruff check", "mypy"))
    assert "\nmake check\n" in (ROOT / ".ci" / "run").read_text()
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    text = str(tools["ruff"]) + str(tools["mypy"])
    assert not re.search("exclude|per-file-ignores|ignore_errors", text)
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, text=True, capture_output=True)
    if tracked.returncode == 0:  # not in a plain copy of the files
        top = {file.split("/")[0] for file in tracked.stdout.split()}
        assert top == set(tools["mypy"]["files"])


def test_the_fast_share_names_tests_that_there_are():
    share = (ROOT / "Makefile").read_text().partition("\nFAST := ")[2].partition("\n\n")[0]
    named = re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", share)
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text() if test else (ROOT / file).exists(), file
