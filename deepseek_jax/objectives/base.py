"""The boundary between what is learnt and how: an objective, and the model that it uses without training it.

train/step.py runs any objective on any mesh, with accumulation, stages and offloading. An objective keeps
three rules for that:

- Its loss and parts of a micro-batch are sums over tokens or sequences, divided by totals of the whole step's
  batch: those of micro-batches add up.
- Tokens of segment 0 count for nothing; a sequence of padding (every field at its `padding`) adds nothing.
- It looks at one sequence at a time; what it needs of others is in the totals.

The balance loss and the z-loss of the router are added for all objectives alike (routing.py).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
from flax import nnx

from deepseek_jax.config.options import Config
from deepseek_jax.data.fields import Field, Fields
from deepseek_jax.hf.compression_map import CompressionMap
from deepseek_jax.model.head import Head
from deepseek_jax.model.layout import ModelWeights, PlacedModel
from deepseek_jax.model.taps import Asked
from deepseek_jax.model.transformer import Output, Transformer

__all__ = [
    "Batch",
    "Field",
    "Fields",
    "Frozen",
    "FrozenOutput",
    "FrozenSource",
    "Objective",
    "Parts",
]

Batch = dict[str, jax.Array]  # by field, [B, ...] of a micro-batch, [A, B, ...] of a step
Parts = dict[str, jax.Array]  # named float32 scalars


class FrozenSource(Protocol):
    """Where a frozen model comes from, before there is a mesh. Whoever starts a run opens it
    (run/teacher.py): what an objective does with a model does not depend on the files that hold it.
    """

    @property
    def config(self) -> Config:
        """To run it with: the run's options, with its own model."""

    @property
    def map(self) -> CompressionMap | None:
        """Which of its layers and experts the student's stand for; None: nothing says so."""

    @property
    def vocab_size(self) -> int:
        """Ids that it has. Its embedding and head get the student's number: cut, or with zeros behind."""

    def place(self, mesh: jax.sharding.Mesh) -> PlacedModel:
        """Its shapes on the mesh of the run."""

    def load(self, placed: PlacedModel) -> ModelWeights:
        """Its weights, in their shards."""


class Frozen(NamedTuple):
    """A model that is used and not trained: a teacher, a reference.

    Its weights are an argument of the step: not donated, not saved, without gradient and optimizer state.
    """

    model: PlacedModel  # on the mesh of the run, by a layout of its own
    load: Callable[[], ModelWeights]  # reads them in their shards; called once, when a run begins
    taps: Asked = ()  # of its layers (model/taps.py)
    # makes the map from the trained model's hidden states to its own, where they differ: parameters that
    # learn, belong to the run and are in no export (train/projection.py)
    projection: Callable[[], nnx.Module] | None = None


class FrozenOutput(NamedTuple):
    """What a frozen model makes of a batch."""

    out: Output  # without statistics and multi-token prediction
    head: Head  # for model/head.py
    projection: nnx.State | None = (
        None  # of Frozen.projection, in training: the loss has its gradient
    )


class Objective(Protocol):
    """What a run learns. `fields` and `taps` may be plain attributes: they are only read."""

    @property
    def fields(self) -> Fields:
        """Fields of its batch, by name; tokens, segment_ids and positions among them. With `next_tokens`
        multi-token prediction runs."""

    @property
    def taps(self) -> Asked:
        """Taps of the model's layers (model/taps.py), which `loss` finds in `out.taps`."""

    def frozen(self, mesh: jax.sharding.Mesh) -> Frozen | None:
        """The frozen model, if it has one. Nothing is read before its `load` is called, so plan asks too."""

    def totals(self, batch: Batch, step: jax.Array) -> Any:
        """What the loss of a micro-batch needs of the whole step: denominators, and weights by step.

        Args:
          batch: all of the step's, with any axes before those of a sequence.
          step: int32, finished steps.

        Returns:
          A pytree of arrays.
        """

    def loss(
        self,
        model: Transformer,
        out: Output,
        batch: Batch,
        totals: Any,
        frozen_out: FrozenOutput | None,
    ) -> tuple[jax.Array, Parts]:
        """A micro-batch's share of the loss: (float32 scalar, what is reported of it by name)."""

    def measure(
        self, model: Transformer, out: Output, batch: Batch, frozen_out: FrozenOutput | None
    ) -> Parts:
        """Sums over a batch of held-out data [B, ...], to be added up over batches."""

    def figures(self, sums: dict[str, float]) -> dict[str, Any]:
        """What is reported of held-out data.

        Args:
          sums: of `measure`, added up; and `targets`, the scored tokens, and `text_bytes` of these, 0 where
            the tokenizer does not know them.
        """
