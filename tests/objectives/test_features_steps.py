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
from deepseek_jax.objectives.forward import run_frozen, run_model
from deepseek_jax.objectives.pretrain import Pretraining
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.train import projection, state
from deepseek_jax.train.batch import put_batch
from tests.support import conversion, invariance, objective_steps, small_runs
from tests.support.objective_steps import Steps

LENGTH, SEQUENCES = 16, 16
# A dense layer in front, two MoE layers, one that predicts ahead; sigmoids with a bias, in groups.
STUDENT = dataclasses.replace(
    small_runs.TINY,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_nextn_predict_layers=1,
    n_group=2,
    topk_group=1,
)
PLAIN = dataclasses.replace(STUDENT, num_nextn_predict_layers=0)
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

    def __init__(self, config: Config):
        super().__init__(config)
        self.taps = FEATURES.taps
        self.teacher = dataclasses.replace(config, model=TEACHER, offload=OffloadConfig())

    def frozen(self, mesh):
        placed = place_model(self.teacher, mesh, jnp.float32)

        def load() -> ModelWeights:
            s = invariance.initial_state(TEACHER)
            return jax.device_put(ModelWeights(s.params, s.bias), placed.shardings)

        return FEATURES.ask(Frozen(placed, load), config_of().seed)

    def totals(self, batch, step):
        return super().totals(batch, step), FEATURES.totals(batch)

    def loss(self, model, out, batch, totals, frozen_out=None):
        loss, parts = super().loss(model, out, batch, totals[0])
        inside, more = FEATURES.loss(out, batch, totals[1], frozen_out)
        return loss + inside, parts | more


def rows(i: int) -> dict[str, np.ndarray]:
    text = objective_steps.padded_rows(i, LENGTH)
    text["targets"][:, :3] = -100  # a prompt
    return text


@functools.cache
def own() -> nnx.State:
    """The projection as a run begins with it, on the host."""
    config = config_of()
    mesh = make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        frozen = Inside(config).frozen(mesh)
        return jax.device_get(jax.jit(lambda: projection.create(frozen))())


@functools.cache
def job(config: Config) -> Steps:
    return Steps(config, Inside(config), rows, own)


@functools.cache
def first_step(config: Config):
    """(metrics, Adam's first moments: the clipped gradients times a constant), on the host."""
    return job(config).first()


def forward():
    """(taps of all layers of the student, of the teacher, the projection, in float64; parts of the loss), of
    one batch.
    """
    config = dataclasses.replace(config_of(), model=PLAIN)
    mesh = make_mesh(config, jax.devices()[:1])
    objective = Inside(config)
    with jax.set_mesh(mesh):
        frozen = objective.frozen(mesh)
        student = place_model(config, mesh)
        weights, given = (
            jax.device_put(drawn(placed.abstract), placed.shardings)
            for placed in (student, frozen.model)
        )
        batch = put_batch({k: rows(0)[k] for k in objective.fields}, SEQUENCES, mesh)
        batch = jax.tree.map(lambda a: a[0], batch)

        @jax.jit
        def run(weights, given, own, batch):
            everything = ("hidden", "router_logits")
            all_taps = [
                run_model(model, batch, everything).taps
                for model in (student.merge(*weights), frozen.model.merge(*given))
            ]
            totals = objective.totals(batch, jnp.int32(0))
            model = student.merge(*weights)
            out = projection.with_output(run_frozen(frozen, given, batch), own)
            chosen = run_model(model, batch, objective.taps)
            return all_taps, objective.loss(model, chosen, batch, totals, out)

        map_to_teacher = drawn(projection.abstract(frozen))
        taps, (loss, parts) = run(weights, given, map_to_teacher, batch)
    kernel = np.asarray(jax.tree.leaves(map_to_teacher)[0], np.float64)
    taps = [{k: np.asarray(a, np.float64) for k, a in of_one.items()} for of_one in taps]
    return (*taps, kernel, parts | {"loss": loss})


def of_projection(moments) -> np.ndarray:
    (found,) = (a for name, a in moments if name.endswith(f"{projection.NAME}/kernel"))
    return found


