"""A loaded model in Python: `hf.load(path)`, `model(tokens_BS)`, `hf.save(model, path)`."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config.configdict import from_config_dict
from deepseek_jax.config.options import DTYPES, Config, ModelConfig, ShardingConfig, TrainConfig
from deepseek_jax.config.options import MeshConfig as MeshOptions
from deepseek_jax.config.validation import validate
from deepseek_jax.data import tokenizer_folder
from deepseek_jax.data.chat import Chat, end_ids
from deepseek_jax.errors import UserError
from deepseek_jax.hf import (
    configuration,
    exporter,
    names,
    peft,
    reader,
    shared_core,
    tokenizer_files,
)
from deepseek_jax.hf.provenance import SourceNotes, notes_of
from deepseek_jax.hf.tokenizer_files import Companions
from deepseek_jax.model.layout import PlacedModel, place_model
from deepseek_jax.parallel.mesh import AXES, BATCH_AXES, make_mesh
from deepseek_jax.train import workdir as workdirs


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a model came from.

    Attributes:
      folder: that it was loaded from.
      notes: how its checkpoint stored it.
      tokenizer: of a trained run, as tokenizer_files.tokenizer_of.
      find_stop_ids: by that tokenizer.
    """

    folder: str
    notes: SourceNotes
    tokenizer: str = ""
    find_stop_ids: Callable[[], frozenset[int]] | None = None


