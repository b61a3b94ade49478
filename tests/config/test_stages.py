"""`distill.stages` as it is written: JSON text, a file, dicts; what is wrong with it is said in one line."""

import dataclasses
import json

import pytest

from deepseek_jax.config import stages
from deepseek_jax.config.configdict import base_config, from_config_dict
from deepseek_jax.config.options import Config, replaced
from deepseek_jax.config.rules import stages as rules
from deepseek_jax.config.stages import StageOptions
from deepseek_jax.config.validation import validate
from deepseek_jax.errors import UserError
from deepseek_jax.run import commandline

TWO = [
    {"name": "experts", "epochs": 2, "lr_multipliers": "experts=1,.=0"},
    {"name": "all", "steps": 50, "lr_multipliers": "norm=0.5", "learning_rate": 1e-5},
]
READ = (
    StageOptions("experts", epochs=2.0, lr_multipliers="experts=1,.=0"),
    StageOptions("all", steps=50, lr_multipliers="norm=0.5", learning_rate=1e-5),
)


def with_stages(text: str, **train) -> Config:
    config = dataclasses.replace(Config(), train=dataclasses.replace(Config().train, **train))
    return replaced(config, "distill.stages", text)


def test_every_way_to_write_them(tmp_path):
    """As text, as a file, as dicts in a config file and from Python: the same options."""
    path = tmp_path / "stages.json"
    path.write_text(json.dumps(TWO, indent=2))
    texts = {
        stages.read(with_stages(given)).distill.stages for given in (json.dumps(TWO), str(path))
    }
    config = base_config()
    config.distill.stages = tuple(TWO)
    texts.add(stages.read(from_config_dict(config)).distill.stages)
    texts.add(from_config_dict({"distill": {"stages": TWO}}).distill.stages)
    texts.add(stages.read(replaced(Config(), "distill.stages", tuple(TWO))).distill.stages)
    assert {stages.parse(text) for text in texts} == {READ}
    assert stages.parse("") == () and stages.read(Config()).distill.stages == ""
    assert from_config_dict(with_stages(json.dumps(TWO)).to_json()) == with_stages(json.dumps(TWO))


def test_the_command_line(tmp_path):
    """The path of a file, from the folder of the command; config.json gets what it holds."""
    path = tmp_path / "stages.json"
    path.write_text(json.dumps(TWO))
    argv = ["train.py", "--config=configs/tiny.py", "--config.train.steps=0"]
    for given in (str(path), json.dumps(TWO)):
        flags = commandline.parse([*argv, f"--config.distill.stages={given}"])
        config = commandline.read_config(flags)
        assert stages.of_config(config) == READ and config.distill.stages.startswith("[")


