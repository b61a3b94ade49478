"""The benchmarks run, at toy size, so that they do not rot: their methods agree and their tables hold what they promise."""

import json
import pathlib
import unittest.mock

import jax
import numpy as np
import pytest
import safetensors.numpy

import bridge
from benchmarks import compile as compile_time
from benchmarks import floor, gpu_bench, gpu_parts, hf_copy, moe, overhead, vocabulary
from deepseek_jax.compilation import CompiledStep
from deepseek_jax.config import Compile, Config, Eval, Mesh, Model, Train
from deepseek_jax.plan import hlo

RESULT = {"machine": {"device": "cpu", "cores": 2}, "dtype": "float32"}


def test_gpu_bench(tmp_path):
    """All parts that need no PyTorch; the table that is written."""
    result = {"toy": True, "bars": {}, "peer": {"not_measured": "a test"}}
    result |= {name: gpu_bench.part(name, True) for name in ("train", "experts", "attention")}
    runs = result["train"]["runs"]
    assert [(r["routing"], r["attention"]) for r in runs] == [("natural", "auto"), ("balanced", "auto")]
    assert all(r["tokens_per_s"] > 0 and r["tokens_per_s_of_the_whole_model"] > 0 for r in runs), runs
    assert len(runs[0]["largest_costs"]) == 3 and all(0 < c["share"] <= 1 for c in runs[0]["largest_costs"])
    assert set(result["experts"]["rows"][0]["tflops"]["both"]) >= {"equal slots", "ragged_dot"}
    gpu_bench.write(result, tmp_path / "gpu")
    assert json.loads((tmp_path / "gpu.json").read_text()) == result
    assert "| natural | auto |" in (tmp_path / "gpu.md").read_text()


def test_layers_that_fit(monkeypatch):
    """Found from what compiled steps need: here 100 bytes and 10 a layer."""
    monkeypatch.setattr(gpu_parts, "compile_on", lambda config, device: (None, None, type("Step", (), {"compiled": config.model.num_hidden_layers})))
    monkeypatch.setattr(gpu_parts.program, "memory", lambda layers: type("Memory", (), {"total": 100 + 10 * layers}))
    assert gpu_parts.layers_that_fit(None, 259)[0] == 15
    assert gpu_parts.layers_that_fit(None, 260)[0] == 16
    assert gpu_parts.layers_that_fit(None, 1e6)[0] == 27
    assert gpu_parts.layers_that_fit(None, 130)[0] == 2


@pytest.mark.parametrize("load", [pytest.param("balanced", marks=pytest.mark.slow), "zipf"])
def test_methods_of_moe_agree(load):
    shape = moe.Shape(8, 64, 2, 16, 8)
    counts = jax.numpy.bincount(moe.routing(shape, load).reshape(-1), length=8)
    assert (int(counts.max()) == 16) == (load == "balanced")
    with jax.set_mesh(moe.one_device()):
        built = moe.programs(shape, load, list(moe.METHODS), 1.25)
        results = {name: program() for name, program in built.items() if name not in ("dense", "products")}
        moe.compare(results)
        arguments, (ys, *_) = built["products"].arguments, built["products"]()
        for x, gate_up, down, y in zip(*arguments[:3], ys, strict=True):
            gate, up = np.split(np.asarray(x) @ gate_up, 2, axis=1)
            np.testing.assert_allclose(y, (gate / (1 + np.exp(-gate)) * up) @ down, rtol=1e-4, atol=1e-5)
        assert [len(x) for x in arguments[0]] == counts.tolist()
        results["ragged"] = (results["ragged"][0] * 1.001, *results["ragged"][1:])
        with pytest.raises(FloatingPointError, match="y by ragged"):
            moe.compare(results)
        assert all(seconds > 0 for seconds in moe.least_of(built["ours"], runs=1).values())


def test_vocabulary():
    """Both losses and their gradients agree (`measure` raises where they do not), and only the plain one holds the logits of all tokens."""
    with jax.set_mesh(moe.one_device()):
        rows = [vocabulary.measure(tokens, 512, 16, 1) for tokens in (2048, 4096)]
    assert vocabulary.bars(rows)["temporary bytes independent of tokens x vocabulary"]
    plain = [r["temporaries"]["plain"] for r in rows]
    assert plain[1] - plain[0] >= 2048 * 512 * 4
    assert rows[1]["temporaries"]["ours"] < plain[1] and "4,096" in vocabulary.text({**RESULT, "width": 16, "chunk": 1024, "rows": rows, "bars": {}})


