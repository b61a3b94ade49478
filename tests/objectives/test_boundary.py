"""An objective of this file, with all that an objective may have, computes the same on every mesh, and
resumes to the last bit.

It has a weighted target, a number per sequence and one per document, a channel of K numbers per token, a tap
and a frozen second model of other sizes, in bfloat16. Tolerance of losses and gradients: 1e-5 of an array's
scale, for float32 sums in another order.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import objectives
from deepseek_jax.config.options import Config, MeshConfig, OffloadConfig, ShardingConfig
from deepseek_jax.data import fields
from deepseek_jax.data.fields import Field
from deepseek_jax.model import divergences, head, logit_functions
from deepseek_jax.model.layout import ModelWeights, place_model
from deepseek_jax.objectives.base import Frozen
from deepseek_jax.objectives.forward import frozen_outputs, loss_of_batch, run_model, step_totals
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.train import state
from deepseek_jax.train.batch import abstract_batch, put_batch
from tests.support import conversion, invariance, objective_steps, small_runs
from tests.support.objective_steps import Steps

K, LENGTH, SEQUENCES = 3, 16, 16
MODEL = dataclasses.replace(small_runs.TINY, aux_loss_alpha=0.01)
# With all kinds of layers: dense ones in front, three that two stages do not divide evenly, one that predicts
# ahead.
WHOLE = dataclasses.replace(
    MODEL, num_hidden_layers=4, first_k_dense_replace=1, num_nextn_predict_layers=1
)
TEACHER = dataclasses.replace(small_runs.TINY, hidden_size=16, num_hidden_layers=1)


def config_of(accumulation: int = 1, offload: bool = False, model=MODEL, **mesh) -> Config:
    base = small_runs.config_of(
        mesh=MeshConfig(**{"fsdp": 1} | mesh),
        sharding=ShardingConfig(min_weight_size=0),
        offload=OffloadConfig(parameters=offload, optimizer_state=offload),
        sequence_length=LENGTH,
        accumulation=accumulation,
        remat="full" if offload else "none",
    )
    return dataclasses.replace(base, model=model)


class Everything:
    """Weighted cross-entropy, divergence from a frozen model, log-probabilities times advantages, taps."""

    frozen_dtype: Any = jnp.bfloat16
    taps: tuple[str, ...] = ("router_scores", "hidden")
    frozen_taps: tuple[str, ...] = ("hidden",)
    fields = fields.TEXT | {
        "loss_weight": Field(np.float32),
        "channel": Field(np.float32, trailing=(K,)),
        "advantage": Field(np.float32, per="sequence"),
        "reward": Field(np.float32, per="document", documents=2),
    }

    def __init__(self, config: Config):
        self.teacher = dataclasses.replace(config, model=TEACHER, offload=OffloadConfig())

    def frozen(self, mesh):
        placed = place_model(self.teacher, mesh, self.frozen_dtype)

        def load() -> ModelWeights:
            s = invariance.initial_state(TEACHER)
            params = jax.tree.map(lambda w: w.astype(self.frozen_dtype), s.params)
            return jax.device_put(ModelWeights(params, s.bias), placed.shardings)

        return Frozen(placed, load, taps=self.frozen_taps)

    def totals(self, batch, step):
        return {
            "weight": jnp.sum(batch["loss_weight"]),
            "tokens": jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32),
        }

    def loss(self, model, out, batch, totals, frozen_out):
        valid = batch["segment_ids"] > 0

        def mean(a_BS):
            return jnp.sum(jnp.where(valid, a_BS, 0.0)) / totals["tokens"]

        (ce,) = head.scan_vocab_sum(
            logit_functions.weighted(logit_functions.cross_entropy),
            out.hidden_BSD,
            model.head,
            batch["targets"],
            batch["loss_weight"],
        )
        (log_p,) = head.scan_vocab(
            logit_functions.log_probability, out.hidden_BSD, model.head, batch["targets"]
        )
        of_document = jnp.take_along_axis(
            batch["reward"], jnp.maximum(batch["segment_ids"] - 1, 0), axis=1
        )
        gain = batch["advantage"][:, None] + of_document + batch["channel"].sum(-1)
        parts = {
            "ce": ce / totals["weight"],
            "kl": self.divergence(model, out, batch, frozen_out) / totals["tokens"],
            "gain": mean(jnp.exp(0.1 * log_p) * gain),
            "scores": mean(jnp.sum(out.taps["router_scores"] ** 2, axis=(0, -1))),
            # Residual streams of the student's layers against the only one of the frozen model.
            "hidden": mean(
                jnp.sum(out.taps["hidden"][..., :16] * frozen_out.out.taps["hidden"], axis=(0, -1))
            ),
        }
        for hidden_BSD in out.mtp_hidden_BSD:
            (mtp,) = head.scan_vocab_sum(
                logit_functions.cross_entropy, hidden_BSD, model.head, batch["targets"]
            )
            parts["mtp"] = mtp / totals["tokens"]
        m = model.config
        assert out.taps["hidden"].shape[0] == m.num_hidden_layers + m.num_nextn_predict_layers
        return sum(parts.values()), parts

    def divergence(self, model, out, batch, frozen_out):
        _, _, kl, *_ = head.scan_vocab_sum(
            divergences.WholeTeacher("forward"),
            out.hidden_BSD,
            model.head,
            jnp.where(batch["segment_ids"] > 0, 0, -100),
            1.0,
            jnp.float32(2),
            0.0,
            frozen=((frozen_out.out.hidden_BSD, frozen_out.head),),
        )
        return kl

    def measure(self, model, out, batch, frozen_out):
        (nll,) = head.scan_vocab_sum(
            logit_functions.cross_entropy, out.hidden_BSD, model.head, batch["targets"]
        )
        return {"nll": nll, "teacher": jnp.sum(frozen_out.out.taps["hidden"] ** 2)}

    def figures(self, sums):
        return {"eval_loss": sums["nll"] / sums["targets"]}


class Divergence(Everything):
    """That from the frozen model alone; in float32, which compiles in half of the time."""

    frozen_dtype = jnp.float32
    taps = ()
    frozen_taps = ()

    def loss(self, model, out, batch, totals, frozen_out):
        kl = self.divergence(model, out, batch, frozen_out) / totals["tokens"]
        return kl, {"kl": kl}


def rows(i: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(i)
    text = objective_steps.padded_rows(i, LENGTH)

    def number(*shape) -> np.ndarray:
        return rng.random((SEQUENCES, *shape), np.float32)

    text |= dict(channel=number(LENGTH, K), advantage=number(), reward=number(2))
    return text | dict(loss_weight=number(LENGTH) * (text["targets"] >= 0))


class Job(Steps):
    """Two steps of `Everything`, or of another objective, on a mesh."""

    def __init__(self, config: Config, objective: type[Everything] = Everything):
        super().__init__(config, objective(config), rows)

    def parts(self, i: int) -> tuple[dict[str, jax.Array], jax.Array]:
        """(the loss's parts, tokens) of a step of one micro-batch, or of several that go through stages,
        without the rest of it: a program of forward alone, which is made in a fraction of the time."""
        assert (self.config.train.accumulation > 1) == (self.config.mesh.stage > 1)

        def forward(params, bias, batch, frozen):
            totals = step_totals(self.objective, self.config, batch, jnp.int32(0))
            if self.config.train.accumulation == 1:
                batch = jax.tree.map(lambda a: a[0], batch)
            model = self.layout.model.merge(params, bias)
            given = frozen_outputs(self.layout.frozen, frozen, batch)
            of_batch = loss_of_batch(self.objective, self.config, model, batch, totals, given)
            return of_batch[1][0], totals.routing.tokens

        fresh = invariance.initial_state(self.config.model)
        with jax.set_mesh(self.mesh):
            weights = jax.device_put(
                (fresh.params, fresh.bias),
                (self.layout.shardings.params, self.layout.shardings.bias),
            )
            batch = put_batch(rows(i), self.config.micro_batch, self.mesh)
            return jax.jit(forward)(*weights, batch, self.frozen)


@functools.cache
def job(config: Config) -> Job:
    return Job(config)


@functools.cache
def first_step(config: Config):
    """(metrics, Adam's first moments: the clipped gradients times a constant), on the host."""
    return job(config).first()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(fsdp=4, expert=2), id="4x2", marks=pytest.mark.slow),
        pytest.param(dict(stage=2, accumulation=4), id="stages", marks=pytest.mark.slow),
        pytest.param(
            dict(accumulation=4, offload=True),
            id="accumulation, offloaded",
            marks=pytest.mark.slow,
        ),
        pytest.param(dict(accumulation=4), id="accumulation", marks=pytest.mark.slow),
        pytest.param(dict(fsdp=2, tensor=2), id="tensor", marks=pytest.mark.slow),
        pytest.param(
            dict(model=WHOLE, stage=2, fsdp=2, expert=2, accumulation=4),
            id="whole, 2x2x2",
            marks=pytest.mark.slow,
        ),
        pytest.param(dict(model=WHOLE, fsdp=4, expert=2), id="whole, 4x2", marks=pytest.mark.slow),
    ],
)
def test_the_same_on_every_mesh(options):
    one_device = config_of(model=options.get("model", MODEL))
    (metrics, moments), (ours, found) = first_step(one_device), first_step(config_of(**options))
    assert {"ce", "kl", "gain", "scores", "hidden", "loss", "z_loss"} <= set(ours.parts)
    for name, value in metrics.parts.items():
        conversion.assert_close(ours.parts[name], value, what=name)
    assert ours.tokens == metrics.tokens
    np.testing.assert_array_equal(ours.load.expert_counts, metrics.load.expert_counts)
    conversion.assert_close(ours.grad_norm, metrics.grad_norm)
    assert len(moments) > 15
    for (name, a), (_, b) in zip(found, moments, strict=True):
        conversion.assert_close(a, b, what=name)


