"""Keep the N best experts of every layer, by scores on calibration text.

Kept experts stay as they are, in ascending order, with their rows of the router and their selection biases.
Where the router chooses groups first, every group keeps as many. Layers of multi-token prediction are
pruned by scores of their own. Methods: compress/scores.py.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from deepseek_jax.cli import arguments, texts
from deepseek_jax.compress import calibration, errors_of_layers, output, parts, picture, scores
from deepseek_jax.compress.errors_of_layers import Reference
from deepseek_jax.compress.output import Compressed
from deepseek_jax.compress.parts import DOWN, Plan
from deepseek_jax.compress.scores import Scores
from deepseek_jax.compress.source import Source, open_source
from deepseek_jax.config.options import ModelConfig
from deepseek_jax.errors import UserError
from deepseek_jax.hf.compression_map import expert_rows
from deepseek_jax.inference.loaded import config_for
from deepseek_jax.inference.opener import parse_mesh

PICTURE = "compression.svg"


def add_options(parser: arguments.Parser) -> None:
    parser.add_argument(
        "--method", choices=scores.METHODS, default="reap", help="score (default %(default)s)"
    )
    parser.add_argument(
        "--experts", type=int, required=True, metavar="N", help="that each layer keeps"
    )
    parser.add_argument(
        "--scores",
        type=arguments.path,
        metavar="FILE",
        help="of `compress score`: the text is not scored again",
    )
    parser.add_argument(
        "--keep-super",
        action="store_true",
        help="keep experts of huge activations, whatever their score",
    )
    parser.add_argument(
        "--scale",
        action="store_true",
        help="of a softmax router without renormalisation: scale the kept experts' outputs down by what "
        "their weights rise on average",
    )
    parser.add_argument(
        "--mtp",
        choices=("prune", "drop"),
        default="prune",
        help="what becomes of layers of multi-token prediction (default %(default)s)",
    )
    calibration.add_options(parser)


def run(args: argparse.Namespace) -> None:
    output.check(args.out)
    if args.text:
        calibration.find(args.text)
    source = open_source(args.model, args.step)
    _check(source, args)
    model = dataclasses.replace(source.model, n_routed_experts=args.experts)
    if args.mtp == "drop":
        model = dataclasses.replace(model, num_nextn_predict_layers=0)
    if args.text:
        config_for(model, parse_mesh(args.mesh), args.dtype)  # whether the mesh fits it, too
    found, before = _scores(source, args)
    if args.method not in scores.NEED_NO_TEXT and (line := found.warning()):
        print(f"warning: {line}")
    kept = chosen(found, source.model, args)
    rows = expert_rows(model)
    scale = np.ones(len(rows))
    if is_inflated(source.model):
        scale = np.array(
            [found.arrays["mean_score"][i][list(kept[i])].sum() for i in range(len(rows))]
        )
    operation: dict[str, Any] = {
        "kind": "prune",
        "method": args.method,
        "num_experts": args.experts,
        "seed": args.seed,
        "scores_file": args.scores or "",
        "scores": {
            str(n): [float(f"{s:.8g}") for s in of_layer]
            for n, of_layer in zip(found.layers, found.of(args.method, args.seed), strict=True)
        },
        "calibration": found.notes.get("calibration"),
        "keep_super": args.keep_super,
        "scale": [round(float(s), 8) for s in scale] if args.scale else None,
        "mtp": args.mtp,
        "layer_errors": None,
    }
    document = source.document.map
    if args.mtp == "drop":
        document = document.without_mtp(source.model.num_nextn_predict_layers)
    made = Compressed(
        model=model,
        parts=plan(source, model, kept, scale if args.scale else None).parts,
        map=document.of_experts([[(e,) for e in kept[i]] for i in range(len(rows))]),
        operation=operation,
    )
    layers = range(model.num_hidden_layers)
    drawing = picture.of_scores(found.of(args.method, args.seed), found.layers, kept, args.method)
    operation = output.write(
        args.out,
        source,
        made,
        measure=None if before is None else lambda f: errors_of_layers.measure(f, before, layers),
        pictures={PICTURE: drawing},
    )
    print(table(found, kept, args, operation["layer_errors"]))
    if is_inflated(source.model) and found.tokens:
        print(_inflation(scale, args.scale))
    print(f"wrote          {args.out}")


def _check(source: Source, args: argparse.Namespace) -> None:
    """Refuses what no model can be, before anything expensive."""
    model = source.model
    check_count(model, args.experts)
    needs = args.method not in scores.NEED_NO_TEXT or args.keep_super or args.scale
    if needs and not args.text and not args.scores:
        raise UserError(
            f"--method={args.method} needs to see what experts do. Give calibration text with "
            f"{calibration.OPTION}=FILE, or --scores=FILE of `compress score`."
        )
    if args.scale and not is_inflated(model):
        raise UserError(
            f"--scale is of softmax routers without renormalisation, and this one has scoring_func="
            f"{model.scoring_func} and norm_topk_prob={model.norm_topk_prob}: its weights stay. Leave it out."
        )


def check_count(model: ModelConfig, count: int, option: str = "--experts") -> None:
    """Refuses a number of experts per layer that a model cannot have.

    Args:
      model: the options of the model before.
      count: the number.
      option: that it was given as.

    Raises:
      UserError: names the numbers that it can have.
    """
    m = model
    if not m.has_experts:
        raise UserError(
            f"{option}={count}: MODEL has no routed experts. Name a mixture of experts."
        )
    if count > m.n_routed_experts:
        raise UserError(
            f"{option}={count} is above the model's {m.n_routed_experts} experts a layer. Name fewer."
        )
    if count < m.num_experts_per_tok:
        raise UserError(
            f"{option}={count} is below num_experts_per_tok={m.num_experts_per_tok}: a token could not "
            f"choose as many. Name {m.num_experts_per_tok} or more."
        )
    if m.n_group <= 1:
        return
    # A group is scored by its two best experts, and those chosen must hold a token's experts.
    each = max(2 if m.topk_method == "noaux_tc" else 1, -(-m.num_experts_per_tok // m.topk_group))
    if count % m.n_group or count // m.n_group < each:
        least = m.n_group * each
        near = max(least, count // m.n_group * m.n_group)
        raise UserError(
            f"{option}={count} does not fit n_group={m.n_group}, topk_group={m.topk_group}, "
            f"num_experts_per_tok={m.num_experts_per_tok}: every group keeps as many, {each} or more. "
            f"Name a multiple of {m.n_group}, as {near}."
        )


def is_inflated(model: ModelConfig) -> bool:
    """Whether weights of kept experts rise when others are taken from the router's softmax."""
    return model.scoring_func == "softmax" and not model.norm_topk_prob


