"""The training state: what it holds, how it is laid out over the mesh, how it is created."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from deepseek_jax.config.options import Config, LoraConfig
from deepseek_jax.model import lora, transformer
from deepseek_jax.model.layout import ModelWeights, PlacedModel, place_model
from deepseek_jax.model.moe import SelectionBias
from deepseek_jax.objectives.base import Frozen
from deepseek_jax.parallel import compression, offload, sharding
from deepseek_jax.train import projection, some_experts, trainable
from deepseek_jax.train.loss_scale import LossScale, init_loss_scale
from deepseek_jax.train.optimizer import make_optimizer


class TrainState(NamedTuple):
    """A pytree of arrays. The selection bias is no parameter: no gradient, no optimizer, no decay."""

    step: jax.Array  # int32: optimizer steps taken, skipped ones included
    params: nnx.State  # float32: the parameters that learn; the model's, and those of projection.py
    bias: nnx.State  # float32 e_score_correction_bias of every MoE layer; empty without one
    opt_state: Any
    bad_steps: jax.Array  # int32: updates skipped in a row, for a non-finite loss or gradient
    skipped_steps: jax.Array  # int32: updates skipped in all
    residual: nnx.State | None = (
        # float32: what gradient_compression has not applied yet, of each parameter [R, ...] for R replicas
        None
    )
    loss_scale: LossScale | None = (
        None  # only where it is dynamic: other states, and their checkpoints, are without it
    )
    # the other parameters (trainable.py): a checkpoint holds them among `params`, but for the base of LoRA
    frozen: nnx.State = trainable.NONE
    esft: dict[str, jax.Array] | None = None  # which experts `params` holds (some_experts.py)

    def weights(self) -> ModelWeights:
        """Those of the model, all of them."""
        params, _ = projection.split(self.params)
        return ModelWeights(trainable.join(params, self.frozen), self.bias)


class Layout(NamedTuple):
    """Everything about the state that is known without holding it."""

    model: PlacedModel
    abstract: TrainState  # shapes and dtypes
    shardings: TrainState
    param_specs: nnx.State  # PartitionSpecs: of the parameters that learn, between steps,
    grad_specs: nnx.State  # of their gradients,
    opt_specs: nnx.State  # and of them while the optimizer works, and so of its state
    optimizer: optax.GradientTransformation
    frozen: Frozen | None = None  # the objective's: not part of the state, an argument of the step
    multipliers: trainable.Multipliers = trainable.Multipliers()  # which parameters learn

    def abstract_frozen(self) -> ModelWeights | None:
        """Shapes of the frozen weights with their shardings: the step's third argument."""
        return None if self.frozen is None else self.frozen.model.abstract_sharded()

    def begin(self, params: nnx.State) -> tuple[nnx.State, nnx.State]:
        """(those that learn, frozen ones) of all parameters of the model, in their shards."""
        learns, frozen = self.multipliers.split(params)
        if not self.multipliers.experts:
            return learns, frozen

        def create(frozen: nnx.State) -> nnx.State:
            index = some_experts.index_of(self.multipliers)
            return some_experts.stacks(self.multipliers, frozen, index)

        where = [
            (p, s)
            for p, s in nnx.to_flat_state(self.shardings.params)
            if self.multipliers.stack_of(p)
        ]
        stacks = jax.jit(create, out_shardings=nnx.from_flat_state(where))(frozen)
        return trainable.join(learns, stacks), frozen

    def new_projection(self) -> nnx.State:
        """The parameters of projection.py as a run begins with them, in their shards."""
        _, where = projection.split(self.shardings.params)
        if not where:
            return trainable.NONE
        return jax.jit(lambda: projection.create(self.frozen), out_shardings=where)()

    def bytes_per_device(self, mesh: jax.sharding.Mesh) -> dict[str, int]:
        """Bytes per device by kind: parameters that learn, the others, gradients, optimizer state, the
        residual of compressed gradients, and the weights of a frozen model; "host": bytes offloaded to the
        device's host.
        """

        # Gradients are where their parameters are.
        def as_stored(g, p):
            return jax.NamedSharding(p.mesh, g.spec, memory_kind=p.memory_kind)

        gradients = jax.tree.map(
            as_stored, sharding.shardings(self.grad_specs, mesh), self.shardings.params
        )
        held = {
            "parameters": (self.abstract.params, self.shardings.params),
            "gradients": (self.abstract.params, gradients),
            "optimizer": (self.abstract.opt_state, self.shardings.opt_state),
        }
        if self.abstract.frozen:
            held["frozen_parameters"] = (self.abstract.frozen, self.shardings.frozen)
        if self.abstract.residual is not None:
            held["residual"] = (self.abstract.residual, self.shardings.residual)
        if self.frozen is not None:
            held["frozen"] = self.frozen.model.abstract, self.frozen.model.shardings
        out = {name: sharding.bytes_per_device(*arrays) for name, arrays in held.items()}
        host = sum(
            sharding.bytes_per_device(*arrays, memory_kind=offload.HOST) for arrays in held.values()
        )
        return out | ({"host": host} if host else {})

    def abstract_sharded(self) -> TrainState:
        """Shapes with their shardings: what a checkpoint is restored into."""
        return jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            self.abstract,
            self.shardings,
        )


