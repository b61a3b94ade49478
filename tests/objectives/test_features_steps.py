"""Training steps with hidden states and routers of a teacher: what they report is what NumPy makes of both
models' taps, the same on every mesh; the projection learns, resumes to the last bit and is in no export.

Tolerance across meshes: 1e-5 of an array's scale, for float32 sums in another order.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.config.options import Config, MeshConfig, OffloadConfig, ShardingConfig
from deepseek_jax.hf.compression_map import CompressionMap
from deepseek_jax.model.layout import ModelWeights, place_model
from deepseek_jax.model.taps import Tap
from deepseek_jax.objectives import correspondence, features
from deepseek_jax.objectives.base import Frozen
from deepseek_jax.objectives.forward import run_model
from deepseek_jax.objectives.pretrain import Pretraining
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.train import projection, state, step
from deepseek_jax.train.batch import abstract_batch, put_batch
from tests.support import conversion, invariance, small_runs

LENGTH, SEQUENCES = 16, 16
# A dense layer in front, two MoE layers, one that predicts ahead; sigmoids with a bias, in groups.
STUDENT = dataclasses.replace(
    small_runs.TINY,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_nextn_predict_layers=1,
    n_group=2,
    topk_group=1,
    num_experts_per_tok=1,
)
# Softmax, twice the experts, narrower, deeper.
TEACHER = dataclasses.replace(
    STUDENT,
    hidden_size=16,
    num_hidden_layers=5,
    n_routed_experts=8,
    scoring_func="softmax",
    topk_method="greedy",
    norm_topk_prob=False,
)
MAP = CompressionMap(
    layer_map=(0, 2, 4),
    expert_map=(((0, 5), (1,), (2, 3, 7), (4,)), ((1,), (4,), (5,), (7,))),
    num_experts=8,
    num_hidden_layers=5,
)
PAIRS = ((0, 1), (2, 4))


def config_of(accumulation: int = 1, offload: bool = False, **mesh) -> Config:
    strategy = mesh.pop("strategy", "full_shard")
    compression = mesh.pop("compression", "none")
    base = small_runs.config_of(
        mesh=MeshConfig(**{"fsdp": 1} | mesh),
        sharding=ShardingConfig(strategy, 0, gradient_compression=compression),
        offload=OffloadConfig(parameters=offload, optimizer_state=offload),
        sequence_length=LENGTH,
        accumulation=accumulation,
        remat="full" if offload else "none",
    )
    return dataclasses.replace(base, model=STUDENT)


WIDTHS = STUDENT.hidden_size, TEACHER.hidden_size
GROUPS = np.full((2, 4, 3), correspondence.NO_TEACHER, np.int32)
for layer, experts in enumerate(MAP.expert_map):
    for e, members in enumerate(experts):
        GROUPS[layer, e, : len(members)] = members
FEATURES = features.Features(
    correspondence.Hidden(0.5, "cosine", PAIRS, WIDTHS),
    correspondence.Router(0.2, ("sigmoid", "softmax"), (1, 3), GROUPS),
)


class Inside(Pretraining):
    """Cross-entropy, and the inside of a teacher."""

    def __init__(self, config: Config, inside: features.Features = FEATURES):
        super().__init__(config)
        self.inside = inside
        self.taps = inside.taps
        self.teacher = dataclasses.replace(config, model=TEACHER, offload=OffloadConfig())

    def frozen(self, mesh):
        placed = place_model(self.teacher, mesh, jnp.float32)

        def load() -> ModelWeights:
            s = invariance.initial_state(TEACHER)
            return jax.device_put(ModelWeights(s.params, s.bias), placed.shardings)

        made = self.inside.projection(self.config.seed)
        return Frozen(placed, load, self.inside.teacher_taps, made)

    def totals(self, batch, step):
        return super().totals(batch, step), self.inside.totals(batch)

    def loss(self, model, out, batch, totals, frozen_out=None):
        loss, parts = super().loss(model, out, batch, totals[0])
        inside, more = self.inside.loss(out, batch, totals[1], frozen_out)
        return loss + inside, parts | more


def rows(i: int) -> dict[str, np.ndarray]:
    text = {k: a[:, :LENGTH].copy() for k, a in invariance.rows(i).items()}
    for name, nothing in (("segment_ids", 0), ("targets", -100), ("next_tokens", -1)):
        text[name][[0, 1, 2, 5], 12:] = nothing  # micro-batches have different numbers of tokens
    text["targets"][:, :3] = -100  # a prompt
    return text


class Job:
    """Steps of `Inside` on a mesh."""

    def __init__(self, config: Config, objective=None):
        self.config = config
        self.mesh = make_mesh(config, jax.devices()[: invariance.devices_of(config)])
        self.objective = objective or Inside(config)
        with jax.set_mesh(self.mesh):
            frozen = self.objective.frozen(self.mesh)
            self.layout = state.make_layout(config, self.mesh, frozen)
            self.frozen = frozen and frozen.load()

    @functools.cached_property
    def lowered(self):
        with jax.set_mesh(self.mesh):
            train_step = conversion.jit(
                step.make_train_step(self.config, self.layout, self.objective),
                self.config,
                donate_argnums=0,
            )
            batch = abstract_batch(self.objective.fields, self.config, self.mesh, 0)
            args = self.layout.abstract_sharded(), batch
            return train_step.lower(*args, self.layout.abstract_frozen())

    @functools.cached_property
    def program(self):
        with jax.set_mesh(self.mesh):
            return self.lowered.compile()

    def start(self) -> state.TrainState:
        """From the same weights on every mesh, which the host has."""
        fresh = invariance.initial_state(self.config.model)
        abstract = self.layout.abstract
        zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), abstract.opt_state)
        residual = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), abstract.residual)
        params = nnx.merge_state(fresh.params, own())
        return jax.device_put(
            fresh._replace(params=params, opt_state=zeros, residual=residual), self.layout.shardings
        )

    def batch(self, i: int):
        return put_batch(
            {k: rows(i)[k] for k in self.objective.fields}, self.config.micro_batch, self.mesh
        )

    def run(self, s: state.TrainState, i: int):
        with jax.set_mesh(self.mesh):
            return self.program(s, self.batch(i), self.frozen)


@functools.cache
def own() -> nnx.State:
    """The projection as a run begins with it, on the host."""
    config = config_of()
    mesh = make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        frozen = Inside(config).frozen(mesh)
        return jax.device_get(jax.jit(lambda: projection.create(frozen))())


@functools.cache
def job(config: Config) -> Job:
    return Job(config)


@functools.cache
def first_step(config: Config):
    """(metrics, Adam's first moments: the clipped gradients times a constant), on the host."""
    s, metrics = job(config).run(job(config).start(), 0)
    moments = [
        (conversion.path_of(path), np.asarray(a))
        for path, a in jax.tree_util.tree_leaves_with_path(s.opt_state)
        if ".mu" in jax.tree_util.keystr(path)
    ]
    return jax.tree.map(np.asarray, metrics), moments


@functools.cache
def tapped():
    """(student's, teacher's) taps of all layers, in NumPy."""
    t = job(config_of())
    asked = ("hidden", "router_logits")
    with jax.set_mesh(t.mesh):
        batch = jax.tree.map(lambda a: a[0], t.batch(0))
        weights = t.start().weights()

        @conversion.jit
        def run(weights, placed, batch):
            inputs = {k: batch[k] for k in ("tokens", "segment_ids", "positions")}
            return run_model(placed.merge(*weights), inputs, asked).taps

        out = []
        for placed, w in ((t.layout.model, weights), (t.layout.frozen.model, t.frozen)):
            model = functools.partial(run.__wrapped__, placed=placed)
            found = conversion.jit(lambda w, b, f=model: f(w, batch=b))(w, batch)
            out.append({k: np.asarray(a, np.float64) for k, a in found.items()})
    return out


def shares(logits, scoring):
    p = 1 / (1 + np.exp(-logits)) if scoring == "sigmoid" else np.exp(logits)
    return p / p.sum(-1, keepdims=True)


def test_a_step_reports_what_numpy_makes_of_the_taps():
    student, teacher = tapped()
    batch, kernel = rows(0), np.asarray(jax.tree.leaves(own())[0], np.float64)
    scored, tokens = batch["targets"] != -100, batch["segment_ids"] > 0
    hidden = []
    for i, (s, t) in enumerate(PAIRS):
        a, b = student["hidden"][s] @ kernel[i], teacher["hidden"][t]
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        hidden.append((1 - (a * b).sum(-1) / norms)[scored].mean())
    router = []
    for layer, (experts, origin) in enumerate(zip(MAP.expert_map, (1, 3), strict=True)):
        t = shares(teacher["router_logits"][origin], "softmax")
        kept = np.stack([t[..., list(e)].sum(-1) for e in experts], -1)
        kept /= kept.sum(-1, keepdims=True)
        s = shares(student["router_logits"][layer], "sigmoid")
        router.append((kept * np.log(kept / s)).sum(-1)[tokens].mean())
    metrics, moments = first_step(config_of())
    parts = metrics.parts
    assert parts["hidden_loss"] == pytest.approx(np.mean(hidden), rel=1e-5)
    assert parts["router_loss"] == pytest.approx(np.mean(router), rel=1e-5)
    whole = parts["lm_loss"] + 0.3 * parts["mtp_loss"]
    whole += 0.5 * parts["hidden_loss"] + 0.2 * parts["router_loss"]
    assert parts["loss"] == pytest.approx(whole, rel=1e-5)
    gradient = dict(moments)["projection/kernel"]
    assert gradient.shape == (2, *WIDTHS) and np.abs(gradient).max() > 0


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(fsdp=4, expert=2), id="4x2", marks=pytest.mark.slow),
        pytest.param(dict(stage=2, accumulation=4), id="stages"),
        pytest.param(dict(accumulation=4), id="accumulation", marks=pytest.mark.slow),
        pytest.param(dict(accumulation=4, offload=True), id="offloaded", marks=pytest.mark.slow),
        pytest.param(dict(fsdp=2, tensor=2), id="tensor", marks=pytest.mark.slow),
        pytest.param(
            dict(stage=2, fsdp=2, expert=2, accumulation=4), id="2x2x2", marks=pytest.mark.slow
        ),
        pytest.param(
            dict(fsdp=4, expert=2, strategy="shard_grad_op"), id="zero2", marks=pytest.mark.slow
        ),
        pytest.param(
            dict(data=2, fsdp=2, strategy="hybrid_shard"), id="hybrid", marks=pytest.mark.slow
        ),
    ],
)
def test_the_same_on_every_mesh(options):
    (metrics, moments), (ours, found) = first_step(config_of()), first_step(config_of(**options))
    assert {"hidden_loss", "router_loss", "lm_loss", "loss"} <= set(ours.parts)
    for name, value in metrics.parts.items():
        conversion.assert_close(ours.parts[name], value, what=name)
    conversion.assert_close(ours.grad_norm, metrics.grad_norm)
    for (name, a), (_, b) in zip(found, moments, strict=True):
        conversion.assert_close(a, b, what=name)


