"""The benchmarks run, at toy size, so that they do not rot: their methods agree and their tables hold what they promise."""

import json

import jax
import pytest

from benchmarks import gpu_bench, gpu_parts, moe


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


@pytest.mark.parametrize("load", ["balanced", "zipf"])
def test_methods_of_moe_agree(load):
    shape = moe.Shape(8, 64, 2, 16, 8)
    counts = jax.numpy.bincount(moe.routing(shape, load).reshape(-1), length=8)
    assert (int(counts.max()) == 16) == (load == "balanced")
    with jax.set_mesh(moe.one_device()):
        built = moe.programs(shape, load, list(moe.METHODS), 1.25)
        results = {name: program() for name, program in built.items() if name != "dense"}
        moe.compare(results)
        results["ragged"] = (results["ragged"][0] * 1.001, *results["ragged"][1:])
        with pytest.raises(FloatingPointError, match="y by ragged"):
            moe.compare(results)
