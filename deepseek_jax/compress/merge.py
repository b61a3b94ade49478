"""Merge the experts of every layer into N, by what they do on calibration text.

  hc-smoe   clusters by average linkage of the experts' mean outputs, named after their most chosen member
            (arXiv:2410.08589)
  ream      the N best by REAP stay, each other expert joins the one of most similar mean output
            (arXiv:2604.04356)
  m-smoe    the N most chosen stay, each other expert joins the one that the router scores most alike, and
            inner units are aligned (arXiv:2310.01334)

The weights of a cluster are averaged by how often its experts are chosen. It keeps the router's row and the
selection bias of the expert that it is named after: rows of a router cannot be added up. Mean outputs are of
all tokens, whether they chose the expert or not. Where the router chooses groups first, clusters stay inside
a group and every group keeps as many. An expert alone in its cluster stays as it is.
"""

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.cli import arguments, texts
from deepseek_jax.compress import calibration, clusters, errors_of_layers, output, parts, scores
from deepseek_jax.compress.calibration import Calibration, on_mesh
from deepseek_jax.compress.clusters import Cluster
from deepseek_jax.compress.merged_experts import MergedExperts
from deepseek_jax.compress.output import Compressed
from deepseek_jax.compress.parts import Plan
from deepseek_jax.compress.prune import check_count
from deepseek_jax.compress.scores import Scores
from deepseek_jax.compress.source import open_source
from deepseek_jax.config.options import ModelConfig
from deepseek_jax.errors import UserError
from deepseek_jax.hf.compression_map import expert_rows
from deepseek_jax.inference.loaded import LoadedModel, config_for
from deepseek_jax.inference.opener import parse_mesh
from deepseek_jax.objectives.forward import run_model

METHODS = ("hc-smoe", "ream", "m-smoe")
# What a cluster is named after, and the experts that stay: a method of scores.py.
ORDER = {"hc-smoe": "frequency", "ream": "reap", "m-smoe": "frequency"}


def add_options(parser: arguments.Parser) -> None:
    parser.add_argument(
        "--method", choices=METHODS, default="hc-smoe", help="clustering (default %(default)s)"
    )
    parser.add_argument(
        "--experts", type=int, required=True, metavar="N", help="that each layer has afterwards"
    )
    parser.add_argument(
        "--align",
        action=argparse.BooleanOptionalAction,
        help="put inner units into the order of the expert that stays, before weights are averaged (default: "
        "of m-smoe)",
    )
    parser.add_argument(
        "--output-tokens",
        type=calibration.tokens,
        default=1 << 13,
        help="that all experts see, for their mean outputs (default %(default)s)",
    )
    calibration.add_options(parser)


def run(args: argparse.Namespace) -> None:
    output.check(args.out)
    if not args.output_tokens:
        raise UserError(
            "--output-tokens=0: experts are compared by their mean outputs. Name 1 token or more."
        )
    if not args.text:
        raise UserError(f"merge needs calibration text. Give it with {calibration.OPTION}=FILE.")
    calibration.find(args.text)
    source = open_source(args.model, args.step)
    check_count(source.model, args.experts)
    model = dataclasses.replace(source.model, n_routed_experts=args.experts)
    config_for(model, parse_mesh(args.mesh), args.dtype)  # whether the mesh fits it, too
    opened = calibration.open_for(args)
    text = calibration.read(opened, args)
    before = errors_of_layers.reference(opened.model, text)
    found = scores.collect(source, opened.model, text)
    if line := found.warning():
        print(f"warning: {line}")
    similar = features(opened.model, text, args)
    del opened
    chosen = [
        of_layer(source.model, found, row, similar[row], args) for row in range(len(found.layers))
    ]
    align = args.method == "m-smoe" if args.align is None else args.align
    merged = MergedExperts(
        source,
        dict(zip(found.layers, chosen, strict=True)),
        dict(zip(found.layers, found.arrays["frequency"], strict=True)),
        align,
    )
    operation = {
        "kind": "merge",
        "method": args.method,
        "num_experts": args.experts,
        "align": align,
        "clusters": {str(n): c for n, c in zip(found.layers, chosen, strict=True)},
        "calibration": text.notes(),
        "layer_errors": None,
    }
    made = Compressed(
        model=model,
        parts=Plan(source, model, parts.all_layers(model), merged.made()).parts,
        map=source.document.map.of_experts(chosen),
        operation=operation,
    )
    layers = range(model.num_hidden_layers)
    operation = output.write(
        args.out,
        source,
        made,
        measure=lambda folder: errors_of_layers.measure(folder, before, layers),
    )
    print(table(found, chosen, operation["layer_errors"]))
    print(f"wrote          {args.out}")


