"""The benchmarks run, at toy size, so that they do not rot: their methods agree and their tables
hold what they promise."""

import json
import os
import pathlib
import runpy
import subprocess
import sys
import unittest.mock

import jax
import numpy as np
import pytest
import safetensors.numpy

from benchmarks.gpu import bench as gpu_bench
from benchmarks.gpu import parts as gpu_parts
from benchmarks.gpu import train as gpu_train
from benchmarks.speed import compile as compile_time
from benchmarks.speed import floor, hf_copy, moe, moe_methods, overhead, vocabulary
from benchmarks.support import shapes, turns
from deepseek_jax.config.configdict import from_config_dict
from deepseek_jax.config.options import (
    IGNORE,
    CompileConfig,
    Config,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    TrainConfig,
)
from deepseek_jax.errors import UserError
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.train.compiled_step import CompiledStep
from deepseek_jax.train.state import make_layout
from deepseek_jax.xla import hlo, work

RESULT = {"machine": {"device": "cpu", "cores": 2}, "dtype": "float32"}


@pytest.mark.slow
@pytest.mark.parametrize("everything", [False, True])
def test_gpu_bench(everything, tmp_path, monkeypatch, capsys):
    """Parts that need no PyTorch, at toy size: lines as they come, and files that are whole after each.
    `everything`: three programs, not one."""
    monkeypatch.setattr(sys, "argv", ["gpu_bench", "--toy", f"--out={tmp_path}"])
    monkeypatch.setattr(gpu_bench, "lines_of", lambda *_: iter([{"not_measured": "a test"}]))
    seen = []
    monkeypatch.setattr(
        gpu_bench,
        "write",
        lambda rows, out, write=gpu_bench.write: (
            write(rows, out),
            seen.append((out / "results.jsonl").read_text()),
        ),
    )
    monkeypatch.setattr(gpu_bench.signal, "signal", lambda *_: None)
    if not everything:
        monkeypatch.setattr(gpu_train, "VARIANTS", gpu_train.VARIANTS[:2])
        monkeypatch.setitem(
            gpu_parts.PARTS,
            "tiny",
            lambda *_: iter(
                [{"platform": "cpu", "losses": [2.0, 1.0], "compile_s": 0.0, "differs_again": []}]
            ),
        )
    assert gpu_bench.main() == 0
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert seen == ["".join(out.splitlines(keepends=True)[: n + 1]) for n in range(len(rows))]
    assert list(dict.fromkeys(r["part"] for r in rows)) == [
        "versions",
        "tiny",
        "train",
        "peer",
        "attention",
        "experts",
    ]

    def of(part):
        return [r for r in rows if r["part"] == part]

    assert (
        of("versions")[0]["jax"] == jax.__version__
        and of("tiny")[0]["losses"][-1] < of("tiny")[0]["losses"][0] - 0.1
    )
    trained, (profile,) = (
        [r for r in of("train") if (r.get("what") == "profile") == wanted]
        for wanted in (False, True)
    )
    assert [(r["tokens"], r["routing"], r["attention"]) for r in trained] == [
        ("packed documents", r, "auto") for r in ("natural", "balanced")[: 1 + everything]
    ]
    assert all(
        r["tokens_per_s"] > 0
        and r["tokens_per_s_of_the_whole_model"] > 0
        and r["dispatch_rounds"] >= 1
        for r in trained
    ), rows
    assert len(profile["largest_costs"]) == 3 and all(
        0 < c["share"] <= 1 for c in profile["largest_costs"]
    )
    assert {r["method"] for r in of("experts") if r.get("both_tflops", 0) > 0} >= {
        "equal slots",
        "our Triton kernels",
        "ragged_dot",
        "dense",
    }
    assert {r["method"] for r in of("attention") if r.get("both_s", 0) > 0} == {"blocks", "plain"}
    assert of("tiny")[0]["differs_again"] == [] and of("attention")[1]["is_from_plain"] < 1e-5
    assert json.loads((tmp_path / "results.json").read_text())["results"] == rows
    assert (
        "| packed documents | natural | auto |" in (tmp_path / "results.md").read_text()
        and "| packed documents | natural |" in err
    )


