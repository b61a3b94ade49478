"""Scores of experts, layers and inner units against a loop over tokens in float64 (support/reference.py)."""

import dataclasses
import json
from typing import NamedTuple

import numpy as np
import pytest

from deepseek_jax.compress import calibration, scores, width
from deepseek_jax.compress.scores import METHODS, SUMS, Scores
from deepseek_jax.compress.source import open_source
from deepseek_jax.errors import UserError
from deepseek_jax.hf.compression_map import expert_rows
from tests.support import compression, conversion
from tests.support import reference as ref
from tests.support.compression import GROUPED, SIGMOID, SOFTMAX

# "stack": one of layers with experts, and one of multi-token prediction, which compile in half of the time.
STACK = dataclasses.replace(GROUPED, num_hidden_layers=2, first_k_dense_replace=0)
MODELS = {"softmax": SOFTMAX, "sigmoid": SIGMOID, "grouped": GROUPED, "stack": STACK}
# float32 beside float64, over a few hundred numbers
CLOSE = dict(rtol=2e-5, atol=1e-6)
MESHES = ("", "fsdp=2,expert=2", "data=2,expert=2,tensor=2")


class Loop(NamedTuple):
    """What the loop adds up."""

    arrays: dict[str, np.ndarray]  # as Scores
    influence: np.ndarray
    units: np.ndarray  # [L, E, F]
    shared: np.ndarray  # [L, Fs]


def options(folder, text, *more):
    return compression.args_of(
        "width",
        folder,
        "out",
        "--moe-intermediate=8",
        f"--text={text}",
        "--tokens=0",
        "--sequence-length=24",
        "--batch-size=3",
        "--dtype=float32",
        *more,
    )


def read(folder, text, *more):
    args = options(folder, text, *more)
    opened = calibration.open_for(args)
    return open_source(folder), opened.model, calibration.read(opened, args)


def loop_of(weights, model, batches, monkeypatch) -> Loop:
    """Token by token, expert by expert."""
    rows, e = len(expert_rows(model)), model.n_routed_experts
    arrays = {name: np.zeros((rows, e)) for name in SUMS}
    f = model.moe_intermediate_size
    units, shared = np.zeros((rows, e, f)), np.zeros((rows, f * model.n_shared_experts))
    cosines = np.zeros(model.num_hidden_layers)
    seen, layers = [], []
    moe, layer = ref.moe, ref.decoder_layer

    def recording(x_TD, w, m):
        out = moe(x_TD, w, m)
        seen.append((x_TD, w, out[2]))
        return out

    def watched(x, *args, **others):
        out = layer(x, *args, **others)
        layers.append((np.asarray(x, np.float64), out[0]))
        return out

    monkeypatch.setattr(ref, "moe", recording)
    monkeypatch.setattr(ref, "decoder_layer", watched)

    def hidden_units(x, w, name):
        gate, up = (ref.linear(x, w[f"mlp.{name}.{p}_proj.weight"]) for p in ("gate", "up"))
        return ref.silu(gate) * up

    tokens = 0
    for batch in batches:
        for ids, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
            seen.clear()
            layers.clear()
            ref.transformer(ids, weights, model, ref.segment_positions(segments), segments)
            ahead = np.roll(segments, -1) == segments
            ahead[-1] = False
            tokens += int((segments > 0).sum())
            for n, (x, y) in enumerate(layers[: model.num_hidden_layers]):
                c = np.sum(x * y, -1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1))
                cosines[n] += c[segments > 0].sum()
            for row, (x_TD, w, routing) in enumerate(seen):
                main = expert_rows(model)[row] < model.num_hidden_layers
                valid = (segments > 0) & (main | ahead)
                for t in np.flatnonzero(valid):
                    share = routing.scores[t] / routing.scores[t].sum()
                    arrays["mean_score"][row] += share
                    shared[row] += np.abs(hidden_units(x_TD[t], w, "shared_experts"))
                    for j, g in zip(routing.chosen[t], routing.weights[t], strict=True):
                        out = ref.mlp(x_TD[t], w, f"mlp.experts.{j}.")
                        norm = np.sqrt(np.sum(out**2))
                        arrays["frequency"][row, j] += 1
                        arrays["weighted_frequency"][row, j] += g
                        arrays["ean_sum"][row, j] += norm
                        arrays["weighted_ean_sum"][row, j] += g * norm
                        peak = arrays["max_activation"][row]
                        peak[j] = max(peak[j], np.abs(out).max())
                        units[row, j] += np.abs(hidden_units(x_TD[t], w, f"experts.{j}"))
    monkeypatch.undo()
    arrays["mean_score"] /= tokens
    arrays["router_norm"] = np.stack(
        [
            np.linalg.norm(weights[f"model.layers.{n}.mlp.gate.weight"].astype(float), axis=1)
            for n in expert_rows(model)
        ]
    )
    return Loop(arrays, 1 - cosines / tokens, units, shared / tokens)


