"""Runs with stages (config.distill.stages): what learns in each, their schedules, every way over a boundary.

A run that was stopped anywhere is the run that was not, bit for bit, and so are its stages chained by hand.
"""

import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from deepseek_jax import run
from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config.options import (
    CheckpointConfig,
    CompileConfig,
    Config,
    DataConfig,
    DistillConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    replaced,
)
from deepseek_jax.config.stages import StageOptions
from deepseek_jax.data.example_loader import ExampleLoader
from deepseek_jax.errors import BadNumbers, UserError
from deepseek_jax.hf import __main__ as commands
from deepseek_jax.model.layout import abstract_model
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.plan import __main__ as plan
from deepseek_jax.run import job, stages
from deepseek_jax.run.loop import Loop
from deepseek_jax.run.teacher import Teacher
from deepseek_jax.tensorfile.arrays import flatten
from deepseek_jax.train import workdir as workdirs
from deepseek_jax.train.history import History
from deepseek_jax.train.state import to_tree
from tests.support import ROOT, chat_folders, runs
from tests.support.stopped_runs import StopAfter, rows

STAGES = [
    {"name": "experts", "steps": 3, "lr_multipliers": "experts=1,.=0"},
    {"name": "all", "steps": 4, "lr_multipliers": "norm=0.5", "learning_rate": 5e-3},
]


def options(folder, stages: list[dict], **more) -> Config:
    return Config(
        train=TrainConfig(batch_size=8, sequence_length=80, dtype="float32", remat="none"),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        distill=DistillConfig(stages=json.dumps(stages)),
        eval=EvalConfig(every_steps=0, sample_tokens=0),
        checkpoint=CheckpointConfig(every_steps=1, keep=0),
        log=LogConfig(every_steps=1, trackers=""),
        compile=CompileConfig(cache_dir=str(folder / "programs")),
        **more,
    )


@pytest.fixture(scope="module")
def small(corpus, tmp_path_factory) -> Config:
    """One dense layer, from random weights: what compiles fastest. Its MLP learns first."""
    model = ModelConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    stages = [STAGES[0] | {"lr_multipliers": "mlp=1,.=0"}, STAGES[1]]
    data = DataConfig(path=str(corpus), tokenizer="bytes", eval_fraction=0.0)
    return options(tmp_path_factory.mktemp("small"), stages, model=model, data=data)


@pytest.fixture(scope="module")
def tracked(small, tmp_path_factory):
    """(workdir, result, calls of W&B) of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("small_run")
    calls = folder / "calls.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tests" / "support" / "stand_ins"))
        patch.setenv("STAND_IN_CALLS", str(calls))
        patch.delenv("WANDB_MODE", raising=False)
        result = train(replaced(small, "log.trackers", "wandb"), folder / "run")
    return folder / "run", result, [json.loads(line) for line in calls.read_text().splitlines()]


@pytest.fixture(scope="module")
def small_run(tracked):
    """(workdir, result)."""
    return tracked[:2]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """Fine-tuning of a mixture of experts, whose experts learn first."""
    folder = tmp_path_factory.mktemp("stages")
    data = DataConfig(path=chat_folders.chats(folder / "chats.jsonl"), eval_fraction=0.0)
    model = chat_folders.model(folder / "model")
    return options(folder, STAGES, objective="sft", init_from=model, data=data)


def train(config: Config, workdir, **options):
    """On one of the devices, unless the mesh wants more."""
    count = config.mesh.fsdp * config.mesh.expert if config.mesh.fsdp > 0 else 1
    with pytest.MonkeyPatch.context() as patch:
        some = functools.partial(make_mesh, devices=jax.devices()[:count])
        patch.setattr(job, "make_mesh", some)
        return run.train(config, str(workdir), **options)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """(workdir, result) of a run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, train(config, workdir)


def figures(workdir) -> list[dict]:
    """Rows without times and memory."""
    ends = ("_s", "_sec", "_gb", "_device")
    return [{k: v for k, v in row.items() if not k.endswith(ends)} for row in rows(workdir)]


def weights(workdir, step: int) -> dict[str, np.ndarray]:
    """Those of a checkpoint."""
    checkpoints = Checkpointer(os.path.join(workdir, "checkpoints"), read_only=True)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        "params": jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one),
            checkpoints.shapes(step)["params"],
        )
    }
    found = flatten(checkpoints.restore_params(wanted, step))
    checkpoints.close()
    return {name: np.asarray(a) for name, a in found.items()}


def same(a, b) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


# ------------------------------------------------------------------------------------- one undisturbed run