def test_gpu_bench_is_useful_if_it_is_cut(tmp_path):
    """A part that hangs or fails leaves what it has printed."""
    said = "import json, sys, time; print(json.dumps({'a': 1}), flush=True); print('no JSON'); "

    def run(rest, seconds):
        return list(gpu_bench.lines_of("versions", ["-c", said + rest], seconds, tmp_path))

    assert run("time.sleep(60)", 1.5) == [{"a": 1}, {"failed": "took more than 2 s"}]
    assert run("print('why', file=sys.stderr); sys.exit(3)", 60) == [{"a": 1}, {"failed": "why"}]
    assert (tmp_path / "versions.log").read_text() == "why\n"
    assert run(
        "import os; print(json.dumps(os.environ['JAX_COMPILATION_CACHE_DIR']), flush=True); "
        "print('{', flush=True)",
        60,
    )[1]["failed"]
    assert sum(gpu_bench.SECONDS.values()) < 8 * 60
    assert gpu_train.autotune(tmp_path) == {
        "xla_gpu_dump_autotune_results_to": str(tmp_path / "autotune.txt")
    }
    (tmp_path / "autotune.txt").touch()
    assert len(gpu_train.autotune(tmp_path)) == 2 and gpu_train.autotune(None) == {}


def test_grouped_products_are_of_narrow_operands():
    """What is timed as bfloat16 is: no method's gradient has a product of float32 operands, which takes three
    times as long."""
    x, w, dy = (
        jax.ShapeDtypeStruct(s, jax.numpy.bfloat16) for s in ((64, 16), (4, 16, 8), (64, 8))
    )
    for method in ("dense", "equal slots"):
        call = gpu_parts.products(64, 4)[method]

        def f(x, w, dy, call=call):
            return jax.vjp(lambda x, w: call(x, w, None), x, w)[1](dy)

        products = [
            e for e in jax.make_jaxpr(f)(x, w, dy).eqns if e.primitive.name == "dot_general"
        ]
        assert len(products) >= 2 and {v.aval.dtype.name for e in products for v in e.invars} == {
            "bfloat16"
        }, method


def test_calls_in_a_queue():
    """Seconds of one call, however many are handed over together."""
    program = turns.compiled(lambda x: x @ x, np.ones((256, 256), np.float32))
    one, ten = (min(turns.queued(program, calls, 5) for _ in range(3)) for calls in (1, 10))
    assert 0 < ten < 5 * one


def test_gpu_bench_needs_few_packages():
    """What CUDA images do not have is not imported: neither by the parent nor by a part, which a plain
    PYTHONPATH starts."""
    block = (
        "import sys\nclass Block:\n def find_spec(self, name, *_):\n"
        "  if name.split('.')[0] in ('ml_collections', 'grain', 'tensorboardX'): raise "
        "ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import benchmarks.__main__, benchmarks.gpu.bench as b\nassert 'jax' not in "
        "sys.modules\nimport benchmarks.gpu.parts\n"
        "sys.argv = ['b', '--part=versions', '--toy']\nsys.exit(b.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", block],
        cwd=gpu_bench.ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0 and json.loads(done.stdout)["jax"] == jax.__version__, done.stderr


def test_v2_lite_is_the_config():
    assert (
        shapes.V2_LITE
        == from_config_dict(
            runpy.run_path(str(gpu_bench.ROOT / "configs" / "v2_lite.py"))["get_config"]()
        ).model
    )


def test_layers_by_memory():
    """By the state's bytes, counted from the shapes, and 8.5 GB for the rest; an H200, an H100 and less."""
    assert [gpu_train.layers_for(0.95 * b) for b in (150.8e9, 85.0e9, 42.4e9)] == [8, 6, 3]
    with pytest.raises(UserError, match="20.0 GB"):
        gpu_train.layers_for(20e9)
    for least, layers in gpu_train.LAYERS:
        config = gpu_train.training_config(False, layers)
        parameters = sum(
            a.size
            for a in jax.tree.leaves(
                make_layout(config, make_mesh(config, jax.devices()[:1])).abstract.params
            )
        )
        assert 0.9 * least < 16 * parameters + 8.5e9 <= least, layers


