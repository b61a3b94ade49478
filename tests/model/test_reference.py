"""The NumPy reference against Hugging Face transformers, and its losses against cases worked by hand."""

import dataclasses
import functools
import zlib

import numpy as np
import pytest

from deepseek_jax.config.options import ModelConfig
from tests.support import reference as ref

pytest.importorskip("torch")
pytest.importorskip("transformers")
from tests.support import hf_variants as hf  # noqa: E402

RTOL = 1e-5  # of the logits' scale: float32 in transformers against float64 here (measured: at most 2e-6)


@functools.cache
def case(variant):
    """-> (transformers model, Model, state, ids [B, S], the reference's Output)."""
    model, config, state = hf.build(variant, seed=0)
    ids = hf.pick_ids(model)
    return model, config, state, ids, ref.batch(ids, state, config)


def assert_same(actual, expected, rtol=RTOL):
    assert actual.shape == expected.shape
    error = np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max()
    assert error < rtol, f"relative error {error:.1e}"


@pytest.mark.parametrize("variant", hf.VARIANTS)
def test_model_matches_transformers(variant):
    model, config, state, ids, out = case(variant)
    assert hf.routing_margins(model, ids).min() > 1e-4
    seen, hooks = (
        [],
        [gate.register_forward_hook(lambda g, _, o: seen.append(o)) for gate in hf._gates(model)],
    )
    logits, loss, _ = hf.hf_logits_loss_grads(model, ids)
    for hook in hooks:
        hook.remove()
    assert_same(out.logits, logits)
    assert abs(ref.cross_entropy(out.logits, ref.targets_ahead(ids)) - loss) < RTOL * loss
    assert len(seen) == len(out.routing) == config.num_hidden_layers - config.first_k_dense_replace
    for (router_logits, weights, chosen), routing in zip(seen, out.routing, strict=True):
        B, S, k = routing.chosen.shape
        router_logits, weights, chosen = (
            a.detach().numpy().reshape(B, S, -1) for a in (router_logits, weights, chosen)
        )
        assert_same(routing.logits, router_logits)
        ours, theirs = np.argsort(routing.chosen, -1), np.argsort(chosen, -1)
        np.testing.assert_array_equal(
            np.take_along_axis(routing.chosen, ours, -1), np.take_along_axis(chosen, theirs, -1)
        )
        assert_same(
            np.take_along_axis(routing.weights, ours, -1), np.take_along_axis(weights, theirs, -1)
        )


@pytest.mark.parametrize("variant", hf.VARIANTS)
def test_rope_and_softmax_scale_match_transformers(variant):
    model, config, *_ = case(variant)
    frequencies, scale = ref.rope_frequencies(config)
    assert_same(frequencies, model.model.rotary_emb.inv_freq.numpy(), 1e-6)
    assert abs(scale - model.model.rotary_emb.attention_scaling) < 1e-12
    assert abs(ref.softmax_scale(config) - model.model.layers[0].self_attn.scaling) < 1e-12


@pytest.mark.parametrize(
    "variant",
    [
        "deepseek_v2-group",
        pytest.param("deepseek_v3-yarn-mscale", marks=pytest.mark.slow),
        pytest.param("deepseek_v3-tied", marks=pytest.mark.slow),
        "deepseek_v3-mtp",
    ],
)
def test_gradients_match_transformers(variant):
    """transformers' gradients under hub names against differences of the reference's loss: both the
    values and the names."""
    model, config, state, ids, _ = case(variant)
    mtp_weight = 0.3 if config.num_nextn_predict_layers else 0.0
    _, loss, grads = hf.hf_logits_loss_grads(model, ids, mtp_weight)

    def total(weights):
        out = ref.batch(ids, weights, config)
        depths = [
            ref.cross_entropy(m.logits, ref.targets_ahead(ids, d + 2))
            for d, m in enumerate(out.mtp)
        ]
        return ref.cross_entropy(out.logits, ref.targets_ahead(ids)) + (
            mtp_weight * np.mean(depths) if depths else 0.0
        )

    assert abs(total(state) - loss) < RTOL * loss
    assert set(grads) == {n for n in state if not n.endswith("e_score_correction_bias")}
    for suffix in (
        "",
        "experts.3.up_proj.weight",
        "mlp.gate.weight",
        "proj_with_mqa.weight",
        "norm.weight",
        "tokens.weight",
    ):
        names = [n for n in grads if n.endswith(suffix)]
        rng = np.random.default_rng(zlib.crc32(suffix.encode()))
        direction = {n: rng.standard_normal(grads[n].shape) for n in names}
        ours = ref.directional_derivative(total, state, direction, 1e-7)
        theirs = sum(float(np.sum(grads[n].astype(np.float64) * direction[n])) for n in names)
        scale = np.sqrt(
            sum(np.sum(grads[n].astype(np.float64) ** 2) for n in names)
        )  # what a random direction gives typically
        assert abs(ours - theirs) < 1e-4 * scale, (suffix, ours, theirs)


