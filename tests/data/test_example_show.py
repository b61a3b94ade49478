"""`data show` of fine-tuning, with a real chat template: a run that is to begin, and one that has begun."""

import json

import pytest
import tokenizers

from deepseek_jax.config.configdict import from_config_dict
from deepseek_jax.config.options import value_of
from deepseek_jax.data.__main__ import main
from deepseek_jax.data.open import open_data
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.train import workdir
from deepseek_jax.train.history import History
from tests.support import ROOT
from tests.support.examples import random_chats, write_jsonl

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tokenizer of bytes and a chat template."""
    folder = tmp_path_factory.mktemp("model")
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    t.train_from_iterator(["user\n", "assistant\n"] * 9, trainer)
    t.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def flags(model, tmp_path):
    """Of configs/tiny.py, for fine-tuning."""
    path = write_jsonl(tmp_path / "chats.jsonl", random_chats(60))
    return [
        f"--config={ROOT}/configs/tiny.py",
        "--config.objective=sft",
        f"--config.data.path={path}",
        f"--config.data.tokenizer={model}/tokenizer.json",
        "--config.train.sequence_length=128",
        "--config.train.batch_size=2",
    ]


def test_show_before_a_run(flags, capsys, monkeypatch):
    """What is trained stands between marks: the answers and their stop tokens, no headers."""
    assert main(["show", *flags, "--rows=0", "--characters=0"]) == 0
    out = capsys.readouterr().out
    assert "60 examples: 59 to train on, 1 held out" in out and "% padding" in out
    assert "the stop token <|im_end|>" in out
    lines = out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("row 0: "))
    assert ", example " in lines[at] and " trained" in lines[at]
    answer = lines.index("<|im_start|>assistant", at) + 1
    assert lines[answer].startswith("⟦") and lines[answer].rstrip("\n").endswith("<|im_end|>⟧")
    assert "⟦" not in "".join(lines[at:answer])
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    main(["show", *flags, "--rows=0", "--characters=0"])
    coloured = capsys.readouterr().out
    assert "\x1b[1;32m" in coloured and "⟦" not in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    main(["show", *flags, "--rows=0", "--characters=0"])
    assert capsys.readouterr().out == out


def test_show_of_a_run(flags, model, tmp_path, capsys):
    """Rows of a step by the options that it had, also where packing changed since."""
    run = tmp_path / "run"
    run.mkdir()
    from deepseek_jax.run import commandline

    config = commandline.read_config(commandline.parse(["show", *flags]))
    tokenizer = load_tokenizer(config.data.tokenizer)
    loader = open_data(config, tokenizer, workdir=str(run))
    history = History().resumed(0, config, loader.contents)
    assert History.of_json(json.loads(json.dumps(history.to_json()))) == history
    workdir.write_config(str(run), config, None, "r", history.to_json())
    assert (run / "examples").is_dir()
    for step in (1, 3):
        assert main(["show", f"--workdir={run}", f"--step={step}", "--characters=0"]) == 0
        out = capsys.readouterr().out
        for row in (2 * step - 2, 2 * step - 1):
            for span in loader.origin(row):
                assert (
                    f"row {row}: {span.source}, example {span.document}, {span.tokens} tokens"
                    in out
                )
    other = commandline.read_config(
        commandline.parse(["show", *flags, "--config.sft.packing=wrapped"])
    )
    with pytest.raises(
        Exception, match=r"config.sft.packing='wrapped' differs from 'bfd'.*new_pass"
    ):
        history.resumed(3, other, open_data(other, tokenizer).contents)
    written = from_config_dict(workdir.read_config(str(run)))
    assert value_of(written, "objective") == "sft"
    main(["show", f"--workdir={run}"])
    assert "row 0: " in capsys.readouterr().out


def test_show_of_neither_or_both(flags, tmp_path, capsys):
    for arguments, words in (
        (["show"], "--workdir and --config"),
        (["show", f"--workdir={tmp_path}", *flags], "--workdir and --config"),
        (["show", *flags, "--step=3"], "--step=3 is of a run"),
        (["show", *flags, "--steps=3"], "unrecognized arguments: --steps=3"),
        (["tokenize", "--config.seed=3"], "--path"),
        (["show", *flags, "--config.nothing=3"], "nothing"),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err
