"""How far a compressed model's layers are from those that they were made of, on calibration text.

Both models read the same tokens. A layer's error is the norm of the difference of the hidden states after
it, over that of the original's: what all layers so far have added up to. The original's states are taken
before it is given back, so that one model at a time is in memory.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from deepseek_jax.compress.calibration import Calibration, on_mesh
from deepseek_jax.data.fields import Rows
from deepseek_jax.inference.loaded import LoadedModel, load
from deepseek_jax.objectives.forward import run_model

_INPUTS = ("tokens", "segment_ids", "positions")


class Reference(NamedTuple):
    """What the original made of some of the text."""

    rows: Rows
    hidden: list[np.ndarray]  # of each layer [T, D], of the tokens, in the compute dtype
    dtype: str
    mesh: jax.sharding.Mesh


def reference(model: LoadedModel, text: Calibration) -> Reference:
    """The original's hidden states of the first batch of the text."""
    rows = {name: text.batches[0][name] for name in _INPUTS}
    return Reference(rows, _hidden(model, rows), model.full_config.train.dtype, model.mesh)


def measure(folder: str, before: Reference, layers: Sequence[int]) -> dict[str, Any]:
    """The errors of a compressed model, `layer_errors` of its operation in compression.json.

    Args:
      folder: of the compressed model.
      before: of the original.
      layers: the original's layer of each of its layers.
    """
    model = load(folder, before.dtype, before.mesh)
    after = _hidden(model, before.rows)
    pairs = zip(after, (before.hidden[n] for n in layers), strict=True)
    return {"layer_errors": [round(relative(now, then), 8) for now, then in pairs]}


def relative(now: np.ndarray, then: np.ndarray) -> float:
    """||now - then|| / ||then||, in float64."""
    now, then = now.astype(np.float64), then.astype(np.float64)
    return float(np.linalg.norm(now - then)) / max(float(np.linalg.norm(then)), 1e-300)


def _hidden(model: LoadedModel, rows: Rows) -> list[np.ndarray]:
    with jax.set_mesh(model.mesh):
        program = jax.jit(functools.partial(_run, model))
        hidden_LBSD = np.asarray(program(model.params, model.bias, on_mesh(model, rows)))
    return [hidden_BSD[rows["segment_ids"] > 0] for hidden_BSD in hidden_LBSD]


def _run(model: LoadedModel, params: Any, bias: Any, batch: dict[str, jax.Array]) -> jax.Array:
    net = model.layout.merge_for_inference(params, bias)
    hidden = run_model(net, batch, ("hidden",)).taps["hidden"]
    return jax.sharding.reshard(hidden, jax.P())