def drawn(abstract):
    """Numbers for shapes, without a program that makes them."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: 0.2 * rng.standard_normal(a.shape).astype(np.float32), abstract)


def shares(logits, scoring):
    p = 1 / (1 + np.exp(-logits)) if scoring == "sigmoid" else np.exp(logits)
    return p / p.sum(-1, keepdims=True)


def test_the_parts_are_what_numpy_makes_of_the_taps():
    student, teacher, kernel, parts = forward()
    batch = rows(0)
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
    assert parts["hidden_loss"] == pytest.approx(np.mean(hidden), rel=1e-5)
    assert parts["router_loss"] == pytest.approx(np.mean(router), rel=1e-5)
    whole = parts["lm_loss"] + 0.5 * parts["hidden_loss"] + 0.2 * parts["router_loss"]
    assert parts["loss"] == pytest.approx(float(whole), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(fsdp=4, expert=2), id="4x2"),
        pytest.param(dict(stage=2, accumulation=4), id="stages"),
        pytest.param(dict(accumulation=4), id="accumulation"),
        pytest.param(dict(accumulation=4, offload=True), id="offloaded"),
        pytest.param(dict(fsdp=2, tensor=2), id="tensor"),
        pytest.param(dict(stage=2, fsdp=2, expert=2, accumulation=4), id="2x2x2"),
        pytest.param(dict(fsdp=4, expert=2, strategy="shard_grad_op"), id="zero2"),
        pytest.param(dict(data=2, fsdp=2, strategy="hybrid_shard"), id="hybrid"),
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
    assert of_projection(found).any()


@pytest.mark.slow
def test_compressed_gradients_reach_the_projection():
    """bfloat16 sums over the replicas: 2^-8 of an array's scale."""
    (_, moments), (_, found) = (
        first_step(config_of()),
        first_step(config_of(data=2, fsdp=2, strategy="hybrid_shard", compression="bfloat16")),
    )
    conversion.assert_close(of_projection(found), of_projection(moments), 2**-8)


@pytest.mark.slow
def test_the_projection_resumes_to_the_last_bit_and_is_no_weight_of_the_model(tmp_path):
    t = job(config_of(stage=2, accumulation=4))
    before = np.asarray(jax.tree.leaves(own())[0])
    s, _ = t.run(t.start(), 0)
    again = small_runs.restored(t, s, tmp_path)
    model = {path for path, _ in nnx.to_flat_state(t.layout.model.abstract.params)}
    assert {path for path, _ in nnx.to_flat_state(s.weights().params)} == model
    (on, metrics), (same, same_metrics) = t.run(s, 1), t.run(again, 1)
    assert small_runs.same(on, same) and small_runs.same(metrics, same_metrics)
    # The learning rate of the first step is 0.
    assert np.any(np.asarray(jax.tree.leaves(projection.split(on.params)[1])[0]) != before)


def test_the_projection_lies_where_the_rule_table_says():
    config = config_of(fsdp=4, expert=2)
    mesh = make_mesh(config, jax.devices())
    with jax.set_mesh(mesh):
        layout = state.make_layout(config, mesh, Inside(config).frozen(mesh))
    _, spec = projection.split(layout.param_specs)
    assert jax.tree.leaves(spec)[0] == jax.P(None, ("data", "fsdp", "expert", "stage"), None)
    whole, where = (
        jax.tree.leaves(projection.split(tree.params)[1])[0]
        for tree in (layout.abstract, layout.shardings)
    )
    assert 8 * np.prod(where.shard_shape(whole.shape)) == np.prod(whole.shape)


@pytest.mark.slow
def test_of_layers_that_nobody_asks_for_nothing_is_held():
    """The program has no array of all layers' hidden states of the teacher."""
    of_all, chosen = (
        f"{layers}x{SEQUENCES}x{LENGTH}x{TEACHER.hidden_size}xf32"
        for layers in (TEACHER.num_hidden_layers - TEACHER.first_k_dense_replace, len(PAIRS))
    )
    text = job(config_of()).lowered.as_text()
    assert f"tensor<{of_all}" not in text and f"tensor<{chosen}" in text
    assert job(config_of()).layout.frozen.taps == (Tap("hidden", (1, 4)), "router_logits")
