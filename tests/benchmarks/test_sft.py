"""The speed of fine-tuning: its chats, its figures, and both sides at toy size."""

import argparse
import json
import sys

import numpy as np
import pytest

from benchmarks.speed import sft, step
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


def test_chats_have_a_quarter_of_a_row_on_average():
    found = list(sft.chats(4000, 256, 2048, 0.6))
    lengths = np.array([len(ids) for ids, _ in found])
    assert lengths.mean() == pytest.approx(64, rel=0.05) and lengths.max() <= 256
    scored = np.array([np.sum(labels != -100) for _, labels in found])
    assert scored.sum() / lengths.sum() == pytest.approx(sft.SCORED, abs=0.03)
    for ids, labels in found[:50]:
        n = np.sum(labels == -100)
        assert n >= 1 and (labels[:n] == -100).all() and np.array_equal(labels[n:], ids[n:])


def test_ratios_are_of_tokens_per_cpu_second():
    ours = {"seconds": [1.0, 1.0], "cpu_seconds": [2.0, 2.0], "scored": 800, "computed": 1600}
    theirs = {"seconds": [4.0], "cpu_seconds": [4.0], "scored": 400, "computed": 1600}
    theirs |= {"peer": "TRL", "threads": 1, "peak_memory": 2e9}
    own = argparse.Namespace(shape="small", dtype="float32", remat="dots", spread=0.8)
    r = sft.summary(own, [(ours | {"peak_memory": 1e9}, theirs)] * 3)
    assert r["ratio"]["scored_per_cpu_second"] == 2.0 and r["met"]
    assert r["ratio"]["computed_per_cpu_second"] == 1.0
    assert r["ours"]["scored_share"] == 0.5 and "2.00x" in sft.text(r)


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    monkeypatch.setitem(shapes._SHAPES, "small", TINY)
    monkeypatch.setitem(shapes._TOKENS, "small", (2, 32))
    own = argparse.Namespace(shape="small", steps=2, dtype="float32", remat="none", threads=1)
    own.spread = 0.6
    sft.write_inputs(own, tmp_path)
    return own, tmp_path


@pytest.mark.slow
def test_one_turn_of_ours(inputs):
    """Every chat's answer is scored but its first token's place: targets are shifted by the row."""
    own, folder = inputs
    turn = sft.measure(own, folder)
    assert len(turn["cpu_seconds"]) == 2 and turn["computed"] == 2 * 2 * 32
    assert 0.3 < turn["scored"] / turn["computed"] < 0.6
    assert turn["loss"] == pytest.approx(np.log(320), rel=0.05)


@pytest.mark.slow
def test_one_turn_of_the_peer(inputs):
    pytest.importorskip("trl")
    own, folder = inputs
    own.peer = "benchmarks/speed/trl_sft.py"
    turn = step.run_json(sft.peer_command(own, folder))
    assert len(turn["cpu_seconds"]) == 2 and turn["peer"].startswith("TRL")
    with open(folder / sft.CHATS) as f:
        chats = [json.loads(line) for line in f]
    mean = np.mean([sum(label != -100 for label in c["labels"]) for c in chats])
    # two updates of eight chats, drawn at random from all
    assert turn["scored"] == pytest.approx(16 * mean, rel=0.5)
    assert turn["computed"] > sum(len(c["input_ids"]) for c in chats) / len(chats) * 16 / 2
    assert turn["loss"] == pytest.approx(np.log(320), rel=0.1)
    assert "jax" in sys.modules  # not in the peer's process, which has torch alone
