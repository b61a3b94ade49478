"""Drop the layers that change least: block influence, 1 - mean cos(input, output), on calibration text.

Dense layers before those with experts stay, unless --dense lets them go too: config.json then says
first_k_dense_replace of what is left.
"""

import argparse
import dataclasses
from collections.abc import Sequence

import numpy as np

from deepseek_jax.cli import arguments, texts
from deepseek_jax.compress import calibration, errors_of_layers, output, picture, scores
from deepseek_jax.compress.errors_of_layers import Reference
from deepseek_jax.compress.output import Compressed
from deepseek_jax.compress.parts import Plan
from deepseek_jax.compress.source import open_source
from deepseek_jax.config.options import ModelConfig
from deepseek_jax.errors import UserError
from deepseek_jax.hf.compression_map import expert_rows
from deepseek_jax.inference.loaded import config_for
from deepseek_jax.inference.opener import parse_mesh

PICTURE = "compression.svg"


def add_options(parser: arguments.Parser) -> None:
    parser.add_argument("--drop", type=int, required=True, metavar="N", help="layers that go")
    parser.add_argument(
        "--dense",
        action="store_true",
        help="dense layers in front of those with experts may go too",
    )
    parser.add_argument(
        "--scores",
        type=arguments.path,
        metavar="FILE",
        help="of `compress score`: the text is not read for influence again",
    )
    calibration.add_options(parser)


def run(args: argparse.Namespace) -> None:
    output.check(args.out)
    if args.text:
        calibration.find(args.text)
    source = open_source(args.model, args.step)
    check_count(source.model, args.drop, args.dense)
    if not args.text and not args.scores:
        raise UserError(
            f"--drop={args.drop} needs to see what layers do. Give calibration text with "
            f"{calibration.OPTION}=FILE, or --scores=FILE of `compress score`."
        )
    found = scores.read(args.scores, source) if args.scores else None
    before: Reference | None = None
    if args.text:
        # Whether the mesh fits what is left, too: as many layers, whichever they are.
        left = shallower(source.model, range(source.model.num_hidden_layers - args.drop))
        config_for(left, parse_mesh(args.mesh), args.dtype)
        opened = calibration.open_for(args)
        text = calibration.read(opened, args)
        before = errors_of_layers.reference(opened.model, text)
        found = found or scores.collect(source, opened.model, text)
        del opened
    assert found is not None
    kept = least(found.influence, source.model, args.drop, args.dense)
    model = shallower(source.model, kept)
    old, new = expert_rows(source.model), expert_rows(model)
    layers = [*kept, *_mtp(source.model)]
    rows = [old.index(layers[n]) for n in new]
    made = Compressed(
        model=model,
        parts=Plan(source, model, layers).parts,
        map=source.document.map.of_layers(kept, rows),
        operation={
            "kind": "layers",
            "method": "block_influence",
            "num_hidden_layers": len(kept),
            "dropped": [n for n in range(source.model.num_hidden_layers) if n not in kept],
            "scores_file": args.scores or "",
            "scores": [float(f"{s:.8g}") for s in found.influence],
            "calibration": found.notes.get("calibration"),
            "seed": args.seed,
            "layer_errors": None,
        },
    )
    operation = output.write(
        args.out,
        source,
        made,
        measure=None if before is None else lambda f: errors_of_layers.measure(f, before, kept),
        pictures={PICTURE: picture.of_influence(found.influence, kept)},
    )
    print(table(found.influence, kept, operation["layer_errors"]))
    print(f"wrote          {args.out}")


def _mtp(model: ModelConfig) -> range:
    first = model.num_hidden_layers
    return range(first, first + model.num_nextn_predict_layers)


def check_count(model: ModelConfig, drop: int, dense: bool) -> None:
    """Refuses a number of layers that cannot go.

    Raises:
      UserError: says how many can.
    """
    free = len(_candidates(model, dense))
    if not 0 <= drop < free:
        raise UserError(
            f"--drop={drop} is not between 0 and {free - 1}: of {free} layers that may go one has to stay. "
            f"Name fewer{'' if dense or not model.first_k_dense_replace else ', or give --dense'}."
        )


def _candidates(model: ModelConfig, dense: bool) -> range:
    first = 0 if dense or not model.has_experts else model.first_k_dense_replace
    return range(first, model.num_hidden_layers)


def least(influence: np.ndarray, model: ModelConfig, drop: int, dense: bool) -> list[int]:
    """The layers that stay: all but those of least influence, of equal ones the last go. One layer with
    experts stays where there are some.
    """
    candidates = list(_candidates(model, dense))
    order = sorted(candidates, key=lambda n: (influence[n], -n))
    gone: set[int] = set()
    for n in order:
        routed = [
            i for i in range(model.first_k_dense_replace, model.num_hidden_layers) if i not in gone
        ]
        if len(gone) < drop and not (model.has_experts and routed == [n]):
            gone.add(n)
    return [n for n in range(model.num_hidden_layers) if n not in gone]


def shallower(model: ModelConfig, kept: Sequence[int]) -> ModelConfig:
    """The options of a model that some layers are left of."""
    dense = sum(n < model.first_k_dense_replace for n in kept)
    return dataclasses.replace(model, num_hidden_layers=len(kept), first_k_dense_replace=dense)


def table(influence: np.ndarray, kept: Sequence[int], errors: Sequence[float] | None) -> str:
    """For people: of each layer its influence, its new number, and the error after it."""
    rows = [["layer", "influence", "becomes", "output error"]]
    for layer, value in enumerate(influence):
        new = str(kept.index(layer)) if layer in kept else "dropped"
        error = f"{errors[kept.index(layer)]:.4f}" if errors and layer in kept else ""
        rows.append([str(layer), f"{value:.4f}", new, error])
    return texts.table(rows)