def make_layout(config: Config, mesh: jax.sharding.Mesh, frozen: Frozen | None = None) -> Layout:
    """Shapes and shardings of the state of a run on a mesh, whose devices may be elsewhere, beside a frozen
    model on the same mesh.
    """
    # Without a mesh in context jax 0.11 forgets the shardings of what eval_shape sees: moments laid out
    # unlike their parameters.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return _make_layout(config, mesh, frozen)


def _make_layout(config: Config, mesh: jax.sharding.Mesh, frozen_model: Frozen | None) -> Layout:
    model = place_model(config, mesh)
    multipliers = trainable.multipliers(config, model.abstract.params)
    params, frozen = multipliers.split(model.abstract.params)
    index = dict(multipliers.experts)
    params = trainable.join(params, some_experts.stacks(multipliers, frozen, index))
    params = trainable.join(params, projection.abstract(frozen_model))
    esft = {s: jax.ShapeDtypeStruct(a.shape, a.dtype) for s, a in index.items()} or None
    param_specs, grad_specs, opt_specs = (
        sharding.specs(params, r, config.sharding.min_weight_size)
        for r in sharding.storage_rules(config)
    )
    optimizer = make_optimizer(config, params, multipliers)
    opt_state, opt_state_specs = _optimizer_state(
        optimizer, params, sharding.shardings(opt_specs, mesh)
    )
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    residual, residual_specs = compression.residual(config, params, grad_specs, mesh.shape["data"])
    scale = jax.eval_shape(lambda: init_loss_scale(config))
    bias = model.abstract.bias
    abstract = TrainState(
        scalar, params, bias, opt_state, scalar, scalar, residual, scale, frozen, esft
    )
    specs = TrainState(
        jax.P(),
        None,
        None,
        opt_state_specs,
        jax.P(),
        jax.P(),
        residual_specs,
        jax.tree.map(lambda _: jax.P(), scale),
        trainable.NONE,
        jax.tree.map(lambda _: jax.P(), esft),
    )
    shardings = sharding.shardings(specs, mesh)
    shardings = shardings._replace(
        params=offload.place_params(config, sharding.shardings(param_specs, mesh)),
        frozen=multipliers.split(model.shardings.params)[1],
        bias=model.shardings.bias,
        opt_state=offload.place_optimizer(config, opt_state, shardings.opt_state),
    )
    return Layout(
        model,
        abstract,
        shardings,
        param_specs,
        grad_specs,
        opt_specs,
        optimizer,
        frozen_model,
        multipliers,
    )


def _optimizer_state(
    optimizer: optax.GradientTransformation, params: nnx.State, shardings: nnx.State
) -> tuple[Any, Any]:
    """(shapes, PartitionSpecs) of its state, for parameters laid out as they are while it works.

    The specs are read from the types, as mesh axes are Explicit: moments are laid out as their parameters,
    row and column means over the axes that divide what is left of them, counters are whole.
    """
    sharded = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), params, shardings
    )
    found = jax.eval_shape(optimizer.init, sharded)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), found)
    return shapes, jax.tree.map(lambda a: jax.P() if a.sharding is None else a.sharding.spec, found)


