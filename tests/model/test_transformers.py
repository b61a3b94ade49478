"""The JAX model against Hugging Face transformers, both in float32 on the CPU."""

import functools

import jax
import numpy as np
import pytest

from deepseek_jax.parallel import sharding
from tests.support import conversion
from tests.support import hf_variants as hf
from tests.support import reference as ref

# Relative to the largest logit or to the gradient's norm. Both sides round to float32 (6e-8) in
# sums of other orders through a few layers: measured at most 2e-6 on logits and 3e-6 on gradients,
# so 1e-5 leaves room and still sees any wrong term.
RTOL = 1e-5
MTP_WEIGHT = 0.3
MESHES = {
    "deepseek_v2": dict(fsdp=2),
    "deepseek_v3-noqlora": dict(expert=2),
}  # the others on one device
# A dense layer, and one depth of multi-token prediction, which has experts: two layers to compile.
SMALL_MTP = "deepseek_v3-mtp, small"
WITH_GRADIENTS = (
    "deepseek_v2-lite",
    "deepseek_v3",
    "moonlight",
    "deepseek_v3-tied",
    "deepseek_v3-mtp",
    SMALL_MTP,
)


@functools.cache
def case(variant):
    """-> (transformers model, Model without balance loss, weights, ids [B, S])."""
    small = dict(hf.V3, num_hidden_layers=1, first_k_dense_replace=1, num_nextn_predict_layers=1)
    with pytest.MonkeyPatch.context() as m:
        m.setitem(hf.VARIANTS, SMALL_MTP, ("deepseek_v3", small))
        theirs, model, weights = hf.build(variant, seed=0)
    return theirs, conversion.smaller(model, aux_loss_alpha=0.0), weights, hf.pick_ids(theirs)


def their_choices(theirs, ids, call):
    """(result of call(), expert counts [E] of every router that ran in it, first to last)."""
    experts, seen = theirs.config.n_routed_experts, []
    hooks = [
        gate.register_forward_hook(
            lambda g, _, out: seen.append(
                np.bincount(out[2].numpy().reshape(-1), minlength=experts)
            )
        )
        for gate in hf._gates(theirs)
    ]
    try:
        return call(), np.stack(seen)
    finally:
        for hook in hooks:
            hook.remove()


def test_weights_survive_the_bridge():
    _, model, weights, _ = case("deepseek_v3-mtp")
    params, bias = conversion.to_state(weights, model)
    back = conversion.to_hf(params, model) | conversion.to_hf(bias, model)
    assert set(back) == set(weights)
    for name, a in back.items():
        np.testing.assert_array_equal(a, weights[name])


# test_layers.py has their routers, rotations and scales, with gradients.
SLOW = (
    "deepseek_v2",
    "deepseek_v3-halfrope",
    "deepseek_v3-yarn",
    "deepseek_v3-yarn-mscale",
    "deepseek_v3-yarn-plain",
    "deepseek_v3-nonorm",
    "deepseek_v3-eps",
    "deepseek_v2-group",
)


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(v, marks=[pytest.mark.slow] if v in SLOW else [])
        for v in hf.VARIANTS
        if v not in WITH_GRADIENTS
    ],
)
def test_logits(variant):
    theirs, model, weights, ids = case(variant)
    (logits, loss, _), counts = their_choices(
        theirs, ids, lambda: hf.hf_logits_loss_grads(theirs, ids)
    )
    out = conversion.run(weights, model, ids, **MESHES.get(variant, {}))
    conversion.assert_close(out.logits, logits, RTOL, "logits")
    assert abs(ref.cross_entropy(out.logits, ref.targets_ahead(ids)) - loss) < RTOL * loss
    np.testing.assert_array_equal(out.stats.load.expert_counts, counts)


LONGER = ("moonlight", "deepseek_v3-tied", "deepseek_v3", "deepseek_v3-mtp")


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=[pytest.mark.slow] if v in LONGER else []) for v in WITH_GRADIENTS],
)
def test_logits_loss_and_every_gradient(variant):
    theirs, model, weights, ids = case(variant)
    weight = MTP_WEIGHT if model.num_nextn_predict_layers else 0.0
    (logits, loss, grads), counts = their_choices(
        theirs, ids, lambda: hf.hf_logits_loss_grads(theirs, ids, weight)
    )
    config = conversion.config_of(model)
    with conversion.on_mesh(config):
        batch = {k: conversion.put(a) for k, a in conversion.batch_of(ids).items()}
        params, bias = conversion.to_state(weights, model)
        params, bias = (
            conversion.place(params, config),
            conversion.place(bias, config, sharding.COMPUTE_RULES),
        )
        make = conversion.model_of(config)

        @jax.jit
        def run(params, bias, batch):
            def loss_of(params):
                net = conversion.Recorder(make(params, bias))
                loss = conversion.loss_of(net, batch, config, weight)
                return loss, (
                    net.logits(net.out.hidden_BSD),
                    [net.logits(h) for h in net.out.mtp_hidden_BSD],
                    net.out.stats,
                )

            (loss, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
            return loss, *aux, grads

        our_loss, our_logits, mtp_logits, stats, our_grads = jax.tree.map(
            np.asarray, run(params, bias, batch)
        )
    conversion.assert_close(our_logits, logits, RTOL, "logits")
    assert abs(our_loss - loss) < RTOL * loss
    # transformers runs depth d on sequences d shorter: the positions that are padding there in ours.
    np.testing.assert_array_equal(stats.load.expert_counts, counts)
    if model.num_nextn_predict_layers:
        for depth, (ours, expected) in enumerate(
            zip(mtp_logits, hf.hf_mtp_logits(theirs, ids), strict=True), 1
        ):
            # Row i predicts token i + 1 + depth; transformers has no rows for the last `depth` positions.
            conversion.assert_close(ours[:, :-depth], expected, RTOL, f"logits of depth {depth}")
    ours = conversion.to_hf(our_grads, model)
    assert set(ours) == set(grads)
    errors = {
        n: np.linalg.norm(ours[n].astype(np.float64) - g) / np.linalg.norm(g)
        for n, g in grads.items()
        if np.any(g)
    }
    worst = max(errors, key=errors.get)
    assert errors[worst] < RTOL, f"gradient of {worst}: relative error {errors[worst]:.1e}"
    for name in grads.keys() - errors.keys():
        assert not np.any(ours[name]), f"gradient of {name} is not 0"
