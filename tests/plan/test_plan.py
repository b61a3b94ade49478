"""What the plan says of compiled programs, on programs whose collectives are known; and its commands."""

import dataclasses
import functools
import json
import runpy
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import benchmarks.__main__ as benchmarks_main
from benchmarks.memory import arrays, strategies
from benchmarks.memory import collectives as layer_collectives
from deepseek_jax.config.configdict import from_config_dict
from deepseek_jax.config.options import Config, MeshConfig, ModelConfig, ShardingConfig, TrainConfig
from deepseek_jax.errors import UserError
from deepseek_jax.plan import __main__ as plan
from deepseek_jax.plan import exchange, options, topology
from deepseek_jax.xla import hlo, program, replica_groups
from tests.support import ROOT, quick

SHAPE = {"data": 1, "fsdp": 4, "expert": 2}
ROWS = 16  # of 32 float32 numbers: 2,048 bytes on each device
BYTES = ROWS * 32 * 4


@pytest.fixture(autouse=True)
def compiled_quickly(monkeypatch):
    """Whole steps in bfloat16 too as quick.py has those of float32: none of them runs."""
    compile_step = topology.compile_step

    def compile_(config, mesh, layout, options=None):
        return compile_step(config, mesh, layout, options or quick.older_loops())

    monkeypatch.setattr(topology, "compile_step", compile_)


def text_of(per_device) -> str:
    """The program of a function of one device's [ROWS, 32]."""
    mesh = jax.make_mesh(
        tuple(SHAPE.values()), tuple(SHAPE), axis_types=(jax.sharding.AxisType.Explicit,) * 3
    )
    spec = P(("fsdp", "expert"))
    with jax.set_mesh(mesh):
        f = jax.jit(jax.shard_map(per_device, in_specs=spec, out_specs=spec, check_vma=False))
        x = jax.ShapeDtypeStruct(
            (8 * ROWS, 32), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec)
        )
        return f.lower(x).compile().as_text()


def gather(x):
    return jnp.tanh(lax.all_gather(x, "fsdp", tiled=True)[:ROWS])


def scatter(x):
    return jnp.tile(lax.psum_scatter(x, ("fsdp", "expert"), tiled=True), (8, 1))


def reduce(x):
    return lax.psum(jnp.sin(x), "expert")


def exchange_rows(x):
    return lax.all_to_all(x, "fsdp", 0, 0, tiled=True) * 2


def pass_on(x):
    return lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]) + 1


