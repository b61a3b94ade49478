"""Score every expert on calibration text, by all methods at once.

OUT.safetensors holds what was added up over tokens (compress/scores.py), OUT.json what it was of, OUT.svg a
picture of --method by layer. `prune --scores=OUT.safetensors` needs no second pass.
"""

import argparse
import os
import pathlib

import numpy as np

from deepseek_jax.cli import arguments, texts
from deepseek_jax.compress import calibration, picture, scores
from deepseek_jax.compress.scores import Scores
from deepseek_jax.compress.source import open_source
from deepseek_jax.config.paths import check_output
from deepseek_jax.errors import UserError
from deepseek_jax.hf.provenance import model_files

SHOWN = tuple(m for m in scores.METHODS if m != "random")


def add_options(parser: arguments.Parser) -> None:
    parser.add_argument(
        "--method", choices=SHOWN, default="reap", help="that is shown (default %(default)s)"
    )
    calibration.add_options(parser)


def run(args: argparse.Namespace) -> None:
    if not args.out.endswith(".safetensors"):
        raise UserError(f"OUT={args.out} is no .safetensors file. Name it {args.out}.safetensors.")
    if not args.text:
        raise UserError(f"score needs calibration text. Give it with {calibration.OPTION}=FILE.")
    drawing = args.out.removesuffix(".safetensors") + ".svg"
    inputs = [*calibration.find(args.text), *model_files(args.model)]
    for path in (args.out, scores.sidecar(args.out), drawing):
        check_output("OUT", path, inputs)
    source = open_source(args.model, args.step)
    opened = calibration.open_for(args)
    text = calibration.read(opened, args)
    found = scores.collect(source, opened.model, text)
    if line := found.warning():
        print(f"warning: {line}")
    if found.layers:
        shown = picture.of_scores(found.of(args.method), found.layers, None, args.method)
        try:
            pathlib.Path(drawing).write_text(shown, encoding="utf-8")
        except OSError as e:
            raise UserError(
                f"OUT={args.out}: {drawing} cannot be written ({e.strerror}). Name another file."
            ) from e
    scores.write(args.out, found)
    print(table(found, args.method))
    print(f"wrote          {os.path.abspath(args.out)}")


def table(found: Scores, method: str) -> str:
    """For people: of each layer its influence, and how the scores are spread over its experts."""
    rows = [
        [
            "layer",
            "influence",
            f"{method} lowest",
            "median",
            "highest",
            "tokens an expert",
            "unseen",
        ]
    ]
    at = {layer: i for i, layer in enumerate(found.layers)}
    for layer in range(max(len(found.influence), max(found.layers, default=-1) + 1)):
        row = [
            str(layer),
            f"{found.influence[layer]:.4f}" if layer < len(found.influence) else "mtp",
        ]
        if layer in at:
            score_E, count_E = found.of(method)[at[layer]], found.arrays["frequency"][at[layer]]
            spread = (score_E.min(), float(np.median(score_E)), score_E.max())
            row += [f"{s:.4g}" for s in spread]
            row += [
                f"{texts.human(count_E.min())} to {texts.human(count_E.max())}",
                str(int((count_E == 0).sum())),
            ]
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    return f"read           {texts.human(found.tokens)} tokens\n" + texts.table(rows)