def test_what_is_frozen_in_a_stage_keeps_its_bits(small_run):
    """And learns in the next."""
    check_frozen(*small_run, "mlp")


@pytest.mark.slow
def test_frozen_experts(whole):
    check_frozen(*whole, "experts")


def check_frozen(workdir, result, learns: str) -> None:
    first, boundary, last = (weights(workdir, step) for step in (1, 3, 7))
    assert result.step == 7 and any(learns in name for name in boundary)
    for name, w in boundary.items():
        assert np.array_equal(w, first[name]) == (learns not in name), name
        assert not np.array_equal(w, last[name]), f"{name} did not learn in stage 2"


def test_each_stage_has_a_schedule_of_its_own(small, small_run):
    """Warmup over two steps, then a cosine to a tenth at the stage's end, in float64; 1e-6: float32."""

    def rate(peak: float, steps: int, done: int) -> float:
        warm = small.optimizer.warmup_steps
        if done < warm:
            return peak * done / warm
        share = (done - warm) / (steps - warm)
        return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2)

    expected = [rate(1e-2, 3, i) for i in range(3)] + [rate(5e-3, 4, i) for i in range(4)]
    found = [row["lr"] for row in rows(small_run[0]) if "loss" in row]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_rows_name_their_stage(small_run):
    found = [(r["step"], r["stage"], r["stage_name"]) for r in rows(small_run[0]) if "loss" in r]
    assert found == [(i, 1, "experts") for i in (1, 2, 3)] + [(i, 2, "all") for i in (4, 5, 6, 7)]


def test_trackers_are_opened_once(tracked):
    """One process per tool for the whole run, and one run there."""
    *_, made = tracked
    assert [c["call"] for c in made if c["call"] in ("wandb.init", "wandb.finish")] == [
        "wandb.init",
        "wandb.finish",
    ]
    assert [c["data"]["step"] for c in made if c["call"] == "wandb.log"] == list(range(1, 8))


def test_what_a_checkpoint_says_of_stages(small, small_run):
    """Those that have begun: at the boundary, the finished one alone."""
    workdir, _ = small_run
    checkpoints = Checkpointer(os.path.join(workdir, "checkpoints"), read_only=True)
    for step, expected in ((2, 1), (3, 1), (4, 2)):
        kept = checkpoints.read_extra(step)["stages"]
        assert [s["name"] for s in kept] == ["experts", "all"][:expected]
        assert [s["last_step"] for s in kept] == [3, 7][:expected]
    checkpoints.close()
    assert workdirs.read_config(str(workdir))["train"]["steps"] == 7


def test_the_summary_has_a_table(small, small_run, capsys):
    """Parameters that learn in each; the second start says what goes on, and that all is done."""
    workdir, _ = small_run
    train(small, workdir)
    text = capsys.readouterr().out
    shapes = flatten(to_tree({"params": abstract_model(small)[1]}))
    learn = sum(math.prod(a.shape) for name, a in shapes.items() if "mlp" in name)
    share = learn / sum(math.prod(a.shape) for a in shapes.values())
    assert f"({share:.1%})" in text and "(100.0%)" in text
    table = [line[17:].split() for line in text.splitlines()]
    assert ["1", "experts", "1", "to", "3", "3", "steps", "0.01"] in [row[:8] for row in table]
    assert "Step 7 of 7 is done already. To go on, add a stage to config.distill.stages." in text


# ----------------------------------------------------------------------------------------- stopped anywhere


def from_step(workdir, step: int, into) -> str:
    """A copy of a run as a kill after a step leaves it."""
    shutil.copytree(workdir, into)
    for name in os.listdir(os.path.join(into, "checkpoints")):
        if name.isdigit() and int(name) > step:
            shutil.rmtree(os.path.join(into, "checkpoints", name))
    return str(into)