def test_bug_02_a_distillation_loss_adds_up_over_accumulation():
    """The divergence from a frozen model, whose micro-batches have different numbers of tokens, is divided
    by those of the whole step; a mean over the means of micro-batches is another number.
    """
    whole, counted = Job(config_of(), Divergence).parts(0)
    tokens = (rows(0)["segment_ids"] > 0).reshape(4, -1).sum(1)
    assert len(set(tokens.tolist())) > 1 and counted == tokens.sum()
    ours, _ = Job(config_of(stage=2, accumulation=4), Divergence).parts(0)
    conversion.assert_close(ours["kl"], whole["kl"])


@pytest.mark.slow
def test_it_resumes_to_the_last_bit(tmp_path):
    """Nothing of the frozen model is saved, and the step does not give its memory away."""
    t = job(config_of(fsdp=4, expert=2))
    s, _ = t.run(t.start(), 0)
    again = small_runs.restored(t, s, tmp_path)
    assert not any("frozen" in str(p) for p in tmp_path.rglob("*"))
    (on, metrics), (same, same_metrics) = t.run(s, 1), t.run(again, 1)
    assert small_runs.same(on, same) and small_runs.same(metrics, same_metrics)
    held = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(t.frozen))
    assert t.layout.bytes_per_device(t.mesh)["frozen"] == held > 0


