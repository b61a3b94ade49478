"""The speed of distillation, at toy size: its programs, its runs, and what is said of them."""

import argparse

import pytest

from benchmarks.repository import figures
from benchmarks.speed import distill
from benchmarks.support import shapes

TINY = dict(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=16,
)


@pytest.fixture
def own(monkeypatch):
    monkeypatch.setitem(shapes._SHAPES, "small", TINY)
    monkeypatch.setitem(shapes._TOKENS, "small", (2, 32))
    return argparse.Namespace(
        shape="small", dtype="float32", remat="none", top_k=8, turns=2, steps=6
    )


def test_the_student_has_half_of_the_experts():
    own = argparse.Namespace(shape="fine", dtype="float32", remat="none")
    whole, half = shapes.config("fine").model, distill.student_of(own).model
    assert (half.n_routed_experts, half.n_group, half.topk_group) == (32, 4, 2)
    assert (
        whole.n_routed_experts == 64 and half.moe_intermediate_size == whole.moe_intermediate_size
    )


@pytest.mark.slow
def test_all_of_it(own, tmp_path):
    rows = distill.online(own, tmp_path)
    assert set(rows) == {"full vocabulary", "top_k=8"} and all(
        r["times"] > 0 for r in rows.values()
    )
    cache = distill.cached(own, tmp_path)
    # ids of 2 bytes and values of 2, the log-sum-exp at two temperatures
    assert cache["bytes_per_token"] == 8 * 4 + 8 and cache["times"] > 0
    result = {"shape": "small", "dtype": "float32", "remat": "none", "bar": distill.BAR}
    result |= {"rows": rows, "cache": cache}
    assert "40 bytes per token" in distill.text(result) and "top_k=8" in figures.distill(result)
