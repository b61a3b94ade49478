"""Distillation on meshes, with stages and accumulation, against plain autodiff of whole logits on one device.

Tolerance of losses and gradients: 1e-5 of an array's scale, for float32 sums in another order.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import objectives
from deepseek_jax.config.options import (
    IGNORE,
    Config,
    DistillConfig,
    LoraConfig,
    MeshConfig,
    OffloadConfig,
    ShardingConfig,
)
from deepseek_jax.data import fields
from deepseek_jax.model.layout import ModelWeights, place_model
from deepseek_jax.model.transformer import tokens_ahead
from deepseek_jax.objectives import distill
from deepseek_jax.objectives.forward import frozen_outputs, loss_of_batch, run_model, step_totals
from deepseek_jax.train import step
from deepseek_jax.train.batch import put_batch
from tests.support import conversion, invariance, objective_steps, small_runs
from tests.support.objective_steps import Steps, moments

LENGTH, SEQUENCES, K = 16, 16, 5
# All kinds of layers: a dense one, MoE layers that two stages do not divide, one that predicts ahead.
STUDENT = dataclasses.replace(
    small_runs.TINY,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    num_nextn_predict_layers=1,
    aux_loss_alpha=0.0,
)
SMALL = small_runs.TINY
TEACHER = dataclasses.replace(small_runs.TINY, hidden_size=16, num_hidden_layers=1)
LOSS = DistillConfig(
    teacher="in memory",
    alpha=0.6,
    temperature=2.0,
    beta=0.9,
    beta_schedule="linear",
    beta_final=0.1,
)
FORWARD = DistillConfig(teacher="in memory", alpha=1.0)


def config_of(
    accumulation: int = 1, loss=LOSS, model=STUDENT, offload: bool = False, **mesh
) -> Config:
    base = small_runs.config_of(
        mesh=MeshConfig(**{"fsdp": 1} | mesh),
        sharding=ShardingConfig(min_weight_size=0),
        offload=OffloadConfig(parameters=offload, optimizer_state=offload),
        sequence_length=LENGTH,
        accumulation=accumulation,
        remat="full" if offload else "none",
    )
    objective = "pretrain" if loss == DistillConfig() else "distill"
    return dataclasses.replace(base, model=model, objective=objective, distill=loss)


class InMemory:
    """A teacher (objectives/base.py: FrozenSource) whose weights are numbers of a seed."""

    map = None

    def __init__(self, config: Config, model=TEACHER):
        held = LoraConfig(base_dtype="float32")
        self.config = dataclasses.replace(config, model=model, lora=held, offload=OffloadConfig())
        self.vocab_size = model.vocab_size

    def place(self, mesh):
        return place_model(self.config, mesh, frozen=True)

    def load(self, placed) -> ModelWeights:
        s = invariance.initial_state(self.config.model)
        return jax.device_put(ModelWeights(s.params, s.bias), placed.shardings)


def rows(i: int) -> dict[str, np.ndarray]:
    """Two documents a sequence; prompts that are not scored, of other lengths in each; padding."""
    text = objective_steps.padded_rows(i, LENGTH)
    for sequence in range(SEQUENCES):
        text["targets"][sequence, : sequence % 5] = IGNORE
    return text


@functools.cache
def job(config: Config, teacher_model=TEACHER) -> Steps:
    teacher = InMemory(config, teacher_model) if config.objective == "distill" else None
    return Steps(config, objectives.make(config, teacher), rows)


@functools.cache
def first_step(config: Config):
    return job(config).first()


def plain_loss(config: Config, model, teacher, batch, scalars):
    """The loss and what is reported, from whole logits [B, S, V]."""
    alpha, temperature, beta = scalars
    inputs = {n: batch[n] for n in ("tokens", "segment_ids", "positions")}
    out, hidden_BSD = run_model(model, batch), run_model(teacher, inputs).hidden_BSD
    t_BSV = jax.lax.stop_gradient(teacher.logits(hidden_BSD))

    def means(z_BSV, t_BSV, targets_BS):
        scored = targets_BS != IGNORE
        log_p = jax.nn.log_softmax(z_BSV)
        here_BSV = targets_BS[..., None] == jnp.arange(log_p.shape[-1])
        ce = -jnp.sum(jnp.where(here_BSV, log_p, 0.0), axis=-1)
        log_s, log_t = (jax.nn.log_softmax(x / temperature) for x in (z_BSV, t_BSV))
        log_m = jnp.logaddexp(log_s + jnp.log1p(-beta), log_t + jnp.log(beta))

        def kl(log_p):
            return jnp.sum(jnp.exp(log_p) * (log_p - log_m), axis=-1)

        d = beta * kl(log_t) + (1 - beta) * kl(log_s)
        return [jnp.sum(jnp.where(scored, x, 0)) / jnp.sum(scored) for x in (ce, d)]

    lm, kl = means(model.logits(out.hidden_BSD), t_BSV, batch["targets"])
    ahead = tokens_ahead(batch["targets"], batch["segment_ids"], 1, IGNORE)
    further = jnp.roll(t_BSV, -1, axis=1)  # the last position is scored nowhere
    mtp_ce, mtp_kl = means(model.logits(out.mtp_hidden_BSD[0]), further, ahead)

    def both(ce, d):
        return (1 - alpha) * ce + alpha * temperature**2 * d

    mtp = both(mtp_ce, mtp_kl)
    loss = both(lm, kl) + config.train.mtp_loss_weight * mtp
    return loss, {"lm_loss": lm, "kl": kl, "mtp_loss": mtp}


@pytest.mark.slow
def test_against_whole_logits():
    """Losses and the gradient of every parameter."""
    config = config_of()
    metrics, found = first_step(config)
    t = job(config)
    with jax.set_mesh(t.mesh):
        batch = jax.tree.map(lambda a: a[0], t.batch(0))
        s = t.start()
        teacher = t.layout.frozen.model.merge(*t.frozen)

        def loss(params):
            model = t.layout.model.merge(params, s.bias)
            return plain_loss(config, model, teacher, batch, (0.6, 2.0, 0.9))

        (_, parts), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(s.params)
    for name, value in parts.items():
        conversion.assert_close(metrics.parts[name], value, what=name)
    norm = math.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
    conversion.assert_close(metrics.grad_norm, norm)
    scale = (1 - config.optimizer.b1) * min(1.0, config.optimizer.grad_clip / norm)
    wanted = [scale * np.asarray(g) for g in jax.tree.leaves(grads)]
    assert len(wanted) == len(found)
    for (name, a), b in zip(found, wanted, strict=True):
        conversion.assert_close(a, b, what=name)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            dict(model=SMALL, stage=2, accumulation=4), id="stages", marks=pytest.mark.slow
        ),
        pytest.param(dict(stage=2, accumulation=4), id="whole, stages", marks=pytest.mark.slow),
        pytest.param(dict(fsdp=4, expert=2), id="4x2", marks=pytest.mark.slow),
        pytest.param(dict(fsdp=2, tensor=2), id="tensor", marks=pytest.mark.slow),
        pytest.param(dict(accumulation=4), id="accumulation", marks=pytest.mark.slow),
        pytest.param(dict(accumulation=4, offload=True), id="offloaded", marks=pytest.mark.slow),
        pytest.param(
            dict(stage=2, fsdp=2, expert=2, accumulation=4), id="2x2x2", marks=pytest.mark.slow
        ),
    ],
)
def test_the_same_on_every_mesh(options):
    one_device = config_of(model=options.get("model", STUDENT))
    (metrics, wanted), (ours, found) = first_step(one_device), first_step(config_of(**options))
    assert {"lm_loss", "kl", "teacher_loss", "token_accuracy"} <= set(ours.parts)
    for name, value in metrics.parts.items():
        conversion.assert_close(ours.parts[name], value, what=name)
    conversion.assert_close(ours.grad_norm, metrics.grad_norm)
    for (name, a), (_, b) in zip(found, wanted, strict=True):
        conversion.assert_close(a, b, what=name)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, dict(stage=2, accumulation=4)], ids=["", "stages"])
def test_alpha_0_is_pretraining(options):
    """The loss and its parts to the last bit. The programs are not the same, so that XLA may add up what is
    behind the head in another order: gradients to float32's rounding.
    """
    text, none = (
        job(config_of(loss=loss, **options))
        for loss in (DistillConfig(), dataclasses.replace(LOSS, alpha=0.0))
    )
    wanted, metrics = text.run(text.start(), 0)
    found, ours = none.run(none.start(), 0)
    for name, value in metrics.parts.items():
        assert ours.parts[name] == value, name
    for (name, a), (_, b) in zip(moments(found), moments(wanted), strict=True):
        conversion.assert_close(a, b, 1e-6, what=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["forward", "reverse", "mixture"])
def test_a_student_that_is_its_teacher(kind):
    """Two passes of one program over the same weights: below 1e-6, divergence and gradient."""
    beta = {"forward": 0.0, "reverse": 1.0, "mixture": 0.4}[kind]
    model = dataclasses.replace(STUDENT, num_nextn_predict_layers=0)
    config = config_of(loss=dataclasses.replace(FORWARD, beta=beta), model=model)
    t = job(config, model)
    _, metrics = t.run(t.start(), 0)
    assert abs(float(metrics.parts["kl"])) < 1e-6
    assert float(metrics.grad_norm) < 1e-6


def test_masked_tokens_count_nothing():
    """What stands where nothing is scored, nor read from there, changes no part of the loss."""
    t = job(config_of(model=SMALL))

    @jax.jit  # forward alone: half of a step
    def parts_of(params, bias, batch, frozen):
        totals = step_totals(t.objective, t.config, batch, jnp.int32(0))
        micro = jax.tree.map(lambda a: a[0], batch)
        given = frozen_outputs(t.layout.frozen, frozen, micro)
        model = t.layout.model.merge(params, bias)
        return loss_of_batch(t.objective, t.config, model, micro, totals, given)[1][0]

    changed = {name: rows(0)[name].copy() for name in t.objective.fields}
    last = (
        np.arange(LENGTH) >= 12
    )  # nothing is scored there in these sequences, nor read from there
    for sequence in (0, 1, 2, 5):
        changed["tokens"][sequence, last] = 7
    with jax.set_mesh(t.mesh):
        s = t.start()
        parts, same = (
            parts_of(s.params, s.bias, batch, t.frozen)
            for batch in (t.batch(0), put_batch(changed, t.config.micro_batch, t.mesh))
        )
    assert {"loss", "lm_loss", "kl"} <= parts.keys()
    for name, value in parts.items():
        assert same[name] == value, name


def test_schedules():
    """First value at the first step, last at the last, MaxText's forms between; one program for all."""
    loss = DistillConfig(
        teacher="in memory",
        alpha=0.9,
        alpha_schedule="cosine",
        alpha_final=0.5,
        temperature=3.0,
        temperature_schedule="linear",
    )
    config = config_of(loss=loss)
    steps = config.train.steps
    for i in (0, 1, steps // 2, steps - 1, steps + 5):
        share = min(i / (steps - 1), 1.0)
        alpha, temperature, beta = (
            float(distill.scheduled(config, name, jnp.int32(i)))
            for name in ("alpha", "temperature", "beta")
        )
        assert alpha == pytest.approx(0.5 + 0.4 * (1 + math.cos(math.pi * share)) / 2, abs=1e-6)
        assert temperature == pytest.approx(3 - 2 * share, abs=1e-6)
        assert beta == 0
    ends = [float(distill.scheduled(config, "alpha", jnp.int32(i))) for i in (0, steps - 1)]
    assert ends == [np.float32(0.9), np.float32(0.5)]


def record(t: Steps, batch: dict, k: int, temperature: float) -> dict[str, jax.Array]:
    """What a teacher says of each token, of its k likeliest words, as fields of a batch [A, B, S]."""
    model = InMemory(t.config)
    with jax.set_mesh(t.mesh):
        placed = model.place(t.mesh)
        net = placed.merge_for_inference(*model.load(placed))

        def of_micro(micro):
            inputs = {n: micro[n] for n in ("tokens", "segment_ids", "positions")}
            z_BSV = net.logits(run_model(net, inputs).hidden_BSD)
            # top_k wants all words of a token in one place; the axis has one device here.
            z_BSV = jax.sharding.reshard(z_BSV, jax.P(*jax.typeof(z_BSV).sharding.spec[:-1], None))
            z_BSV = z_BSV - jnp.max(z_BSV, axis=-1, keepdims=True)
            values, ids = jax.lax.top_k(z_BSV, k)
            lse = [jax.nn.logsumexp(z_BSV / t, axis=-1) for t in (1.0, temperature)]
            made = ids.astype(jnp.int32), values.astype(jnp.float16), jnp.stack(lse, axis=-1)
            return dict(zip(fields.OF_TEACHER, made, strict=True))

        return batch | jax.jit(lambda b: jax.lax.map(of_micro, b))(batch)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, dict(stage=2, accumulation=4)], ids=["", "stages"])