# Received by one device: what all others put in; the share of the others; both; all but its own part; all.
KNOWN = [
    (gather, "all-gather", 3 * BYTES, 4, ("fsdp",)),
    (scatter, "reduce-scatter", 7 * BYTES // 8, 8, ("fsdp", "expert")),
    (reduce, "all-reduce", 2 * BYTES // 2, 2, ("expert",)),
    (exchange_rows, "all-to-all", 3 * BYTES // 4, 4, ("fsdp",)),
    (pass_on, "collective-permute", BYTES, 4, ("fsdp",)),
]


@pytest.mark.parametrize("f, kind, received, group, axes", KNOWN)
def test_bytes_axes_and_times(f, kind, received, group, axes):
    def nested(x):
        return lax.scan(
            lambda x, _: (lax.scan(lambda x, _: (f(x), None), x, length=3)[0] + 1, None),
            x,
            length=5,
        )[0]

    (c,) = program.collectives(text_of(nested), SHAPE)
    assert (c.kind, c.bytes, c.group, c.axes, c.times) == (kind, received, group, axes, 15)
    assert c.loops == (5, 3) and not c.further and c.bytes_per_step == 15 * received


def twice_then_rounds(x):
    """Two turns of a loop of known length, and inside each a loop that depends on data."""

    def body(x, _):
        return lax.while_loop(
            lambda x: jnp.sum(lax.stop_gradient(x)) > 0, lambda x: exchange_rows(x) - 1, reduce(x)
        ), None

    return lax.scan(body, x, length=6)[0]


def test_a_loop_of_unknown_length_counts_one_round():
    first, again = sorted(
        program.collectives(text_of(twice_then_rounds), SHAPE), key=lambda c: c.further
    )
    assert (first.kind, first.times, first.loops) == ("all-reduce", 6, (6,)) and not first.further
    assert (again.kind, again.times, again.loops) == ("all-to-all", 6, (6, None)) and again.further


def test_trip_counts_without_the_compilers_note():
    """Pipelined collectives drop the note; the loop's own condition says the same."""
    text = text_of(twice_then_rounds)
    assert text.count("known_trip_count") >= 1
    unnoted = text.replace("known_trip_count", "no_note")
    assert [c.loops for c in program.collectives(unnoted, SHAPE)] == [
        c.loops for c in program.collectives(text, SHAPE)
    ]


def test_conditional_is_marked():
    def f(x):
        return lax.cond(x[0, 0] > 0, reduce, lambda x: x * 2, x)

    (c,) = program.collectives(text_of(f), SHAPE)
    assert c.conditional and c.times == 1


GROUPS = [
    ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
    ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("mesh['a'=2,'b'=4] {'a','b'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ("mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ("mesh['a'=2,'b'=4], device_ids=({{7,6,5,4},{3,2,1,0}}) {'b'}", [[7, 6, 5, 4], [3, 2, 1, 0]]),
]


@pytest.mark.parametrize("written, groups", GROUPS)
def test_replica_groups(written, groups):
    found = replica_groups.replica_groups(
        f"channel_id=1, replica_groups={written}, dimensions={{0}}", 8
    )
    np.testing.assert_array_equal(found, groups)


def test_unknown_replica_groups_are_an_error():
    with pytest.raises(ValueError, match="not understood"):
        replica_groups.replica_groups("replica_groups=@new_spelling", 8)


# As a GPU's scheduled program is written: starts and ends apart, a reduce-scatter wrapped in an
# async computation.
SCHEDULED = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%wrapped (p: f32[64,4]) -> f32[8,4] {
  %p = f32[64,4]{1,0} parameter(0)
  ROOT %rs = f32[8,4]{1,0} reduce-scatter(%p), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, \
to_apply=%add
}

%cond (c: (s32[], f32[64,4])) -> pred[] {
  %c = (s32[], f32[64,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %limit = s32[] constant(7)
  ROOT %lt = pred[] compare(%next, %limit), direction=LT
}

%body (b: (s32[], f32[64,4])) -> (s32[], f32[64,4]) {
  %b = (s32[], f32[64,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[64,4]{1,0} get-tuple-element(%b), index=1
  %start = ((f32[64,4]{1,0}), f32[8,4]{1,0}, s32[]) async-start(%x), calls=%wrapped
  %gemm = f32[64,4]{1,0} custom-call(%x), custom_call_target="__cublas$gemm"
  %done = f32[8,4]{1,0} async-done(%start), calls=%wrapped
  %ag = (f32[8,4]{1,0}, f32[64,4]{1,0}) all-gather-start(%done), replica_groups={}, dimensions={0}
  %one = s32[] constant(1)
  %inc = s32[] add(%i, %one)
  %agd = f32[64,4]{1,0} all-gather-done(%ag)
  ROOT %out = (s32[], f32[64,4]{1,0}) tuple(%inc, %agd)
}

ENTRY %main (x: f32[64,4]) -> (s32[], f32[64,4]) {
  %x = f32[64,4]{1,0} parameter(0)
  %two = s32[] constant(2)
  %init = (s32[], f32[64,4]{1,0}) tuple(%two, %x)
  ROOT %loop = (s32[], f32[64,4]{1,0}) while(%init), condition=%cond, body=%body
}
"""


def test_scheduled_program():
    scatter, gather = program.collectives(SCHEDULED, SHAPE)
    # From 2, while i + 1 < 7: i = 2, 3, 4, 5.
    assert (scatter.kind, scatter.bytes, scatter.times) == (
        "reduce-scatter",
        64 * 4 * 4 * 7 // 8,
        4,
    )
    assert (gather.kind, gather.bytes, gather.times) == ("all-gather", 8 * 4 * 4 * 7, 4)
    assert scatter.asynchronous and scatter.overlapped == 1
    assert gather.asynchronous and gather.overlapped == 0


def test_no_program():
    with pytest.raises(ValueError, match="not an XLA program"):
        hlo.Module("module @jit_f {}")


def test_shape_bytes():
    assert (
        hlo.shape_bytes("(f32[2,3]{1,0}, bf16[5]{0}, pred[7], s4[3], f8e4m3fn[2], s32[])")
        == 24 + 10 + 7 + 1.5 + 2 + 4 + 0.5
    )


@functools.cache
def layer(strategy: str) -> dict:
    config = from_config_dict(layer_collectives.get_config("small"))
    model = dataclasses.replace(config.model, hidden_size=64, vocab_size=64, n_routed_experts=8)
    train = dataclasses.replace(config.train, sequence_length=64)
    config = dataclasses.replace(
        config, model=model, train=train, sharding=ShardingConfig(strategy, min_weight_size=0)
    )
    return layer_collectives.measure(layer_collectives.one_stack(config), jax.devices())


@pytest.mark.slow
def test_full_shard_gathers_each_weight_twice_and_exchanges_tokens_twice():
    r = layer("full_shard")
    for group in ("weights, forward", "weights, backward"):
        g = r["groups"][group]
        assert set(g["collectives"]) == {"all-gather"} and g["bytes"] == pytest.approx(
            g["least"], rel=0.01
        )
    assert r["groups"]["gradients"]["collectives"]["reduce-scatter"] == 2
    assert r["token_exchanges_forward"] == 2 and r["token_exchanges_further_round"] == 2
    tokens = r["groups"]["tokens, forward"]
    assert tokens["collectives"] == {"all-to-all": 2} and tokens["bytes"] / tokens[
        "least"
    ] == pytest.approx(1.25, rel=0.02)


@pytest.mark.slow
def test_no_shard_gathers_and_scatters_no_weight():
    groups = layer("no_shard")["groups"]
    assert (
        not groups["weights, forward"]["collectives"]
        and not groups["weights, backward"]["collectives"]
    )
    assert not groups["after the update"]["collectives"]
    assert set(groups["gradients"]["collectives"]) == {"all-reduce"}
    assert groups["gradients"]["bytes"] == pytest.approx(groups["gradients"]["least"], rel=0.02)


def test_exchange_buffers():
    model = ModelConfig(hidden_size=64, n_routed_experts=32, num_experts_per_tok=4)
    config = Config(
        model=model, train=TrainConfig(batch_size=8, sequence_length=100, dtype="bfloat16")
    )
    b = exchange.buffers(config, {"data": 1, "fsdp": 2, "expert": 4})
    # 100 tokens per device choose 4 of 32: mean load 12.5, times 1.25, up. 8 experts here, places for
    # 4 devices each.
    assert (b.places, b.exchanged_rows, b.expert_rows) == (16, 8 * 4 * 16, 8 * 4 * 16)
    assert b.bytes == 2 * 512 * 64 * 2
    assert (b.ragged_rows, b.ragged_bytes) == (4 * 100 * 4, 4 * 100 * 4 * 64 * 2)
    b = exchange.buffers(config, {"data": 1, "fsdp": 2, "expert": 1})
    # 1,600 rows in blocks of 128, the last of each of 32 experts not full: (1600 + 32 x 127) / 128 = 44.
    assert (b.places, b.exchanged_rows, b.expert_rows) == (0, 0, 44 * 128)
    dense = dataclasses.replace(
        config, model=dataclasses.replace(model, num_hidden_layers=2, first_k_dense_replace=2)
    )
    assert exchange.buffers(dense, {"data": 1, "fsdp": 8, "expert": 1}) is None


def test_axes_inside_a_host():
    config = Config(mesh=MeshConfig(data=2, fsdp=2, expert=2), train=TrainConfig(batch_size=8))
    mesh, _ = topology.lay_out(config, jax.devices())
    assert topology.devices_per_host(mesh, 4) == {"data": 1, "fsdp": 2, "expert": 2}
    assert topology.devices_per_host(mesh, 2) == {"data": 1, "fsdp": 1, "expert": 2}
    mesh, _ = topology.lay_out(dataclasses.replace(config, mesh=MeshConfig(fsdp=8)), jax.devices())
    assert topology.devices_per_host(mesh, 2) == {"fsdp": 2}


def run_plan(capsys, *argv: str) -> str:
    assert plan.main(["--config=" + str(ROOT / "configs" / "tiny.py"), *argv]) == 0
    return capsys.readouterr().out


MOE_ALONE = ("--config.mesh.expert=2", "--config.model.first_k_dense_replace=0")


def test_plan_of_the_cpu_program(capsys):
    found = json.loads(run_plan(capsys, "--devices=8", "--hardware=cpu", "--json", *MOE_ALONE))
    _, config = options.read(options.Parser(), [f"--config={ROOT}/configs/tiny.py", *MOE_ALONE])
    mesh, layout = topology.lay_out(config, jax.devices())
    assert found["mesh"] == {
        "data": 1,
        "stage": 1,
        "fsdp": 4,
        "expert": 2,
        "context": 1,
        "tensor": 1,
    }
    assert found["layout_bytes"] == layout.bytes_per_device(mesh)
    # Arguments: parameters, optimizer state, bias, a few counters, and 256 tokens of 4 int32 arrays.
    stored = found["layout_bytes"]["parameters"] + found["layout_bytes"]["optimizer"]
    assert 4 * 256 * 4 <= found["program"]["memory"]["arguments"] - stored <= 4 * 256 * 4 + 1000
    rows = {(row["kind"], *row["axes"]): row for row in found["program"]["collectives"]}
    assert (
        rows["all-to-all", "expert"]["times"] > 0
        and rows["reduce-scatter", "fsdp"]["times"] == 2 * config.model.num_hidden_layers
    )
    assert found["program"]["further_round"] and found["program"]["memory"]["temporaries"] > 0
    assert sum(row["bytes"] for row in found["program"]["collectives"]) == found["program"]["bytes"]


def test_plan_without_the_gpu_compiler(capsys, monkeypatch):
    monkeypatch.setattr(topology, "has_gpu_compiler", lambda: False)
    text = run_plan(capsys, "--devices=8", "--config.mesh.expert=2", "--gpus_per_host=2")
    for said in (
        "1.89M parameters",
        "4 hosts of 2",
        "fsdp: between hosts",
        "expert: inside a host",
        "of 141 GB",
        topology.INSTALL,
    ):
        assert said in text, said
    assert "memory  " not in text


MISTAKES = [
    (
        ["--devices=12"],
        "--devices=12 is not a multiple of --gpus_per_host=8. Set --devices to 8 or 16.",
    ),
    (["--devices=0"], "--devices=0 is not a number of devices"),
    (["--devices=8", "--gpus_per_host=0"], "--gpus_per_host=0 is not a number of devices"),
    ([], "--devices is missing"),
    (["--devices=many"], "invalid int value: 'many'"),
    (["--devices=8", "--hardware=abacus"], "invalid choice: 'abacus'"),
    (
        ["--devices=8", "--config.mesh.fsdp=3"],
        "config.mesh (fsdp 3) has 3 devices, but there are 8",
    ),
    (["--devices=8", "--config.modle.layers=3"], "'modle' is not an option"),
    (["--devices=8", "--device=4"], "Unknown command line flag 'device'"),
]


@pytest.mark.parametrize("argv, message", MISTAKES)
def test_mistakes(argv, message, monkeypatch):
    monkeypatch.setattr(topology, "has_gpu_compiler", lambda: False)
    with pytest.raises(UserError) as error:
        plan.main(["--config=" + str(ROOT / "configs" / "tiny.py"), *argv])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "JAX_NUM_CPU_DEVICES" not in str(error.value)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_a_mistake_exits_with_2(capsys, monkeypatch):
    """What `python -m deepseek_jax.plan` runs, in this process."""
    argv = ["plan", f"--config={ROOT}/configs/v3.py", "--devices=12"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("deepseek_jax.plan", run_name="__main__")
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and "Traceback" not in err
    assert err.splitlines()[-1].startswith("deepseek_jax.plan: --devices=12")


@pytest.mark.slow
def test_strategies_table(capsys, monkeypatch):
    argv = [
        "strategies",
        f"--config={ROOT}/configs/tiny.py",
        "--no-time",
        "--json",
        "--config.mesh.expert=2",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(strategies, "STRATEGIES", ("hybrid_shard",))
    assert strategies.main() == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["mesh"] == {"data": 2, "fsdp": 2, "expert": 2} and row["step_seconds"] is None
    assert (
        row["received"]["all-gather"] > 0
        and row["received"]["reduce-scatter"] > 0
        and row["temporaries"] > 0
    )
    assert "hybrid_shard" in strategies.text(
        [row]
    ) and "data 2 x fsdp 2 x expert 2" in strategies.text([row])


def test_benchmarks_are_listed(capsys):
    assert benchmarks_main.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in benchmarks_main.ABOUT)
    programs = [
        f"benchmarks.{p.parent.name}.{p.stem}"
        for p in (ROOT / "benchmarks").glob("*/*.py")
        if "\ndef main() -> int:" in p.read_text(encoding="utf-8") and p.stem != "peer"
    ]
    assert sorted(map(benchmarks_main.module_of, benchmarks_main.ABOUT)) == sorted(programs)
    with pytest.raises(UserError, match="'nothing' is not a benchmark"):
        benchmarks_main.main(["nothing"])


def test_arrays_that_a_step_must_not_have():
    """Dense experts and whole attention scores are found in a program that has them; blocks and
    rounds are not."""
    model = ModelConfig(
        hidden_size=96,
        moe_intermediate_size=40,
        n_routed_experts=8,
        num_experts_per_tok=2,
        num_attention_heads=4,
        vocab_size=500,
    )
    config = Config(model=model, train=TrainConfig(batch_size=2, sequence_length=64))
    shape = dict.fromkeys(("data", "stage", "fsdp", "expert", "context", "tensor"), 1)
    x, w = np.ones((128, 96), np.float32), np.ones((8, 96, 40), np.float32)

    def found(f, *given):
        return arrays.too_large(jax.jit(f).lower(*given).compile().as_text(), config, shape)

    dense = found(lambda x, w: jnp.einsum("td,edf->etf", x, w).max(1), x, w)
    assert dense["every_expert_on_every_token"] and not dense["whole_scores"]
    places = found(lambda x, w: jnp.einsum("ecd,edf->ecf", x.reshape(8, 16, 96), w).max(1), x, w)
    assert not places["every_expert_on_every_token"] and not places["whole_scores"]
    q = np.ones((2, 64, 4, 24), np.float32)

    def scores(q, k):
        return jax.nn.softmax(jnp.einsum("bqnh,bknh->bnqk", q, k)).max(-1)

    assert found(scores, q, q)["whole_scores"] and not found(scores, q[:, :16], q)["whole_scores"]


COMBINED = """HloModule jit_step, is_scheduled=true

FileNames
1 "/x/deepseek_jax/model/layers.py"
2 "/x/deepseek_jax/model/transformer.py"

FunctionNames
1 "Embedding.__call__"
2 "Transformer._scan"

FileLocations
1 {file_name_id=1 function_name_id=1}
2 {file_name_id=2 function_name_id=2}

StackFrames
1 {file_location_id=1 parent_frame_id=0}
2 {file_location_id=2 parent_frame_id=0}

ENTRY %main (a: f32[2,30], b: f32[2,10]) -> (f32[8,30], f32[8,10]) {
  %a = f32[2,30]{1,0} parameter(0), metadata={op_name="params"}
  %b = f32[2,10]{1,0} parameter(1)
  %slice = f32[2,10]{1,0} bitcast(%b), \
metadata={op_name="jit(step)/jvp()/while/body/dynamic_slice" stack_frame_id=2}
  ROOT %g = (f32[8,30]{1,0}, f32[8,10]{1,0}) all-gather(%a, %slice), \
replica_groups={{0,1,2,3}}, dimensions={0}, \
metadata={op_name="jit(step)/jvp(embed)/gather" stack_frame_id=1}
}
"""


def test_first_layer_gathered_with_the_embedding():
    """XLA's combiner joins them: the bytes of the layer are not the embedding's."""
    [found] = program.collectives(COMBINED, {"fsdp": 4})
    assert found.shares == (("forward", "embed", 0.75), ("forward", "layer", 0.25))