def one(**keys) -> str:
    return json.dumps([{"name": "a", "steps": 5} | keys])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stages.json", "'stages.json' is no JSON, and as a file it cannot be read (No such file"),
        ('[{"name": "a", "steps": 5}', "is neither a file nor JSON (Expecting ',' delimiter"),
        ('{"name": "a", "steps": 5}', "is no list of stages. Write a list: [{"),
        ("[]", "=[] is no list of stages"),
        ("[1]", "=[1] is no list of stages"),
        (one(name=""), "stage 1 has no name"),
        (json.dumps([{"steps": 5}]), "stage 1 has no name. Give it one"),
        (
            json.dumps([{"name": "a", "steps": 1}, {"name": "a", "steps": 2}]),
            "2 stages are named 'a'",
        ),
        (one(epochs=1), "stage 1 (a) has both epochs and steps. Give it one of them"),
        (json.dumps([{"name": "a"}]), "stage 1 (a) has neither epochs nor steps"),
        (
            one(steps=0),
            "steps=0 is not a whole number of steps above 0. Set it, or leave the stage",
        ),
        (one(steps=1.5), "steps=1.5 is not a whole number of steps above 0"),
        (one(steps=True), "steps=True is not"),
        (json.dumps([{"name": "a", "epochs": 0}]), "epochs=0 is not a number of passes above 0"),
        ('[{"name": "a", "epochs": NaN}]', "epochs=nan is not a number of passes"),
        ('[{"name": "a", "epochs": Infinity}]', "epochs=inf is not a number of passes"),
        ('[{"name": "a", "steps": 1, "steps": 2}]', "the key 'steps' occurs twice in a stage"),
        (one(lr=1), "stage 1 (a): 'lr' is not known. A stage has name, epochs, steps, lr_multi"),
        (one(learning_rate=0), "learning_rate=0 is no number above 0"),
        (one(lr_multipliers="experts"), "stage 1 (a): lr_multipliers='experts': 'experts' has no"),
        (one(lr_multipliers="(=1"), "lr_multipliers='(=1': '(' is no regular expression"),
        (one(lr_multipliers=1), "lr_multipliers=1 is no text of PATTERN=FACTOR"),
        (json.dumps([{"stage_name": "a", "num_epochs": 2}]), "stage_name is name here"),
        (one(num_epochs=2), "num_epochs is epochs here"),
        (
            one(parameter_lr_multipliers=[{"pattern": ".*experts.*", "lr_multiplier": 1.0}]),
            "parameter_lr_multipliers is lr_multipliers here. A stage has name, epochs, steps, "
            'lr_multipliers, learning_rate. Write "lr_multipliers": ".*experts.*=1.0".',
        ),
        (
            one(lr_multipliers=[{"pattern": "norm", "lr_multiplier": 0}]),
            'Write "lr_multipliers": "norm=0".',
        ),
    ],
)
def test_what_is_no_stage_is_refused(text, said):
    with pytest.raises(UserError) as error:
        stages.read(with_stages(text))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("config.distill.stages")


def test_a_file_is_looked_at(tmp_path):
    path = tmp_path / "s.json"
    for content, said in (("", "is an empty file"), (" " * 2**20 + "[1]", "more than 1048576 b")):
        path.write_text(content)
        with pytest.raises(UserError, match=said):
            stages.read(with_stages(str(path)))
    path.write_bytes(b"\xff\xfe[")
    with pytest.raises(UserError, match="cannot be read \\(it is no text\\)"):
        stages.read(with_stages(str(path)))


def test_options_that_do_not_go_together():
    given = with_stages(json.dumps(TWO))
    validate(given)
    validate(with_stages(json.dumps(TWO), steps=0))  # a run needs an end, and has one
    for name, value, said in (
        ("optimizer.lr_multipliers", "norm=1", "config.optimizer.lr_multipliers=norm=1 has no eff"),
        ("optimizer.schedule_steps", 7, "config.optimizer.schedule_steps=7 has no effect with"),
        ("lora.r", 4, "config.distill.stages and config.lora.r=4: a checkpoint of an adapter"),
        (
            "distill.stages",
            one(lr_multipliers=".=0"),
            "stage 1 (a): lr_multipliers='.=0' and config.optimizer.default_lr_multiplier=1 freeze",
        ),
    ):
        config = replaced(given, name, value)
        if name == "distill.stages":  # what no pattern matches may learn: known with the weights
            config = replaced(config, "optimizer.default_lr_multiplier", 0.0)
            said = said.replace("=1 freeze", "=0 freeze")
        with pytest.raises(UserError) as error:
            rules.check(config)
        assert said in str(error.value) and "\n" not in str(error.value)
    mixed = replaced(given, "data.weights", "1,2")
    validate(mixed)  # documents go round and round
    with pytest.raises(
        UserError, match="stage 1 \\(experts\\): epochs=2 counts passes over the exa"
    ):
        rules.check(replaced(mixed, "objective", "sft"))


def test_schedule_steps_of_a_constant_rate_are_refused():
    config = replaced(Config(), "optimizer.schedule", "constant")
    with pytest.raises(UserError, match="schedule_steps=9 has no effect with config.optimizer.sch"):
        validate(replaced(config, "optimizer.schedule_steps", 9))
