"""A distillation from its folders to figures: the teacher opened, refused, held in few bits; a run that goes
on bit for bit.
"""

import dataclasses
import functools
import json
import os
import shutil

import jax
import numpy as np
import pytest
import tokenizers

from deepseek_jax import run
from deepseek_jax.config.options import (
    CheckpointConfig,
    Config,
    DataConfig,
    DistillConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    OptimizerConfig,
    SftConfig,
    TrainConfig,
    replaced,
)
from deepseek_jax.config.validation import validate
from deepseek_jax.data.open import settled
from deepseek_jax.errors import UserError
from deepseek_jax.hf import reader
from deepseek_jax.model.layout import place_model
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.quantized import QuantizedWeight
from deepseek_jax.plan import asked, topology
from deepseek_jax.run import job, metrics
from deepseek_jax.run import teacher as teachers
from deepseek_jax.xla import program
from tests.support import chat_folders, hf_folders
from tests.support.stopped_runs import StopAfter, rows

STUDENT = dataclasses.replace(
    hf_folders.MODEL, num_hidden_layers=1, num_nextn_predict_layers=1, aux_loss_alpha=0.0
)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    folder = tmp_path_factory.mktemp("distill")
    teacher = chat_folders.model(folder / "teacher")
    return Config(
        objective="distill",
        model=STUDENT,
        data=DataConfig(
            path=chat_folders.chats(folder / "chats.jsonl"),
            tokenizer=os.path.join(teacher, "tokenizer.json"),
            eval_fraction=0.1,
        ),
        distill=DistillConfig(teacher=teacher, alpha=0.7),
        train=TrainConfig(steps=5, batch_size=8, sequence_length=80, dtype="float32", remat="none"),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=1),
        eval=EvalConfig(every_steps=3, batches=2, sample_tokens=0),
        checkpoint=CheckpointConfig(every_steps=2, keep=0),
        log=LogConfig(every_steps=1),
    )


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """(workdir, result) of a run that nobody disturbed."""
    workdir = str(tmp_path_factory.mktemp("whole") / "run")
    return workdir, run.train(config, workdir)