def test_a_batch_of_the_wrong_shape_is_an_error():
    config = config_of()
    mesh = make_mesh(config, jax.devices()[:1])
    objective = Everything(config)
    good = rows(0)
    with pytest.raises(ValueError, match=r"'channel' has 15 sequences"):
        put_batch(good | {"channel": good["channel"][:15]}, config.micro_batch, mesh)
    with pytest.raises(ValueError, match=r"'channel' of the batch is float32\[1, 16, 16\] and not"):
        fields.check_batch(
            put_batch(good | {"channel": good["channel"][..., 0]}, 16, mesh), objective.fields
        )
    with pytest.raises(ValueError, match="no field 'advantage'"):
        fields.check_batch({k: a for k, a in good.items() if k != "advantage"}, objective.fields)
    assert put_batch(good, 4, mesh)["channel"].shape == (4, 4, LENGTH, K)
    assert put_batch(good, 4, mesh)["advantage"].shape == (4, 4)


AHEAD = dataclasses.replace(MODEL, num_nextn_predict_layers=1)


def forward_of(targets_of_rows: list[np.ndarray], **axes: Any) -> list[list[np.ndarray]]:
    """(hidden states, those of the layer that predicts ahead, its cross-entropy, numbers of tokens of
    experts) of rows(0) with each of these targets."""
    config = config_of(model=AHEAD, **axes)
    objective = objectives.make(config)
    mesh = make_mesh(config, jax.devices()[: invariance.devices_of(config)])
    text = {k: rows(0)[k] for k in objective.fields}
    with jax.set_mesh(mesh):
        layout = state.make_layout(config, mesh)
        weights = conversion.to_state(conversion.random_weights(AHEAD, 0), AHEAD)
        params, bias = jax.device_put(ModelWeights(*weights), layout.model.shardings)

        @jax.jit
        def run(params, bias, batch):
            model = layout.model.merge(params, bias)
            out = run_model(model, batch)
            mtp = head.scan_vocab(
                logit_functions.cross_entropy, out.mtp_hidden_BSD[0], model.head, batch["targets"]
            )
            return out.hidden_BSD, out.mtp_hidden_BSD[0], mtp[0], out.stats.load.expert_counts

        batches = [put_batch(text | {"targets": t}, 16, mesh) for t in targets_of_rows]
        outs = [run(params, bias, jax.tree.map(lambda a: a[0], batch)) for batch in batches]
    return [[np.asarray(a) for a in out] for out in outs]