def init_state(config: Config, layout: Layout) -> TrainState:
    """A fresh state, created in its shards: no device or host ever holds the whole model. The same on every
    mesh.
    """

    def create() -> TrainState:
        _, params, bias = nnx.split(
            transformer.Transformer(config, nnx.Rngs(config.seed)), nnx.Param, SelectionBias
        )
        multipliers = layout.multipliers
        params, frozen = multipliers.split(lora.held(config.lora, params))
        frozen = sharding.reshard(frozen, multipliers.split(layout.model.specs.params)[1])
        esft = some_experts.index_of(multipliers)
        params = trainable.join(params, some_experts.stacks(multipliers, frozen, esft))
        params = trainable.join(params, projection.create(layout.frozen))
        params = sharding.reshard(params, layout.opt_specs)
        opt_state = layout.optimizer.init(params)
        zero = jnp.zeros((), jnp.int32)
        residual = jax.tree.map(
            lambda a, s: jnp.zeros(a.shape, a.dtype, out_sharding=s),
            layout.abstract.residual,
            layout.shardings.residual,
        )
        params = sharding.reshard(params, layout.param_specs)
        scale = init_loss_scale(config)
        state = TrainState(zero, params, bias, opt_state, zero, zero, residual, scale, frozen, esft)
        return offload.to(state, layout.shardings)

    # Dozens of random weights are much code for a CPU and little work: LLVM's first level compiles it in half
    # the time, to the same numbers.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(create, out_shardings=layout.shardings, compiler_options=options)()


def state_around(config: Config, layout: Layout, params: nnx.State, bias: nnx.State) -> TrainState:
    """A state of step 0 with weights from elsewhere, in the shards of the layout. Nothing else of a fresh
    state depends on them.
    """

    def create() -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        residual = jax.tree.map(
            lambda a, s: jnp.zeros(a.shape, a.dtype, out_sharding=s),
            layout.abstract.residual,
            layout.shardings.residual,
        )
        state = TrainState(
            zero,
            None,
            None,
            layout.optimizer.init(zero_params(layout)),
            zero,
            zero,
            residual,
            init_loss_scale(config),
            None,
            some_experts.index_of(layout.multipliers),
        )
        return offload.to(state, shardings)

    shardings = layout.shardings._replace(params=None, bias=None, frozen=None)
    params, frozen = layout.begin(params)
    params = trainable.join(params, layout.new_projection())
    rest = jax.jit(create, out_shardings=shardings)()
    return rest._replace(params=params, bias=bias, frozen=frozen)


def saved(state: TrainState, options: LoraConfig) -> TrainState:
    """What a checkpoint holds of a state: with LoRA the base is not in it, which nothing changes. Factors
    that a multiplier of 0 freezes are.
    """
    if not options.r:
        return state
    flat = nnx.to_flat_state(state.frozen)
    adapter = [(path, v) for path, v in flat if lora.learns(path, options)]
    return state._replace(frozen=nnx.from_flat_state(adapter))


def zero_params(layout: Layout) -> nnx.State:
    """Zeros laid out as the parameters while the optimizer works: its fresh state depends on no more."""
    return jax.tree.map(
        lambda a, s: jnp.zeros(a.shape, a.dtype, out_sharding=s),
        layout.abstract.params,
        layout.opt_specs,
    )


def _parts(path: tuple) -> list[str]:
    """Names along a tree path, without the attribute that a Variable keeps its array in."""
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    # Which parameters learn is no property of a checkpoint. Of experts of which some learn it has all: in a
    # TrainState these come after the stack of those that do.
    names[0] = "params" if names[0] == "frozen" else names[0]
    return names[:-1] if len(names) > 1 and names[-1] == "value" else names


def to_tree(state: Any) -> dict[str, Any]:
    """The same arrays as nested dicts with string keys: what a checkpoint holds."""
    out: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        *parents, name = _parts(path)
        node = out
        for p in parents:
            node = node.setdefault(p, {})
        node[name] = leaf
    return out


def from_tree(tree: dict[str, Any], like: Any) -> Any:
    """The inverse of `to_tree`: puts a checkpoint's arrays into the structure of `like`."""

    def pick(path, _):
        node = tree
        for p in _parts(path):
            node = node[p]
        return node

    return jax.tree_util.tree_map_with_path(pick, like)