class LoadedModel:
    """Weights over a mesh, and the forward pass.

    Attributes:
      config: the options of the model.
      full_config: all options that it was built with: mesh, dtype, dispatch.
      mesh: that the weights are spread over.
      layout: how the weights lie on the mesh.
      params: the weights.
      bias: the selection biases of the router.
      notes: how its checkpoint stored it.
      family: the `model_type` that it is saved as.
      source: the folder that it was loaded from.
      tokenizer: of a trained run; else empty.
    """

    def __init__(
        self,
        full_config: Config,
        mesh: jax.sharding.Mesh,
        layout: PlacedModel,
        params: Any,
        bias: Any,
        origin: Origin,
    ):
        self.full_config = full_config
        self.config: ModelConfig = full_config.model
        self.mesh = mesh
        self.layout = layout
        self.params = params
        self.bias = bias
        self.notes = origin.notes
        self.family = origin.notes.family
        self.source = origin.folder
        self.tokenizer = origin.tokenizer
        self._find_stop_ids = origin.find_stop_ids
        self._forward = jax.jit(self._logits, static_argnames="count")
        self._engine: Any = None

    def __call__(self, tokens_BS: Any) -> jax.Array:
        """The logits of the tokens that come next.

        Args:
          tokens_BS: token ids, whole numbers [B, S], equally long sequences.

        Returns:
          float32 [B, S, V]: [b, s] tells of the token after tokens_BS[b, : s + 1].

        Raises:
          UserError: the ids are not those of the vocabulary, or the sequences are too long.
        """
        ids = np.asarray(tokens_BS)
        if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
            raise UserError(
                f"tokens are {ids.dtype}{list(ids.shape)} and not whole numbers [sequences, positions]. "
                f"Give a list of equally long lists of ids."
            )
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise UserError(
                f"tokens run from {ids.min()} to {ids.max()}, but the model has the ids 0 to "
                f"{self.config.vocab_size - 1}."
            )
        longest = self.config.max_position_embeddings
        if ids.shape[1] > longest:
            raise UserError(
                f"sequences of {ids.shape[1]} tokens are above the model's max_position_embeddings={longest}."
            )
        shards = math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)
        count = len(ids)
        padding = np.repeat(ids[:1], -count % shards, axis=0)
        ids = np.concatenate([ids, padding]).astype(np.int32)
        with jax.set_mesh(self.mesh):
            placed = jax.device_put(ids, jax.P(BATCH_AXES))
            return self._forward(self.params, self.bias, placed, count=count)

    def generate(
        self,
        tokens: Sequence[int] | Sequence[Sequence[int]],
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_ids: Iterable[int] | None = None,
        draft_tokens: int = 0,
    ) -> list[int] | list[list[int]]:
        """The tokens after a prompt, or after each of several of any lengths, without the one that ends them.

        Args:
          tokens: ids of a prompt, or a list of such.
          max_tokens: of an answer; it also ends at max_position_embeddings.
          temperature: divides the logits; 0 takes the likeliest token.
          top_k: draw from so many of the likeliest tokens; 0: all.
          top_p: draw from the smallest set of likeliest tokens with this probability.
          seed: a draw depends on it, the prompt's place in the list and the token's position alone.
          stop_ids: tokens that end an answer; None: `self.stop_ids`.
          draft_tokens: tokens that multi-token prediction layers draft per step; the answers stay the same.

        Returns:
          The ids of the answer, or a list of such.

        Raises:
          UserError: the ids are not those of the vocabulary, a prompt is empty or too long, or there is no
            multi-token prediction layer.
        """
        # generation/ reads checkpoints by this package.
        from deepseek_jax.inference.generation.bound import BoundModel
        from deepseek_jax.inference.generation.engine import Engine
        from deepseek_jax.inference.generation.sampling import Sampling

        one = len(tokens) > 0 and not isinstance(tokens[0], (Sequence, np.ndarray))
        given: Any = [tokens] if one else tokens
        prompts = [[int(i) for i in prompt] for prompt in given]
        self._check_prompts(prompts, draft_tokens)
        if (
            not 0 <= temperature < float("inf")
            or top_k < 0
            or not 0 < top_p <= 1
            or max_tokens < 1
            or not 0 <= seed < 2**32
        ):
            raise UserError(
                f"temperature={temperature} must be 0 or more and finite, top_k={top_k} 0 or more, "
                f"top_p={top_p} above 0 and at most 1, max_tokens={max_tokens} at least 1, seed={seed} a "
                f"32-bit number."
            )
        if self._engine is None:
            bound = BoundModel(self.layout, self.params, self.bias, self.mesh)
            self._engine = Engine(bound)
        stop = self.stop_ids if stop_ids is None else stop_ids
        if not prompts:
            return []
        sampling = Sampling(temperature, top_k, top_p, seed)
        out = self._engine.generate(prompts, max_tokens, sampling, stop, draft_tokens)
        return out[0] if one else out

    def _check_prompts(self, prompts: list[list[int]], draft_tokens: int) -> None:
        longest, vocab_size = self.config.max_position_embeddings, self.config.vocab_size
        for prompt in prompts:
            if not 0 < len(prompt) < longest:
                raise UserError(
                    f"a prompt has {len(prompt)} tokens, and not 1 to {longest - 1} "
                    f"(max_position_embeddings - 1). Give prompts of such lengths."
                )
            if min(prompt) < 0 or max(prompt) >= vocab_size:
                raise UserError(
                    f"tokens run from {min(prompt)} to {max(prompt)}, but the model has the ids 0 to "
                    f"{vocab_size - 1}."
                )
        if draft_tokens and not self.config.num_nextn_predict_layers:
            raise UserError(
                f"draft_tokens={draft_tokens} needs multi-token prediction layers, and this model has none. "
                f"Set draft_tokens=0."
            )

    @functools.cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer, the same as of the command: Chat.stop_ids, or without a tokenizer what
        the checkpoint's configs say.

        Raises:
          UserError: a file of the tokenizer is damaged.
        """
        return self._find_stop_ids() if self._find_stop_ids else stop_ids_of(self.source)

    def _logits(self, params, bias, tokens_BS, count: int) -> jax.Array:
        """Of the first `count` sequences; the others fill the batch."""
        chex.assert_rank(tokens_BS, 2)
        net = self.layout.merge_for_inference(params, bias)
        positions_BS = jax.lax.broadcasted_iota(
            jnp.int32, tokens_BS.shape, 1, out_sharding=jax.typeof(tokens_BS).sharding
        )
        out = net(tokens_BS, jnp.ones_like(tokens_BS), positions_BS)
        logits_BSV = net.logits(out.hidden_BSD)
        if count == len(tokens_BS):
            return logits_BSV
        return jax.sharding.reshard(logits_BSV, jax.P())[:count]


def load(
    path: str,
    dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
    adapter: str = "",
) -> LoadedModel:
    """A Hugging Face checkpoint as a model.

    Args:
      path: a folder with config.json and safetensors files.
      dtype: float32, bfloat16 or float16: of the weights and of the computation; router, norms and logits are
        float32.
      mesh: with the axes of parallel/mesh.py (any missing ones have size 1); all weights are sharded over it.
        None: the first device.
      adapter: the folder of an adapter as PEFT writes it, which is merged into the weights in float32.

    Raises:
      UserError: checkpoint or adapter cannot be read, do not fit each other or are not of a model that this
        version has; dtype or mesh do not fit.
    """
    source, model, family = reader.open_source(path)
    shared_core.check_trained(source)
    config, mesh = config_for(model, mesh, dtype)
    with jax.set_mesh(mesh):
        layout = place_model(config, mesh)
        merged = peft.read(adapter, model, family) if adapter else None
        params, bias = reader.state_of(source, config, family, layout, dtype, merged)
    source.close()
    origin = Origin(source.folder, notes_of(source, model, family))
    return LoadedModel(config, mesh, layout, params, bias, origin)


def save(model: LoadedModel, path: str, dtype: str | None = None) -> None:
    """Writes a loaded model as a Hugging Face checkpoint.

    The tokenizer files of the one that it was loaded from go with it.

    Args:
      model: what to write.
      path: a folder that does not exist yet.
      dtype: of all tensors but the selection bias; None: each as it was stored (FP8: bfloat16).

    Raises:
      UserError: the folder cannot be written, no family has such a model, or dtype is not float32, bfloat16
      or float16.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}.")
    companions = Companions(model.source)
    if model.tokenizer:  # of a run
        saved = from_config_dict(workdirs.read_config(model.source))
        companions = tokenizer_files.of_run(saved, model.source, model.tokenizer)
    family = model.family or configuration.find_family(model.config)
    arrays, leaves = {}, []
    for state in (model.params, model.bias):
        leaves += names.leaves(state, family, model.config)
        for tree_path, array in jax.tree_util.tree_leaves_with_path(state):
            arrays[names.path_of(tree_path)] = array

    def get(leaf: names.Leaf) -> jax.Array:
        return arrays[leaf.path]

    what = exporter.Export(
        model.config, family, leaves, get, companions, notes=model.notes, dtype=dtype
    )
    exporter.export(path, what)


