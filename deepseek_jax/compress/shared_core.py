"""Put one shared core and low-rank wrappers in the place of each layer's experts.

Each projection of all experts of a layer becomes a core and, for each expert, two wrappers of rank R:
W = (I + U_out V_out^T) C (I + U_in V_in^T), the method of MoE_Factorize_Compress. They begin in closed form
and are fitted to the weights by Adam in float32; no text is needed. OUT has the factors, in the format of
that program's checkpoint-0: train.py trains them as they are (--config.init_from=OUT), hf.load, generate and
evaluate read them, and `compress multiply-out` makes a model of them that transformers loads, which
--multiplied-out writes at once. --text is for measuring the error of each layer's output.

A fit that was stopped goes on where it was: OUT.fit keeps what is done. Several workers (--worker=0/4) share
it; the same command without --worker then writes OUT.
"""

import argparse
import dataclasses
import re
from typing import Any

from deepseek_jax.cli import arguments, texts
from deepseek_jax.cli.progress import Bar
from deepseek_jax.compress import (
    calibration,
    errors_of_layers,
    multiplied_out,
    output,
    shared_core_fit,
)
from deepseek_jax.compress.errors_of_layers import Reference
from deepseek_jax.compress.fitted import Fitted
from deepseek_jax.compress.output import Compressed
from deepseek_jax.compress.shared_core_fit import Losses
from deepseek_jax.compress.shared_core_plan import (
    PROJECTIONS,
    Get,
    from_source,
    kept_share,
    plan,
    units,
    weights,
)
from deepseek_jax.compress.source import Source, leaves_of, open_source
from deepseek_jax.config.options import ModelConfig
from deepseek_jax.errors import UserError
from deepseek_jax.hf.compression_map import expert_rows

VERSION = 1


