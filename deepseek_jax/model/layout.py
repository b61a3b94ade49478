"""A model placed on a mesh: what is known of its weights without holding them, and how they become a model to
call.

Inference and frozen models need this only; training puts the optimizer's state around it (train/state.py).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from flax import nnx

from deepseek_jax.config.options import Config
from deepseek_jax.model import lora, transformer
from deepseek_jax.model.moe import SelectionBias
from deepseek_jax.parallel import offload, sharding


class ModelWeights(NamedTuple):
    """Arrays of a model, or their shapes, PartitionSpecs or shardings. The selection bias is not a parameter:
    nothing trains it.
    """

    params: nnx.State
    bias: nnx.State  # float32 e_score_correction_bias of every MoE layer; empty without one


class PlacedModel(NamedTuple):
    """A model's structure, and its weights' shapes and places on a mesh."""

    graphdef: nnx.GraphDef
    inference_graphdef: nnx.GraphDef  # the same model, which never drops a token
    abstract: ModelWeights  # shapes and dtypes
    specs: ModelWeights  # PartitionSpecs
    shardings: ModelWeights

    def merge(self, params: nnx.State, bias: nnx.State) -> transformer.Transformer:
        """The model with these weights."""
        return nnx.merge(self.graphdef, params, bias)

    def merge_for_inference(self, params: nnx.State, bias: nnx.State) -> transformer.Transformer:
        """The model for evaluation and sampling: `moe.drop` is of training only, as in a batch of few tokens
        it would drop many.
        """
        return nnx.merge(self.inference_graphdef, params, bias)

    def abstract_sharded(self) -> ModelWeights:
        """Shapes with their shardings."""
        return jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            self.abstract,
            self.shardings,
        )

    def bytes_per_device(self) -> int:
        """Bytes of the weights that one device holds."""
        return sharding.bytes_per_device(self.abstract, self.shardings)


def abstract_model(config: Config) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graphdef, parameters, selection biases) as shapes, without allocating anything."""
    return nnx.split(
        nnx.eval_shape(lambda: transformer.Transformer(config, nnx.Rngs(0))),
        nnx.Param,
        SelectionBias,
    )


def place_model(
    config: Config, mesh: jax.sharding.Mesh, dtype: Any = None, frozen: bool = False
) -> PlacedModel:
    """The model of a config on a mesh, whose devices may be elsewhere.

    Args:
      dtype: of the parameters; as they are trained by default, float32 but for the base of LoRA.
      frozen: nothing of it is trained: its matrices are in config.lora.base_dtype, as the base of LoRA.
    """
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        graphdef, params, bias = abstract_model(config)
        if dtype is not None:
            params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), params)
        elif config.lora.r or frozen:
            params = jax.eval_shape(functools.partial(lora.in_base_dtype, config.lora), params)
        rules = sharding.storage_rules(config)[0]
        specs = ModelWeights(
            sharding.specs(params, rules, config.sharding.min_weight_size),
            sharding.specs(bias, sharding.COMPUTE_RULES),
        )
        shardings = sharding.shardings(specs, mesh)
        shardings = shardings._replace(params=offload.place_params(config, shardings.params))
        never_drops = dataclasses.replace(config, moe=dataclasses.replace(config.moe, drop=False))
        inference = abstract_model(never_drops)[0] if config.moe.drop else graphdef
        return PlacedModel(graphdef, inference, ModelWeights(params, bias), specs, shardings)
