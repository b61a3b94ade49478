"""plan advise: its arithmetic beside the layouts that it stands for, its search, what it says."""

import dataclasses
import functools
import itertools
import json
import math
import re

import jax
import numpy as np
import pytest

from deepseek_jax.config.options import Config, MeshConfig, ModelConfig, TrainConfig
from deepseek_jax.config.validation import validate
from deepseek_jax.errors import UserError
from deepseek_jax.parallel.mesh import AXES, make_mesh
from deepseek_jax.parallel.xla_options import bytes_of_a_layer
from deepseek_jax.plan import __main__ as plan
from deepseek_jax.plan import rates, report, topology
from deepseek_jax.plan.advise import command, hardware, memory, programs, search
from deepseek_jax.plan.advise.candidates import Choice, configured
from deepseek_jax.plan.advise.estimate import PARTS, Estimate, share_a_host
from deepseek_jax.plan.advise.weights import Weights
from deepseek_jax.run import commandline
from deepseek_jax.train import kept
from tests.support import ROOT

MODEL = ModelConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    moe_intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    q_lora_rank=32,
    kv_lora_rank=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
)
CONFIG = Config(
    model=MODEL,
    mesh=MeshConfig(fsdp=8),
    train=TrainConfig(batch_size=16, sequence_length=64, dtype="bfloat16", steps=10),
)
CONFIG = dataclasses.replace(
    CONFIG, sharding=dataclasses.replace(CONFIG.sharding, min_weight_size=64)
)
MESHES = [(1, 1, 8, 1, 1, 1), (2, 1, 2, 2, 1, 1), (1, 2, 2, 1, 1, 2), (1, 1, 1, 8, 1, 1)]


@functools.cache
def weights_of(config: Config) -> Weights:
    one = command.alone(config)
    return Weights(one, topology.lay_out(one, topology.cpu_devices(1))[1])