def test_packed_rows():
    """Zipf tokens in documents: positions begin again, targets stay inside, the likeliest token has its
    share."""
    rows = gpu_train.packed(8, 512, 1000)
    tokens, targets, segments, positions = (
        rows[k] for k in ("tokens", "targets", "segment_ids", "positions")
    )
    assert all(a.dtype == np.int32 and a.shape == (8, 512) for a in rows.values())
    same = segments[:, 1:] == segments[:, :-1]
    assert (
        np.array_equal(targets[:, :-1], np.where(same, tokens[:, 1:], IGNORE))
        and (targets[:, -1] == IGNORE).all()
    )
    assert (
        np.array_equal(positions[:, 1:], np.where(same, positions[:, :-1] + 1, 0))
        and (positions[:, 0] == 0).all()
    )
    assert 3 < segments[:, -1].mean() < 9  # about six documents a row
    assert np.bincount(tokens.ravel()).max() / tokens.size == pytest.approx(
        1 / np.sum(1 / np.arange(1, 1001)), rel=0.15
    )
    assert (gpu_train.packed(2, 64, 100, documents=False)["segment_ids"] == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("load", ["balanced", "zipf"])
def test_methods_of_moe_agree(load):
    shape = moe_methods.Shape(8, 64, 2, 16, 8)
    counts = jax.numpy.bincount(moe_methods.routing(shape, load).reshape(-1), length=8)
    assert (int(counts.max()) == 16) == (load == "balanced")
    with jax.set_mesh(moe_methods.one_device()):
        built = moe_methods.programs(shape, load, list(moe_methods.METHODS), 1.25)
        results = {
            name: program() for name, program in built.items() if name not in ("dense", "products")
        }
        moe_methods.compare(results)
        arguments, (ys, *_) = built["products"].arguments, built["products"]()
        for x, gate_up, down, y in zip(*arguments[:3], ys, strict=True):
            gate, up = np.split(np.asarray(x) @ gate_up, 2, axis=1)
            np.testing.assert_allclose(
                y, (gate / (1 + np.exp(-gate)) * up) @ down, rtol=1e-4, atol=1e-5
            )
        assert [len(x) for x in arguments[0]] == counts.tolist()
        results["ragged"] = (results["ragged"][0] * 1.001, *results["ragged"][1:])
        with pytest.raises(FloatingPointError, match="y by ragged"):
            moe_methods.compare(results)
        assert all(seconds > 0 for seconds in moe.least_of(built["ours"], runs=1).values())


@pytest.mark.slow
def test_vocabulary():
    """Both losses and their gradients agree (`measure` raises where they do not), and only the
    plain one holds the logits of all tokens."""
    with jax.set_mesh(moe_methods.one_device()):
        rows = [vocabulary.measure(tokens, 512, 16, 1) for tokens in (2048, 4096)]
    assert vocabulary.bars(rows)["temporary bytes independent of tokens x vocabulary"]
    plain = [r["temporaries"]["plain"] for r in rows]
    assert plain[1] - plain[0] >= 2048 * 512 * 4
    assert rows[1]["temporaries"]["ours"] < plain[1] and "4,096" in vocabulary.text(
        {**RESULT, "width": 16, "chunk": 1024, "rows": rows, "bars": {}}
    )


def test_hf_copy(tmp_path):
    """What it imports and exports is the checkpoint that it wrote; times, ratios and memory are there."""
    kept = {}

    def run(name, source, target):
        out = hf_copy.timed(name, source, target)
        folder = target + "/hf" * (name == "import")
        kept[name] = {
            f.name: safetensors.numpy.load_file(f)
            for f in pathlib.Path(folder).glob("*.safetensors")
        }
        return out

    r = hf_copy.measure(0.0005, 1, str(tmp_path / "copies"), run)
    whole = [{n: a for held in files.values() for n, a in held.items()} for files in kept.values()]
    assert sum(a.nbytes for a in whole[0].values()) == r["bytes"] and 4e5 < r["bytes"] < 6e5
    for other in whole[1:]:
        assert other.keys() == whole[0].keys() and all(
            np.array_equal(a, whole[0][n].astype(a.dtype)) for n, a in other.items()
        )
    assert [held["lm_head.weight"].dtype.name for held in whole] == ["bfloat16"] * 3 + ["float16"]
    assert (
        all(
            r[name]["seconds"] > 0 and r[name]["ratio"] > 0 and r[name]["peak_bytes"] >= 0
            for name in kept
        )
        and r["copy"]["ratio"] == 1
    )
    assert ("MISSED" in hf_copy.text(r)) != r["met"] and not (
        tmp_path / "copies" / "export"
    ).exists()


@pytest.mark.slow
def test_overhead():
    """Times of a loop, and which of its threads are Python's."""
    model = ModelConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        kv_lora_rank=16,
    )
    config = Config(
        model=model,
        mesh=MeshConfig(fsdp=1),
        train=TrainConfig(batch_size=4, sequence_length=64, dtype="float32"),
        compile=CompileConfig(cache_dir="off"),
        eval=EvalConfig(sample_prompt=""),
    )
    with unittest.mock.patch.object(
        overhead,
        "CompiledStep",
        lambda step, mesh, options: CompiledStep(step, mesh, {}),
    ):
        r = overhead.measure(config, 1, 4)
    assert (
        r["idle_s"] >= 0
        and r["host_cpu_s"] > 0
        and r["cpu_s"] > 0
        and r["checkpoint_s"] > 0
        and r["step_s"] > 0
    )
    assert r["overhead"] == pytest.approx(
        (r["idle_s"] + r["checkpoint_s"] / 250 + r["host_cpu_s"]) / r["step_s"]
    )
    assert f"bar 2%: {'met' if r['met'] else 'MISSED'}" in overhead.text(r)
    timed = overhead.Timed.__new__(overhead.Timed)
    timed.done, timed.returned = [1.0, 2.0, 3.0], [0.5, 0.7, 2.5]
    assert timed.idle(1) == 0 and timed.idle(2) == 0.5


