"""Make experts narrower: keep the inner units of largest mean activation on calibration text.

A unit counts by the mean of |silu(gate) * up| over the tokens that chose its expert; the units of an expert
that no token chose by the norm of what they add to its output (their row of down). Shared experts, which
are as wide as their number says, keep so many units each. Kept units stay as they are, in ascending order.
"""

import argparse
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from deepseek_jax.cli import arguments, texts
from deepseek_jax.compress import calibration, errors_of_layers, output, parts, picture
from deepseek_jax.compress.calibration import Calibration, on_mesh
from deepseek_jax.compress.output import Compressed
from deepseek_jax.compress.parts import DOWN, GATE_UP, SHARED, Make, Plan
from deepseek_jax.compress.source import Source, open_source
from deepseek_jax.config.options import ModelConfig
from deepseek_jax.errors import UserError
from deepseek_jax.hf.compression_map import expert_rows
from deepseek_jax.hf.reader import Part
from deepseek_jax.inference.loaded import LoadedModel, config_for
from deepseek_jax.inference.opener import parse_mesh
from deepseek_jax.objectives.forward import run_model
from deepseek_jax.tensorfile import regions

PICTURE = "compression.svg"
DIVISOR = 8  # tensor cores' tiles


class Units(NamedTuple):
    """Mean activations of inner units.

    Attributes:
      routed: float64 [E, F] of each row of layers with experts.
      shared: float64 [F] of each row; empty without shared experts.
      unseen: experts that no token chose.
      tokens: that were read.
    """

    routed: list[np.ndarray]
    shared: list[np.ndarray]
    unseen: int
    tokens: int


def add_options(parser: arguments.Parser) -> None:
    parser.add_argument(
        "--moe-intermediate",
        "--moe_intermediate",
        type=int,
        required=True,
        metavar="N",
        help="inner units that each expert keeps: moe_intermediate_size",
    )
    calibration.add_options(parser)


def run(args: argparse.Namespace) -> None:
    output.check(args.out)
    if not args.text:
        raise UserError(f"width needs calibration text. Give it with {calibration.OPTION}=FILE.")
    calibration.find(args.text)
    source = open_source(args.model, args.step)
    check_width(source.model, args.moe_intermediate)
    model = dataclasses.replace(source.model, moe_intermediate_size=args.moe_intermediate)
    config_for(model, parse_mesh(args.mesh), args.dtype)
    opened = calibration.open_for(args)
    text = calibration.read(opened, args)
    before = errors_of_layers.reference(opened.model, text)
    units = collect(source, opened.model, text)
    del opened
    kept = [_best(a, args.moe_intermediate) for a in units.routed]
    count = model.n_shared_experts * args.moe_intermediate
    shared = [_best(a[None], count)[0] for a in units.shared]
    shares = [
        np.take_along_axis(a, k, axis=1).sum(axis=1) / np.maximum(a.sum(axis=1), 1e-300)
        for a, k in zip(units.routed, kept, strict=True)
    ]
    layers = expert_rows(model)
    made = Compressed(
        model=model,
        parts=plan(source, model, kept, shared).parts,
        map=source.document.map,
        operation={
            "kind": "width",
            "method": "mean_activation",
            "moe_intermediate_size": args.moe_intermediate,
            "kept_share": {
                str(n): round(float(s.mean()), 8) for n, s in zip(layers, shares, strict=True)
            },
            "calibration": text.notes(),
            "seed": args.seed,
            "layer_errors": None,
        },
    )
    operation = output.write(
        args.out,
        source,
        made,
        measure=lambda f: errors_of_layers.measure(f, before, range(model.num_hidden_layers)),
        pictures={PICTURE: picture.of_units(shares, layers)},
    )
    if units.unseen:
        print(
            f"warning: {units.unseen} experts were chosen by no token: the calibration text is too short for "
            f"them, and their units count by their weights. Give more of it (--text, --tokens)."
        )
    print(table(layers, shares, units.tokens, operation["layer_errors"]))
    print(f"wrote          {args.out}")


