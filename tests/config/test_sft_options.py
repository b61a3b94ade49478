"""Options of fine-tuning: read in every spelling, and refused in one line where they cannot act."""

import dataclasses

import pytest

from deepseek_jax.cli import packaged
from deepseek_jax.config import paths
from deepseek_jax.config.configdict import base_config, from_config_dict
from deepseek_jax.config.options import Config, replaced
from deepseek_jax.config.validation import validate
from deepseek_jax.errors import UserError
from deepseek_jax.run import commandline
from tests.support import ROOT, chat_folders

GOOD = from_config_dict(
    {
        "objective": "sft",
        "init_from": "model",
        "data": {"path": "chats.jsonl"},
        "train": {"steps": 5},
    }
)


def with_options(config: Config, **options) -> Config:
    for name, value in options.items():
        config = replaced(config, name.replace("__", "."), value)
    return config


@pytest.mark.parametrize(
    "value, read", [("auto", None), ("True", True), ("FALSE", False), (True, True), (False, False)]
)
def test_true_false_and_auto(value, read):
    """Text in any case, from a command line, and Python's own in a config file and in JSON."""
    config = base_config()
    config.sft.assistant_only_loss = value
    config.sft.completion_only_loss = value
    for tree in (config, {"sft": {"assistant_only_loss": value, "completion_only_loss": value}}):
        options = from_config_dict(tree)
        assert options.sft.assistant_only is read and options.sft.completion_only is read
        assert from_config_dict(options.to_json()) == options
    with pytest.raises(TypeError):
        config.sft.packing = True
    with pytest.raises(UserError, match="config.sft.packing=True has the type bool"):
        from_config_dict({"sft": {"packing": True}})


def test_packing_by_its_older_name():
    assert with_options(GOOD, sft__packing="bfd-requeue").sft.packing_strategy == "bfd_split"
    assert GOOD.sft.packing_strategy == "bfd"


def test_a_template_is_a_path_or_a_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    for value, absolute in (
        ("mine.jinja", str(tmp_path / "mine.jinja")),
        ("{{ messages }}", "{{ messages }}"),
        ("a\nb", "a\nb"),
        ("tool_use", "tool_use"),  # the name of one of the model's
        ("", ""),
    ):
        config = paths.absolute_config(with_options(GOOD, sft__chat_template=value))
        assert config.sft.chat_template == absolute


@pytest.mark.parametrize(
    "options, said",
    [
        ({"objective": "pretrain", "sft__eval_prompts": 3}, "or config.objective=sft."),
        ({"init_from": ""}, "config.init_from='': there is no model to fine-tune. Set"),
        ({"data__path": "stdlib"}, "config.data.path=stdlib, which are programs"),
        ({"data__special_tokens": True}, "has no effect with config.objective=sft"),
        ({"data__document_mask": False}, "would see the others of its row. Set"),
        (
            {"sft__packing": "wrapped", "sft__truncation": "drop"},
            "no effect with config.sft.packing=wrapped",
        ),
        ({"sft__chat_template_kwargs": "[1]"}, "'[1]' is no JSON object. Set it to"),
        ({"sft__chat_template_kwargs": "{"}, "is no JSON object ("),
        (
            {"sft__format": "text", "sft__assistant_only_loss": "True"},
            "config.sft.format=text, which has no messages. Set config.sft.assistant_only_loss=auto.",
        ),
        (
            {"sft__format": "tokenized", "sft__system_prompt": "x"},
            "config.sft.system_prompt=x has no effect",
        ),
        (
            {"sft__format": "messages", "sft__completion_only_loss": "true"},
            "no prompt beside a completion. Set config.sft.completion_only_loss=auto.",
        ),
        (
            {"sft__loss_type": "dft", "sft__label_smoothing": 0.1},
            "config.sft.label_smoothing=0.1 and config.sft.loss_type=dft",
        ),
        ({"sft__eval_tokens": 9}, "config.sft.eval_tokens=9 has no effect with"),
        ({"sft__eval_prompts": 2, "data__eval_fraction": 0.0}, "Set it above 0, or"),
        ({"sft__eval_prompts": 2, "sft__format": "text"}, "which has no prompts. Set"),
        ({"train__steps": 0}, "config.train.epochs=0.0: a run needs an end. Set"),
    ],
)
def test_what_cannot_act_is_refused(options, said):
    validate(GOOD)
    with pytest.raises(UserError) as error:
        validate(with_options(GOOD, **options))
    text = str(error.value)
    assert said in text and "\n" not in text and " Set " in text


def test_the_config_file(tmp_path):
    """The model is that of init_from; without one it is refused. By its short name it is found, too."""
    model = chat_folders.model(tmp_path / "model")
    argv = ["train.py", "--config=configs/post/sft.py", "--config.train.sequence_length=64"]
    config = commandline.read_config(commandline.parse([*argv, f"--config.init_from={model}"]))
    assert (config.objective, config.train.steps, config.train.epochs) == ("sft", 0, 3.0)
    assert config.model.hidden_size == 16 and config.moe.bias_update_rate == 0
    assert config.data.tokenizer == f"{model}/tokenizer.json"
    with pytest.raises(UserError, match="config.init_from='': there is no model"):
        commandline.read_config(commandline.parse(argv))
    with pytest.raises(UserError, match="the argument 'x' of this config is not known"):
        commandline.parse(["train.py", "--config=configs/post/sft.py:x"])
    (found,) = packaged.with_config_file(["--config=post/sft"])
    assert found == f"--config={ROOT / 'configs/post/sft.py'}"
    text = (ROOT / "configs/post/sft.py").read_text()
    assert "python train.py --config=configs/post/sft.py" in text


def test_epochs_in_place_of_steps():
    """The profile is checked against the last step when it is known."""
    config = with_options(GOOD, train__steps=0, train__epochs=0.5)
    validate(config)
    validate(dataclasses.replace(config, profile=dataclasses.replace(config.profile, start=10)))