def test_compile_time():
    config = compile_time.config_of("small", 3, 8)
    assert (config.model.num_hidden_layers, config.mesh.fsdp, config.mesh.expert) == (3, 4, 2)
    pairs = [
        [
            {"lower_s": 1.0, "compile_s": 2.0 + i, "cpu_s": 4.0},
            {"lower_s": 1.0, "compile_s": 1.0, "cpu_s": 2.0},
        ]
        for i in range(3)
    ]
    row = compile_time.summary(8, pairs)
    assert row["ratio"] == 2.0 and row["cpu_ratio"] == 2.0 and row["compile_s"] == [3.0, 1.0]
    text = compile_time.text(
        {
            **RESULT,
            "shape": "small",
            "layers": 61,
            "against": 8,
            "rows": [row],
            "bar": 1.5,
            "met": False,
        }
    )
    assert text.endswith("bar 1.5: MISSED")


PROGRAM = """HloModule step, is_scheduled=true

%into (p0: f32[1000,256], p1: f32[1,256]) -> f32[1000,256] {
  %p0 = f32[1000,256]{1,0} parameter(0)
  %p1 = f32[1,256]{1,0} parameter(1)
  %five = s32[] constant(5)
  %zero = s32[] constant(0)
  ROOT %update = f32[1000,256]{1,0} dynamic-update-slice(%p0, %p1, %five, %zero)
}

%product (q0: f32[48,64], q1: f32[1000,64,80], at: s32[]) -> f32[48,80] {
  %q0 = f32[48,64]{1,0} parameter(0)
  %q1 = f32[1000,64,80]{2,1,0} parameter(1)
  %at = s32[] parameter(2)
  %none = s32[] constant(0)
  %one = f32[1,64,80]{2,1,0} dynamic-slice(%q1, %at, %none, %none), dynamic_slice_sizes={1,64,80}
  %weight = f32[64,80]{1,0} bitcast(%one)
  ROOT %dot = f32[48,80]{1,0} dot(%q0, %weight), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: f32[48,64], b: f32[1000,64,80], s: f32[1000,256], r: f32[1,256], i: s32[]) -> f32[1000,256] {
  %a = f32[48,64]{1,0} parameter(0)
  %b = f32[1000,64,80]{2,1,0} parameter(1)
  %stack = f32[1000,256]{1,0} parameter(2)
  %row = f32[1,256]{1,0} parameter(3)
  %i = s32[] parameter(4)
  %multiplied = f32[48,80]{1,0} fusion(%a, %b, %i), kind=kCustom, calls=%product
  %sum = f32[1000,256]{1,0} add(%stack, %stack)
  ROOT %updated = f32[1000,256]{1,0} fusion(%sum, %row), kind=kLoop, calls=%into
}
"""


def test_the_floor_counts_what_an_instruction_must_do():
    module = hlo.Module(PROGRAM)
    reader = work.Reader(module, on_gpu=False)
    least = {name: floor.of(reader, "main", i) for name, i in module.computations["main"].items()}
    assert least["multiplied"].matmuls == (
        floor.Matmul("f32", (48, 64), (64, 80), (((1,), (0,)), ((), ()))),
    )
    assert least["multiplied"].matmuls[0].flops == 2 * 48 * 64 * 80
    assert least["multiplied"].bytes == 4 * (
        48 * 64 + 64 * 80 + 1 + 48 * 80
    )  # one weight of the thousand
    assert least["sum"] == ((), 4 * 3 * 1000 * 256)
    assert least["updated"] == ((), 4 * 2 * 256)  # in place: a row is read and written


def test_a_batched_matmul_has_its_flops():
    m = floor.Matmul("f32", (8, 128, 64), (8, 64, 32), (((2,), (1,)), ((0,), (0,))))
    assert m.flops == 2 * 8 * 128 * 64 * 32
