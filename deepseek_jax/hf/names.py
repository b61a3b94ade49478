"""Where a model's arrays lie in a Hugging Face checkpoint: from an array to its tensors and regions of them.

The names themselves are in the record of each family (families/), those outside of layers here.
"""

import itertools
import re
from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import jax

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.hf.families import FAMILIES
from deepseek_jax.hf.families.name_tables import Alternatives, NameTable, one_name
from deepseek_jax.tensorfile import regions

TOP: NameTable = {
    "embed_tokens/weight": one_name("model.embed_tokens.weight"),
    "norm/weight": one_name("model.norm.weight"),
    "lm_head/kernel": one_name("lm_head.weight"),
}
# Copies of the embedding and the output head that DeepSeek-V3's and GLM's files have in layers of multi-token
# prediction.
MTP_COPIES = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "shared_head.head.weight": "lm_head.weight",
}


# By the end of an array's path; all others are as their tensors.
_KINDS = {
    "kernel": "matrix",
    "core": "matrix",
    "gate_up_proj": "gate_up",
    "down_proj": "down",
    "U": "factor",
    "V": "factor",
}


class Leaf(NamedTuple):
    """An array of the model and the tensors that it is made of."""

    path: str  # "layers/mlp/gate/kernel"
    shape: tuple[int, ...]
    # What its layers' tensors begin with; one, possibly empty, where the array has no axis of layers.
    prefixes: tuple[str, ...]
    stacked: bool  # the first axis is that of layers
    names: Alternatives

    @property
    def kind(self) -> str:
        """plain (as the tensor), matrix ([in, out], transposed), gate_up [E, D, 2, F], down [E, F, D] or
        factor (of a shared core, [E, width, R], as the tensor of each expert).
        """
        return _KINDS.get(self.path.rpartition("/")[2], "plain")


class TensorRegion(NamedTuple):
    """A part of an array that is a region of one tensor."""

    # Leading index of a vector or a matrix in the part of the array that was asked for; of gate_up (layer,
    # expert, pair), of down and factors (layer, expert).
    at: tuple[int, ...]
    name: str
    region: regions.Index  # of the tensor
    shape: tuple[int, ...]  # of the whole tensor


def leaf_of(path: str, shape: tuple[int, ...], family: str, model: ModelConfig) -> Leaf:
    """The tensors of a variable of Transformer.

    Raises:
      KeyError: the family has no such variable.
    """
    table = FAMILIES[family].tensors
    dense, layers = model.first_k_dense_replace, model.num_hidden_layers
    first, _, rest = path.partition("/")
    if first in ("dense_layers", "layers"):
        held = range(dense) if first == "dense_layers" else range(dense, layers)
        return Leaf(path, shape, tuple(f"model.layers.{i}." for i in held), True, table[rest])
    if first == "mtp":
        depth, _, rest = rest.partition("/")
        prefix = f"model.layers.{layers + int(depth)}."
        return Leaf(path, shape, (prefix,), False, table[rest.removeprefix("layer/")])
    return Leaf(path, shape, ("",), False, TOP[path])


def leaves(state: Any, family: str, model: ModelConfig) -> list[Leaf]:
    """The leaves of a state of Transformer, parameters or selection biases, in its order.

    Raises:
      KeyError: the family has no such variable.
    """
    flat = jax.tree_util.tree_leaves_with_path(state)
    return [leaf_of(path_of(path), tuple(leaf.shape), family, model) for path, leaf in flat]