@pytest.mark.slow
def test_compressed_gradients_reach_the_projection():
    """bfloat16 sums over the replicas: 2^-8 of an array's scale."""
    (_, moments), (_, found) = (
        first_step(config_of()),
        first_step(config_of(data=2, fsdp=2, strategy="hybrid_shard", compression="bfloat16")),
    )
    a, b = dict(found)["projection/kernel"], dict(moments)["projection/kernel"]
    conversion.assert_close(a, b, 2**-8)


def test_the_projection_resumes_to_the_last_bit_and_is_no_weight_of_the_model(tmp_path):
    t = job(config_of(stage=2, accumulation=4))
    before = np.asarray(jax.tree.leaves(own())[0])
    s, _ = t.run(t.start(), 0)
    again = small_runs.restored(t, s, tmp_path)
    assert np.any(np.asarray(jax.tree.leaves(projection.split(s.params)[1])[0]) != before)
    model = {path for path, _ in nnx.to_flat_state(t.layout.model.abstract.params)}
    assert {path for path, _ in nnx.to_flat_state(s.weights().params)} == model
    (on, metrics), (same, same_metrics) = t.run(s, 1), t.run(again, 1)
    assert small_runs.same(on, same) and small_runs.same(metrics, same_metrics)


def test_the_projection_lies_where_the_rule_table_says():
    t = Job(config_of(fsdp=4, expert=2))
    _, spec = projection.split(t.layout.param_specs)
    assert jax.tree.leaves(spec)[0] == jax.P(None, ("data", "fsdp", "expert", "stage"))
    whole, where = (
        jax.tree.leaves(projection.split(tree.params)[1])[0]
        for tree in (t.layout.abstract, t.layout.shardings)
    )
    assert 8 * np.prod(where.shard_shape(whole.shape)) == np.prod(whole.shape)


def test_of_layers_that_nobody_asks_for_nothing_is_held():
    """The program with chosen layers has no array of all layers' hidden states of the teacher, and the one
    without weights is the one of pretraining.
    """
    config = config_of()
    nothing = Job(config, Inside(config, features.Features(None, None)))
    plain = Pretraining(config)
    plain.frozen = nothing.objective.frozen
    assert nothing.lowered.as_text() == Job(config, plain).lowered.as_text()
    of_all = f"{TEACHER.num_hidden_layers}x{SEQUENCES}x{LENGTH}x{TEACHER.hidden_size}xf32"
    assert of_all not in job(config).lowered.as_text()
    assert Tap("hidden", (1, 4)) in job(config).objective.inside.teacher_taps