def test_a_masked_prompt_changes_no_hidden_state():
    """Targets of -100 take the prompt out of the loss; what the model reads, and predicts further on, stays
    the same to the last bit, and on a mesh it is what one device computes.
    """
    text = rows(0)
    masked = text["targets"].copy()
    masked[:, :8] = -100
    one, of_masked = forward_of([text["targets"], masked])
    (hidden, mtp_hidden, mtp, counts), (hidden_m, mtp_hidden_m, mtp_m, counts_m) = one, of_masked
    np.testing.assert_array_equal(hidden, hidden_m)
    np.testing.assert_array_equal(mtp_hidden, mtp_hidden_m)
    np.testing.assert_array_equal(counts, counts_m)
    np.testing.assert_array_equal(mtp[:, 8:], mtp_m[:, 8:])
    assert mtp[:, :8].any() and not mtp_m[:, :8].any()
    tokens, ahead = (int(n.sum()) for n in (text["segment_ids"] > 0, text["next_tokens"] >= 0))
    expected = [tokens] * AHEAD.num_hidden_layers + [ahead]
    np.testing.assert_array_equal(counts.sum(1), np.array(expected) * AHEAD.num_experts_per_tok)
    ((*spread, counts_on_mesh),) = forward_of([masked], fsdp=2, expert=2)
    np.testing.assert_array_equal(counts_on_mesh, counts)
    for a, b in zip(spread, (hidden, mtp_hidden, mtp_m), strict=True):
        conversion.assert_close(a, b)


def test_taps_cost_nothing_when_nobody_asks():
    """The program of a model that is asked for no tap is the one of a model whose layers have none."""
    config = config_of(fsdp=2)
    mesh = make_mesh(config, jax.devices()[:2])
    with jax.set_mesh(mesh):
        layout = state.make_layout(config, mesh)
        batch = {
            k: jax.ShapeDtypeStruct(
                a.shape[1:], a.dtype, sharding=jax.NamedSharding(mesh, jax.P(a.sharding.spec[1]))
            )
            for k, a in abstract_batch(fields.TEXT, config, mesh, 0).items()
        }

        def lowered(taps):
            def run(params, bias, batch):
                out = run_model(layout.model.merge(params, bias), batch, taps)
                return out.hidden_BSD, out.taps

            weights = layout.model.abstract_sharded()
            return jax.jit(run).lower(*weights, batch).as_text()

        plain, tapped = lowered(()), lowered(("router_scores",))
        with pytest.MonkeyPatch.context() as patch:
            from deepseek_jax.model import decoder, moe

            patch.setattr(moe, "ROUTED", ())
            patch.setattr(decoder, "tap", lambda *_: None)
            without = lowered(())
    assert plain == without and len(tapped) > len(plain)
