"""Float16 with loss scaling: against float32, DeepSpeed's rules, and a run that was not interrupted."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.config.options import Fp16Config, MeshConfig
from deepseek_jax.model.count import Count
from deepseek_jax.model.head import Head
from deepseek_jax.objectives import pretrain
from deepseek_jax.parallel.mesh import BATCH_AXES
from deepseek_jax.run import metrics
from deepseek_jax.train.loss_scale import LossScale, adjust, may_fall
from tests.support import conversion
from tests.support.small_runs import (
    ADAMW,
    Trainer,
    config_of,
    losses_of,
    restored,
    same,
    trainer,
)

FLOAT16 = config_of(
    dataclasses.replace(ADAMW, moment_dtype="bfloat16"),
    MeshConfig(fsdp=2, expert=2),
    dtype="float16",
)


@pytest.mark.slow
def test_float16_tracks_float32():
    """20 steps, over which the loss falls by 1. Float16 has 11 bits: 5e-4 of an activation, some of which
    decide an expert otherwise.
    """
    half, full = (
        trainer(FLOAT16),
        trainer(
            dataclasses.replace(FLOAT16, train=dataclasses.replace(FLOAT16.train, dtype="float32"))
        ),
    )
    (s, ours), (_, exact) = half.run(half.start(), 20), full.run(full.start(), 20)
    last, ours, expected = ours[-1], losses_of(ours), losses_of(exact)
    assert expected[-1] < expected[0] - 0.8
    assert np.abs(ours - expected).max() < 0.02 and 0 < np.abs(ours - expected)[0]
    assert (
        int(s.skipped_steps) == 0
        and full.layout.abstract.loss_scale is None
        and exact[0].loss_scale is None
    )
    assert float(s.loss_scale.scale) == 2.0**16 and int(s.loss_scale.good_steps) == 20

    def row(m):
        m = jax.device_get(m)
        return metrics.row(metrics.Measured(20, m, 1.0, 1.0, 1, FLOAT16, Count(1, 1, 0, 1.0)))

    assert row(last)["loss_scale"] == 65536 and "loss_scale" not in row(exact[-1])


@pytest.mark.slow
def test_an_overflow_halves_the_scale_and_changes_nothing_else():
    t = trainer(FLOAT16)
    first, _ = t.run(t.start(), 3)
    with jax.set_mesh(t.mesh):
        high = jax.device_put(
            LossScale(np.float32(2.0**30), np.int32(7), np.int32(2)), t.layout.shardings.loss_scale
        )
    s, scale, skipped = first._replace(loss_scale=high), 2.0**30, 0
    while True:
        before = s
        s, (m,) = t.run(s, 1, 3)
        assert float(m.loss_scale) == scale and np.isfinite(m.loss) and int(s.bad_steps) == 0
        if np.isfinite(m.grad_norm):
            break
        skipped += 1
        scale /= 2 if skipped > 1 else 1  # hysteresis: the first overflow is forgiven
        assert (float(s.loss_scale.scale), int(s.loss_scale.good_steps), int(s.skipped_steps)) == (
            scale,
            0,
            skipped,
        )
        assert same((s.params, s.opt_state, s.bias), (before.params, before.opt_state, before.bias))
    assert skipped > 3 and scale > 2.0**10, (skipped, scale)
    assert (float(s.loss_scale.scale), int(s.loss_scale.good_steps)) == (scale, 1) and not same(
        s.params, first.params
    )
    # Gradients are those at the usual scale, but for float16's rounding.
    usual, (m0,) = t.run(first, 1, 3)
    assert float(m.grad_norm) == pytest.approx(float(m0.grad_norm), rel=1e-2) and float(
        m.lr
    ) == float(m0.lr)
    # A loss that is no number is not the scale's fault.
    broken = jax.tree.map(lambda a: a * jnp.nan, s.params)
    after, (m,) = t.run(s._replace(params=broken), 1, 4)
    assert int(after.bad_steps) == 1 and float(after.loss_scale.scale) == scale


@pytest.mark.slow
def test_float16_resumes_exactly(tmp_path):
    t = trainer(FLOAT16)
    s, _ = t.run(t.start(), 5)
    s = s._replace(loss_scale=s.loss_scale._replace(hysteresis=s.loss_scale.hysteresis - 1))
    on, metrics = t.run(s, 3, 5)
    again, same_metrics = t.run(restored(t, s, tmp_path), 3, 5)
    assert same(on, again) and same(metrics, same_metrics) and int(again.loss_scale.good_steps) == 8


@pytest.mark.slow
def test_overflows_at_the_lowest_scale_count_as_bad_steps():
    class Rooted(pretrain.Pretraining):
        def loss(self, model, out, batch, totals, frozen_out):
            w = model.norm.weight[...]
            # The root's gradient at 0 is no number.
            root = jnp.sqrt(jnp.sum((w - jax.lax.stop_gradient(w)) ** 2))
            return jnp.sum(w**2) + root, {}

    config = config_of(dtype="float16", fp16=Fp16Config(initial_scale_power=2, hysteresis=1))
    t = Trainer(config, Rooted(config))
    s, metrics = t.run(t.start(), 5)
    assert [float(m.loss_scale) for m in metrics] == [4, 2, 1, 1, 1]
    assert [int(m.bad_steps) for m in metrics] == [0, 0, 1, 2, 3] and int(s.skipped_steps) == 5


def test_the_scale_moves_as_deepspeeds():
    """Against its DynamicLossScaler, written anew from its source, on random overflows."""
    for seed, options in enumerate(
        (
            Fp16Config(),
            Fp16Config(
                initial_scale_power=4, loss_scale_window=3, hysteresis=1, min_loss_scale=2.0
            ),
            Fp16Config(initial_scale_power=8, loss_scale_window=5, hysteresis=3),
        )
    ):
        ours = LossScale(
            jnp.float32(2.0**options.initial_scale_power),
            jnp.int32(0),
            jnp.int32(options.hysteresis),
        )
        scale, hysteresis, last = 2.0**options.initial_scale_power, options.hysteresis, -1
        move = jax.jit(functools.partial(adjust, options))
        for i, overflow in enumerate(np.random.default_rng(seed).random(80) < 0.25):
            if overflow:
                if options.hysteresis == 1 or hysteresis == 1:
                    scale = max(scale / 2, options.min_loss_scale)
                else:
                    hysteresis -= 1
                last = i
            elif (i - last) % options.loss_scale_window == 0:
                hysteresis, scale = options.hysteresis, scale * 2
            ours = move(ours, jnp.asarray(overflow), jnp.asarray(False))
            assert (float(ours.scale), int(ours.hysteresis)) == (scale, hysteresis), (seed, i)
            assert bool(may_fall(options, ours)) == (scale > options.min_loss_scale)
    grown = move(
        LossScale(jnp.float32(2.0**32), jnp.int32(4), jnp.int32(1)),
        jnp.asarray(False),
        jnp.asarray(False),
    )
    assert float(grown.scale) == 2.0**32


def test_the_heads_gradient_does_not_overflow_before_it_is_divided():
    """4,096 tokens, most with the same target and like hidden states of 32: their sum is above 65,504, their
    mean far below. And words of a probability of 1e-4 keep their gradient, which float16 alone would store in
    a few bits.
    """
    rng = np.random.default_rng(0)
    tokens, width, words, scale = 4096, 16, 8192, 2.0**10
    hidden = (32 + rng.standard_normal((tokens, width))).astype(np.float16)
    kernel = (
        (rng.standard_normal((width, words)) * 0.002)
        .astype(np.float32)
        .astype(np.float16)
        .astype(np.float32)
    )
    target = np.where(rng.random(tokens) < 0.9, 3, rng.integers(0, words, tokens)).astype(np.int32)
    with conversion.on_mesh(config_of()):

        def loss(hidden, kernel):
            weight = nnx.Param(kernel, out_sharding=("embed", "vocab"), eager_sharding=False)
            model = types.SimpleNamespace(head=Head(weight, tied=False))
            nll = pretrain.cross_entropy_sum(hidden, model, conversion.put(target.reshape(8, -1)))
            return nll / tokens * scale

        on_devices = (
            jax.device_put(hidden.reshape(8, -1, width), jax.P(BATCH_AXES)),
            jax.device_put(kernel, jax.P(None, "tensor")),
        )
        dhidden, dkernel = jax.jit(jax.grad(loss, argnums=(0, 1)))(*on_devices)
    logits = hidden.astype(np.float64) @ kernel
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    dlogits = (p / p.sum(axis=1, keepdims=True) - np.eye(words)[target]) / tokens * scale
    expected = hidden.astype(np.float64).T @ dlogits
    assert np.abs(expected * tokens / scale).max() > 65504
    rare = np.setdiff1d(np.arange(words), target)
    for name, ours, exact in (
        ("kernel", dkernel, expected),
        ("rare words", np.asarray(dkernel)[:, rare], expected[:, rare]),
        ("hidden", np.asarray(dhidden, np.float64).reshape(tokens, width), dlogits @ kernel.T),
    ):
        error = np.linalg.norm(np.asarray(ours, np.float64) - exact) / np.linalg.norm(exact)
        assert error < 2e-3, f"{name}: {error:.1e}"  # float16 rounds by 2^-11
