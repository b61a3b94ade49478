"""Pictures of a compression, by layer: SVG."""

from collections.abc import Sequence

import numpy as np

from deepseek_jax.cli.svg import (
    BLUE,
    ORANGE,
    RIGHT,
    WIDTH,
    Panel,
    axes,
    dot,
    label,
    legend,
    picture,
    span,
)

HEIGHT, TOP = 320, 40  # pixels, of the whole and above the panel


def of_scores(
    scores_LE: np.ndarray,
    layers: Sequence[int],
    kept: Sequence[Sequence[int]] | None,
    method: str,
) -> str:
    """The scores of all experts by layer: kept ones blue, others orange.

    Args:
      scores_LE: of the rows in `layers`.
      layers: their numbers.
      kept: the experts that each row keeps; None: nothing is pruned.
      method: that the scores are of.
    """
    values = [float(s) for s in scores_LE.flat]
    panel = _panel(values, max(layers, default=0))
    parts = axes(panel, numbered=True)
    for i, layer in enumerate(layers):
        chosen = set(kept[i]) if kept is not None else None
        for e, score in enumerate(scores_LE[i]):
            color = BLUE if chosen is None or e in chosen else ORANGE
            parts.append(dot(panel, (layer, float(score)), color, radius=2))
    entries = [("pruned", ORANGE), ("kept", BLUE)] if kept is not None else []
    parts += [*legend(panel, entries), label(WIDTH - RIGHT, HEIGHT - 4, "layer", anchor="end")]
    return picture(HEIGHT, f"{method} of every expert", parts)


def of_influence(influence: np.ndarray, kept: Sequence[int]) -> str:
    """The influence of every layer: kept ones blue, dropped ones orange."""
    panel = _panel([float(v) for v in influence], len(influence) - 1)
    parts = axes(panel, numbered=True)
    for layer, value in enumerate(influence):
        color = BLUE if layer in kept else ORANGE
        parts.append(dot(panel, (layer, float(value)), color))
    parts += legend(panel, [("dropped", ORANGE), ("kept", BLUE)])
    parts.append(label(WIDTH - RIGHT, HEIGHT - 4, "layer", anchor="end"))
    return picture(HEIGHT, "block influence of every layer, 1 - mean cos(input, output)", parts)


def of_units(values: Sequence[np.ndarray], layers: Sequence[int]) -> str:
    """The share of the activations of their experts that the kept inner units have, an expert a dot.

    Args:
      values: of each row, the share of each of its experts.
      layers: the numbers of the rows.
    """
    panel = _panel([0.0, 1.0], max(layers, default=0))
    parts = axes(panel, numbered=True)
    for layer, shares in zip(layers, values, strict=True):
        parts += [dot(panel, (layer, float(s)), BLUE, radius=2) for s in shares]
    parts.append(label(WIDTH - RIGHT, HEIGHT - 4, "layer", anchor="end"))
    return picture(HEIGHT, "share of an expert's activations in the units that are kept", parts)


def _panel(values: Sequence[float], last: int) -> Panel:
    return Panel(TOP, HEIGHT - 36, *span([0.0, *values], floor=0.0), max(last, 1))