@pytest.mark.parametrize(
    "router",
    [m if m == "stack" else pytest.param(m, marks=pytest.mark.slow) for m in MODELS],
)
def test_scores_are_those_of_a_loop_over_tokens(tmp_path, monkeypatch, router):
    model = MODELS[router]
    weights = conversion.random_weights(model, 1)
    folder = compression.folder(tmp_path / "model", model, weights=weights)
    source, loaded, text = read(folder, compression.text(tmp_path / "text.jsonl"))
    for batch in text.batches:
        if "next_tokens" in batch:  # the reference knows no token after the sequence
            batch["next_tokens"][:, -1] = -1
    loop = loop_of(weights, model, text.batches, monkeypatch)
    found = scores.collect(source, loaded, text)
    assert found.tokens == text.tokens > 100 and found.layers == expert_rows(model)
    np.testing.assert_array_equal(found.arrays["frequency"], loop.arrays["frequency"])
    for name in loop.arrays:
        np.testing.assert_allclose(found.arrays[name], loop.arrays[name], err_msg=name, **CLOSE)
    np.testing.assert_allclose(found.influence, loop.influence, **CLOSE)
    count = np.maximum(loop.arrays["frequency"], 1)
    np.testing.assert_allclose(found.of("reap"), loop.arrays["weighted_ean_sum"] / count, **CLOSE)
    np.testing.assert_allclose(found.of("ean_mean"), loop.arrays["ean_sum"] / count, **CLOSE)

    units = width.collect(source, loaded, text)
    seen = loop.arrays["frequency"] > 0
    means = loop.units / count[:, :, None]
    np.testing.assert_allclose(np.stack(units.routed)[seen], means[seen], **CLOSE)
    np.testing.assert_allclose(np.stack(units.shared), loop.shared, **CLOSE)
    assert units.unseen == (~seen).sum()


def test_reaps_own_update_where_it_is_right():
    """Its script for a softmax router that renormalises, batch by batch with running means, written again."""
    rng = np.random.default_rng(0)
    experts, top = 6, 2
    means, counts = np.zeros(experts), np.zeros(experts)
    arrays = {name: np.zeros((1, experts)) for name in SUMS}
    for tokens in (5, 9, 2):
        logits = rng.normal(size=(tokens, experts))
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        chosen = np.argsort(-p, axis=1)[:, :top]
        outputs = rng.normal(size=(experts, tokens, 7))  # of every expert for every token
        weights = p / np.take_along_axis(p, chosen, 1).sum(1, keepdims=True)
        for j in range(experts):
            active = (chosen == j).any(1)
            if n := active.sum():
                norms = np.linalg.norm(outputs[j, active], axis=1)
                mean = (norms * weights[active, j]).mean()
                means[j] += (mean - means[j]) * n / (counts[j] + n)
                counts[j] += n
        each = outputs[chosen, np.arange(tokens)[:, None]]
        scores._add(
            arrays,
            0,
            {
                "router_choices": chosen[None],
                "router_weights": np.take_along_axis(weights, chosen, 1)[None],
                "expert_norms": np.linalg.norm(each, axis=-1)[None],
                "expert_peaks": np.abs(each).max(-1)[None],
                "score_sum": p.sum(0)[None],
            },
        )
    found = Scores(arrays, np.zeros(1), (0,), 16, {})
    np.testing.assert_allclose(found.of("reap")[0], means, rtol=1e-12)
    np.testing.assert_array_equal(arrays["frequency"][0], counts)


def permuted(weights, model, orders):
    """The same model with its experts in another order: new expert i is old orders[layer][i]."""
    out = dict(weights)
    for layer, order in orders.items():
        prefix = f"model.layers.{layer}.mlp."
        for name in ("gate.weight", "gate.e_score_correction_bias"):
            if prefix + name in weights:
                out[prefix + name] = weights[prefix + name][order]
        for new, old in enumerate(order):
            for part in ("gate", "up", "down"):
                to, of = (f"{prefix}experts.{e}.{part}_proj.weight" for e in (new, old))
                out[to] = weights[of]
    return out