def of_layer(
    model: ModelConfig,
    found: Scores,
    row: int,
    features_EF: np.ndarray,
    args: argparse.Namespace,
) -> list[Cluster]:
    """The clusters of a layer, in the order of the experts that they are named after.

    Args:
      model: the options of the model.
      found: scores of its experts.
      row: of the layer, in `found`.
      features_EF: what is compared: of `features`.
      args: method and number of experts.
    """
    order_E = found.of(ORDER[args.method])[row]

    def split(group: slice, count: int) -> list[Cluster]:
        if args.method == "hc-smoe":
            return clusters.average_linkage(features_EF[group], order_E[group], count)
        alike_EE = -clusters.cosine_distances(features_EF[group])
        return clusters.nearest(alike_EE, order_E[group], count)

    return clusters.in_groups(split, model.n_routed_experts, max(1, model.n_group), args.experts)


def features(model: LoadedModel, text: Calibration, args: argparse.Namespace) -> np.ndarray:
    """float64 [L, E, ...]: what experts are compared by, of every layer that has some.

    Mean outputs [L, E, D]; of m-smoe the experts' scores by the router, of which cosines need the products of
    pairs alone, [L, E, E]: a matrix with the same products between its rows.
    """
    rows, experts = len(expert_rows(model.config)), model.config.n_routed_experts
    routed = args.method == "m-smoe"
    sums = np.zeros((rows, experts, experts if routed else model.config.hidden_size))
    left, seen, batches = args.output_tokens, 0, []
    for batch in text.batches:
        if not routed and left <= 0:
            break
        batches.append(batch)
        left -= int(np.sum(batch["segment_ids"] > 0))
    program = jax.jit(functools.partial(_products if routed else _outputs, model))
    for batch in text._replace(batches=batches).progress("Comparing"):
        with jax.set_mesh(model.mesh):
            sums += np.asarray(program(model.params, model.bias, on_mesh(model, batch)), np.float64)
        seen += int(np.sum(batch["segment_ids"] > 0))
    return np.stack([_root(products) for products in sums]) if routed else sums / max(seen, 1)


def _outputs(model: LoadedModel, params: Any, bias: Any, batch: dict[str, jax.Array]) -> jax.Array:
    net = model.layout.merge_for_inference(params, bias)
    return run_model(net, batch, ("expert_outputs",)).taps["expert_outputs"]


def _products(model: LoadedModel, params: Any, bias: Any, batch: dict[str, jax.Array]) -> jax.Array:
    net = model.layout.merge_for_inference(params, bias)
    scores_LBSE = run_model(net, batch, ("router_scores",)).taps["router_scores"]
    scores_LBSE = jnp.where((batch["segment_ids"] > 0)[None, :, :, None], scores_LBSE, 0)
    return jnp.einsum(
        "lbse,lbsf->lef",
        scores_LBSE,
        scores_LBSE,
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=jax.P(),
    )


def _root(products_EE: np.ndarray) -> np.ndarray:
    """A matrix whose rows have these products: float64 [E, E]."""
    values_E, vectors_EE = np.linalg.eigh(products_EE)
    return vectors_EE * np.sqrt(np.maximum(values_E, 0))


def table(found: Scores, chosen: Sequence[Sequence[Cluster]], errors: Sequence[float]) -> str:
    """For people: of each layer how many experts are averages, of the choices the share of those whose router
    rows stay, and the error.
    """
    rows = [["layer", "experts", "merged", "largest", "of choices", "output error"]]
    for i, layer in enumerate(found.layers):
        count_E, sizes = found.arrays["frequency"][i], [len(c) for c in chosen[i]]
        names = [c[0] for c in chosen[i]]
        rows.append(
            [
                str(layer),
                f"{len(sizes)} of {len(count_E)}",
                str(sum(size > 1 for size in sizes)),
                str(max(sizes)),
                f"{count_E[names].sum() / max(count_E.sum(), 1):.1%}",
                f"{errors[layer]:.4f}" if layer < len(errors) else "",
            ]
        )
    return f"read           {texts.human(found.tokens)} tokens\n{texts.table(rows)}"
