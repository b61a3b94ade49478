"""Fine-tuning: its losses against torch, TRL and transformers; the same on every mesh and for every
accumulation, whatever lies beside an example; noise.

Tolerances as in test_layers.py: 1e-5 of an array's scale for float32 sums in another order.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from deepseek_jax import hf, objectives
from deepseek_jax.config.options import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    SftConfig,
    ShardingConfig,
)
from deepseek_jax.hf import names
from deepseek_jax.model import embedding_noise, head, logit_functions
from deepseek_jax.objectives.forward import loss_of_batch, step_totals
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.train import state, step
from deepseek_jax.train.batch import put_batch
from tests.support import conversion, hf_variants, invariance, small_runs
from tests.support import hf_families as families

plain_rows = invariance.rows
MODEL = small_runs.TINY  # two layers of experts
WITH_MTP = dataclasses.replace(MODEL, num_nextn_predict_layers=1)
EXAMPLES = DataConfig(path="examples.jsonl")
SMOOTHING = 0.1
S, D = 24, 16  # of the tests of noise


def fine_tuning(config: Config, **sft) -> Config:
    return dataclasses.replace(config, objective="sft", data=EXAMPLES, sft=SftConfig(**sft))


def small(mesh, model=MODEL, **sft) -> Config:
    variant = invariance.variant(**{"remat": "none"} | mesh)
    return dataclasses.replace(fine_tuning(variant, **sft), model=model)


# ------------------------------------------------------------------------------------------ single losses


def losses_of(function, hidden, kernel, targets, *inputs):
    """(sums of the values, gradients of the first by hidden states and kernel), on 2 x 2 devices."""
    config = dataclasses.replace(
        conversion.config_of(ModelConfig()),
        mesh=MeshConfig(fsdp=2, tensor=2),
        sharding=ShardingConfig(min_weight_size=0),
    )
    with jax.set_mesh(make_mesh(config, jax.devices()[:4])):
        variable = jax.device_put(jnp.float32(kernel), jax.P("fsdp", "tensor"))

        def first(hidden, weight):
            one = head.Head(
                nnx.Param(weight, out_sharding=("embed", "vocab"), eager_sharding=False),
                tied=False,
            )
            values = head.scan_vocab_sum(function, hidden, one, conversion.put(targets), *inputs)
            return values[0], values

        run = jax.jit(jax.value_and_grad(first, argnums=(0, 1), has_aux=True))
        (_, values), grads = run(conversion.put(hidden), variable)
        return np.asarray(values), [np.asarray(g) for g in grads]


@pytest.mark.parametrize("loss", ["nll", "dft", "smoothed"])
def test_losses_against_torch_and_transformers(loss):
    """Values and gradients in float64 of torch, of TRL's formula of dft, and of transformers' LabelSmoother;
    accuracy and entropy beside them.
    """
    from transformers.trainer_pt_utils import LabelSmoother

    rng = np.random.default_rng(0)
    hidden, kernel = rng.standard_normal((4, 9, 16)), rng.standard_normal((16, 40)) / 2
    targets = rng.integers(0, 40, (4, 9))
    targets[0, 3:6] = targets[1, 8] = -100
    targets[2] = -100
    functions = {
        "nll": (logit_functions.scored_tokens,),
        "dft": (logit_functions.dynamic_fine_tuning,),
        "smoothed": (logit_functions.smoothed_cross_entropy, jnp.float32(SMOOTHING)),
    }
    function, *inputs = functions[loss]
    values, grads = losses_of(function, hidden, kernel, targets, *inputs)

    h, k = (torch.tensor(a, requires_grad=True) for a in (hidden, kernel))
    logits, labels = h @ k, torch.tensor(targets)
    count = int((labels != -100).sum())
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    log_probs = torch.where(
        labels != -100,
        logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0],
        0.0,
    )

    expected = {
        "nll": lambda: nll,
        "dft": lambda: (-log_probs * log_probs.exp().detach()).sum(),
        "smoothed": lambda: (
            count * LabelSmoother(SMOOTHING)({"logits": logits}, labels.clone(), shift_labels=False)
        ),
    }[loss]()
    expected.backward()
    conversion.assert_close(values[0], expected.item(), what=loss)
    for ours, theirs in zip(grads, (h.grad, k.grad), strict=True):
        conversion.assert_close(ours, theirs.numpy(), what=loss)
    scored = targets != -100
    z = hidden @ kernel
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    reported = [
        (np.argmax(z, -1) == targets)[scored].sum(),
        -(np.exp(log_p) * log_p).sum(-1)[scored].sum(),
    ]
    conversion.assert_close(values[-2:], reported)
    conversion.assert_close(values[-3], nll.item())  # whatever is minimised


# ----------------------------------------------------------------------------- transformers, whole models

LENGTHS = (24, 9, 15, 20)  # of the examples; rows: 0 | 1 2 | 3 and padding | nothing but padding
ROWS = ((0,), (1, 2), (3,), ())
PROMPTS = (7, 3, 0, 19)  # their tokens that are not scored; of the last one token is


def packed(ids, prompts=PROMPTS) -> dict[str, np.ndarray]:
    """Rows of 24 tokens, of sequences ids [4, 24] cut to LENGTHS."""
    n = ids.shape[1]
    out = {
        "tokens": np.zeros((4, n), np.int32),
        "segment_ids": np.zeros((4, n), np.int32),
        "positions": np.zeros((4, n), np.int32),
        "targets": np.full((4, n), -100, np.int32),
        "next_tokens": np.full((4, n), -1, np.int32),
        "row": np.arange(4, dtype=np.int32),
    }
    for row, members in enumerate(ROWS):
        at = 0
        for segment, e in enumerate(members, 1):
            tokens = ids[e, : LENGTHS[e]]
            here = slice(at, at + len(tokens))
            out["tokens"][row, here], out["segment_ids"][row, here] = tokens, segment
            out["positions"][row, here] = np.arange(len(tokens))
            out["next_tokens"][row, at : at + len(tokens) - 1] = tokens[1:]
            first = max(prompts[e], 1)  # no token predicts an example's first
            out["targets"][row, at + first - 1 : at + len(tokens) - 1] = tokens[first:]
            at += len(tokens)
    return out


def their_loss_and_gradients(theirs, ids):
    """Of every example alone, by ForCausalLMLoss with the scored tokens of all of them."""
    theirs.zero_grad(set_to_none=True)
    scored = sum(n - max(p, 1) for n, p in zip(LENGTHS, PROMPTS, strict=True))
    total = 0.0
    for e, (length, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
        labels = torch.as_tensor(ids[e : e + 1, :length]).clone()
        labels[:, :prompt] = -100
        out = theirs(
            input_ids=torch.as_tensor(ids[e : e + 1, :length]),
            labels=labels,
            num_items_in_batch=scored,
            use_cache=False,
        )
        out.loss.backward()
        total += out.loss.item()
    named = [(n, p.grad.numpy()) for n, p in theirs.named_parameters() if p.grad is not None]
    return total, families.hub_names(theirs, named)


@pytest.mark.parametrize(
    "variant",
    [
        *(pytest.param(v, marks=pytest.mark.slow) for v in ("qwen3_moe", "deepseek_v3")),
        "deepseek_v3, MoE alone",
    ],
)
def test_bug_06_packed_is_the_sum_of_transformers_unpacked(variant, tmp_path, monkeypatch):
    """The loss of packed rows in two micro-batches, and its gradients, are transformers' of each example
    alone with num_items_in_batch; what lies beside an example in its row does not matter.
    """
    alone = dict(hf_variants.V3, num_hidden_layers=2, first_k_dense_replace=0)
    monkeypatch.setitem(hf_variants.VARIANTS, "deepseek_v3, MoE alone", ("deepseek_v3", alone))
    theirs = families.save(variant, tmp_path)
    ids = families.pick_ids(theirs, batch=4, seq=S)
    loss, grads = their_loss_and_gradients(theirs, ids)
    model = hf.load(str(tmp_path))
    config = fine_tuning(model.full_config)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, aux_loss_alpha=0.0)
    )
    objective = objectives.make(config)
    with jax.set_mesh(model.mesh):

        @jax.jit
        def run(params, bias, batch):
            totals = step_totals(objective, config, batch, jnp.int32(0))

            def loss_of(params):
                net = model.layout.merge(params, bias)

                def of_micro_batch(micro):
                    return loss_of_batch(objective, config, net, micro, totals)[0]

                return jnp.sum(jax.lax.map(of_micro_batch, batch))

            return jax.value_and_grad(loss_of)(params)

        def of(rows):
            batch = put_batch({k: rows[k] for k in objective.fields}, 2, model.mesh)
            return jax.tree.map(np.asarray, run(model.params, model.bias, batch))

        our_loss, our_grads = of(packed(ids))
        # a neighbour that is not scored, and another one in its place
        beside = [packed(some, (7, 3, 15, 19)) for some in (ids, ids[[0, 1, 3, 3]])]
        assert not np.array_equal(beside[0]["tokens"], beside[1]["tokens"])
        (with_one, its_grads), (with_other, other_grads) = map(of, beside)
    assert with_one == pytest.approx(with_other, rel=1e-6)
    for a, b in zip(jax.tree.leaves(its_grads), jax.tree.leaves(other_grads), strict=True):
        conversion.assert_close(a, b)
    assert abs(float(our_loss) - loss) < 1e-5 * loss
    ours = {}
    for leaf, a in zip(
        names.leaves(our_grads, model.family, model.config),
        map(np.asarray, jax.tree.leaves(our_grads)),
        strict=True,
    ):
        whole = tuple(slice(0, n) for n in leaf.shape)
        ours |= {p.name: names.view(a, leaf, p.at) for p in names.tensor_regions(leaf, whole)}
    for name, a in ours.items():
        conversion.assert_close(a, grads.get(name, np.zeros_like(a)), what=name)


# -------------------------------------------------------------------- meshes, accumulation, neighbours


def rows_of_examples(i: int) -> dict[str, np.ndarray]:
    """The rows of invariance.py with prompts of very unequal lengths that are not scored, and row numbers."""
    rows = plain_rows(i)
    targets, rng = rows["targets"].copy(), np.random.default_rng(i)
    for row in targets:
        row[: rng.integers(0, 12)] = -100
        row[12 : 12 + rng.integers(0, 20)] = -100
    targets[3] = -100
    count = invariance.SEQUENCES
    return rows | {"targets": targets, "row": np.arange(i * count, (i + 1) * count, dtype=np.int32)}


@functools.cache
def one_device(model, **sft) -> invariance.Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(invariance, "rows", rows_of_examples)
        return invariance.train(small({}, model, **sft), 2)


NOISY = {"neftune_noise_alpha": 5.0, "label_smoothing": SMOOTHING}


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(dict(fsdp=4, expert=2, accumulation=2), id="4x2, 2 micro-batches"),
        pytest.param(dict(accumulation=4, remat="full"), id="4 micro-batches"),
        pytest.param(dict(stage=2, fsdp=2, expert=2, accumulation=2), id="stages"),
        pytest.param(
            dict(fsdp=2, expert=2, tensor=2, accumulation=2, dispatch="ring"),
            id="2x2x2",
        ),
    ],
)
@pytest.mark.slow
def test_bug_01_the_same_on_every_mesh_and_accumulation(mesh, monkeypatch):
    """Losses, gradients, statistics and the noise on the embeddings, in float32 to 1e-5."""
    monkeypatch.setattr(invariance, "rows", rows_of_examples)
    model = MODEL if mesh.get("fsdp") == 4 else WITH_MTP
    run = invariance.train(small(mesh, model, **NOISY), 2)
    loss, gradient, name, counts = invariance.differences(run, one_device(model, **NOISY))
    assert loss < 1e-5 and gradient < 1e-5 and counts, (loss, gradient, name)


# ------------------------------------------------------------------------------------------------ noise


def noise_of(segments, rows, alpha=5.0, seed=0, devices=1):
    config = dataclasses.replace(conversion.config_of(ModelConfig()), mesh=MeshConfig(fsdp=devices))
    segments = np.asarray(segments, np.int32)
    with jax.set_mesh(make_mesh(config, jax.devices()[:devices])):
        x = conversion.put(np.zeros((*segments.shape, D), np.float32))
        add = jax.jit(embedding_noise.EmbeddingNoise(alpha, seed).add)
        return np.asarray(add(x, conversion.put(segments), conversion.put(np.asarray(rows))))


def test_noise_is_neftunes():
    """U(-1, 1) * alpha / sqrt(n D) by the length n of each example: the factor of transformers, which takes
    the length of a batch, for an example alone in its batch."""
    from transformers.integrations.neftune import neftune_post_forward_hook

    segments = np.array([[1] * 4 + [2] * 16 + [0] * 4, [1] * S])
    noise = noise_of(np.repeat(segments, 32, axis=0), np.arange(64))
    for row, begin, n in ((0, 0, 4), (0, 4, 16), (32, 0, S)):
        part = noise[row : row + 32, begin : begin + n]
        module = torch.nn.Embedding(8, D)
        module.train()
        module.neftune_noise_alpha = 5.0
        theirs = neftune_post_forward_hook(module, None, torch.zeros(32, n, D)).numpy()
        bound = 5.0 / np.sqrt(n * D)
        assert 0.99 * bound < np.abs(part).max() <= bound >= np.abs(theirs).max()
        # 2,048 numbers or more: the mean of their squares is within 10%, the mean within 4 deviations
        assert np.mean(part**2) == pytest.approx(bound**2 / 3, rel=0.1)
        assert np.mean(part**2) == pytest.approx(np.mean(theirs**2), rel=0.15)
        assert abs(np.mean(part)) < 4 * bound / np.sqrt(3 * part.size)
    assert not noise[:32, 20:].any()  # padding


def test_noise_is_a_function_of_seed_row_and_place():
    segments = np.array([[1] * 10 + [2] * 14, [1] * S, [1] * 10 + [0] * 14, [1] * S])
    noise = noise_of(segments, [7, 8, -1, 2**31 - 1])
    assert not noise[2].any() and noise[[0, 1, 3]].any(axis=-1).all()  # held out
    other_batch = noise_of(segments[::-1], [2**31 - 1, -1, 8, 7], devices=2)[::-1]
    np.testing.assert_array_equal(noise, other_batch)
    assert not np.array_equal(noise[1], noise[3]) and not np.array_equal(
        noise, noise_of(segments, [7, 8, -1, 2**31 - 1], seed=1)
    )
    shorter = noise_of(np.array([[1] * 10 + [3] * 4]), [7])  # a neighbour of another length
    np.testing.assert_array_equal(shorter[0, :10], noise[0, :10])
    assert len(np.unique(noise[1])) > 0.99 * noise[1].size


def test_lengths_of_segments():
    segments = np.array([[1, 1, 1, 2, 0, 0], [1, 2, 3, 3, 3, 3], [0] * 6, [5] * 6], np.int32)
    expected = [[3, 3, 3, 1, 0, 0], [1, 1, 4, 4, 4, 4], [0] * 6, [6] * 6]
    np.testing.assert_array_equal(jax.jit(embedding_noise.lengths)(segments), expected)


def test_held_out_figures_are_without_noise_and_smoothing():
    """eval_loss is the cross-entropy whatever is minimised, eval_token_accuracy of the likeliest tokens."""
    plain, noisy = small({}), small({}, **NOISY)
    rows = rows_of_examples(0)
    figures = []
    for config in (plain, noisy):
        mesh = make_mesh(config, jax.devices()[:1])
        objective = objectives.make(config)
        with jax.set_mesh(mesh):
            layout = state.make_layout(config, mesh)
            s = jax.device_put(invariance.initial_state(MODEL), layout.shardings)
            batch = put_batch({k: rows[k] for k in objective.fields}, 16, mesh)
            micro = jax.tree.map(lambda a: a[0], batch)
            sums = jax.jit(step.make_eval_step(layout, objective))(s.params, s.bias, micro)
        scored = int((rows["targets"] != -100).sum())
        sums = {k: float(v) for k, v in sums.items()} | {"targets": scored, "text_bytes": 0}
        figures.append(objective.figures(sums))
    assert figures[0] == figures[1]
    assert figures[0]["eval_loss"] > 1 and figures[0]["eval_tokens"] == scored
    assert 0 <= figures[0]["eval_token_accuracy"] < 0.2
