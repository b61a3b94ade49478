"""Hugging Face weights into our modules, their gradients back, and our model run on a mesh.

The name table here is the tests' own, so that they do not trust the one that users' checkpoints go through.

    params, bias = to_state(weights, model)   # {Hugging Face name: array} -> states with NumPy leaves
    grads = to_hf(gradient_state, model)      # the way back, for parameters or their gradients
    out = run(weights, model, ids, expert=2)  # logits, hidden states, statistics; on two devices
    with on_mesh(config):                     # one module with given weights
        mlp, params, bias = load(lambda: MLP(model, 8, nnx.Rngs(0)), weights, config, "mlp.")
        y = jit(lambda params, x: mlp(params, bias)(x))(params, put(x))
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from deepseek_jax import objectives
from deepseek_jax.config.options import (
    Config,
    MeshConfig,
    ModelConfig,
    MoeConfig,
    ShardingConfig,
    TrainConfig,
)
from deepseek_jax.config.validation import validate
from deepseek_jax.model.layout import abstract_model
from deepseek_jax.model.moe import SelectionBias
from deepseek_jax.model.moe_statistics import MoEStats
from deepseek_jax.objectives.forward import loss_of_batch, step_totals
from deepseek_jax.parallel import sharding
from deepseek_jax.parallel.mesh import BATCH_AXES, make_mesh
from tests.support import reference as ref

Weights = dict[str, np.ndarray]  # Hugging Face names, [out, in], one entry an expert


NEVER_DROPPED = MoeConfig()

# -------------------------------------------------------------------------------------------- names


def path_of(path: tuple) -> str:
    """ "layers/mlp/gate/kernel" of a leaf of a state."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def _place(path: str, model: ModelConfig) -> tuple[list[str], str, bool]:
    """Of a variable of Transformer: (prefix of every layer in it, its path below that, whether it
    has a leading layer axis)."""
    first, _, rest = path.partition("/")
    dense, layers = model.first_k_dense_replace, model.num_hidden_layers
    if first in ("dense_layers", "layers"):
        held = range(dense) if first == "dense_layers" else range(dense, layers)
        return [f"model.layers.{i}." for i in held], rest, True
    if first == "mtp":
        depth, _, rest = rest.partition("/")
        rest = "shared_head/norm/weight" if rest == "norm/weight" else rest.removeprefix("layer/")
        return [f"model.layers.{layers + int(depth)}."], rest, False
    return ["" if first == "lm_head" else "model."], path, False


def _read(weights: Weights, prefix: str, path: str) -> np.ndarray:
    """One variable of one layer, in our orientation."""
    name = prefix + path.replace("/", ".")
    if name.endswith(".kernel"):
        return weights[name.removesuffix("kernel") + "weight"].T
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return weights[name]
    root, _, kind = name.rpartition(".")
    experts = sum(n.startswith(root + ".") and n.endswith(".down_proj.weight") for n in weights)

    def of(e, part):
        return weights[f"{root}.{e}.{part}_proj.weight"].T

    if kind == "down_proj":
        return np.stack([of(e, "down") for e in range(experts)])
    return np.stack([np.stack([of(e, "gate"), of(e, "up")], axis=1) for e in range(experts)])


def _write(out: Weights, prefix: str, path: str, a: np.ndarray) -> None:
    """The inverse of `_read`."""
    name = prefix + path.replace("/", ".")
    if name.endswith(".kernel"):
        out[name.removesuffix("kernel") + "weight"] = a.T
    elif name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        root, _, kind = name.rpartition(".")
        for e in range(a.shape[0]):
            parts = (
                {"down": a[e]} if kind == "down_proj" else {"gate": a[e, :, 0], "up": a[e, :, 1]}
            )
            out.update({f"{root}.{e}.{part}_proj.weight": w.T for part, w in parts.items()})
    else:
        out[name] = a


def _fill(state: nnx.State, get: Callable[[str], np.ndarray]) -> nnx.State:
    """A state of shapes with `get(path)` for leaves, float32."""

    def leaf(path, shape):
        a = np.asarray(get(path_of(path)), np.float32)
        assert a.shape == shape.shape, (path_of(path), a.shape, shape.shape)
        return a

    return jax.tree_util.tree_map_with_path(leaf, state)


def to_state(weights: Weights, model: ModelConfig) -> tuple[nnx.State, nnx.State]:
    """(parameters, selection biases) of our Transformer, with NumPy leaves."""
    _, params, bias = abstract_model(config_of(model))

    def get(path):
        prefixes, rest, stacked = _place(path, model)
        found = [_read(weights, prefix, rest) for prefix in prefixes]
        return np.stack(found) if stacked else found[0]

    return _fill(params, get), _fill(bias, get)


