"""Where a model's arrays lie in a Hugging Face checkpoint: one literal name table a family, and the way from one array to its tensors.

A table goes from the path of a variable below its layer (model/transformer.py) to the name of its tensor below `model.layers.N.`.
Where checkpoints differ there are alternatives: the first is what the hub has and what export writes. Routed experts are one tensor
each on the hub, with `{e}` in the name, or all in one. A name with two parts is the pair of gate and up projections.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.hf.families import FAMILIES
from deepseek_jax.hf.families.name_tables import Alternatives, NameTable, one_name

TOP: NameTable = {
    "embed_tokens/weight": one_name("model.embed_tokens.weight"),
    "norm/weight": one_name("model.norm.weight"),
    "lm_head/kernel": one_name("lm_head.weight"),
}
# Copies of the embedding and the output head that DeepSeek-V3's and GLM's files have in layers of multi-token prediction.
MTP_COPIES = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "shared_head.head.weight": "lm_head.weight",
}


class Leaf(NamedTuple):
    """An array of the model and the tensors that it is made of."""

    path: str  # "layers/mlp/gate/kernel"
    shape: tuple[int, ...]
    prefixes: tuple[
        str, ...
    ]  # what its layers' tensors begin with; one, possibly empty, where the array has no axis of layers
    stacked: bool  # the first axis is that of layers
    names: Alternatives

    @property
    def kind(self) -> str:
        """plain (as the tensor), matrix ([in, out], transposed), gate_up ([E, D, 2, F]) or down ([E, F, D])."""
        last = self.path.rpartition("/")[2]
        return {"kernel": "matrix", "gate_up_proj": "gate_up", "down_proj": "down"}.get(
            last, "plain"
        )


class Piece(NamedTuple):
    """A part of an array that is a region of one tensor."""

    at: tuple[
        int, ...
    ]  # leading index of a vector or a matrix in the array's part; gate_up: (layer, expert, pair)
    name: str
    region: tuple[slice, ...]  # of the tensor
    shape: tuple[int, ...]  # of the whole tensor


def leaf_of(path: str, shape: tuple[int, ...], family: str, model: ModelConfig) -> Leaf:
    """The tensors of a variable of Transformer.

    Raises:
      KeyError: the family has no such variable.
    """
    table, dense, layers = (
        FAMILIES[family].tensors,
        model.first_k_dense_replace,
        model.num_hidden_layers,
    )
    first, _, rest = path.partition("/")
    if first in ("dense_layers", "layers"):
        held = range(dense) if first == "dense_layers" else range(dense, layers)
        return Leaf(path, shape, tuple(f"model.layers.{i}." for i in held), True, table[rest])
    if first == "mtp":
        depth, _, rest = rest.partition("/")
        return Leaf(
            path,
            shape,
            (f"model.layers.{layers + int(depth)}.",),
            False,
            table[rest.removeprefix("layer/")],
        )
    return Leaf(path, shape, ("",), False, TOP[path])


def leaves(state: object, family: str, model: ModelConfig) -> list[Leaf]:
    """Of a state of Transformer, parameters or selection biases, in its order.

    Raises:
      KeyError: the family has no such variable.
    """
    flat = jax.tree_util.tree_leaves_with_path(state)
    return [leaf_of(path_of(path), tuple(leaf.shape), family, model) for path, leaf in flat]


def path_of(path: tuple) -> str:
    """ "layers/mlp/gate/kernel" of a leaf of a state."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def follows_dtype(path: str, dimensions: int) -> bool:
    """Whether an array, of so many dimensions in a layer, is in the dtype that a model was asked for, and not in its own: matrices but the router's."""
    return dimensions > 1 and not path.endswith("/gate/kernel")


def names_of(leaf: Leaf, prefix: str, present: object = None) -> tuple[str, ...]:
    """The names of one layer's tensors, `{e}` still in them: the alternative that is `present`, else the first."""
    for parts in leaf.names if present is not None else ():
        if all((prefix + part).format(e=0) in present for part in parts):
            return tuple(prefix + part for part in parts)
    return tuple(prefix + part for part in leaf.names[0])


def pieces(leaf: Leaf, index: tuple[slice, ...], present: object = None) -> Iterator[Piece]:
    """The regions of tensors that make up a part of an array, in order.

    Args:
      index: which part: a slice with start and stop for every axis.
      present: names of tensors that exist, to choose among alternatives.
    """
    size = lambda s: s.stop - s.start
    layers = index[0] if leaf.stacked else slice(0, 1)
    body, shape = (index[1:], leaf.shape[1:]) if leaf.stacked else (index, leaf.shape)
    for i, layer in enumerate(range(layers.start, layers.stop)):
        here = (i,) if leaf.stacked else ()
        names = names_of(leaf, leaf.prefixes[layer], present)
        if leaf.kind == "plain":
            yield Piece(here, names[0], body, shape)
        elif leaf.kind == "matrix":
            yield Piece(here, names[0], body[::-1], shape[::-1])
        elif leaf.kind == "gate_up":
            (experts, width, pair, f), (_, d_all, _, f_all) = body, shape
            for (j, e), (k, part) in itertools.product(
                enumerate(range(experts.start, experts.stop)),
                enumerate(range(pair.start, pair.stop)),
            ):
                if len(names) == 2:
                    yield Piece((*here, j, k), names[part].format(e=e), (f, width), (f_all, d_all))
                else:
                    rows = slice(part * f_all + f.start, part * f_all + f.start + size(f))
                    yield Piece(
                        (*here, j, k),
                        names[0],
                        (slice(e, e + 1), rows, width),
                        (shape[0], 2 * f_all, d_all),
                    )
        else:
            (experts, f, width), (_, f_all, d_all) = body, shape
            for j, e in enumerate(range(experts.start, experts.stop)):
                if "{e}" in names[0]:
                    yield Piece((*here, j), names[0].format(e=e), (width, f), (d_all, f_all))
                else:
                    yield Piece(
                        (*here, j), names[0], (slice(e, e + 1), width, f), (shape[0], d_all, f_all)
                    )


def view(array, leaf: Leaf, at: tuple[int, ...]):
    """The part of an array that a piece is about, in the orientation of its tensor: a vector or [rows, columns]."""
    if leaf.kind == "plain":
        return array[at]
    if leaf.kind == "gate_up":
        *lead, pair = at
        return array[tuple(lead)][:, pair].T
    return array[at].T


def tensors(leaf: Leaf, present: object = None) -> dict[str, tuple[int, ...]]:
    """{name: shape} of all tensors of an array."""
    return {p.name: p.shape for p in pieces(leaf, tuple(slice(0, n) for n in leaf.shape), present)}
