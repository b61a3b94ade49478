"""Fine-tuning from a checkpoint and a file of chats to a model that is asked and exported."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from deepseek_jax import evaluate, objectives, run
from deepseek_jax.config.options import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    OptimizerConfig,
    SftConfig,
    TrainConfig,
)
from deepseek_jax.data.open import open_data
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.data.tokenizer_folder import read_json
from deepseek_jax.errors import UserError
from deepseek_jax.hf import __main__ as hf_commands
from deepseek_jax.hf import fine_tuned
from deepseek_jax.inference.opener import open_model
from deepseek_jax.model.layout import ModelWeights
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.run import answers, init_from, job, metrics, passes
from deepseek_jax.train import workdir as workdirs
from deepseek_jax.train.history import History
from tests.support import ROOT, chat_folders, hf_folders
from tests.support.examples import make_config
from tests.support.stopped_runs import StopAfter, rows

OTHER_TEMPLATE = chat_folders.TEMPLATE.replace("<|im_start|>", "<|im_start|>the ")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """Of one layer of experts: a dense one beside it would be half of every program. Rows of the vocabulary
    that the tokenizer has no text for are never the likeliest: `generate` of ids would not leave them out."""
    folder = tmp_path_factory.mktemp("sft")
    small = dataclasses.replace(hf_folders.MODEL, num_hidden_layers=1, first_k_dense_replace=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_folders, "MODEL", small)
        model = chat_folders.model(folder / "model")
    file = os.path.join(model, "model.safetensors")
    weights = safetensors.numpy.load_file(file)
    weights["lm_head.weight"][chat_folders.END_ID + 1 :] = 0
    safetensors.numpy.save_file(weights, file, {"format": "pt"})
    return Config(
        objective="sft",
        init_from=model,
        data=DataConfig(path=chat_folders.chats(folder / "chats.jsonl"), eval_fraction=0.1),
        train=TrainConfig(
            steps=0, epochs=2.0, batch_size=8, sequence_length=80, dtype="float32", remat="none"
        ),
        sft=SftConfig(
            chat_template=OTHER_TEMPLATE, eval_prompts=2, eval_tokens=3, neftune_noise_alpha=1.0
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=1),
        eval=EvalConfig(every_steps=3, batches=2, sample_tokens=0),
        checkpoint=CheckpointConfig(every_steps=2, keep=0),
        log=LogConfig(every_steps=1),
    )


def train(config: Config, workdir: str, **options):
    """On one of the devices: other meshes are of other tests."""
    with pytest.MonkeyPatch.context() as patch:
        one = functools.partial(make_mesh, devices=jax.devices()[:1])
        patch.setattr(job, "make_mesh", one)
        return run.train(config, workdir, **options)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """(workdir, result, what was printed) of a run that nobody disturbed."""
    workdir = str(tmp_path_factory.mktemp("whole") / "run")
    return workdir, train(config, workdir)


def test_epochs_come_to_steps(config, whole):
    """The first step after which two passes were read; config.json has both."""
    workdir, result = whole
    with open(os.path.join(workdir, "config.json")) as f:
        written = json.load(f)
    assert written["train"]["steps"] == 0 and written["train"]["epochs"] == 2.0
    assert written["last_step"] == result.step == workdirs.read_config(workdir)["train"]["steps"]
    # 54 examples of 35 or 36 tokens, two in a row of 80: 27 rows, and 54 in batches of 8
    assert result.step == 7


def test_metrics(whole):
    workdir, result = whole
    found = rows(workdir)
    steps = [r for r in found if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, result.step + 1))
    for row in steps:
        assert 0 <= row["token_accuracy"] <= 1 and 0 < row["entropy"] < np.log(320) + 1e-3
        assert row["lm_loss"] > 0
    names = {name: metrics.METRICS[name].row for row in found for name in row}
    assert set(names.values()) == {"step", "evaluation"}, "a row without a name in the table"
    assert 0 <= result.evaluation["eval_token_accuracy"] <= 1


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(config, whole, tmp_path):
    """With epochs, packing and noise: state and losses are those of a run that was not stopped."""
    workdir, result = whole
    parts = str(tmp_path / "parts")
    silent = dataclasses.replace(
        config,
        eval=EvalConfig(every_steps=0, batches=0, sample_tokens=0),
        sft=dataclasses.replace(config.sft, eval_prompts=0, eval_tokens=256),
    )
    train(silent, parts, stopper=StopAfter(3))
    second = train(silent, parts)
    assert second.step == result.step and second.losses.keys() == {4, 5, 6, 7}
    for a, b in zip(jax.tree.leaves(result.state), jax.tree.leaves(second.state), strict=True):
        np.testing.assert_array_equal(a, b)

    def losses(folder):
        return {r["step"]: r["loss"] for r in rows(folder) if "loss" in r}

    assert losses(parts) == losses(workdir)


@pytest.mark.slow
def test_answers_are_those_of_generate(config, whole):
    """Prompts as the template writes them, answers as the command's, by the cache and without one."""
    workdir, result = whole
    with open(f"{workdir}/answers/{result.step}.jsonl") as f:
        found = [json.loads(line) for line in f]
    assert len(found) == 2
    opened = open_model(workdir)
    encoder = opened.encoder()
    for row in found:
        question = row["prompt"].split("\n")[1].removesuffix("<|im_end|>")
        asked = encoder.chat.render([{"role": "user", "content": question}])
        assert asked == row["prompt"] and "the user" in asked
        a, b = map(int, question.split("+"))
        assert row["reference"] == str(a + b)
        ids = opened.model.generate(encoder.chat.encode(asked_messages(question)), max_tokens=3)
        assert encoder.decode(ids) == row["answer"] and row["tokens"] == len(ids)
        assert row["finish_reason"] == ("stop" if len(ids) < 3 else "length")
    known = init_from.with_what_is_known(config, workdir)
    fields = objectives.make(known).fields
    data = open_data(known, load_tokenizer(known.data.tokenizer), fields)
    model = opened.model
    prompts = answers.prompts_of_run(known, data)
    without = answers.Answering(known, workdir, model.layout, model.mesh, data, prompts)
    without._has_cache = False
    with jax.set_mesh(model.mesh):
        found_ids = without.answers(ModelWeights(model.params, model.bias))
    assert [encoder.decode(ids) for ids in found_ids] == [row["answer"] for row in found]