def check_width(model: ModelConfig, width: int) -> None:
    """Refuses a width that experts cannot have.

    Raises:
      UserError: names one that they can.
    """
    if not model.has_experts:
        raise UserError(
            f"--moe-intermediate={width}: MODEL has no routed experts. Name a mixture of experts."
        )
    now = model.moe_intermediate_size
    if width > now:
        raise UserError(
            f"--moe-intermediate={width} is above the model's moe_intermediate_size={now}. Name less."
        )
    if width != now and (width % DIVISOR or width < DIVISOR):
        below = max(DIVISOR, width // DIVISOR * DIVISOR)
        raise UserError(
            f"--moe-intermediate={width} is not divisible by {DIVISOR}, as the tiles of tensor cores need. "
            f"Name {below}."
        )


def collect(source: Source, model: LoadedModel, text: Calibration) -> Units:
    """One pass over calibration text, as scores.collect."""
    m = model.config
    rows = expert_rows(m)
    sums = [np.zeros((m.n_routed_experts, m.moe_intermediate_size)) for _ in rows]
    counts = np.zeros((len(rows), m.n_routed_experts))
    width = m.n_shared_experts * m.moe_intermediate_size
    shared = [np.zeros(width) for _ in rows] if width else []
    tokens = 0
    program = jax.jit(functools.partial(_run, model))
    for batch in text.progress("Looking at activations"):
        tokens += int(np.sum(batch["segment_ids"] > 0))
        with jax.set_mesh(model.mesh):
            found = program(model.params, model.bias, on_mesh(model, batch))
        for row in range(len(rows)):
            sums[row] += np.asarray(found["expert_units"][row])
            counts[row] += np.asarray(found["counts"][row])
            if width:
                shared[row] += np.asarray(found["shared_units"][row])
    for row, layer in enumerate(rows):
        unseen = np.flatnonzero(counts[row] == 0)
        sums[row] /= np.maximum(counts[row], 1)[:, None]
        for at, down in parts.some_experts(source, layer, DOWN, unseen.tolist()):
            sums[row][unseen[at]] = np.linalg.norm(down.astype(np.float64), axis=-1)
    means = [a / max(tokens, 1) for a in shared]
    return Units(sums, means, int((counts == 0).sum()), tokens)


def _run(model: LoadedModel, params: Any, bias: Any, batch: dict[str, jax.Array]) -> Any:
    shared = ("shared_units",) if model.config.n_shared_experts else ()
    out = run_model(
        model.layout.merge_for_inference(params, bias), batch, ("expert_units", *shared)
    )
    assert out.stats is not None  # of a model with experts
    found = out.taps | {"counts": out.stats.load.expert_counts}
    return {n: jax.sharding.reshard(a, jax.P()) for n, a in found.items()}


def _best(values_EF: np.ndarray, count: int) -> np.ndarray:
    """int [E, N]: of each row the places of the largest values, of equal ones the first, ascending."""
    order = np.argsort(-values_EF, axis=1, kind="stable")[:, :count]
    return np.sort(order, axis=1)


def plan(
    source: Source, model: ModelConfig, kept: Sequence[np.ndarray], shared: Sequence[np.ndarray]
) -> Plan:
    """The narrower model.

    Args:
      source: the model before.
      model: the options of the one after.
      kept: [E, N] of each layer with experts, multi-token prediction last: inner units that stay.
      shared: [n_shared_experts * N] of each, likewise; empty without shared experts.
    """
    rows = expert_rows(model)
    routed, of_shared = dict(zip(rows, kept, strict=True)), dict(zip(rows, shared, strict=False))
    experts = range(model.n_routed_experts)

    def gate_up(layer: int) -> Iterator[Part]:
        def change(at: slice, array_GDPF: np.ndarray) -> np.ndarray:
            return np.take_along_axis(array_GDPF, routed[layer][at][:, None, None], axis=3)

        return parts.expert_parts(source, layer, GATE_UP, experts, change)

    def down(layer: int) -> Iterator[Part]:
        def change(at: slice, array_GFD: np.ndarray) -> np.ndarray:
            return np.take_along_axis(array_GFD, routed[layer][at][:, :, None], axis=1)

        return parts.expert_parts(source, layer, DOWN, experts, change)

    made: dict[str, Make] = {GATE_UP: gate_up, DOWN: down}
    for rest in SHARED if shared else ():
        made[rest] = functools.partial(_shared, source, of_shared, rest)
    return Plan(source, model, parts.all_layers(model), made)


def _shared(source: Source, kept: dict[int, np.ndarray], rest: str, layer: int) -> Iterator[Part]:
    """A matrix of the shared experts: gate and up are [D, F], down [F, D]."""
    axis = 0 if "down_proj" in rest else 1
    array = np.take(source.layer(layer, rest), kept[layer], axis=axis)
    yield array, regions.whole(array.shape)


def table(
    layers: Sequence[int],
    shares: Sequence[np.ndarray],
    tokens: int,
    errors: Sequence[float] | None,
) -> str:
    """For people: of each layer the share of the activations that is kept, and the error."""
    rows = [["layer", "kept of activations", "least of an expert", "output error"]]
    for layer, share in zip(layers, shares, strict=True):
        error = f"{errors[layer]:.4f}" if errors and layer < len(errors) else ""
        rows.append([str(layer), f"{share.mean():.1%}", f"{share.min():.1%}", error])
    return f"read           {texts.human(tokens)} tokens\n" + texts.table(rows)