@pytest.mark.slow
def test_a_run(config, whole):
    workdir, result = whole
    found = rows(workdir)
    steps = [r for r in found if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5]
    t2 = config.distill.temperature**2
    for row in steps:
        main = 0.3 * row["lm_loss"] + 0.7 * t2 * row["kl"]
        extra = config.train.mtp_loss_weight * row["mtp_loss"]
        assert row["loss"] == pytest.approx(main + extra, rel=1e-5)
        assert 0 <= row["token_accuracy"] <= 1 and row["teacher_loss"] > 0
    names = {name: metrics.METRICS[name].row for row in found for name in row}
    assert set(names.values()) == {"step", "evaluation"}, "a row without a name in the table"
    held_out = {"eval_loss", "eval_kl", "eval_teacher_loss", "eval_token_accuracy"}
    assert held_out <= result.evaluation.keys()
    assert steps[-1]["kl"] < steps[0]["kl"]
    with open(os.path.join(workdir, "config.json")) as f:
        assert json.load(f)["distill"]["data"] == "examples"  # by the first row


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(config, whole, tmp_path):
    workdir, result = whole
    parts = str(tmp_path / "parts")
    run.train(config, parts, stopper=StopAfter(3))
    second = run.train(config, parts)
    assert second.step == result.step and second.losses.keys() == {4, 5}
    for a, b in zip(jax.tree.leaves(result.state), jax.tree.leaves(second.state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert second.evaluation == result.evaluation


@functools.cache
def loaded(config: Config, **options):
    """(teacher, where its weights lie, weights) on one device."""
    for name, value in options.items():
        config = replaced(config, name.replace("__", "."), value)
    mesh = make_mesh(config, jax.devices()[:1])
    teacher = teachers.open_teacher(config, "nowhere")
    with jax.set_mesh(mesh):
        placed = teacher.place(mesh)
        return teacher, placed, teacher.load(placed)


def flat(params) -> dict[str, np.ndarray]:
    found = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda a: isinstance(a, QuantizedWeight)
    )
    return {jax.tree_util.keystr(path): a for path, a in found}


@functools.cache
def own_weights(config: Config) -> dict[str, np.ndarray]:
    """The teacher's, as the reader of checkpoints makes them, float32."""
    source, model, family = reader.open_source(config.distill.teacher)
    mesh = make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        layout = place_model(dataclasses.replace(config, model=model), mesh)
        return flat(
            reader.state_of(source, dataclasses.replace(config, model=model), family, layout)[0]
        )


@pytest.mark.parametrize("dtype", ["", "bfloat16", "int8"])
def test_what_is_held(config, dtype):
    """Matrices in the dtype, norms and router exact."""
    _, placed, weights = loaded(config, distill__teacher_dtype=dtype)
    exact, held = own_weights(config), flat(weights.params)
    assert exact.keys() == held.keys()
    assert jax.tree.map(lambda a: (a.shape, a.dtype), weights.params) == jax.tree.map(
        lambda a: (a.shape, a.dtype), placed.abstract.params
    )
    kinds = set()
    for name, w in exact.items():
        w, ours = np.asarray(w), held[name]
        if isinstance(ours, QuantizedWeight):
            kinds.add("int8")
            scale = np.asarray(ours.scale)
            assert (abs(np.asarray(ours.values) * scale - w) <= 0.501 * scale).all()
            continue
        kinds.add(str(ours.dtype))
        if "norm" in name or "gate'" in name:
            assert ours.dtype == np.float32
        np.testing.assert_array_equal(np.asarray(ours), w.astype(ours.dtype))
    assert (
        kinds
        == {
            "": {"float32"},
            "bfloat16": {"float32", "bfloat16"},
            "int8": {"float32", "bfloat16", "int8"},
        }[dtype]
    )


def test_plan_counts_a_teacher_that_is_asked(config):
    """Its weights, as they are read, lie beside the state; its program needs memory between the steps."""
    options = replaced(config, "distill.top_k", 4)
    options = replaced(options, "distill.teacher_dtype", "int8")
    validate(options)
    # As test_what_is_held has them: what is asked does not change how they are held.
    _, _, weights = loaded(config, distill__teacher_dtype="int8")
    mesh = make_mesh(options, jax.devices()[:1])
    teacher = asked.find(options, mesh)
    arrays = jax.tree.leaves((weights.params, weights.bias))
    memory = teacher.memory()
    assert teacher.bytes == sum(a.nbytes for a in arrays) <= memory.arguments
    step = program.Memory(arguments=100, results=10, temporaries=10**9, code=1)
    needs = asked.beside(step, teacher.bytes, memory)
    assert needs["total"] == step.total + teacher.bytes
    small = asked.beside(step._replace(temporaries=0), teacher.bytes, memory)
    assert small["total"] == 100 + memory.total > 111 + teacher.bytes
    assert asked.find(config, mesh) is None  # inside the step: the layout counts it


@pytest.mark.parametrize("size", [280, 352])
def test_padding_rows_of_the_vocabulary(config, size):
    """A student with other padding rows: the teacher's are cut, or zeros follow them."""
    teacher, _, weights = loaded(config, model__vocab_size=size)
    exact, held = own_weights(config), flat(weights.params)
    assert teacher.vocab_size == 320
    for name, w in exact.items():
        ours, w = np.asarray(held[name]), np.asarray(w)
        if ours.shape != w.shape:
            axis = w.shape.index(320)
            assert ours.shape[axis] == size
            rows = min(size, 320)
            kept, rest = np.split(ours, [rows], axis)
            np.testing.assert_array_equal(kept, np.split(w, [rows], axis)[0])
            assert not rest.any()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["", "int8"])
def test_a_run_is_a_teacher(config, whole, dtype):
    """The newest checkpoint of a workdir, without its multi-token prediction."""
    workdir, result = whole
    _, placed, weights = loaded(config, distill__teacher=workdir, distill__teacher_dtype=dtype)
    exact = flat(result.state.params)
    for name, ours in flat(weights.params).items():
        if isinstance(ours, QuantizedWeight):
            scale = np.asarray(ours.scale)
            w = np.asarray(exact[name])
            assert (abs(np.asarray(ours.values) * scale - w) <= 0.501 * scale).all()
        else:
            np.testing.assert_array_equal(ours, np.asarray(exact[name]).astype(ours.dtype))
    assert not any("mtp" in name for name in flat(weights.params))