def asked_messages(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


def test_prompts_of_examples():
    """All before the last run of scored tokens; examples without one, and too long ones, are left out."""
    ids = np.arange(8, dtype=np.int32)

    def example(scored: str):
        return ids[: len(scored)], np.array([c == "1" for c in scored])

    some = [example(s) for s in ("00110011", "0000", "1111", "0000001", "0111", "001")]
    assert answers.prompts_of(some, 2, longest=5) == [
        answers.Prompt([0], [1, 2, 3]),
        answers.Prompt([0, 1], [2]),
    ]
    assert answers.prompts_of(some, 1, longest=6) == [answers.Prompt([0, 1, 2, 3, 4, 5], [6, 7])]


def test_evaluate_finds_what_the_run_held_out(config, whole, capsys):
    """The same loss as the run's, over all of the held-out examples."""
    workdir, result = whole
    assert evaluate.main([f"--model={workdir}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["documents"] == 6
    if found["tokens"] == result.evaluation["eval_tokens"]:  # eval.batches may leave some out
        assert found["nats_per_token"] == pytest.approx(result.evaluation["eval_loss"], rel=1e-5)
    assert found["tokens"] >= result.evaluation["eval_tokens"]


def test_bug_03_exports_end_where_training_did(config, whole, tmp_path):
    """The stop token that was trained, and the template, are in the export; transformers asks as we do."""
    import transformers

    workdir, _ = whole
    out = str(tmp_path / "out")
    hf_commands.export(workdir, out)
    assert read_json(out, "generation_config.json")["eos_token_id"] == chat_folders.END_ID
    assert read_json(out, "config.json")["eos_token_id"] == chat_folders.END_ID
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    text = theirs.apply_chat_template(
        asked_messages("1+2"), tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>the user\n1+2<|im_end|>\n<|im_start|>the assistant\n"
    assert text == open_model(workdir).encoder().chat.render(asked_messages("1+2"))
    assert open_model(workdir).model.stop_ids == {chat_folders.END_ID}


def test_bug_03_a_stop_token_that_is_never_trained_is_refused(config, tmp_path):
    """eos is <|endoftext|>, and answers end with <|im_end|>: such a model would never stop."""
    base = chat_folders.model(tmp_path / "base", eos_token="<|endoftext|>")
    wrong = dataclasses.replace(config, init_from=base)
    with pytest.raises(UserError, match="stop token .*endoftext.* is never trained"):
        train(wrong, str(tmp_path / "run"))


def test_bug_04_padding_is_no_stop_token(tmp_path):
    """What the checkpoint names stays a stop, but for its padding token."""
    folder = chat_folders.model(
        tmp_path / "m", eos_token_id=[chat_folders.END_OF_TEXT_ID, 7], pad_token_id=256
    )
    fine_tuned.state(folder, None, [chat_folders.END_ID])
    assert read_json(folder, "generation_config.json")["eos_token_id"] == [258, 7]
    assert read_json(folder, "config.json")["eos_token_id"] == [258, 7]
    before = {n: open(f"{folder}/{n}", "rb").read() for n in os.listdir(folder)}
    fine_tuned.state(folder, None, [chat_folders.END_ID])  # a later start
    assert before == {n: open(f"{folder}/{n}", "rb").read() for n in os.listdir(folder)}
    assert read_json(folder, "tokenizer_config.json")["chat_template"] == chat_folders.TEMPLATE
    fine_tuned.state(folder, OTHER_TEMPLATE, [chat_folders.END_ID], "<|im_end|>")
    assert "chat_template" not in read_json(folder, "tokenizer_config.json")
    with open(f"{folder}/chat_template.jinja") as f:
        assert f.read() == OTHER_TEMPLATE


def test_files_are_those_of_the_tokenizer_that_was_used(tmp_path):
    """Of another tokenizer, the stop tokens that the checkpoint named are other text, and go."""
    folder = chat_folders.model(tmp_path / "model", eos_token_id=[7])
    other = chat_folders.model(tmp_path / "other", eos_token="<|endoftext|>")
    before = {n: open(f"{folder}/{n}", "rb").read() for n in os.listdir(folder)}
    fine_tuned.take_tokenizer(folder, f"{other}/tokenizer.json")  # the same ids
    assert before == {n: open(f"{folder}/{n}", "rb").read() for n in os.listdir(folder)}
    inner = tokenizers.Tokenizer.from_file(f"{other}/tokenizer.json")
    inner.add_special_tokens(["<|tool|>"])
    inner.save(f"{other}/tokenizer.json")
    fine_tuned.take_tokenizer(folder, f"{other}/tokenizer.json")
    fine_tuned.state(folder, fine_tuned.template_of(other), [258])
    assert read_json(folder, "generation_config.json")["eos_token_id"] == 258
    assert read_json(folder, "tokenizer_config.json")["eos_token"] == "<|endoftext|>"
    assert fine_tuned.template_of(folder) == chat_folders.TEMPLATE


def test_bug_13_a_full_example_has_no_generation_prompt(config):
    """Ids are transformers' of the whole conversation; the answers are scored, with their stop token."""
    import transformers

    from deepseek_jax.data.chat import Chat
    from deepseek_jax.data.scoring import ExampleEncoder

    messages = [
        {"role": "user", "content": "1+2"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "4"},
    ]
    theirs = transformers.AutoTokenizer.from_pretrained(config.init_from)
    expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    (found,) = ExampleEncoder(SftConfig(), Chat(config.init_from)).encode_batch(
        [{"messages": messages}]
    )
    assert found.ids.tolist() == list(expected)
    assert theirs.decode(found.ids[found.scored]) == "3<|im_end|>4<|im_end|>"


# ------------------------------------------------------------------------------------- steps from epochs


def test_steps_of_epochs(tmp_path):
    """In the batches that each start had; a batch ramp and fractions count."""
    config = make_config("x.jsonl", batch=4, steps=0, epochs=1.5)
    contents = {"tokenizer": "bytes", "sources": [], "weights": []}

    def steps(**train) -> int:
        changed = dataclasses.replace(config, train=dataclasses.replace(config.train, **train))
        return passes.with_steps(changed, str(tmp_path), 21, contents).train.steps

    assert steps() == 8  # 31.5 rows in batches of 4
    assert steps(steps=3) == 3  # wins
    assert steps(epochs=0.1) == 1 and steps(epochs=2.0) == 11
    # 2 rows per step up to 4 within 8 steps: 2 + 2 + 2 + 2 + 3 + 3 + 3 + 3, and then 4 per step
    assert steps(accumulation=4, batch_ramp_start=2, batch_ramp_steps=8) == 11
    with pytest.raises(UserError, match="config.profile.start=30 is after the last step, 8, which"):
        late = dataclasses.replace(config, profile=dataclasses.replace(config.profile, start=30))
        passes.with_steps(late, str(tmp_path), 21, contents)


def test_another_batch_size_reads_as_many_passes():
    """10 steps of 4 rows, then of 8: the last is the first after which all rows of the passes were read."""
    config = make_config("x.jsonl", batch=4, steps=0, epochs=3.0)
    contents = {"tokenizer": "bytes", "sources": [], "weights": []}
    first = History().resumed(0, config, contents)
    larger = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=8))
    then = first.resumed(10, larger, contents)
    assert passes.first_step_after(first, 120) == 30
    assert passes.first_step_after(then, 120) == 20 and then.first_row(20) == 120
    assert passes.first_step_after(then, 30) == 8  # done before


# -------------------------------------------------------------------------------------- processes


def command(config: Config, workdir, *more: str) -> list[str]:
    return [
        "--config=configs/post/sft.py",
        f"--workdir={workdir}",
        f"--config.init_from={config.init_from}",
        f"--config.data.path={config.data.path}",
        "--config.data.eval_fraction=0.1",
        "--config.train.sequence_length=64",
        "--config.train.batch_size=8",
        "--config.train.dtype=float32",
        "--config.checkpoint.every_steps=1",
        "--config.eval.every_steps=4",
        "--config.sft.eval_prompts=1",
        "--config.sft.eval_tokens=2",
        *more,
    ]


def environment(devices: int) -> dict[str, str]:
    return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}


@pytest.mark.slow
def test_killed_and_started_again(config, tmp_path):
    """kill -9 in the middle; the same command goes on, with the losses of a run that was not killed."""
    calm = subprocess.run(
        [sys.executable, "train.py", *command(config, tmp_path / "calm")],
        cwd=ROOT,
        env=environment(2),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert calm.returncode == 0, calm.stderr
    workdir = tmp_path / "killed"
    args = [sys.executable, "train.py", *command(config, workdir)]
    process = subprocess.Popen(args, cwd=ROOT, env=environment(2), stdout=subprocess.DEVNULL)
    path, deadline = workdir / "checkpoints" / "3", time.time() + 200
    while not path.exists() and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    again = subprocess.run(
        args, cwd=ROOT, env=environment(2), capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0 and "resuming after step" in again.stdout, again.stderr

    def losses(folder):
        return {r["step"]: r["loss"] for r in rows(folder) if "loss" in r}

    assert losses(workdir) == losses(tmp_path / "calm")


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [(), ("--config.lora.r=2", "--config.lora.base_dtype=int8")],
    ids=["all weights", "LoRA"],
)
def test_two_processes(config, more, tmp_path):
    """Two processes of one device each: the losses of one process with two, and answers to prompts."""
    outs = []
    for folder, before in (
        ("one", []),
        ("two", ["-m", "deepseek_jax.launch", "--nproc_per_node=2"]),
    ):
        done = subprocess.run(
            [sys.executable, *before, "train.py", *command(config, tmp_path / folder, *more)],
            cwd=ROOT,
            env=environment(1 if before else 2),
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr
        outs.append({r["step"]: r["loss"] for r in rows(tmp_path / folder) if "loss" in r})
        assert sorted(os.listdir(tmp_path / folder / "answers"))
    one, two = outs
    assert one.keys() == two.keys()
    np.testing.assert_allclose(list(one.values()), list(two.values()), rtol=1e-5)