def to_hf(state: nnx.State, model: ModelConfig) -> Weights:
    """The arrays of a state of Transformer under Hugging Face names: parameters, their gradients,
    or the biases."""
    out = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        prefixes, rest, stacked = _place(path_of(path), model)
        a = np.asarray(leaf)
        for prefix, layer in zip(prefixes, a if stacked else [a], strict=True):
            _write(out, prefix, rest, layer)
    return out


def random_weights(model: ModelConfig, seed: int) -> Weights:
    """Weights so large that every term matters: norms between 0.5 and 1.5, matrices of unit gain,
    biases that change choices."""
    rng = np.random.default_rng(seed)
    _, params, bias = abstract_model(config_of(model))
    shapes = to_hf(jax.tree.map(lambda s: np.zeros(s.shape, np.float32), params), model)
    out = {}
    for name, a in shapes.items():
        scale = 1.0 if "embed_tokens" in name else a.shape[-1] ** -0.5
        out[name] = (
            0.5 + rng.random(a.shape) if a.ndim == 1 else rng.standard_normal(a.shape) * scale
        )
    for name, a in to_hf(
        jax.tree.map(lambda s: np.zeros(s.shape, np.float32), bias), model
    ).items():
        out[name] = rng.standard_normal(a.shape) * 0.15
    return {name: a.astype(np.float32) for name, a in out.items()}


# ------------------------------------------------------------------------------------------- meshes


def config_of(
    model: ModelConfig, data: int = 1, fsdp: int = 1, expert: int = 1, **sections: Any
) -> Config:
    """A float32 run of `model` on data x fsdp x expert devices, without rematerialisation unless
    `train` says so."""
    train = TrainConfig(dtype="float32", remat="none", batch_size=8, sequence_length=16)
    # With replicas along `data`, weights are divided over the other axes only: small shapes need
    # not divide by all devices.
    strategy = ShardingConfig("hybrid_shard" if data > 1 else "full_shard", min_weight_size=0)
    config = Config(
        model=model,
        mesh=MeshConfig(data=data, fsdp=fsdp, expert=expert),
        **{"train": train, "sharding": strategy, **sections},
    )
    validate(config)
    return config


@contextlib.contextmanager
def on_mesh(config: Config):
    """The mesh of a config, on as many of the test's devices as it has, as the current mesh."""
    count = config.mesh.data * config.mesh.fsdp * config.mesh.expert
    mesh = make_mesh(config, jax.devices()[:count])
    with jax.set_mesh(mesh):
        yield mesh


def put(a: np.ndarray, axis: int = 0) -> jax.Array:
    """A batch on the current mesh, `axis` divided over the batch axes; floats as float32, integers
    as int32."""
    a = np.asarray(a)
    dtype = np.float32 if a.dtype.kind == "f" else np.int32 if a.dtype.kind in "iu" else a.dtype
    return jax.device_put(a.astype(dtype), P(*[None] * axis, BATCH_AXES))


def place(state: nnx.State, config: Config, rules: dict | None = None) -> nnx.State:
    """A state with NumPy leaves on the current mesh, as the config's strategy stores parameters."""
    rules = sharding.storage_rules(config)[0] if rules is None else rules
    specs = sharding.specs(state, rules, config.sharding.min_weight_size)
    return jax.tree.map(jax.device_put, state, specs)


def load(
    create: Callable[[], nnx.Module], weights: Weights, config: Config, prefix: str = ""
) -> tuple[Callable, nnx.State, nnx.State]:
    """One module with given weights on the current mesh.

    Returns:
      (module(params, bias), params, bias)
    """
    graphdef, params, bias = nnx.split(nnx.eval_shape(create), nnx.Param, SelectionBias)
    params, bias = (_fill(s, functools.partial(_read, weights, prefix)) for s in (params, bias))
    return (
        functools.partial(nnx.merge, graphdef),
        place(params, config),
        place(bias, config, sharding.COMPUTE_RULES),
    )


def names_of(state: nnx.State, prefix: str = "") -> Weights:
    """The arrays of one module's state under Hugging Face names: the inverse of `load`."""
    out = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        _write(out, prefix, path_of(path), np.asarray(leaf))
    return out


# -------------------------------------------------------------------------------------- whole model


class Run(NamedTuple):
    """What `run` returns, as NumPy arrays."""

    logits: np.ndarray  # [B, S, V]
    hidden: np.ndarray  # [B, S, D]
    mtp_logits: list[np.ndarray]  # one a depth
    stats: MoEStats | None


