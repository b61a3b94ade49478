"""The teacher of a distillation: opened and compared with the student before anything is compiled, read in
its shards when the run begins.

It is a Hugging Face checkpoint, or the newest checkpoint of a run. On the mesh of the run it lies as a
model that is trained would, its matrices in config.distill.teacher_dtype, without layers of multi-token
prediction.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.cli.progress import Bar
from deepseek_jax.cli.texts import human
from deepseek_jax.config.options import (
    Config,
    LoraConfig,
    OffloadConfig,
    ShardingConfig,
)
from deepseek_jax.errors import UserError
from deepseek_jax.hf import base as adapted
from deepseek_jax.hf import reader
from deepseek_jax.model.count import Count, count
from deepseek_jax.model.layout import ModelWeights, PlacedModel, abstract_model, place_model
from deepseek_jax.parallel.mesh import BATCH_AXES, check_model
from deepseek_jax.parallel.quantized import QuantizedWeight, inputs_of, quantize
from deepseek_jax.run import base
from deepseek_jax.run.student_map import map_of
from deepseek_jax.run.teacher_files import (
    OPTION,
    Found,
    Weights,
    check_tokenizer,
    check_weights,
    find,
)
from deepseek_jax.train import workdir as workdirs
from deepseek_jax.train.state import from_tree, to_tree


class Teacher:
    """A FrozenSource (objectives/base.py).

    Attributes:
      config: to run it with, on the mesh of the run: its model with the student's vocab_size.
      vocab_size: ids that its own embedding and head have.
      identity: tells its weights from others.
    """

    def __init__(
        self, config: Config, found: Found, weights: Weights | None = None, progress: bool = False
    ):
        """
        Args:
          config: of the run.
          weights: what they are known by; None: they are not there.
          progress: show a bar on stderr when its weights are read.
        """
        held = config.distill.teacher_dtype or config.train.dtype
        # The student's vocab_size: what both say of a word stands in the same column.
        model = dataclasses.replace(
            found.model, vocab_size=config.model.vocab_size, num_nextn_predict_layers=0
        )
        # What it says is not to depend on how the student is trained.
        self.config = dataclasses.replace(
            config,
            model=model,
            train=dataclasses.replace(config.train, fp8="none"),
            moe=dataclasses.replace(config.moe, fp8_dispatch=False),
            lora=LoraConfig(base_dtype=held),
            offload=OffloadConfig(),
        )
        self.map = found.map
        if config.distill.top_k:
            # The other methods add up a token's experts in an order that follows from the rows beside it,
            # which for a record must not count (distill/program.py).
            moe = dataclasses.replace(self.config.moe, dispatch="all_to_all")
            self.config = dataclasses.replace(self.config, moe=moe)
        self.vocab_size = found.model.vocab_size
        self.identity = weights.identity if weights else ""
        self._step = weights.step if weights else None
        self._found = found
        self._progress = progress

    @functools.cached_property
    def count(self) -> Count:
        """Its parameters and FLOPs."""
        length = self.config.train.sequence_length
        return count(self.config.model, abstract_model(self.config)[1], length)

    @property
    def description(self) -> str:
        """Its folder, size and dtype, for people."""
        m = self.config.model
        shape = f"{m.num_hidden_layers} layers, hidden {m.hidden_size}"
        if m.has_experts:
            shape += f", {m.n_routed_experts} experts, {m.num_experts_per_tok} per token"
        size = f"{human(self.count.total)} parameters in {self.config.lora.base_dtype}"
        return f"{self._found.folder}: {size}, {shape}"

    def place(self, mesh: jax.sharding.Mesh) -> PlacedModel:
        """Raises UserError: the mesh does not divide it."""
        # It runs outside of the pipeline, and its batch is the student's.
        shape = dict(mesh.shape)
        shape |= {"stage": 1, "fsdp": shape["fsdp"] * shape["stage"]}
        ways = math.prod(shape[a] for a in BATCH_AXES)
        config = dataclasses.replace(
            self.config,
            train=dataclasses.replace(self.config.train, batch_size=ways, accumulation=1),
            sharding=ShardingConfig(self.config.sharding.strategy),
        )
        try:
            check_model(config, shape)
        except UserError as e:
            raise UserError(
                f"{OPTION}={self.config.distill.teacher} does not fit the mesh: {e}"
            ) from e
        return place_model(self.config, mesh, frozen=True)

    def load(self, placed: PlacedModel) -> ModelWeights:
        """Raises UserError: its files cannot be read."""
        total = placed.abstract.params
        size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(total))
        with Bar("reading the teacher", size, self._progress) as bar:
            if self._found.run is None:
                return self._of_hugging_face(placed, bar.advance)
            return self._of_run(self._found.run, placed, bar.advance)

    def _of_hugging_face(self, placed: PlacedModel, done: Callable[[int], None]) -> ModelWeights:
        source, _, family = reader.open_source(self._found.folder)
        words = self.vocab_size if self.vocab_size != self.config.model.vocab_size else None
        out = base.read(source, self.config, family, placed, True, words, done)
        source.close()
        return out

    def _of_run(
        self, run: Config, placed: PlacedModel, done: Callable[[int], None]
    ) -> ModelWeights:
        """Read as it was trained, float32, then held as it is placed, array by array."""
        workdir = self._found.folder
        mesh = jax.tree.leaves(placed.shardings)[0].mesh
        checkpoints = Checkpointer(
            workdirs.checkpoints(workdir, run), read_only=True, options=run.checkpoint
        )
        model = (
            run.model if run.lora.r else dataclasses.replace(run.model, num_nextn_predict_layers=0)
        )
        config = dataclasses.replace(self.config, model=model, lora=LoraConfig())
        own = place_model(config, mesh)
        if run.lora.r:
            opened = adapted.open_run(workdir, run, checkpoints, self._step)
            weights = ModelWeights(
                *reader.state_of(opened.source, config, opened.family, own, None, opened.adapter)
            )
            opened.source.close()
        else:
            wanted = own.abstract_sharded()
            weights = from_tree(checkpoints.restore_params(to_tree(wanted), self._step), wanted)
        checkpoints.close()
        return ModelWeights(held_as(weights.params, placed, done), _matching(weights.bias, placed))


def held_as(
    params: nnx.State, placed: PlacedModel, done: Callable[[int], None] | None = None
) -> nnx.State:
    """Float32 parameters as a placed frozen model holds them. Those that it has not are left out.

    Args:
      params: in their shards; each is given up when it is converted.
      done: is told of the bytes of each.
    """
    given = {path: v.get_value() for path, v in nnx.to_flat_state(params)}
    where = dict(nnx.to_flat_state(placed.shardings.params))
    out = []
    for path, variable in nnx.to_flat_state(placed.abstract.params):
        axes = tuple(variable.get_metadata()["out_sharding"])
        one = _converter(variable.get_value(), where[path].get_value(), axes)
        held = jax.block_until_ready(one(given.pop(path)))
        out.append((path, variable.replace(held)))
        if done is not None:
            done(sum(a.nbytes for a in jax.tree.leaves(held)))
    return nnx.from_flat_state(out)


def _converter(like: Any, sharding: Any, axes: tuple) -> Callable[[jax.Array], Any]:
    """From a float32 array to one of another dtype, in few bits, or with another number of words."""

    def convert(w: jax.Array) -> Any:
        if tuple(w.shape) != tuple(like.shape):
            axis = axes.index("vocab")
            w = jax.sharding.reshard(w, jax.P(*(None,) * w.ndim))
            size = like.shape[axis] - w.shape[axis]
            padding = [(0, max(size, 0), 0) if i == axis else (0, 0, 0) for i in range(w.ndim)]
            w = jax.lax.pad(w, jnp.zeros((), w.dtype), padding)
            w = jax.lax.slice_in_dim(w, 0, like.shape[axis], axis=axis)
        if isinstance(like, QuantizedWeight):
            return quantize("int8", w, inputs_of(axes))
        return w.astype(like.dtype)

    return jax.jit(convert, out_shardings=sharding)


def _matching(bias: nnx.State, placed: PlacedModel) -> nnx.State:
    """Of the layers that the placed model has."""
    wanted = {path for path, _ in nnx.to_flat_state(placed.abstract.bias)}
    return nnx.from_flat_state([(p, v) for p, v in nnx.to_flat_state(bias) if p in wanted])


def planned(config: Config) -> Teacher | None:
    """The teacher of a run that is only planned: a config.json is enough, and `load` is not for it."""
    d = config.distill
    if not d.teacher or d.cache:
        return None
    return Teacher(config, find(config)._replace(map=map_of(config)))


def open_teacher(config: Config, workdir: str, progress: bool = False) -> Teacher | None:
    """The teacher of a run; None where it has none.

    Args:
      config: its options, with the tokenizer that it reads with.
      workdir: of the run.
      progress: as Teacher.

    Raises:
      UserError: it cannot be read, is the run itself, has another tokenizer, fewer words than are used, or
        positions for shorter sequences.
    """
    given = config.distill.teacher
    if not given:
        return None
    found = find(config)._replace(map=map_of(config, workdir))
    if os.path.realpath(found.folder) == os.path.realpath(workdir):
        raise UserError(f"{OPTION}={given} is this run's own --workdir. Name another model.")
    longest, length = found.model.max_position_embeddings, config.train.sequence_length
    if longest < length:
        raise UserError(
            f"{OPTION}={given} has max_position_embeddings={longest}, below config.train.sequence_length="
            f"{length}. Lower config.train.sequence_length to {longest}."
        )
    weights = check_weights(found, given)
    check_tokenizer(config, found, weights.tokenizer)
    return Teacher(config, found, weights, progress)
