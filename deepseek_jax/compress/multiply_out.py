"""Give every expert around a shared core weights of its own: a model that transformers loads.

MODEL is a folder with factors (compress shared-core, checkpoint-0 of MoE_Factorize_Compress), or the workdir
of a run that trained such a model. Core and wrappers are multiplied in float32, and written in the dtype in
which they were stored.
"""

import argparse

from deepseek_jax.cli import arguments
from deepseek_jax.compress import output, parts
from deepseek_jax.compress.output import Compressed
from deepseek_jax.compress.parts import Plan
from deepseek_jax.compress.source import open_source
from deepseek_jax.errors import UserError


def add_options(parser: arguments.Parser) -> None:
    pass


def run(args: argparse.Namespace) -> None:
    output.check(args.out)
    found = open_source(args.model, args.step, factors=True)
    rank = found.model.shared_core_rank
    if not rank:
        raise UserError(
            f"{args.model} has no experts around a shared core: its config.json has no compression_config. "
            f"Name a folder of `compress shared-core`."
        )
    source = found.multiplied_out()
    made = Compressed(
        model=source.model,
        parts=Plan(source, source.model, parts.all_layers(source.model)).parts,
        map=source.document.map,
        operation={"kind": "shared_core", "rank": rank, "multiplied_out": True},
    )
    output.write(args.out, source, made)
    print(f"wrote          {args.out}")