def batch_of(ids: np.ndarray, segment_ids: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """A batch of whole sequences, or of packed ones; the last position of each document has no target."""
    segments = np.ones_like(ids) if segment_ids is None else np.asarray(segment_ids)
    targets, positions = ref.targets_ahead(ids, 1, segment_ids), ref.segment_positions(segments)
    next_tokens = np.where(targets == ref.IGNORE, -1, targets)
    return dict(
        tokens=ids,
        targets=targets,
        next_tokens=next_tokens,
        segment_ids=segments,
        positions=positions,
    )


def model_of(config: Config) -> Callable[[nnx.State, nnx.State], nnx.Module]:
    """(params, bias) -> Transformer."""
    return functools.partial(nnx.merge, abstract_model(config)[0])


def loss_of(net: nnx.Module, batch: dict, config: Config, mtp_weight: Any = 0.0) -> jax.Array:
    """The pretraining loss of one batch [B, S], with all its parts."""
    objective = objectives.make(config)
    totals = step_totals(objective, config, batch, jnp.int32(0))
    weighted = totals.objective._replace(mtp_weight=jnp.float32(mtp_weight))
    totals = totals._replace(objective=weighted)
    return loss_of_batch(objective, config, net, batch, totals)[0]


class Recorder:
    """A Transformer that keeps the output of its last call, for what a loss function does not hand out."""

    def __init__(self, net: nnx.Module):
        self.net, self.out = net, None

    def __call__(self, *args):
        self.out = self.net(*args)
        return self.out

    def __getattr__(self, name):
        return getattr(self.net, name)


def run(
    weights: Weights,
    model: ModelConfig,
    ids: np.ndarray,
    segment_ids: np.ndarray | None = None,
    moe: MoeConfig = NEVER_DROPPED,
    **mesh: int,
) -> Run:
    """Our model, jitted, in float32, on one device or on a mesh of data x fsdp x expert."""
    config = config_of(model, moe=moe, **mesh)
    with on_mesh(config):
        batch = {k: put(a) for k, a in batch_of(ids, segment_ids).items()}
        params, bias = to_state(weights, model)
        params, bias = place(params, config), place(bias, config, sharding.COMPUTE_RULES)
        make = model_of(config)

        @jax.jit
        def forward(params, bias, batch):
            net = make(params, bias)
            out = net(
                batch["tokens"], batch["segment_ids"], batch["positions"], batch["next_tokens"]
            )
            return (
                net.logits(out.hidden_BSD),
                out.hidden_BSD,
                [net.logits(h) for h in out.mtp_hidden_BSD],
                out.stats,
            )

        return Run(*jax.tree.map(np.asarray, forward(params, bias, batch)))


# -------------------------------------------------------------------------------------- comparisons


def error_of(actual: Any, expected: Any) -> float:
    """Largest difference, relative to the largest expected number (the scale of the array)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return (
        float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30))
        if expected.size
        else 0.0
    )


def assert_close(actual: Any, expected: Any, rtol: float = 1e-5, what: str = "") -> None:
    error = error_of(actual, expected)
    assert error < rtol, f"{what}: relative error {error:.1e}"


def assert_gradients(
    f: Callable[[Weights], float],
    weights: Weights,
    grads: Weights,
    rtol: float = 1e-5,
    eps: float = 1e-6,
    group: Callable[[str], str] = str,
) -> None:
    """Every gradient against central differences of the float64 reference f along a random
    direction, which sees all elements.

    The error is relative to the norm of the gradient: what a random direction gives typically.
    Names that `group` maps to the same string share one direction.
    """
    assert grads and set(grads) <= set(weights)
    groups = {}
    for name in sorted(grads):
        assert grads[name].shape == weights[name].shape, name
        groups.setdefault(group(name), []).append(name)
    for i, (label, names) in enumerate(groups.items()):
        rng = np.random.default_rng(i)
        direction = {name: rng.standard_normal(grads[name].shape) for name in names}
        expected = ref.directional_derivative(f, weights, direction, eps)
        actual = sum(
            float(np.sum(grads[name].astype(np.float64) * d)) for name, d in direction.items()
        )
        norm = np.sqrt(sum(np.sum(np.square(grads[name], dtype=np.float64)) for name in names))
        error = abs(actual - expected) / max(
            norm, abs(expected), 1e-30
        )  # 0 / 1e-30 for a weight out of use
        assert error < rtol, f"gradient of {label}: relative error {error:.1e}"


def smaller(model: ModelConfig, **changes: Any) -> ModelConfig:
    return dataclasses.replace(model, **changes)
