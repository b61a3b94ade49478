"""What generation needs of a model: how to build it, its weights, and the mesh that they lie on."""

from typing import NamedTuple, Protocol

import jax
from flax import nnx

from deepseek_jax.model.transformer import Transformer


class InferenceLayout(Protocol):
    """The part of a layout that generation uses."""

    def merge_for_inference(self, params: nnx.State, bias: nnx.State) -> Transformer:
        """The model with these weights, which never drops a token."""
        ...


class PlacedModel(NamedTuple):
    """A model on a mesh, which any program can be compiled for: no optimizer, no training state."""

    layout: InferenceLayout
    params: nnx.State
    bias: nnx.State  # the selection biases of the routers
    mesh: jax.sharding.Mesh

    def net(self) -> Transformer:
        return self.layout.merge_for_inference(self.params, self.bias)
