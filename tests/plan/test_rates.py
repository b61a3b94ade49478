"""Rounds at a stated skew, and rates of hardware."""

import dataclasses

import numpy as np
import pytest

from deepseek_jax.config.options import Config, ModelConfig, MoeConfig, TrainConfig
from deepseek_jax.errors import UserError
from deepseek_jax.plan import exchange, rates, skew


def moe(**given) -> Config:
    model = ModelConfig(vocab_size=1000, n_routed_experts=64, num_experts_per_tok=6)
    return Config(
        model=dataclasses.replace(model, **given),
        moe=MoeConfig(experts_implementation="rounds"),
        train=TrainConfig(batch_size=8, sequence_length=1024),
    )


@pytest.mark.parametrize(
    "violation, rounds", [(0.0, 1), (0.2, 1), (0.25, 1), (0.3, 2), (1.6, 3), (7.438, 7), (9.667, 9)]
)
def test_rounds_at_a_violation(violation, rounds):
    """ceil((1 + violation) / 1.25); the last two were seen on a GPU (benchmarks/results/gpu_h200.json)."""
    found = skew.rounds_at(str(violation), moe(), {"data": 1, "fsdp": 8, "expert": 1})
    assert found.rounds == rounds and found.violation == violation
    places = exchange.buffers(moe(), {"data": 1, "fsdp": 8, "expert": 1}).places
    assert rounds == np.ceil((1 + violation) * 1024 * 6 / 64 / places)


def test_experts_without_places_have_no_rounds():
    grouped = dataclasses.replace(moe(), moe=MoeConfig(experts_implementation="auto"))
    found = skew.rounds_at("7.438", grouped, {"data": 1, "fsdp": 8, "expert": 1})
    assert found.rounds == 1 and found.violation == 7.438 and "without rounds" in found.said


def test_zipf_is_as_uneven_as_a_draw():
    """Beside another generator and a plain loop: 100 draws of the experts of each word."""
    vocabulary, experts, top_k = 200, 16, 2
    share = 1 / np.arange(1, vocabulary + 1)
    share /= share.sum()
    rng = np.random.default_rng(12345)
    largest = []
    for _ in range(100):
        load = np.zeros(experts)
        for s in share:
            load[rng.choice(experts, top_k, replace=False)] += s
        largest.append(load.max() / (top_k / experts))
    # Means of 32 and 100 draws: their standard errors, by the latter's deviation.
    error = np.std(largest) * np.sqrt(1 / skew.DRAWS + 1 / 100)
    assert skew.zipf_violation(vocabulary, experts, top_k) + 1 == pytest.approx(
        np.mean(largest), abs=4 * error
    )


def test_a_dense_model_has_one_round():
    dense = moe(num_hidden_layers=2, first_k_dense_replace=2)
    assert skew.rounds_at("3", dense, {"data": 1, "fsdp": 8, "expert": 1}).rounds == 1


@pytest.mark.parametrize("text", ["much", "-1", "nan", "inf", ""])
def test_a_skew_that_is_none(text):
    with pytest.raises(UserError, match="is no skew. Set it to zipf"):
        skew.rounds_at(text, moe(), {"data": 1, "fsdp": 8, "expert": 1})


def test_given_rates():
    speed = rates.speed_of("h200", "bf16=7.5e14,memory=4300000000000")
    assert speed.derated.bf16 == 750e12 and speed.derated.memory == 4.3e12
    assert speed.ideal == rates.SPEEDS["h200"].ideal and speed.reasons["bf16"] == "given by --rates"
    for mistake in ("fast=1", "bf16", "bf16=quick", "bf16=0", "memory=-1"):
        with pytest.raises(UserError, match="--rates="):
            rates.speed_of("h200", mistake)
    with pytest.raises(UserError, match="--rates=f32=150e9,memory=20e9"):
        rates.speed_of("cpu", "bf16=1e12")


@pytest.mark.parametrize("name", rates.SPEEDS)
def test_every_rate_has_a_source(name):
    speed = rates.SPEEDS[name]
    assert set(speed.sources) | {"host", "vector"} == set(rates.Rates._fields)
    assert set(speed.reasons) | {"vector"} == set(rates.Rates._fields)
    slower = {"launch", "collective", "host"}
    for field in speed.reasons:
        ideal, derated = getattr(speed.ideal, field), getattr(speed.derated, field)
        assert derated >= ideal if field in slower else derated < ideal