def machine(devices: int = 8, room: int | None = None, **changed) -> search.Machine:
    speed = rates.SPEEDS["h100"].derated._replace(**changed)
    return search.Machine(devices, max(2, devices // 2), room, speed)


def searched(m: search.Machine, config: Config = CONFIG) -> search.Found:
    return search.enumerate_plans(config, weights_of(config), m, "1.0")


@functools.cache
def all_plans() -> search.Found:
    return searched(machine())


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("strategy", ["full_shard", "shard_grad_op", "zero1", "hybrid_shard"])
def test_stored_bytes_are_those_of_the_layout(mesh, strategy):
    config = configured(CONFIG, Choice(mesh, strategy, 1, "all_to_all"))
    placed, layout = topology.lay_out(config, topology.cpu_devices(8))
    found = weights_of(CONFIG).divided(config, dict(placed.shape))
    assert found.stored == layout.bytes_per_device(placed)
    assert found.layer == bytes_of_a_layer(config, layout.model.abstract.params, placed)
    if mesh[1] == 1:
        sizes = kept.sizes_of(config, placed, layout)
        full = Choice(mesh, strategy, 1, "all_to_all", "full")
        assert memory.Memory(config, placed.shape, found).total(full) == sizes.total(())


def test_frozen_weights_and_adapters_are_stored_as_the_layout_has_them():
    lora = dataclasses.replace(CONFIG.lora, r=4, base_dtype="int8")
    config = dataclasses.replace(CONFIG, lora=lora)
    placed, layout = topology.lay_out(config, topology.cpu_devices(8))
    assert weights_of(config).divided(config, dict(placed.shape)).stored == layout.bytes_per_device(
        placed
    )


@pytest.mark.parametrize("gpus_per_host", [1, 2, 4, 8])
def test_axes_share_hosts_as_the_devices_of_a_mesh_do(gpus_per_host):
    for mesh in [(2, 1, 2, 2, 1, 1), (1, 1, 8, 1, 1, 1), (1, 2, 1, 2, 1, 2), (8, 1, 1, 1, 1, 1)]:
        config = configured(CONFIG, Choice(mesh, "hybrid_shard", 1, "all_to_all"))
        placed = make_mesh(config, topology.cpu_devices(8))
        shares = share_a_host(placed.shape, gpus_per_host)
        wanted = topology.devices_per_host(placed, gpus_per_host)
        assert {axis: shares[axis] for axis in wanted} == wanted


def test_what_is_proposed_is_valid():
    found = all_plans()
    assert found.tried > len(found.plans) > 500
    rng = np.random.default_rng(0)
    for i in rng.choice(len(found.plans), 6, replace=False):
        choice = found.plans[i].choice
        config = configured(CONFIG, choice)
        assert math.prod(choice.mesh) == 8 and config.train.batch_size == 16
        validate(config)
        topology.lay_out(config, topology.cpu_devices(8))
    meshes = {p.choice.mesh for p in found.plans}
    # All ways to divide 8 devices by five axes, but with more stages than layers, with heads cut through, and
    # with data alone beside tensor, which is what fsdp with no_shard is.
    every = {m for m in itertools.product((1, 2, 4, 8), repeat=6) if math.prod(m) == 8}
    by_axis = [dict(zip(AXES, m, strict=True)) for m in every]
    assert meshes == {
        tuple(m.values())
        for m in by_axis
        if m["context"] == 1
        and m["tensor"] <= 4
        and m["stage"] <= CONFIG.pipelined_blocks
        and (m["data"] == 1 or m["fsdp"] * m["expert"] * m["stage"] > 1)
    }


@pytest.mark.parametrize(
    "better",
    [
        {"link": 720e9},
        {"network": 80e9},
        {"memory": 8e12},
        {"bf16": 1400e12},
        {"room": 40_000_000},
        {"collective": 1e-6},
    ],
    ids=str,
)
def test_more_of_anything_never_makes_the_best_plan_slower(better):
    base: dict = {"room": 4_000_000, "devices": 4}
    worse, more = searched(machine(**base)), searched(machine(**(base | better)))
    best = [min(p.estimate.seconds for p in found.plans) for found in (worse, more)]
    assert best[1] <= best[0] and len(more.plans) >= len(worse.plans)


def plan_of(seconds: float, size: int = 10, data: int = 1) -> search.Plan:
    choice = Choice((data, 1, 1, 1, 1, 1), "no_shard", 1, "all_to_all")
    parts = dict.fromkeys(PARTS, 0.0) | {"experts": seconds, "mlp": 1.0}
    return search.Plan(choice, size, 0, Estimate(parts, {}, 0.0), 1)


def program(seconds: float, size: int = 10) -> search.Compiled:
    parts = dict.fromkeys(PARTS, 0.0) | {"experts": seconds, "mlp": 1.0}
    return search.Compiled(size, parts, 0.0, {})


def test_compiled_plans_correct_the_others_and_replace_themselves():
    plans = [plan_of(1.0, data=1), plan_of(1.5, data=2), plan_of(2.5, data=3)]
    asked = []

    def compile_plan(p: search.Plan) -> search.Compiled:
        asked.append(p.choice.mesh[0])
        return program(3.0 if p.choice.mesh[0] == 1 else 2.0)

    ranked = search.rank(plans, machine(), compile_plan, 2, 1e9)
    # Experts of the first take three times what was said: the second, said to take 1.5, may take 4.5.
    assert asked == [1, 2]
    assert [p.choice.mesh[0] for p in ranked.plans] == [2, 1, 3]
    assert ranked.corrections.seconds(ranked.plans[0]) == 3.0
    assert ranked.corrections.factors["experts"] == pytest.approx((3.0 + 2.0 / 1.5) / 2)
    assert ranked.corrections.factors["mlp"] == 1.0


def test_what_does_not_fit_or_compile_is_left_out():
    plans = [plan_of(1.0, data=1), plan_of(1.5, data=2), plan_of(2.5, data=3)]
    results = {1: program(1.0, size=200), 2: "refused", 3: program(2.0, size=5)}

    def compile_plan(p: search.Plan) -> search.Compiled | str:
        return results[p.choice.mesh[0]]

    ranked = search.rank(plans, machine(room=100), compile_plan, 2, 1e9)
    assert [p.choice.mesh[0] for p in ranked.plans] == [3]
    assert {p.choice.mesh[0]: why for p, why in ranked.refused} == {
        1: "takes 200 B of 100 B, as compiled",
        2: "refused",
    }


def test_what_takes_too_long_stays_as_estimated():
    plans = [plan_of(1.0, data=1), plan_of(1.5, data=2)]
    ranked = search.rank(plans, machine(), lambda _: None, 2, 1e9)
    assert ranked.plans == plans and not ranked.refused


def test_none_is_compiled_that_would_not_be_done_in_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(search.time, "monotonic", lambda: now[0])

    def compile_plan(_: search.Plan) -> search.Compiled:
        now[0] += 40
        return program(1.0)

    plans = [plan_of(1.0 + i / 10, data=i + 1) for i in range(5)]
    ranked = search.rank(plans, machine(), compile_plan, 5, 100)
    assert sum(p.compiled is not None for p in ranked.plans) == 2


def run(capsys, *flags: str) -> str:
    config = f"--config={ROOT / 'configs/tiny.py'}"
    assert plan.main(["advise", config, "--compile=0", *flags]) == 0
    return capsys.readouterr().out


def test_the_command_lines_make_the_plans(capsys):
    given = ["--config.train.batch_size=16", "--config.train.dtype=bfloat16"]
    said = json.loads(run(capsys, "--devices=4", "--json", *given))
    assert said["missing"] or not topology.has_gpu_compiler()
    seconds = np.array([p["step_s"] for p in said["plans"]])
    assert np.all(
        np.diff(seconds) > -1e-3 * seconds[1:]
    )  # those that are equal to four digits: the simplest
    for found in said["plans"][:3]:
        _, script, *flags = found["command"].split()
        config = commandline.read_config(commandline.parse([script, *flags]))
        assert config.train.batch_size == 16 and config.train.dtype == "bfloat16"
        for name, value in found["options"].items():
            section, _, key = name.partition(".")
            assert getattr(getattr(config, section), key) == value
    first = said["plans"][0]
    tokens = 16 * config.train.sequence_length
    assert first["tokens_per_s"] == pytest.approx(tokens / first["step_s"])
    assert sum(first["parts"].values()) == pytest.approx(first["step_s"])


def test_the_text_says_what_was_found(capsys):
    said = run(capsys, "--devices=8", "--hardware=a100", "--top=4", "--config.train.batch_size=16")
    assert "8 x NVIDIA A100" in said and "as for an H100, the nearest" in said
    (count,) = re.findall(r"([\d,]+) plans tried", said)
    assert int(count.replace(",", "")) > 1000
    assert len(re.findall(r"^[1-4]  .*arithmetic$", said, re.M)) == 4
    assert re.search(r"^1\. python train\.py --config=", said, re.M)
    for rule in ("model size", "a single node", "block-level sharding", "expert-level sharding"):
        assert rule in said


@pytest.mark.parametrize(
    "flags, wanted",
    [
        (["--hardware=h500"], r"--hardware=h500 is not known\. Choose from: h200, h100, a100"),
        (["--hardware=bf16=1e12"], r"does not say capacity, memory, link, network"),
        (["--hardware=capacity=no"], r"gives capacity the value 'no'"),
        (["--hardware=speed=1"], r"names 'speed'"),
        (["--devices=0"], r"--devices=0 is not a number of devices"),
        (["--devices=12"], r"--devices=12 is not a multiple of --gpus_per_host=8"),
        (["--skew=much"], r"--skew=much is no skew"),
        (
            ["--devices=7"],
            r"no mesh of 7 devices is valid for this config: config\.train\.batch_size",
        ),
        (
            [
                "--devices=1",
                "--hardware=capacity=30e6,bf16=1e15,memory=1e12,link=1e11,network=1e10",
            ],
            r"nothing fits --devices=1 of 28\.5 MB: the smallest .* With --devices=\d+ it would: about",
        ),
    ],
)
def test_a_mistake_is_one_line(flags, wanted):
    argv = ["advise", f"--config={ROOT / 'configs/tiny.py'}", "--devices=8", *flags]
    with pytest.raises(UserError, match=wanted) as e:
        plan.main(argv)
    assert "\n" not in str(e.value)


def test_numbers_are_hardware():
    text = "capacity=80e9,bf16=500e12,memory=2e12,link=300e9,network=25e9"
    known = hardware.find(text, "link=200e9")
    assert known.hardware.memory == 80_000_000_000 and known.stands_in == "h200"
    h100 = rates.SPEEDS["h100"]
    assert known.speed.ideal.bf16 == 500e12 and known.speed.derated.link == 200e9
    share = h100.derated.grouped / h100.ideal.grouped
    assert known.speed.derated.grouped == pytest.approx(500e12 * share)
    assert hardware.find("h200", "") == hardware.Known(
        "h200", topology.HARDWARE["h200"], rates.SPEEDS["h200"], ""
    )


@pytest.mark.parametrize("key", ["h200", "cpu"])
def test_programs_are_timed_at_the_same_rates(key):
    speed = rates.SPEEDS["h200"] if key == "h200" else rates.speed_of("cpu", "f32=1e9,memory=2e9")
    assert rates.speed_of(key, programs.given(speed.derated)).derated == speed.derated


def test_what_meets_every_plan_ends_the_search():
    asked = []

    def compile_plan(p: search.Plan) -> str:
        asked.append(p)
        return "no disk"

    plans = [plan_of(1.0 + i / 10, data=i + 1) for i in range(50)]
    ranked = search.rank(plans, machine(), compile_plan, 2, 1e9)
    assert len(asked) == len(ranked.refused) == 5 and len(ranked.plans) == 45


@pytest.mark.slow  # a program each: 15 s
@pytest.mark.parametrize("mesh", [(1, 1, 8, 1, 1, 1), (1, 1, 1, 8, 1, 1)])
def test_bytes_received_are_those_of_the_program(mesh):
    """Of weights and tokens, in float32: a CPU exchanges bfloat16 as float32, and sums dense gradients over
    all devices before it divides them, which GPUs do not."""
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, dtype="float32"))
    choice = Choice(mesh, "full_shard", 1, "all_to_all", "full")
    config = configured(config, choice)
    said = search.one_plan(config, choice, weights_of(config), machine(), "0.0")
    placed, layout = topology.lay_out(config, topology.cpu_devices(8))
    found = report.of_program(
        topology.compile_step(config, placed, layout), placed, topology.Hardware("CPU", None, "")
    )
    by_kind = {row["kind"]: row["bytes"] for row in found["collectives"]}
    # Counts and choices travel besides.
    assert said.estimate.received["weights"] == pytest.approx(by_kind["all-gather"], rel=0.02)
    if mesh[AXES.index("expert")] > 1:
        assert said.estimate.received["tokens"] == pytest.approx(by_kind["all-to-all"], rel=0.02)


@pytest.mark.slow  # two programs in processes of their own: 30 s
def test_the_best_are_compiled_on_this_machine(capsys):
    given = [f"--{name}" for name in ("config.train.batch_size=8", "config.train.dtype=float32")]
    numbers = "--rates=f32=150e9,memory=20e9"
    argv = ["advise", f"--config={ROOT / 'configs/tiny.py'}", "--devices=4", "--hardware=cpu"]
    assert plan.main([*argv, numbers, "--compile=2", "--seconds=1000", "--json", *given]) == 0
    said = json.loads(capsys.readouterr().out)
    compiled = [p for p in said["plans"] if p["compiled"]]
    assert len(compiled) == 2 and said["missing"] == ""
    for p in compiled:
        assert p["bytes"] == p["plan"]["program"]["memory"]["total"]
        assert p["step_s"] == pytest.approx(p["plan"]["roofline"]["derated"]["step_s"], rel=1e-6)
        assert p["state_bytes"] <= p["plan"]["program"]["memory"]["arguments"]
    assert jax.default_backend() == "cpu"
