"""The command line of train.py, read from a list: nothing is taken from sys.argv or left behind in the
process.
"""

import sys

import pytest
from absl import flags

from deepseek_jax.errors import UserError
from deepseek_jax.plan import options as plan_options
from deepseek_jax.run import commandline
from tests.support import ROOT

TINY = f"--config={ROOT}/configs/tiny.py"


def read(*argv):
    return commandline.read_config(commandline.parse(["program", *argv]))


def test_two_command_lines_in_one_process(monkeypatch):
    """As a notebook reads them, whose own sys.argv has other flags."""
    monkeypatch.setattr(sys, "argv", ["notebook", "-f", "kernel.json", "--config.train.steps=1"])
    before = set(flags.FLAGS)
    first = read(TINY, "--config.train.steps=3", "--config.model.q_lora_rank=24")
    second = read(f"--config={ROOT}/configs/v3.py:yarn", "--config.model.q_lora_rank=None")
    assert (first.train.steps, first.model.q_lora_rank) == (3, 24)
    assert second.model.q_lora_rank is None and second.model.rope_scaling.factor == 40.0
    assert sys.argv == ["notebook", "-f", "kernel.json", "--config.train.steps=1"]
    assert set(flags.FLAGS) == before


def test_flags_of_another_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["other"])
    parser = plan_options.Parser()
    parser.add_argument("--devices", type=int)
    own, config = plan_options.read(parser, ["--devices=8", "--config.train.steps=5"], TINY[9:])
    assert (own.devices, config.train.steps) == (8, 5) and sys.argv == ["other"]


def test_booleans_and_separate_values():
    config = read(TINY, "--noconfig.data.document_mask", "--config.train.steps", "9")
    assert not config.data.document_mask and config.train.steps == 9


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            ["--config.train.gradient_accumulation_steps=4"],
            "--config.train.gradient_accumulation_steps=4: 'gradient_accumulation_steps' is not an option. "
            "gradient_accumulation_steps (DeepSpeed) is config.train.accumulation here.",
        ),
        (["--config.trian.steps=4"], "'trian' is not an option. Did you mean"),
        (
            ["--config.train.stepz", "4"],
            "--config.train.stepz: 'stepz' is not an option. Did you mean steps?",
        ),
        (["--noconfig.data.mask"], "'mask' is not an option."),
        (["--config.sharding.strategy=FULL-SHARD"], "Did you mean full_shard?"),
        (["--config.model=7"], "--config.model=7"),
    ],
)
def test_mistakes(argv, message):
    with pytest.raises(UserError) as error:
        read(TINY, *argv)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_argument_that_a_config_does_not_know():
    with pytest.raises(UserError) as error:
        read(f"{TINY}:big")
    assert str(error.value) == (
        f"{TINY}:big: the argument 'big' of this config is not known. Leave it out: there is none."
    )


def test_a_config_file_that_makes_a_mistake(tmp_path):
    mistakes = (
        ("c.train.stepz = 3", "config.train.stepz is not an option. Did you mean steps?"),
        ("c.trian.steps = 3", "cannot be used: AttributeError"),
        ("c.train.steps = -1", "config.train.steps=-1 is below 0. Set it to 0 or more."),
    )
    # Each in a file of its own: of one that is as long and as old as its bytecode Python reads that.
    for i, (text, said) in enumerate(mistakes):
        file = tmp_path / f"mine{i}.py"
        file.write_text(
            "from deepseek_jax.configdict import base_config\n"
            f"def get_config():\n  c = base_config()\n  {text}\n  return c\n"
        )
        with pytest.raises(UserError) as error:
            read(f"--config={file}")
        assert said in str(error.value) and "\n" not in str(error.value)