def test_mtp_matches_transformers():
    model, config, state, ids, out = case("deepseek_v3-mtp")
    for depth, logits in enumerate(hf.hf_mtp_logits(model, ids), 1):
        mtp = out.mtp[depth - 1]
        np.testing.assert_array_equal(
            mtp.valid, np.broadcast_to(np.arange(ids.shape[1]) < ids.shape[1] - depth, ids.shape)
        )
        assert_same(mtp.logits[:, :-depth], logits)


def test_mtp_is_fed_the_state_after_the_final_norm():
    """transformers gives MTP hidden_states[-1] (generation/candidate_generator.py), and that is the
    final norm's output."""
    import torch

    model, config, state, ids, out = case("deepseek_v3-mtp")
    with torch.no_grad():
        run = model.model(
            input_ids=torch.as_tensor(ids), output_hidden_states=True, use_cache=False
        )
    assert torch.equal(run.hidden_states[-1], run.last_hidden_state)
    assert_same(out.hidden, run.last_hidden_state.numpy())


def test_loss_is_that_of_transformers():
    import torch

    model, _, _, ids, _ = case("deepseek_v3")
    with torch.no_grad():
        theirs = model(
            input_ids=torch.as_tensor(ids), labels=torch.as_tensor(ids), use_cache=False
        ).loss.item()
    assert abs(hf.hf_logits_loss_grads(model, ids)[1] - theirs) < 1e-6


def test_packed_documents_equal_separate_ones():
    """Two documents and padding in one row give what each document gives alone, MTP included."""
    _, config, state, ids, _ = case("deepseek_v3-mtp")
    first, second = ids[0, :11], ids[1, :9]
    tokens = np.concatenate([first, second, np.zeros(4, int)])
    segments = np.repeat([1, 2, 0], [11, 9, 4])
    positions = ref.segment_positions(segments)
    np.testing.assert_array_equal(positions, np.r_[0:11, 0:9, 0:4])
    packed = ref.transformer(tokens, state, config, positions, segments)
    for part, document in ((slice(0, 11), first), (slice(11, 20), second)):
        alone = ref.transformer(document, state, config)
        np.testing.assert_allclose(packed.logits[part], alone.logits, rtol=0, atol=1e-10)
        np.testing.assert_allclose(
            packed.routing[0].weights[part], alone.routing[0].weights, atol=1e-10
        )
        for depth in (1, 2):
            a, b = packed.mtp[depth - 1], alone.mtp[depth - 1]
            np.testing.assert_array_equal(a.valid[part], b.valid)
            np.testing.assert_allclose(
                a.logits[part][b.valid], b.logits[b.valid], rtol=0, atol=1e-10
            )
    assert not packed.mtp[0].valid[20:].any() and np.isfinite(packed.logits).all()
    targets = ref.targets_ahead(tokens, 1, segments)
    np.testing.assert_array_equal(targets, np.r_[first[1:], -100, second[1:], -100, [-100] * 4])
    np.testing.assert_array_equal(
        ref.targets_ahead(tokens, 3, segments), np.r_[first[3:], [-100] * 3, second[3:], [-100] * 7]
    )


def test_rotation_keeps_relative_positions():
    for interleave in (True, False):
        config, rng = (
            ModelConfig(qk_rope_head_dim=8, rope_interleave=interleave),
            np.random.default_rng(0),
        )
        q, k = rng.standard_normal((2, 1, 8))

        def rotated(a, position, config=config, interleave=interleave):
            return ref.apply_rope(a, *ref.rope_tables(config, [position]), interleave)[0]

        def score(i, j, q=q, k=k, rotated=rotated):
            return float(rotated(q, i) @ rotated(k, j))

        assert abs(score(7, 3) - score(104, 100)) < 1e-12
        assert abs(score(7, 3) - score(7, 4)) > 1e-3
        assert abs(score(5, 5) - float(q[0] @ k[0])) < 1e-12