def test_a_run_goes_on_at_the_boundary_bit_for_bit(small, small_run, tmp_path):
    check_resumed(small, *small_run, 3, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
def test_a_run_goes_on_bit_for_bit(config, whole, at, tmp_path):
    """Inside the first stage, at the boundary, inside the second."""
    check_resumed(config, *whole, at, tmp_path)


def check_resumed(config, workdir, result, at, tmp_path) -> None:
    again = from_step(workdir, at, tmp_path / "run")
    second = train(config, again)
    same(second.state, result.state)
    assert figures(again) == figures(workdir)
    assert second.losses == {s: loss for s, loss in result.losses.items() if s > at}


@pytest.mark.slow
def test_a_signal_in_the_last_step_of_a_stage_stops_the_run(config, whole, tmp_path):
    workdir, result = whole
    stopped = train(config, tmp_path / "run", stopper=StopAfter(3))
    assert stopped.stopped_by == 15 and stopped.step == 3 and stopped.exit_code == 128 + 15
    same(train(config, tmp_path / "run").state, result.state)
    assert figures(tmp_path / "run") == figures(workdir)


@pytest.mark.slow
def test_the_stages_are_runs_chained_by_hand(config, whole, tmp_path, monkeypatch):
    """Two runs without stages: the second begins with the exported weights of the first, and reads the rows
    that follow. Weights, losses and learning rates are the same bits."""
    workdir, result = whole
    plain = dataclasses.replace(config, distill=DistillConfig())

    def with_(rules: str, steps: int, **more) -> Config:
        optimizer = dataclasses.replace(config.optimizer, lr_multipliers=rules, **more)
        done = dataclasses.replace(plain, optimizer=optimizer)
        return replaced(done, "train.steps", steps)

    first = train(with_("experts=1,.=0", 3), tmp_path / "first")
    commands.export(str(tmp_path / "first"), str(tmp_path / "between"))
    own = ExampleLoader.train_rows

    def later(self, start: int, count: int):
        return own(self, start + 3 * config.train.batch_size, count)

    monkeypatch.setattr(ExampleLoader, "train_rows", later)
    chained = dataclasses.replace(
        with_("norm=0.5", 4, learning_rate=5e-3), init_from=str(tmp_path / "between")
    )
    second = train(chained, tmp_path / "second")
    same(second.state.params, result.state.params)
    same(second.state.opt_state, result.state.opt_state)
    chain = figures(tmp_path / "first") + figures(tmp_path / "second")
    for name in ("loss", "lm_loss", "lr", "grad_norm", "balance_loss", "max_violation"):
        assert [r[name] for r in chain] == [r[name] for r in figures(workdir)], name
    assert first.losses | {step + 3: loss for step, loss in second.losses.items()} == result.losses


# ------------------------------------------------------------------------------------------- what may change


def named(steps: int = 3, name: str = "experts", **more) -> dict:
    return {"name": name, "steps": steps, "lr_multipliers": "experts=1,.=0"} | more


def resolved(given, step=0, done=(), rows=20, **train):
    config = Config(train=TrainConfig(batch_size=4, **train))
    config = replaced(config, "distill.stages", json.dumps(given))
    contents = {"tokenizer": "bytes", "sources": [], "weights": []}
    history = History().resumed(0, config, contents)
    extra = {"data": history.to_json(), "stages": list(done)} if step else {}
    return stages.resolved(config, step, extra, rows, contents)


def test_steps_of_stages():
    """Epochs count from the beginning of their stage, in whole batches, those of a ramp among them."""
    found = resolved([named(3), {"name": "b", "epochs": 1.5}, {"name": "c", "epochs": 0.1}])
    assert [(s.first_step, s.last_step) for s in found] == [(0, 3), (3, 11), (11, 12)]
    assert [s.options.train.steps for s in found] == [12] * 3
    assert [s.options.optimizer.schedule_steps for s in found] == [3, 8, 1]
    assert [s.options.optimizer.lr_multipliers for s in found] == ["experts=1,.=0", "", ""]
    # 1, 1, 2, 3 and then 4 rows per step
    ramp = dict(accumulation=4, batch_ramp_start=1, batch_ramp_steps=4)
    found = resolved([named(2), {"name": "b", "epochs": 1}], **ramp)
    assert found[1].last_step == 2 + 6  # 2 + 3 + 4 x 4 rows
    assert [stages.at(found, i).name for i in (0, 1, 2, 7, 8)] == ["experts"] * 2 + ["b"] * 3
    assert stages.planned(Config()) == ()


def test_a_finished_stage_ended_where_the_checkpoint_says():
    """Whatever its epochs come to by now: the batch may have another size."""
    done = [{"name": "a", "epochs": 1.0, "last_step": 3}]
    found = resolved([{"name": "a", "epochs": 1}, {"name": "b", "epochs": 1}], 4, done)
    assert [(s.first_step, s.last_step) for s in found] == [(0, 3), (3, 8)]


DONE = [named(3) | {"last_step": 3}, named(4, "all", lr_multipliers="") | {"last_step": 7}]


@pytest.mark.parametrize(
    ("given", "step", "said"),
    [
        (
            [named(4)],
            3,
            "stage 1 (experts): steps=4 differs from 3 of the run of --workdir, in which",
        ),
        (
            [named(3, lr_multipliers="norm=0")],
            2,
            "lr_multipliers='norm=0' differs from 'experts=1,.",
        ),
        ([named(3, name="x")], 2, "stage 1 (x): name='x' differs from 'experts'"),
        ([named(3, learning_rate=1e-5)], 3, "learning_rate=1e-05 differs from 0.0 of the run"),
        ([named(1)], 2, "stage 1 (experts): 1 step end after step 1, and the run is at step 2"),
        (
            [named(3)],
            5,
            "has 1 stages, and stage 2 (all) of the run of --workdir has begun before ste",
        ),
        (
            [named(3), named(1, "all", lr_multipliers="")],
            5,
            "stage 2 (all): 1 step end after step 4, and the run is at step 5, inside this stage",
        ),
    ],
)
def test_stages_that_have_begun_stay(given, step, said):
    with pytest.raises(UserError) as error:
        resolved(given, step, DONE[: 1 if step <= 3 else 2])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_stages_to_come_may_change():
    """And the length and the learning rate of the one that goes on."""
    found = resolved([named(5, learning_rate=1e-5), named(9, "other")], 2, DONE[:1])
    assert [s.last_step for s in found] == [5, 14]
    found = resolved([named(3), named(9, "other"), named(1, "third")], 3, DONE[:1])
    assert [s.last_step for s in found] == [3, 12, 13]


def test_a_run_with_stages_is_none_without():
    given = (StageOptions("a", steps=3),)
    with pytest.raises(UserError, match="names stages, and the 4 steps of the run .* had none"):
        stages.check(given, [], 4)
    with pytest.raises(UserError, match="has 0 stages, and stage 1 \\(experts\\) of the run"):
        stages.check((), DONE[:1], 2)
    stages.check((), [], 4)
    stages.check(given, [], 0)


def test_a_pattern_that_matches_nothing_names_its_stage(small, tmp_path):
    """Of the last stage, before anything is compiled."""
    wrong = [STAGES[1] | {"name": "first"}, STAGES[1] | {"lr_multipliers": "expertts=1"}]
    with pytest.raises(UserError) as error:
        train(replaced(small, "distill.stages", json.dumps(wrong)), tmp_path / "run")
    said = (
        "config.distill.stages, stage 2 (all): lr_multipliers: 'expertts' matches no weight of this"
    )
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_plan_is_of_the_stage_that_needs_most(tmp_path, capsys):
    """All weights have moments in the second stage only."""
    argv = ["--config=configs/tiny.py", "--devices=2", "--config.mesh.fsdp=2", "--json"]
    argv.append(f"--config.distill.stages={json.dumps(STAGES)}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan.topology, "has_gpu_compiler", lambda: False)
        assert plan.main(argv) == 0
        found = json.loads(capsys.readouterr().out)
        assert plan.main([a for a in argv if a != "--json"]) == 0
    text = capsys.readouterr().out
    assert [(s["name"], s["needs_most"]) for s in found["stages"]] == [
        ("experts", False),
        ("all", True),
    ]
    small, large = (s["bytes"] for s in found["stages"])
    stored = found["layout_bytes"]
    assert small < large == sum(stored.values()) and "frozen_parameters" not in stored
    assert "2 all, 4 steps: " in text and "needs most: the rest of this report is of it" in text


# -------------------------------------------------------------------------------- disturbed in other ways


@pytest.mark.slow
def test_a_rollback_goes_back_to_the_boundary(config, whole, tmp_path, monkeypatch):
    """Bad numbers in the first step of the second stage: it begins anew, without the rows of that step."""
    workdir, _ = whole
    again = from_step(workdir, 3, tmp_path / "run")
    own, fired = Loop._finished, []

    def once(self, step, metrics):
        if step == 4 and not fired:
            fired.append(step)
            raise BadNumbers("bad", step)
        return own(self, step, metrics)

    monkeypatch.setattr(Loop, "_finished", once)
    train(replaced(config, "train.on_bad_steps", "rollback"), again)
    found = rows(again)
    (rolled_back,) = [row for row in found if "rollback" in row]
    assert rolled_back["step"] == 4 and rolled_back["skipped_rows"] == [[24, 32]]
    before = [r["lr"] for r in rows(workdir) if "loss" in r]
    assert [
        r["lr"] for r in found if "loss" in r
    ] == before  # the schedule of the stage, from its beginning
    checkpoints = Checkpointer(os.path.join(again, "checkpoints"), read_only=True)
    extra = checkpoints.read_extra()
    checkpoints.close()
    assert [s["name"] for s in extra["stages"]] == ["experts", "all"] and extra["rollbacks"] == 1


@pytest.mark.slow
def test_a_damaged_boundary_is_passed_over(config, whole, tmp_path, capsys):
    """The run goes on in the stage before, whose checkpoint is the newest that is good."""
    workdir, result = whole
    again = from_step(workdir, 3, tmp_path / "run")
    folder = os.path.join(again, "checkpoints", "3")
    (largest,) = sorted(
        (os.path.join(d, f) for d, _, files in os.walk(folder) for f in files),
        key=os.path.getsize,
    )[-1:]
    with open(largest, "r+b") as f:
        f.seek(-8, os.SEEK_END)
        f.write(b"\xff" * 8)
    second = train(config, again)
    text = capsys.readouterr().out
    assert "resuming after step 2" in text and "1 of 2, experts" in text
    same(second.state, result.state)


@pytest.mark.slow
def test_a_teacher_is_read_once(config, tmp_path, monkeypatch):
    """Distillation with stages: a student that is its teacher, frozen but for its experts at first."""
    loads = []
    own = Teacher.load
    monkeypatch.setattr(Teacher, "load", lambda self, placed: loads.append(1) or own(self, placed))
    distil = dataclasses.replace(
        config,
        objective="distill",
        distill=dataclasses.replace(config.distill, teacher=config.init_from),
    )
    whole = train(distil, tmp_path / "whole")
    assert len(loads) == 1 and whole.step == 7
    found = [r for r in rows(tmp_path / "whole") if "loss" in r]
    assert found[0]["kl"] < 1e-6 < found[-1]["kl"]
    for at in (2, 3, 5):
        again = from_step(tmp_path / "whole", at, tmp_path / str(at))
        same(train(distil, again).state, whole.state)
        assert figures(again) == figures(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sharded", "full", "local"])
def test_killed_on_a_mesh(corpus, tmp_path, kind):
    """train.py on 4 x 2 devices, killed inside each stage and at the boundary: all rows and weights are those
    of a run that nobody disturbed."""
    more = [
        f"--config.distill.stages={json.dumps(STAGES)}",
        "--config.mesh.fsdp=4",
        "--config.mesh.expert=2",
        "--config.sharding.min_weight_size=0",
        "--config.checkpoint.every_steps=1",
        "--config.checkpoint.keep=0",
        f"--config.checkpoint.kind={kind}",
    ]
    if kind == "local":
        more.append(f"--config.checkpoint.local_dir={tmp_path}/local")
    calm = runs.run(runs.command(tmp_path / "calm", corpus, *more), devices=8, timeout=1200)
    assert calm.returncode == 0, calm.stderr
    args = runs.command(tmp_path / "run", corpus, *more)
    env = runs.environment(args, 8)  # the compiler's options too: bits are compared
    for kill_at in (2, 3, 5):
        process = subprocess.Popen([sys.executable, "train.py", *args], cwd=ROOT, env=env)
        deadline = time.monotonic() + 1200
        while process.poll() is None and time.monotonic() < deadline:
            if os.path.exists(tmp_path / "run" / "metrics.jsonl"):
                done = [r["step"] for r in _whole_rows(tmp_path / "run") if "loss" in r]
                if done and done[-1] >= kill_at:
                    break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = runs.run(args, devices=8, timeout=1200)
    assert last.returncode == 0, last.stderr
    assert figures(tmp_path / "run") == figures(tmp_path / "calm")
    if kind != "local":
        same(weights(tmp_path / "run", 7), weights(tmp_path / "calm", 7))


def _whole_rows(workdir) -> list[dict]:
    with open(os.path.join(workdir, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f if line.endswith("\n")]


@pytest.mark.slow
def test_two_processes(corpus, tmp_path):
    """Each with two devices, over the boundary and from it: what one process with four computes."""
    more = [
        f"--config.distill.stages={json.dumps(STAGES)}",
        "--config.mesh.fsdp=4",
        "--config.checkpoint.every_steps=1",
    ]
    one = runs.run(runs.command(tmp_path / "one", corpus, *more), devices=4, timeout=1200)
    assert one.returncode == 0, one.stderr
    launch = ("-m", "deepseek_jax.launch", "--nproc_per_node=2", "train.py")
    args = runs.command(tmp_path / "two", corpus, *more)
    two = runs.run(args, devices=2, module=launch, timeout=1200)
    assert two.returncode == 0, two.stderr
    found, expected = runs.losses(tmp_path / "two"), runs.losses(tmp_path / "one")
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=2e-5)
