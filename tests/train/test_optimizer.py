"""Schedules, batch-size ramp and weight-decay mask against the published numbers, by separate arithmetic."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from deepseek_jax.config.options import Config, ModelConfig, OptimizerConfig, TrainConfig
from deepseek_jax.model.layout import abstract_model
from deepseek_jax.train.optimizer import decay_mask, first_sequence, learning_rate, sequences_at

STEPS = 1480
PEAK = 2.2e-4


def schedule(name: str, **options):
    config = Config(
        train=TrainConfig(steps=STEPS),
        optimizer=OptimizerConfig(schedule=name, learning_rate=PEAK, warmup_steps=20, **options),
    )
    rate = learning_rate(config)
    return lambda step: float(rate(step))


def expected(name: str, step: int) -> float:
    """The same schedules written as one formula a step."""
    if step < 20:
        return PEAK * step / 20
    if name == "constant":
        return PEAK
    if name == "cosine":
        return PEAK * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - 20) / (STEPS - 20))) / 2)
    if name == "wsd":
        start = STEPS - round(0.2 * STEPS)
        return PEAK if step < start else PEAK * (1 - 0.9 * (step - start) / (STEPS - start))
    if name == "deepseek_v2":
        return PEAK * 0.316 ** ((step >= 0.6 * STEPS) + (step >= 0.9 * STEPS))
    trillion = step / STEPS * 14.8
    if trillion < 10:
        return PEAK
    if trillion < 14.3:
        return PEAK * (0.1 + 0.9 * (1 + math.cos(math.pi * (trillion - 10) / 4.3)) / 2)
    return 2.2e-5 if trillion < 14.633 else 7.3e-6


@pytest.mark.parametrize("name", ["constant", "cosine", "wsd", "deepseek_v2", "deepseek_v3"])
def test_schedules(name):
    rate = schedule(name, decay_fraction=0.4 if name == "deepseek_v2" else 0.2)
    steps = sorted(
        {
            *range(0, STEPS, 7),
            0,
            19,
            20,
            21,
            887,
            888,
            999,
            1000,
            1001,
            1331,
            1332,
            1429,
            1430,
            1463,
            1464,
            STEPS - 1,
        }
    )
    edges = {1463}  # 14.633T of 14.8T lies between two steps
    for step in set(steps) - edges:
        assert rate(step) == pytest.approx(expected(name, step), rel=1e-5, abs=1e-12), (name, step)


def test_warmup_longer_than_the_run_only_warms_up():
    config = Config(
        train=TrainConfig(steps=10), optimizer=OptimizerConfig(warmup_steps=2000, learning_rate=1.0)
    )
    rates = [float(learning_rate(config)(s)) for s in range(10)]
    assert rates == sorted(rates) and rates[0] == 0


def test_batch_ramp_is_a_pure_function_of_the_step():
    config = Config(
        train=TrainConfig(
            steps=100, batch_size=64, accumulation=8, batch_ramp_start=16, batch_ramp_steps=30
        )
    )
    sizes = [sequences_at(config, s) for s in range(100)]
    assert (
        sizes[0] == 16
        and sizes[30:] == [64] * 70
        and sizes == sorted(sizes)
        and all(s % 8 == 0 for s in sizes)
    )
    assert [first_sequence(config, s) for s in range(100)] == [sum(sizes[:s]) for s in range(100)]
    plain = dataclasses.replace(config, train=TrainConfig(steps=100, batch_size=64))
    assert first_sequence(plain, 37) == 37 * 64


def test_norms_are_not_decayed_and_everything_else_is():
    config = Config(model=ModelConfig(num_nextn_predict_layers=1, q_lora_rank=8))
    params = abstract_model(config)[1]
    mask = dict(jax.tree_util.tree_leaves_with_path(decay_mask(params)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        assert mask[path] == ("norm" not in name), name
        assert np.prod(leaf.shape) > 0
    assert sum(mask.values()) > 10 and not all(mask.values())
