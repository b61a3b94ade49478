"""What a layer keeps for its backward pass, and where: `config.train.remat`, `config.offload.activations`."""

from collections.abc import Callable

import jax

from deepseek_jax.parallel.offload import HOST
from deepseek_jax.parallel.weights import WEIGHTS


def rematerialise(f: Callable, remat: str, offload: str = "") -> Callable:
    """f under `jax.checkpoint`: what a layer keeps for its backward pass, and where.

    Args:
      f: the forward pass of a layer.
      remat: `config.train.remat`; `auto`, where nobody has said what it stands for, is `full`.
      offload: `config.offload.activations`.
    """
    if remat == "none":
        return jax.checkpoint(f, policy=_all_but_weights)
    if remat == "dots":
        return jax.checkpoint(f, policy=_dots)
    if remat in ("full", "auto"):
        names: tuple[str, ...] = ()
    elif remat == "exchange":
        names = ("exchange",)
    else:
        names = tuple(remat.removeprefix("save:").split(","))
    if offload:
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=names,
            names_which_can_be_offloaded=offload.split(","),
            offload_src="device",
            offload_dst=HOST,
        )
        return jax.checkpoint(f, policy=policy)
    if not names:
        return jax.checkpoint(f)
    return jax.checkpoint(f, policy=jax.checkpoint_policies.save_only_these_names(*names))


# Primitives that lead from stored weights to the weights that are used.
_MOVES = (
    "reshard",
    "all_gather",
    "pcast",
    "pvary",
    "convert_element_type",
    "reshape",
    "squeeze",
    "transpose",
)


def _dots(primitive, *_, **params) -> bool:
    """A `jax.checkpoint` policy: keeps results of matmuls, and what has a name."""
    if primitive.name == "name":
        return params["name"] != WEIGHTS
    return primitive.name in ("dot_general", "top_k")


def _all_but_weights(primitive, *_, **params) -> bool:
    """A `jax.checkpoint` policy: keeps what was computed, but no weights as they are used.

    Without it every layer's weights would be kept gathered and cast, copied out of their stack and
    into another.
    """
    if primitive.name == "name":
        return params["name"] != WEIGHTS
    return primitive.name not in _MOVES
