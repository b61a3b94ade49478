"""What generation needs of a model: how to build it, its weights, and the mesh that they lie on."""

from typing import NamedTuple

import jax
from flax import nnx

from deepseek_jax.model.layout import PlacedModel
from deepseek_jax.model.transformer import Transformer


class BoundModel(NamedTuple):
    """A placed model and its weights, which any program can be compiled for."""

    model: PlacedModel
    params: nnx.State
    bias: nnx.State  # the selection biases of the routers
    mesh: jax.sharding.Mesh

    def net(self) -> Transformer:
        """The model, which never drops a token."""
        return self.model.merge_for_inference(self.params, self.bias)