def test_routing_by_hand():
    """One token with router logits given directly: x = 1, so gate_weight [E, 1] holds the logits."""
    logits, x = np.log([[0.4], [0.1], [0.3], [0.05], [0.1], [0.05]]), np.ones((1, 1))
    m = ModelConfig(
        n_routed_experts=6,
        num_experts_per_tok=2,
        scoring_func="softmax",
        topk_method="greedy",
        norm_topk_prob=False,
        routed_scaling_factor=10.0,
    )
    scores, chosen, weights = ref.route(x, logits, np.full(6, 9.0) * np.arange(6), m)
    np.testing.assert_allclose(scores, [[0.4, 0.1, 0.3, 0.05, 0.1, 0.05]])
    assert chosen.tolist() == [[0, 2]]
    np.testing.assert_allclose(weights, [[4.0, 3.0]])
    grouped = dataclasses.replace(
        m, n_group=3, topk_group=1, topk_method="group_limited_greedy", norm_topk_prob=True
    )
    _, chosen, weights = ref.route(
        x, logits, None, grouped
    )  # the group of 0 and 1 has the largest maximum
    assert chosen.tolist() == [[0, 1]]
    np.testing.assert_allclose(weights, [[8.0, 2.0]])
    biased = dataclasses.replace(grouped, topk_method="noaux_tc", scoring_func="softmax")
    _, chosen, weights = ref.route(
        x, logits, np.array([0, 0, 0, 0.2, 0, 0]), biased
    )  # sums of groups: 0.5, 0.55, 0.15
    assert chosen.tolist() == [[2, 3]]
    np.testing.assert_allclose(weights, [[10 * 0.3 / 0.35, 10 * 0.05 / 0.35]])
    _, chosen, _ = ref.route(
        x, logits, np.array([-1, -1, -0.8, -1, -1, -1.0]), biased
    )  # all below 0, yet no other group
    assert chosen.tolist() == [[2, 3]]
    np.testing.assert_allclose(
        ref.routing_margin(x, logits, np.array([0, 0, 0, 0.2, 0, 0]), biased), [0.05]
    )
    np.testing.assert_allclose(ref.routing_margin(x, logits, None, m), [0.2])
    np.testing.assert_allclose(ref.routing_margin(x, logits, None, grouped), [0.1])


def test_losses_by_hand():
    m = ModelConfig(n_routed_experts=4, num_experts_per_tok=2, aux_loss_alpha=0.5)
    scores = np.array(
        [[[0.2, 0.2, 0.2, 0.2], [0.8, 0.4, 0.2, 0.2]], [[0.9, 0.3, 0.3, 0.3], [9.0, 9.0, 9.0, 9.0]]]
    )
    chosen = np.array([[[0, 1], [0, 1]], [[0, 3], [2, 3]]])
    mask = np.array([[True, True], [True, False]])
    # row 0: P = (0.375, 0.25, 0.1875, 0.1875), f = 4/(2*2) * (2, 2, 0, 0)
    # row 1: P = (0.5, 1/6, 1/6, 1/6), f = 4/2 * (1, 0, 0, 1)
    rows = [1.25, 4 / 3]
    np.testing.assert_allclose(
        ref.sequence_balance_loss(scores, chosen, mask, m), 0.5 * np.mean(rows)
    )
    empty = np.array([[True, True], [False, False]])
    np.testing.assert_allclose(ref.sequence_balance_loss(scores, chosen, empty, m), 0.5 * rows[0])
    # over the batch: f = 4/(2*3) * (3, 2, 0, 1), P = mean of the three tokens' shares
    p = (2 * np.array([0.375, 0.25, 0.1875, 0.1875]) + np.array([0.5, 1 / 6, 1 / 6, 1 / 6])) / 3
    np.testing.assert_allclose(
        ref.batch_balance_loss(scores, chosen, mask, m),
        0.5 * (2 / 3) * (3 * p[0] + 2 * p[1] + p[3]),
    )
    assert ref.batch_balance_loss(scores, chosen, mask & False, m) == 0.0
    np.testing.assert_array_equal(ref.expert_counts(chosen, mask, 4), [3, 2, 0, 1])
    np.testing.assert_allclose(
        ref.router_z_loss(np.log([[[1, 2, 1.0]], [[5, 5, 5.0]]]), [[True], [False]]), np.log(4) ** 2
    )
    np.testing.assert_allclose(
        ref.cross_entropy(np.log([[0.25, 0.75], [0.5, 0.5]]), [1, -100]), -np.log(0.75)
    )
    assert ref.cross_entropy(np.zeros((2, 3)), [-100, -100]) == 0.0
    np.testing.assert_allclose(
        ref.bias_update([0.1, 0, 0, 0], [4, 2, 1, 1], 0.01, False), [0.09, 0, 0.01, 0.01]
    )
    np.testing.assert_allclose(
        ref.bias_update([0.1, 0, 0, 0], [4, 2, 1, 1], 0.01, True),
        [0.0625, -0.0275, -0.0175, -0.0175],
    )