def test_a_record_of_all_words_is_the_teacher(options):
    """Within what float16 loses of the values: 2^-11 of logits of a few nats."""
    whole = job(config_of(**options))
    size = STUDENT.vocab_size
    listed = job(config_of(loss=dataclasses.replace(LOSS, top_k=size), **options))
    assert listed.frozen is None
    wanted, metrics = whole.run(whole.start(), 0)
    with jax.set_mesh(listed.mesh):
        used = {n: rows(0)[n] for n in listed.objective.fields if n not in fields.OF_TEACHER}
        batch = put_batch(used, listed.config.micro_batch, listed.mesh)
        batch = record(listed, batch, size, 2.0)
        found, ours = listed.program(listed.start(), batch, None)
    for name in ("loss", "lm_loss", "kl", "mtp_loss"):
        conversion.assert_close(ours.parts[name], metrics.parts[name], 1e-3, what=name)
    for (name, a), (_, b) in zip(moments(found), moments(wanted), strict=True):
        conversion.assert_close(a, b, 1e-2, what=name)


@pytest.mark.slow
def test_held_out_figures():
    """KL at temperature 1, the teacher's own loss: sums over batches, divided by the targets."""
    config = config_of()
    t = job(config)
    with jax.set_mesh(t.mesh):
        batch = jax.tree.map(lambda a: a[0], t.batch(0))
        s = t.start()
        eval_step = jax.jit(step.make_eval_step(t.layout, t.objective))
        sums = {n: float(v) for n, v in eval_step(s.params, s.bias, batch, t.frozen).items()}
        net, teacher = (
            t.layout.model.merge(s.params, s.bias),
            t.layout.frozen.model.merge(*t.frozen),
        )
        inputs = {n: batch[n] for n in ("tokens", "segment_ids", "positions")}
        z, z_t = (
            np.asarray(
                jax.nn.log_softmax(jax.jit(lambda m: m.logits(run_model(m, inputs).hidden_BSD))(m))
            )
            for m in (net, teacher)
        )
    targets = rows(0)["targets"]
    scored = targets != IGNORE
    sums["targets"], sums["text_bytes"] = float(scored.sum()), 0.0
    figures = t.objective.figures(sums)

    def loss_of(log_p):
        return -np.take_along_axis(log_p, np.maximum(targets, 0)[..., None], -1)[..., 0][
            scored
        ].mean()

    kl = np.sum(np.exp(z_t) * (z_t - z), axis=-1)[scored].mean()
    accuracy = (z.argmax(-1) == targets)[scored].mean()
    expected = dict(eval_loss=loss_of(z), eval_kl=kl, eval_teacher_loss=loss_of(z_t))
    for name, value in (expected | {"eval_token_accuracy": accuracy}).items():
        conversion.assert_close(figures[name], value, what=name)