def add_options(parser: arguments.Parser) -> None:
    parser.add_argument(
        "--rank", type=int, help="R, of every wrapper (default 64; with --factors-from its own)"
    )
    parser.add_argument(
        "--steps", type=int, default=1000, help="of Adam; 0: the closed form (default %(default)s)"
    )
    parser.add_argument(
        "--lr",
        type=float,
        default=1e-3,
        help="of an array with a root mean square of 1/32, of others in proportion; it falls to 0 "
        "(default %(default)s)",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--factors", action="store_true", help="write core and wrappers (the default)")
    how.add_argument(
        "--multiplied-out", action="store_true", help="write every expert's own weights instead"
    )
    parser.add_argument(
        "--factors-from",
        type=arguments.path,
        metavar="DIR",
        help="take core and wrappers from there, a checkpoint-0 of MoE_Factorize_Compress, and all else from "
        "MODEL: its program leaves attention, router and embedding at random",
    )
    parser.add_argument(
        "--worker", type=_worker, default=None, metavar="I/N", help="fit every N-th part, from I on"
    )
    calibration.add_options(parser)


def _worker(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not found or not int(found[1]) < int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1, as 0/4")
    return int(found[1]), int(found[2])


def run(args: argparse.Namespace) -> None:
    output.check(args.out)
    if args.text:
        calibration.find(args.text)
    source = open_source(args.model, args.step)
    given = _given(source, args)
    rank = 64 if args.rank is None else args.rank
    if given is not None:
        rank = given.model.shared_core_rank
    check(source.model, rank, args)
    operation: dict[str, Any] = {"kind": "shared_core", "rank": rank, "multiplied_out": False}
    fitted = None
    if given is None:
        fitted = _fit(source, rank, args)
        if fitted is None:
            return
        get: Get = fitted.read
        operation |= {"steps": args.steps, "lr": args.lr, "seed": args.seed}
        operation["losses"] = {
            f"{layer}/{projection}": [float(f"{x:.6g}") for x in fitted.losses(layer, projection)]
            for layer, projection in units(source.model)
        }
        print(table(source.model, fitted))
    else:
        get = from_source(given)
        operation["factors_from"] = args.factors_from
    operation |= {"multiplied_out": args.multiplied_out, "kept": kept_share(source.model, rank)}
    before, text = _reference(args)
    operation["calibration"] = text.notes() if text else None
    layers = range(source.model.num_hidden_layers)
    made = plan(source, rank, get, args.multiplied_out)
    source.notes = multiplied_out.stored_as(
        source.notes,
        list(source.leaves.values()),
        leaves_of(made.model, source.family),
    )
    output.write(
        args.out,
        source,
        Compressed(made.model, made.parts, source.document.map, operation),
        measure=before and (lambda folder: errors_of_layers.measure(folder, before, layers)),
    )
    if fitted is not None:
        fitted.remove()
    print(f"kept           {operation['kept']:.1%} of the experts' numbers")
    print(f"wrote          {args.out}")


def check(model: ModelConfig, rank: int, args: argparse.Namespace) -> None:
    """Refuses what cannot be fitted.

    Raises:
      UserError: names the option.
    """
    if not model.has_experts:
        raise UserError(f"{args.model} has no routed experts. Name a mixture-of-experts model.")
    least = min(model.hidden_size, model.moe_intermediate_size)
    if not 1 <= rank <= least:
        raise UserError(
            f"--rank={rank} is not between 1 and {least}, the shorter side of an expert "
            f"(hidden_size={model.hidden_size}, moe_intermediate_size={model.moe_intermediate_size})."
        )
    if args.steps < 0:
        raise UserError(f"--steps={args.steps} is below 0. Set it to 0 or more.")
    if not 0 < args.lr < float("inf"):
        raise UserError(f"--lr={args.lr} is not above 0 and finite. Set it to, for instance, 1e-3.")


def _fit(source: Source, rank: int, args: argparse.Namespace) -> Fitted | None:
    """All of it, or this worker's share; None where others have not finished theirs."""
    of = {
        "version": VERSION,
        "model": source.identity(),
        "rank": rank,
        "steps": args.steps,
        "lr": args.lr,
        "seed": args.seed,
    }
    fitted, every = Fitted(args.out, of), units(source.model)
    index, count = args.worker or (0, 1)
    mine = [(i, unit) for i, unit in enumerate(every) if i % count == index]
    left = [(i, unit) for i, unit in mine if not fitted.has(*unit)]
    if len(left) < len(mine):
        print(f"resumed        {len(mine) - len(left)} of {len(mine)} parts are fitted already")
    with Bar("Fitting", len(left) * max(args.steps, 1), True, "items") as bar:
        for i, unit in left:
            found = shared_core_fit.fit(
                weights(source, unit), rank, args.steps, args.lr, args.seed + i, bar.advance
            )
            fitted.write(*unit, *found)
    missing = [unit for unit in every if not fitted.has(*unit)]
    if args.worker is None:
        return fitted
    print(
        f"fitted         {len(every) - len(missing)} of {len(every)} parts; the same command without "
        f"--worker writes OUT"
    )
    return None


def _given(source: Source, args: argparse.Namespace) -> Source | None:
    """What --factors-from names.

    Raises:
      UserError: it has no factors, or is of another model.
    """
    if not args.factors_from:
        return None
    given = open_source(args.factors_from, factors=True)
    text, rank = f"--factors-from={args.factors_from}", given.model.shared_core_rank
    if not rank:
        raise UserError(
            f"{text} has no compression_config in its config.json: its experts are no core and wrappers. "
            f"Leave the option out, and they are fitted."
        )
    if args.rank not in (None, rank):
        raise UserError(f"--rank={args.rank} and {text}, whose rank is {rank}. Leave --rank out.")
    same = dataclasses.replace(given.model, shared_core_rank=0)
    for name in (
        "hidden_size",
        "moe_intermediate_size",
        "n_routed_experts",
        "num_hidden_layers",
        "first_k_dense_replace",
        "num_nextn_predict_layers",
    ):
        if getattr(same, name) != getattr(source.model, name):
            raise UserError(
                f"{text} has {name}={getattr(same, name)}, and MODEL={args.model} has "
                f"{getattr(source.model, name)}. Name the model that it was made of."
            )
    return given


def _reference(
    args: argparse.Namespace,
) -> tuple[Reference | None, calibration.Calibration | None]:
    """What the errors of layers are measured against, where there is text."""
    if not args.text:
        return None, None
    opened = calibration.open_for(args)
    text = calibration.read(opened, args)
    return errors_of_layers.reference(opened.model, text), text


def table(model: ModelConfig, fitted: Fitted) -> str:
    """For people: the relative loss of each layer and projection, at the mean of the experts and fitted."""
    rows = [["layer", *(f"{p}: mean, fitted" for p in PROJECTIONS)]]

    def cell(losses: Losses) -> str:
        return f"{losses.mean:.4f} {losses.end:.4f}"

    for layer in expert_rows(model):
        rows.append([str(layer), *(cell(fitted.losses(layer, p)) for p in PROJECTIONS)])
    return texts.table(rows)