def _scores(source: Source, args: argparse.Namespace) -> tuple[Scores, Reference | None]:
    """The scores, and what errors are measured against where there is text. The model is gone after it."""
    found = scores.read(args.scores, source) if args.scores else None
    if not args.text:
        return found or scores.without_text(source), None
    opened = calibration.open_for(args)
    text = calibration.read(opened, args)
    before = errors_of_layers.reference(opened.model, text)
    return found or scores.collect(source, opened.model, text), before


def chosen(found: Scores, model: ModelConfig, args: argparse.Namespace) -> list[tuple[int, ...]]:
    """The experts that each row of the scores keeps, ascending: of each group the best, of equal ones the
    first.

    Raises:
      UserError: with --keep-super more are to be kept than there is room for.
    """
    scores_LE = found.of(args.method, args.seed)
    super_LE = found.super_experts() if args.keep_super else np.zeros(scores_LE.shape, bool)
    groups = max(1, model.n_group)
    each = args.experts // groups
    out = []
    for layer, score_E, super_E in zip(found.layers, scores_LE, super_LE, strict=True):
        kept: list[int] = []
        for group in np.split(np.arange(len(score_E)), groups):
            if super_E[group].sum() > each:
                raise UserError(
                    f"--keep-super: layer {layer} has {int(super_E[group].sum())} super experts in a group "
                    f"of which --experts={args.experts} keeps {each}. Keep more, or leave --keep-super out."
                )
            best = np.lexsort((group, -score_E[group], ~super_E[group]))[:each]
            kept += sorted(int(e) for e in group[best])
        out.append(tuple(kept))
    return out


def plan(
    source: Source,
    model: ModelConfig,
    kept: Sequence[Sequence[int]],
    scale: np.ndarray | None = None,
) -> Plan:
    """The pruned model.

    Args:
      source: the model before.
      model: the options of the one after.
      kept: the experts of each layer that has some, multi-token prediction last.
      scale: of each of these layers, what outputs of its experts are multiplied by.
    """
    layers = parts.all_layers(model)
    rows = expert_rows(model)
    by_layer = dict(zip(rows, kept, strict=False))  # dropped ones at the end are not asked for
    made = parts.keeping(source, model, by_layer, layers)
    if scale is not None:
        factors = dict(zip(rows, scale, strict=True))

        def scaled(layer: int):
            return parts.expert_parts(
                source,
                layer,
                DOWN,
                by_layer[layer],
                lambda _, array: array.astype(np.float32) * np.float32(factors[layer]),
            )

        made[DOWN] = scaled
    return Plan(source, model, layers, made)


def table(
    found: Scores,
    kept: Sequence[Sequence[int]],
    args: argparse.Namespace,
    errors: Sequence[float] | None,
) -> str:
    """For people: of each layer the share of the scores and of the choices that is kept, and the error."""
    rows = [["layer", "experts", f"of {args.method}", "of choices", "unseen", "output error"]]
    for i, layer in enumerate(found.layers):
        score_E, count_E = found.of(args.method, args.seed)[i], found.arrays["frequency"][i]
        chosen = list(kept[i])
        rows.append(
            [
                str(layer),
                f"{len(chosen)} of {len(score_E)}",
                f"{score_E[chosen].sum() / max(score_E.sum(), 1e-300):.1%}",
                f"{count_E[chosen].sum() / count_E.sum():.1%}" if count_E.sum() else "",
                str(int(found.unseen()[i].sum())) if found.tokens else "",
                f"{errors[layer]:.4f}" if errors and layer < len(errors) else "",
            ]
        )
    head = f"read           {texts.human(found.tokens)} tokens\n" if found.tokens else ""
    return head + texts.table(rows)


def _inflation(mass_L: np.ndarray, scaled: bool) -> str:
    rise = 1 / np.maximum(mass_L, 1e-30)
    worst = (
        f"weights of kept experts rise {rise.mean():.3f} times on average, {rise.max():.3f} at most"
    )
    if scaled:
        return f"scale          {worst}: --scale has divided the experts' outputs by it"
    return f"scale          {worst} (softmax over fewer, without renormalisation): --scale divides it out"