@pytest.mark.slow
def test_permuting_experts_permutes_scores(tmp_path):
    model, rng = SIGMOID, np.random.default_rng(3)
    weights = conversion.random_weights(model, 1)
    orders = {n: rng.permutation(model.n_routed_experts) for n in expert_rows(model)}
    text = compression.text(tmp_path / "text.jsonl")
    one = scores.collect(*read(compression.folder(tmp_path / "a", model, weights=weights), text))
    moved = permuted(weights, model, orders)
    two = scores.collect(*read(compression.folder(tmp_path / "b", model, weights=moved), text))
    for name, a in one.arrays.items():
        expected = np.stack([row[orders[n]] for n, row in zip(one.layers, a, strict=True)])
        np.testing.assert_allclose(two.arrays[name], expected, rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_scores_are_the_same_on_every_mesh(tmp_path):
    """On 1, 4 and 8 devices; numbers of tokens equal, sums to float32's rounding."""
    widths = dict(hidden_size=32, num_attention_heads=4, kv_lora_rank=16, v_head_dim=8)
    model = dataclasses.replace(GROUPED, **widths)
    folder = compression.folder(tmp_path / "model", model, seed=1)
    text, found = compression.text(tmp_path / "text.jsonl"), []
    for mesh in MESHES:
        args = [f"--mesh={mesh}"] if mesh else []
        source, model, rows = read(folder, text, *args)
        found.append((scores.collect(source, model, rows), width.collect(source, model, rows)))
    (one, units), *others = found
    for other, other_units in others:
        assert other.tokens == one.tokens
        np.testing.assert_array_equal(other.arrays["frequency"], one.arrays["frequency"])
        for name, a in one.arrays.items():
            np.testing.assert_allclose(other.arrays[name], a, err_msg=name, **CLOSE)
        np.testing.assert_allclose(other.influence, one.influence, **CLOSE)
        np.testing.assert_allclose(np.stack(other_units.routed), np.stack(units.routed), **CLOSE)
        np.testing.assert_allclose(np.stack(other_units.shared), np.stack(units.shared), **CLOSE)


def test_scores_are_written_and_read(tmp_path, capsys, monkeypatch):
    model = dataclasses.replace(SOFTMAX, num_hidden_layers=3, first_k_dense_replace=0)
    folder = compression.folder(tmp_path / "model", model, seed=1)
    text, out = compression.text(tmp_path / "text.jsonl", 1), tmp_path / "scores.safetensors"
    run = ["score", folder, out, f"--text={text}", "--sequence-length=24", "--dtype=float32"]
    collect, collected = scores.collect, []

    def recorded(*args):
        collected.append(collect(*args))
        return collected[-1]

    monkeypatch.setattr(scores, "collect", recorded)
    compression.run(*run)
    (written,) = collected
    said = capsys.readouterr().out
    assert "were chosen by no token: the calibration text is too short for them" in said
    assert "influence" in said
    assert (tmp_path / "scores.svg").read_text().startswith("<svg")
    source = open_source(folder)
    found = scores.read(str(out), source)
    assert found.tokens == written.tokens > 10 and found.unseen().any()
    assert found.arrays.keys() == written.arrays.keys() and found.layers == written.layers
    for name, a in written.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], a, err_msg=name)
    np.testing.assert_array_equal(found.influence, written.influence)
    assert {m for m in METHODS if not np.isfinite(found.of(m)).all()} == set()

    beside = tmp_path / "scores.json"
    good = beside.read_text()
    beside.write_text(json.dumps(json.loads(good) | {"layers": ["a", "b"]}))
    with pytest.raises(UserError, match="cannot be read"):
        scores.read(str(out), source)
    beside.write_text(good)
    other = compression.folder(tmp_path / "other", model, seed=2)
    with pytest.raises(UserError, match="is of another model"):
        scores.read(str(out), open_source(other))
    raw = bytearray(out.read_bytes())
    raw[-1] ^= 1
    out.write_bytes(raw)
    with pytest.raises(UserError, match="not the file that the .json is of"):
        scores.read(str(out), source)


def test_super_experts():
    """Above the 99.5th percentile and a tenth of the largest, and not in the last quarter."""
    peaks = np.ones((8, 32))
    peaks[1, 3], peaks[7, 2] = 100.0, 200.0
    arrays = dict.fromkeys(SUMS, np.zeros((8, 32))) | {"max_activation": peaks}
    found = Scores(arrays, np.zeros(8), tuple(range(8)), 1, {})
    assert np.argwhere(found.super_experts()).tolist() == [[1, 3]]


def test_text_that_is_none_is_refused(tmp_path):
    folder = compression.folder(tmp_path / "model", SIGMOID)
    path = tmp_path / "text.jsonl"
    opened = calibration.open_for(options(folder, path))
    for content, said in (("", "is empty"), ('{"text": ""}\n', "no text"), ('{"txt": 1}\n', "txt")):
        path.write_text(content)
        with pytest.raises(UserError, match=said) as error:
            calibration.read(opened, options(folder, path))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="sequence-length=65 is not between 2 and"):
        read(folder, compression.text(tmp_path / "good.jsonl"), "--sequence-length=65")


def test_a_model_without_experts_has_influence_alone(tmp_path):
    model = dataclasses.replace(SIGMOID, num_hidden_layers=3, first_k_dense_replace=3)
    folder = compression.folder(tmp_path / "model", model)
    source, loaded, text = read(folder, compression.text(tmp_path / "text.jsonl"))
    found = scores.collect(source, loaded, text)
    assert found.layers == () and (found.influence > 0).all()
