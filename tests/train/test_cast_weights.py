"""Weights cast once a step: which, that no number moves, that micro-batches still add up in float32, and that
nothing of it is left inside the loops.

Gradients are compiled without XLA's licence to skip roundings (xla_allow_excess_precision), so that a weight
rounded outside of a loop gives what one rounded inside gives. Tolerance 1e-5 of an array's scale, for float32
sums in another order; whole steps, which XLA rounds as it likes: 1% of a loss, bfloat16's 2^-8 and more.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax import objectives
from deepseek_jax.config.options import (
    Config,
    LoraConfig,
    MeshConfig,
    OffloadConfig,
    ShardingConfig,
)
from deepseek_jax.config.validation import validate
from deepseek_jax.model import layers
from deepseek_jax.objectives.forward import loss_of_batch, step_totals
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.weights import gather_on_device
from deepseek_jax.train import cast_weights, state, step
from deepseek_jax.train.batch import put_batch
from deepseek_jax.train.gradients import Learner
from tests.support import conversion, invariance
from tests.support.small_runs import TINY, Trainer, config_of, losses_of

EXACT = {"xla_allow_excess_precision": False}
SLOW = pytest.mark.slow
MODELS = {
    "plain": TINY,
    "dense": dataclasses.replace(TINY, first_k_dense_replace=TINY.num_hidden_layers),
    "mtp": dataclasses.replace(TINY, num_nextn_predict_layers=1, first_k_dense_replace=1),
    "grouped": dataclasses.replace(
        TINY,
        num_key_value_heads=1,
        head_dim=16,
        attention_bias=True,
        attention_out_bias=True,
        use_qk_norm=True,
        tie_word_embeddings=True,
    ),
    "shared core": dataclasses.replace(TINY, shared_core_rank=4),
}
MESH_4X2 = MeshConfig(fsdp=4, expert=2)


def of(model: str = "plain", lora: LoraConfig | None = None, **options: Any) -> Config:
    small = config_of(**{"dtype": "bfloat16"} | options)
    # An adapter has no place for the selection bias.
    moe = dataclasses.replace(small.moe, bias_update_rate=0.0) if lora else small.moe
    config = dataclasses.replace(small, model=MODELS[model], lora=lora or small.lora, moe=moe)
    validate(config)
    return config


class Small:
    """A layout, and a state of random numbers, which no bfloat16 is."""

    def __init__(self, config: Config):
        self.config = config
        self.mesh = make_mesh(config, jax.devices()[: invariance.devices_of(config)])
        self.objective = objectives.make(config)
        with jax.set_mesh(self.mesh):
            self.layout = state.make_layout(config, self.mesh)
        rng = np.random.default_rng(0)

        def filled(a):
            if not jnp.issubdtype(a.dtype, jnp.floating):
                return np.zeros(a.shape, a.dtype)
            return (rng.standard_normal(a.shape) * 0.1).astype(a.dtype)

        drawn = jax.tree.map(filled, self.layout.abstract._replace(opt_state=None))
        self.state = jax.device_put(drawn, self.layout.shardings._replace(opt_state=None))
        self.batch = put_batch(invariance.rows(0), config.micro_batch, self.mesh)

    def gradients(self, *parts: range) -> list[dict[str, np.ndarray]]:
        """Of these micro-batches of the batch, the others being padding, by parameter, in float64."""
        learner = Learner(self.config, self.layout, self.objective)

        @functools.partial(jax.jit, compiler_options=EXACT)
        def of_some(s, whole, batch):
            totals = step_totals(self.objective, self.config, whole, s.step)
            return learner.gradients(s, None, batch, totals, None)[0]

        def by_name(grads):
            leaves = jax.tree_util.tree_leaves_with_path(grads)
            assert all(g.dtype == jnp.float32 for _, g in leaves)
            return {conversion.path_of(p): np.asarray(g, np.float64) for p, g in leaves}

        with jax.set_mesh(self.mesh):
            found = []
            for part in parts:
                rows = invariance.rows(0)
                size = self.config.micro_batch
                away = np.isin(np.arange(len(rows["tokens"])) // size, part, invert=True)
                for name, padding in (("segment_ids", 0), ("targets", -100), ("next_tokens", -1)):
                    rows[name][away] = padding
                some = put_batch(rows, size, self.mesh)
                found.append(by_name(of_some(self.state, self.batch, some)))
            return found


def cast_in_use(monkeypatch) -> None:
    """As it was: each layer casts what it uses, and the embedding is gathered in float32."""
    monkeypatch.setattr(cast_weights, "in_compute_dtype", lambda config, params: params)
    monkeypatch.setattr(
        layers,
        "gather_rounded",
        lambda arrays, specs, _: gather_on_device(arrays, specs, jnp.float32),
    )


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], bound: float) -> None:
    for name, g in wanted.items():
        assert np.abs(g).max() > 0, name
        error = conversion.error_of(found[name], g)
        assert error < bound, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    "model", ["grouped", *(pytest.param(m, marks=SLOW) for m in ("mtp", "shared core"))]
)
def test_what_is_cast_is_used_in_the_compute_dtype(model):
    """Rounded beforehand, these weights change no bit of the loss."""
    small = Small(of(model))
    config, objective, params = small.config, small.objective, small.state.params

    @functools.partial(jax.jit, compiler_options=EXACT)
    def loss(params, bias, batch):
        totals = step_totals(objective, config, batch, jnp.zeros((), jnp.int32))
        net = small.layout.model.merge(params, bias)
        micro = jax.tree.map(lambda a: a[0], batch)
        return loss_of_batch(objective, config, net, micro, totals)[0]

    def rounded(params, which):
        def one(path, v):
            if not which(path, v):
                return v
            w = v.get_value()  # by NumPy: no program for each shape
            on_host = np.asarray(w).astype(jnp.bfloat16).astype(np.float32)
            return v.replace(jax.device_put(on_host, w.sharding))

        return nnx.from_flat_state([(p, one(p, v)) for p, v in nnx.to_flat_state(params)])

    def is_cast(path, v):
        return cast_weights.is_cast(config, path, v)

    with jax.set_mesh(small.mesh):
        exact, after, others = (
            float(loss(p, small.state.bias, small.batch))
            for p in (
                params,
                rounded(params, is_cast),
                rounded(params, lambda path, v: not is_cast(path, v)),
            )
        )
    assert exact == after != others
    names = {conversion.path_of(p) for p, v in nnx.to_flat_state(params) if not is_cast(p, v)}
    ends = {name.rpartition("/")[0].rpartition("/")[2] or name for name in names}
    router_and_norms = {"gate", "norm", "input_layernorm", "post_attention_layernorm"}
    assert router_and_norms - {"gate"} <= ends and "embed_tokens" in ends
    assert ("lm_head" in ends) == (model == "mtp")


def test_micro_batches_add_up_in_float32():
    """Gradients of four are the float64 sum of the micro-batches' own, to float32's rounding. In bfloat16
    that sum would be off by 2^-9.
    """
    small = Small(of("dense", accumulation=4))
    whole, *single = small.gradients(range(4), *(range(i, i + 1) for i in range(4)))
    assert_same(whole, {name: sum(g[name] for g in single) for name in whole}, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        dict(accumulation=4),
        dict(model="mtp"),
        dict(model="grouped"),
        dict(model="shared core"),
        dict(lora=LoraConfig(r=4), accumulation=2),
        dict(mesh=MESH_4X2, accumulation=2),
        dict(mesh=MESH_4X2, sharding=ShardingConfig("shard_grad_op", 0)),
        dict(mesh=MESH_4X2, sharding=ShardingConfig("zero1", 0), accumulation=2),
        dict(mesh=MeshConfig(data=2, fsdp=2, tensor=2), sharding=ShardingConfig("hybrid_shard", 0)),
        dict(mesh=MeshConfig(stage=2, fsdp=2), accumulation=4),
        dict(offload=OffloadConfig(parameters=True), remat="full", accumulation=2),
    ],
    ids=lambda o: "-".join(o),
)
def test_gradients_are_those_of_weights_cast_in_use(monkeypatch, options):
    """Of other models, strategies and meshes too."""
    config = of(**options)
    micro = range(config.train.accumulation)
    now = Small(config).gradients(micro)[0]
    cast_in_use(monkeypatch)
    assert_same(now, Small(config).gradients(micro)[0], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        dict(accumulation=2, accumulation_dtype="bfloat16"),
        dict(dtype="float16"),
        dict(mesh=MESH_4X2, accumulation=2),
        dict(
            mesh=MeshConfig(data=2, fsdp=2),
            sharding=ShardingConfig("hybrid_shard", 0, gradient_compression="int8"),
        ),
        dict(offload=OffloadConfig(optimizer_state=True)),
        dict(offload=OffloadConfig(optimizer_state=True, parameters=True), remat="full"),
    ],
    ids=lambda o: "-".join(o),
)
def test_losses_of_whole_steps(monkeypatch, options):
    config = of(**options)
    found = []
    for _ in range(2):
        t = Trainer(config)
        found.append(losses_of(t.run(t.start(), 4)[1]))
        cast_in_use(monkeypatch)
    assert np.abs(found[0] / found[1] - 1).max() < 0.01, found


def test_float32_and_stages_are_left_as_they_are():
    """Not a copy: the program of a float32 run is the one that it was."""
    for config in (of(dtype="float32"), of(mesh=MeshConfig(fsdp=1, stage=2), accumulation=2)):
        small = Small(config)
        with jax.set_mesh(small.mesh):
            params = small.state.params
            assert cast_weights.in_compute_dtype(config, params) is params


def test_nothing_is_cast_inside_the_loops():
    """Of the traced step on 4 x 2 devices: no weight of a layer is cast in a loop, and every weight that is
    gathered travels in bfloat16, the embedding among them.
    """
    config = of(mesh=MESH_4X2, accumulation=2, remat="full")
    small = Small(config)
    with jax.set_mesh(small.mesh):
        train_step = step.make_train_step(config, small.layout, small.objective)
        jaxpr = jax.make_jaxpr(train_step)(small.layout.abstract_sharded(), small.batch)
    matrices = {
        v.get_value().shape[1:]
        for path, v in nnx.to_flat_state(small.layout.abstract.params)
        if path[0] == "layers" and cast_weights.is_cast(config, path, v)
    } - {(invariance.LENGTH, invariance.LENGTH)}  # attention's weights have this shape
    casts, moved = [], []
    for eqn, loops in equations(jaxpr.jaxpr):
        a = eqn.invars[0].aval if eqn.invars else None
        if eqn.primitive.name == "convert_element_type" and loops and a.dtype == jnp.float32:
            if a.shape in matrices and eqn.params["new_dtype"] == jnp.bfloat16:
                casts.append(eqn)
        if eqn.primitive.name == "reshard" and loops and a.shape in matrices:
            moved.append(a.dtype)
        if eqn.primitive.name == "all_gather" and a.ndim > 1:
            moved.append(a.dtype)
    assert not casts
    assert moved and set(moved) == {jnp.dtype("bfloat16")}


def equations(jaxpr, loops: int = 0) -> Iterator[tuple[Any, int]]:
    """All of a jaxpr but those whose results nobody reads, with the number of loops around each."""
    read, alive = {v for v in jaxpr.outvars if not hasattr(v, "val")}, []
    for eqn in reversed(jaxpr.eqns):
        if read & set(eqn.outvars):
            alive.append(eqn)
            read |= {v for v in eqn.invars if not hasattr(v, "val")}
    for eqn in reversed(alive):
        yield eqn, loops
        inside = loops + (eqn.primitive.name in ("scan", "while"))
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner, inside)