def config_for(
    model: ModelConfig, mesh: jax.sharding.Mesh | None, dtype: str = "float32"
) -> tuple[Config, jax.sharding.Mesh]:
    """Options to run a model with, and a mesh that has all axes.

    Args:
      model: its options.
      mesh: as `load`.
      dtype: of weights and computation.

    Raises:
      UserError: the mesh has an axis of another name, or the model does not fit it.
    """
    shape = {a: 1 for a in AXES} | dict(mesh.shape if mesh is not None else {})
    if unknown := sorted(shape.keys() - set(AXES)):
        raise UserError(
            f"the mesh has an axis {unknown[0]!r}, and not only {', '.join(AXES)}. Name its axes so."
        )
    batch = math.prod(shape[a] for a in BATCH_AXES)
    length = min(model.max_position_embeddings, 512)
    train = TrainConfig(
        dtype=dtype,
        remat="full",
        batch_size=batch,
        sequence_length=max(length, model.num_nextn_predict_layers + 1),
    )
    config = Config(
        model=dataclasses.replace(model),
        mesh=MeshOptions(**shape),
        train=train,
        sharding=ShardingConfig(),
    )
    validate(config)
    devices = list(mesh.devices.flat) if mesh is not None else jax.devices()[:1]
    return config, make_mesh(config, devices)


def stop_ids_of(folder: str) -> frozenset[int]:
    """Tokens that end an answer of a checkpoint."""
    return Chat(folder).stop_ids if tokenizer_folder.find(folder) else end_ids(folder)