def test_bad_teachers_are_refused_in_a_line(config, tmp_path):
    def refused(why: str, **options) -> None:
        changed = config
        for name, value in options.items():
            changed = replaced(changed, name.replace("__", "."), value)
        with pytest.raises(UserError, match=why) as e:
            teachers.open_teacher(changed, str(tmp_path / "run"))
        assert "config.distill.teacher" in str(e.value) and "\n" not in str(e.value)

    refused("is not a folder", distill__teacher=str(tmp_path / "none"))
    refused("there is no config.json", distill__teacher=str(tmp_path))
    refused("max_position_embeddings=128, below", train__sequence_length=129)
    copy = str(tmp_path / "copy")
    shutil.copytree(config.distill.teacher, copy)
    with pytest.raises(UserError, match="this run's own --workdir"):
        teachers.open_teacher(replaced(config, "distill.teacher", copy), copy)

    inner = tokenizers.Tokenizer.from_file(os.path.join(copy, "tokenizer.json"))
    inner.add_special_tokens(["<|tool|>"])
    inner.save(os.path.join(copy, "tokenizer.json"))
    teachers.open_teacher(replaced(config, "distill.teacher", copy), "")  # one that nothing uses
    more = os.path.join(copy, "tokenizer.json")
    refused("the id 259 is None there and '<|tool|>'", data__tokenizer=more)
    tree = json.loads(inner.to_str())
    vocab = tree["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    with open(more, "w") as f:
        json.dump(tree, f)
    refused("has another tokenizer: the id 97", distill__teacher=copy)

    os.remove(os.path.join(copy, "model.safetensors"))
    refused("model.safetensors is missing", distill__teacher=copy)
    # To plan with, a config.json is enough.
    of_plan = replaced(config, "distill.teacher", copy)
    mesh, layout = topology.lay_out(of_plan, jax.devices()[:1])
    numbers = sum(w.size for w in own_weights(config).values())
    bias = sum(a.size for a in jax.tree.leaves(layout.frozen.model.abstract.bias))
    assert layout.bytes_per_device(mesh)["frozen"] == 4 * (numbers + bias)


def test_a_teacher_that_the_mesh_does_not_divide(config):
    config = dataclasses.replace(
        config,
        mesh=MeshConfig(expert=8),
        model=dataclasses.replace(STUDENT, n_routed_experts=8),
    )
    teacher = teachers.open_teacher(config, "nowhere")
    with pytest.raises(
        UserError, match="config.distill.teacher=.* does not fit the mesh: .*experts=4"
    ):
        teacher.place(make_mesh(config, jax.devices()[:8]))


@pytest.mark.parametrize(
    "options,why",
    [
        (dict(distill=DistillConfig()), "there is no teacher"),
        (dict(distill__alpha_final=0.1), "no effect with config.distill.alpha_schedule=constant"),
        (dict(distill__tail="renormalise"), "no effect with config.distill.top_k=0"),
        (dict(distill__top_k=321), "above config.model.vocab_size=320"),
        (dict(distill__top_k=8, distill__hidden_weight=1.0), "a record of its logits alone"),
        (dict(distill__hidden_loss="mse"), "no effect with config.distill.hidden_weight"),
        (dict(distill__map="M"), "router_weight=0.0"),
        (dict(sft=SftConfig(loss_type="dft")), "config.sft.loss_type=dft has no effect"),
        (dict(distill__data="text", sft=SftConfig(packing="none")), "config.distill.data=text"),
        (dict(distill__data="examples", data__path="stdlib"), "programs and not examples"),
        (dict(objective="pretrain"), "no effect with config.objective=pretrain"),
        (
            dict(distill=DistillConfig(cache="C", temperature_schedule="linear")),
            "log-sum-exp of some temperatures",
        ),
        (dict(distill=DistillConfig(cache="C", teacher_dtype="int8")), "holds logits alone"),
        (dict(distill__beta=1.5), "above 1"),
        (dict(distill__temperature=0.0), "not above 0"),
    ],
)
def test_options_that_do_not_go_together(config, options, why):
    for name, value in options.items():
        config = replaced(config, name.replace("__", "."), value)
    with pytest.raises(UserError, match=why) as e:
        validate(config)
    assert "\n" not in str(e.value)


def test_what_the_data_are(config, tmp_path):
    """By their first row; options that do not go with it are refused then."""
    assert settled(config).distill.data == "examples"
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a text"}\n')
    of_text = replaced(config, "data.path", str(text))
    assert settled(of_text).distill.data == "text"
    with pytest.raises(UserError, match="config.distill.data=text"):
        settled(replaced(of_text, "sft.packing", "none"))
    with pytest.raises(UserError, match="examples are encoded by their template"):
        settled(replaced(config, "data.special_tokens", True))