def test_hf_copy(tmp_path):
    """What it imports and exports is the checkpoint that it wrote; times, ratios and memory are there."""
    kept = {}

    def run(name, source, target):
        out = hf_copy.timed(name, source, target)
        folder = target + "/hf" * (name == "import")
        kept[name] = {f.name: safetensors.numpy.load_file(f) for f in pathlib.Path(folder).glob("*.safetensors")}
        return out

    r = hf_copy.measure(0.0005, 1, str(tmp_path / "copies"), run)
    whole = [{n: a for held in files.values() for n, a in held.items()} for files in kept.values()]
    assert sum(a.nbytes for a in whole[0].values()) == r["bytes"] and 4e5 < r["bytes"] < 6e5
    for other in whole[1:]:
        assert other.keys() == whole[0].keys() and all(np.array_equal(a, whole[0][n].astype(a.dtype)) for n, a in other.items())
    assert [held["lm_head.weight"].dtype.name for held in whole] == ["bfloat16"] * 3 + ["float16"]
    assert all(r[name]["seconds"] > 0 and r[name]["ratio"] > 0 and r[name]["peak_bytes"] >= 0 for name in kept) and r["copy"]["ratio"] == 1
    assert ("MISSED" in hf_copy.text(r)) != r["met"] and not (tmp_path / "copies" / "export").exists()


def test_overhead():
    """Times of a loop, and which of its threads are Python's."""
    model = Model(vocab_size=320, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                  kv_lora_rank=16)
    config = Config(model=model, mesh=Mesh(fsdp=1), train=Train(batch_size=4, sequence_length=64, dtype="float32"), compile=Compile(cache_dir="off"),
                    eval=Eval(sample_prompt=""))
    with unittest.mock.patch.object(overhead, "CompiledStep", lambda step, mesh, options: CompiledStep(step, mesh, bridge.quick_options())):
        r = overhead.measure(config, 1, 4)
    assert r["idle_s"] >= 0 and r["host_cpu_s"] > 0 and r["cpu_s"] > 0 and r["checkpoint_s"] > 0 and r["step_s"] > 0
    assert r["overhead"] == pytest.approx((r["idle_s"] + r["checkpoint_s"] / 250 + r["host_cpu_s"]) / r["step_s"])
    assert f"bar 2%: {'met' if r['met'] else 'MISSED'}" in overhead.text(r)
    timed = overhead.Timed.__new__(overhead.Timed)
    timed.done, timed.returned = [1.0, 2.0, 3.0], [0.5, 0.7, 2.5]
    assert timed.idle(1) == 0 and timed.idle(2) == 0.5


def test_compile_time():
    config = compile_time.config_of("small", 3, 8)
    assert (config.model.num_hidden_layers, config.mesh.fsdp, config.mesh.expert) == (3, 4, 2)
    pairs = [[{"lower_s": 1.0, "compile_s": 2.0 + i, "cpu_s": 4.0}, {"lower_s": 1.0, "compile_s": 1.0, "cpu_s": 2.0}] for i in range(3)]
    row = compile_time.summary(8, pairs)
    assert row["ratio"] == 2.0 and row["cpu_ratio"] == 2.0 and row["compile_s"] == [3.0, 1.0]
    text = compile_time.text({**RESULT, "shape": "small", "layers": 61, "against": 8, "rows": [row], "bar": 1.5, "met": False})
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

ENTRY %main (a: f32[48,64], b: f32[1000,64,80], stack: f32[1000,256], row: f32[1,256], i: s32[]) -> f32[1000,256] {
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
    least = {name: floor.of(module, "main", i) for name, i in module.computations["main"].items()}
    assert least["multiplied"].matmuls == (floor.Matmul("f32", (48, 64), (64, 80), (((1,), (0,)), ((), ()))),)
    assert least["multiplied"].matmuls[0].flops == 2 * 48 * 64 * 80
    assert least["multiplied"].bytes == 4 * (48 * 64 + 64 * 80 + 1 + 48 * 80)  # one weight of the thousand
    assert least["sum"] == ((), 4 * 3 * 1000 * 256)
    assert least["updated"] == ((), 4 * 2 * 256)  # in place: a row is read and written


def test_a_batched_matmul_has_its_flops():
    m = floor.Matmul("f32", (8, 128, 64), (8, 64, 32), (((2,), (1,)), ((0,), (0,))))
    assert m.flops == 2 * 8 * 128 * 64 * 32
