"""A mistake on the command line of any command is one line on stderr and exit code 2."""

import sys
import textwrap

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks.learning import tiny
from deepseek_jax import evaluate, generate
from deepseek_jax.checkpoint import __main__ as checkpoint
from deepseek_jax.cli.command import exit_code
from deepseek_jax.config import __main__ as config
from deepseek_jax.data import __main__ as data
from deepseek_jax.hf import __main__ as hf
from deepseek_jax.launch import __main__
from deepseek_jax.plan import __main__ as plan
from tests.support import ROOT


@pytest.mark.parametrize(
    "main, argv, named",
    [
        (lambda _: checkpoint.main(), ["ls"], "DIR"),
        (lambda _: checkpoint.main(), ["verify", "runs/x", "--stap=3"], "--stap=3"),
        (lambda _: hf.main(), ["export", "a", "b", "--dtype=int8"], "int8"),
        (lambda _: evaluate.main(), ["--model=x", "--text=a", "--questions=b"], "--questions"),
        (generate.main, ["--model=x", "--temperature=hot"], "hot"),
        (generate.main, ["--model=x", "--max=5"], "--max=5"),  # no abbreviations
        (data.main, ["tokenize", "--path=x"], "--tokenizer"),
        (__main__.main, ["--nproc_per_node=2"], "program"),
        (plan.main, ["--devices=many"], "many"),
        (config.main, ["wards"], "'wards'"),
        (benchmarks.main, ["floor", "--shape=huge"], "huge"),
        (benchmarks.main, ["moe", "--turnz=3"], "--turnz=3"),
        (benchmarks.main, ["storm", "--kills"], "--kills"),
        (benchmarks.main, ["storm", "--only=kills,disc"], "'disc' is not known. Choose of kills,"),
        (
            benchmarks.main,
            ["attention", "--lengths=512,1k"],
            "'512,1k' is not a list of whole numbers",
        ),
    ],
)
def test_a_mistake_is_one_line(main, argv, named, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program", *argv])
    assert exit_code("program", lambda: main(argv)) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and named in err and err.endswith("See --help.\n")


@pytest.mark.parametrize(
    "main, argv, flag",
    [
        (generate.main, [], "--draft-tokens"),
        (benchmarks.main, ["storm"], "--kills=50\n        Kills of "),
    ],
)
def test_help_of_a_command_and_of_a_benchmark(main, argv, flag, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program", *argv, "--help"])
    with pytest.raises(SystemExit) as end:
        main([*argv, "--help"])
    out, err = capsys.readouterr()
    assert end.value.code == 0 and flag in out and "python -m" in out and not err


def test_texts_that_are_read_do_not_depend_on_indentation():
    """As docstrings are in Python 3.13 (dedented) and before; what is asked of the text is the same."""
    text = (ROOT / "configs" / "tiny.py").read_text(encoding="utf-8")
    assert (
        tiny.stated(text)
        == tiny.stated(textwrap.indent(text, "    "))
        == tiny.stated("\n".join(text.split()))
        == (1.29, 0.05)
    )