def path_of(path: tuple) -> str:
    """ "layers/mlp/gate/kernel" of a leaf of a state."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def follows_dtype(path: str, dimensions: int) -> bool:
    """Whether an array is in the dtype that a model was asked for, and not in its own.

    Matrices are, but the router's.

    Args:
      path: of the array.
      dimensions: that it has in one layer.
    """
    return dimensions > 1 and not path.endswith("/gate/kernel")


def names_of(leaf: Leaf, prefix: str, present: Container[str] | None = None) -> tuple[str, ...]:
    """The names of one layer's tensors, `{e}` still in them.

    They are those of the alternative that is `present`, else of the first.
    """
    if present is not None:
        for parts in leaf.names:
            if all((prefix + part).format(e=0) in present for part in parts):
                return tuple(prefix + part for part in parts)
    return tuple(prefix + part for part in leaf.names[0])


def tensor_regions(
    leaf: Leaf, index: regions.Index, present: Container[str] | None = None
) -> Iterator[TensorRegion]:
    """The regions of tensors that make up a part of an array, in order.

    Args:
      leaf: the array.
      index: which part: a slice with start and stop for every axis.
      present: names of tensors that exist, to choose among alternatives.
    """
    layers = index[0] if leaf.stacked else slice(0, 1)
    body, shape = (index[1:], leaf.shape[1:]) if leaf.stacked else (index, leaf.shape)
    for i, layer in enumerate(range(layers.start, layers.stop)):
        at = (i,) if leaf.stacked else ()
        names = names_of(leaf, leaf.prefixes[layer], present)
        if leaf.kind == "plain":
            yield TensorRegion(at, names[0], body, shape)
        elif leaf.kind == "matrix":
            yield TensorRegion(at, names[0], body[::-1], shape[::-1])
        elif leaf.kind == "gate_up":
            yield from _gate_up_regions(names, at, body, shape)
        elif leaf.kind == "factor":
            for j, e in enumerate(range(body[0].start, body[0].stop)):
                yield TensorRegion((*at, j), names[0].format(e=e), body[1:], shape[1:])
        else:
            yield from _down_regions(names, at, body, shape)


def _gate_up_regions(
    names: tuple[str, ...], at: tuple[int, ...], body: regions.Index, shape: tuple[int, ...]
) -> Iterator[TensorRegion]:
    (experts, width, pair, f), (_, d_all, _, f_all) = body, shape
    for (j, e), (k, part) in itertools.product(
        enumerate(range(experts.start, experts.stop)), enumerate(range(pair.start, pair.stop))
    ):
        here = (*at, j, k)
        if len(names) == 2:
            yield TensorRegion(here, names[part].format(e=e), (f, width), (f_all, d_all))
        else:  # all experts in one tensor, gate above up
            both = slice(part * f_all + f.start, part * f_all + f.stop)
            region = (slice(e, e + 1), both, width)
            yield TensorRegion(here, names[0], region, (shape[0], 2 * f_all, d_all))


def _down_regions(
    names: tuple[str, ...], at: tuple[int, ...], body: regions.Index, shape: tuple[int, ...]
) -> Iterator[TensorRegion]:
    (experts, f, width), (_, f_all, d_all) = body, shape
    for j, e in enumerate(range(experts.start, experts.stop)):
        here = (*at, j)
        if "{e}" in names[0]:
            yield TensorRegion(here, names[0].format(e=e), (width, f), (d_all, f_all))
        else:
            region = (slice(e, e + 1), width, f)
            yield TensorRegion(here, names[0], region, (shape[0], d_all, f_all))


def view(array: Any, leaf: Leaf, at: tuple[int, ...]) -> Any:
    """The part of an array that a TensorRegion is about, as its tensor lies: a vector or [rows, columns]."""
    if leaf.kind in ("plain", "factor"):
        return array[at]
    if leaf.kind == "gate_up":
        *lead, pair = at
        return array[tuple(lead)][:, pair].T
    return array[at].T


def tensors(leaf: Leaf, present: Container[str] | None = None) -> dict[str, tuple[int, ...]]:
    """{name: shape} of all tensors of an array."""
    return {r.name: r.shape for r in tensor_regions(leaf, regions.whole(leaf.shape), present)}


def order(name: str) -> tuple:
    """The key that sorts names as checkpoints have them: embedding, layers by number, the rest."""
    first = 1
    if name.startswith("model.embed"):
        first = -1
    elif name.startswith("model.layers."):
        first = 0
    return first, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def copies_of(name: str, model: ModelConfig) -> list[str]:
    """Where layers of multi-token prediction have a copy of a tensor, as in DeepSeek-V3's release."""
    first = model.num_hidden_layers
    layers = range(first, first + model.num_nextn_predict_layers)
    original = {"lm_head.weight": "model.embed_tokens.weight"} if model.tie_word_embeddings else {}
    return [
        f"model.layers.{i}.{copy}"
        for i in layers
        for copy, of in MTP_COPIES.items()
        if original.get(of, of) == name
    ]
