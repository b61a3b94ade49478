"""Measure a model on text:

  python -m deepseek_jax.evaluate --model=DIR --text=FILE|FOLDER|stdlib   perplexity, bits per byte
  python -m deepseek_jax.evaluate --model=RUN                  the same of what the run held out
  python -m deepseek_jax.evaluate --model=DIR --questions=FILE.jsonl      multiple choice

DIR: a checkpoint of Hugging Face, or the folder of a run of train.py or of `python -m
deepseek_jax.hf
import`. Questions are lines {"prompt": ..., "choices": [...], "answer": ...}. Choices follow the
prompt as
they are: " Paris" begins with a space if the prompt ends without one. The tasks of
lm-evaluation-harness:
python -m deepseek_jax.hf.lm_eval.
"""

if __name__ == "__main__":
    from deepseek_jax.runtime.huge_pages import use_huge_pages

    use_huge_pages()  # before all other work: it starts the program again

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from deepseek_jax.cli import arguments
from deepseek_jax.cli.command import exit_code
from deepseek_jax.config.options import DTYPES, CompileConfig
from deepseek_jax.config.paths import check_output
from deepseek_jax.data.documents import find_files, split_paths
from deepseek_jax.errors import UserError
from deepseek_jax.hf.provenance import model_files
from deepseek_jax.inference.evaluation import choices, perplexity
from deepseek_jax.inference.evaluation.scorer import Scorer
from deepseek_jax.inference.opener import Opened, open_model, parse_mesh
from deepseek_jax.runtime import compile_cache


def parser() -> arguments.Parser:
    parser = arguments.Parser(prog="python -m deepseek_jax.evaluate", description=__doc__)
    parser.add_argument(
        "--model", type=arguments.path, required=True, metavar="DIR", help="folder with the model"
    )
    parser.add_argument("--step", type=int, help="checkpoint of a run (default: the newest)")
    parser.add_argument(
        "--adapter",
        type=arguments.path,
        metavar="DIR",
        help="folder of a LoRA adapter as PEFT writes it, merged into the checkpoint",
    )
    parser.add_argument("--mesh", help="devices, as fsdp=2,expert=4 (default: one)")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=DTYPES,
        help="of weights and computation (default %(default)s)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--text",
        type=arguments.path_list,
        metavar="PATH",
        help="stdlib, text, .jsonl or .parquet files, a folder or a glob; several separated by commas "
        "(default: what a run held out)",
    )
    what.add_argument(
        "--questions", type=arguments.path, metavar="FILE", help="JSONL file of multiple choice"
    )
    parser.add_argument(
        "--window",
        type=int,
        help="tokens that are read together (default: what a run was trained with, else the model's longest, "
        f"at most {perplexity.MAX_WINDOW})",
    )
    parser.add_argument(
        "--stride",
        type=int,
        help="tokens from one window to the next; the rest is context (default: half a window)",
    )
    parser.add_argument(
        "--batch-size",
        "--batch_size",
        type=int,
        help="sequences of a batch, over the whole mesh (default: about 4,096 tokens per device)",
    )
    parser.add_argument("--limit", type=int, help="documents or questions at most (default: all)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--output",
        type=arguments.path,
        metavar="FILE",
        help="file for the result as JSON, or for a JSON line about each question",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    for name in ("window", "stride") if args.questions else ():
        if getattr(args, name) is not None:
            raise UserError(
                f"--{name}={getattr(args, name)} is for text, and --questions has none. Leave it out."
            )
    questions = choices.read_questions(args.questions, args.limit) if args.questions else None
    if args.output:
        texts = (
            [
                f.path
                for spec in split_paths(args.text, "--text")
                for f in find_files(spec, "--text")
            ]
            if args.text
            else []
        )
        check_output(
            "--output",
            args.output,
            itertools.chain(
                filter(None, [args.questions]),
                texts,
                *map(model_files, filter(None, [args.model, args.adapter])),
            ),
        )
    compile_cache.use_cache(
        CompileConfig().cache_dir, warn=lambda line: print(line, file=sys.stderr)
    )
    opened = open_model(args.model, args.step, args.dtype, parse_mesh(args.mesh), args.adapter)
    if args.output and opened.run and not args.text and not args.questions:
        held_out = (
            f.path
            for spec in split_paths(opened.run.data.path, "config.data.path")
            for f in find_files(spec, "config.data.path")
        )
        check_output("--output", args.output, held_out)
    begun = time.perf_counter()
    details = None
    if questions is not None:
        result, details = choices.evaluate(opened, questions, args.batch_size, progress=True)
    else:
        result = _perplexity(opened, args)
    result = {"model": args.model, **result, "seconds": round(time.perf_counter() - begun, 2)}
    if args.output:
        _write(args.output, details if details is not None else [result])
    print(json.dumps(result, allow_nan=False) if args.json else text(result))
    return 0


def _perplexity(opened: Opened, args: argparse.Namespace) -> dict[str, Any]:
    if args.text is None and opened.run is None:
        raise UserError(
            f"--text and --questions are missing, and {args.model} is a checkpoint, not a run that held "
            f"something out. Give one of them."
        )
    window = args.window if args.window is not None else perplexity.default_window(opened)
    scorer = Scorer(opened.model, window, args.batch_size)
    stride = args.stride if args.stride is not None else max(1, window // 2)
    if args.text is None:
        return perplexity.of_held_out(opened, scorer, stride, args.limit, progress=True)
    return perplexity.of_text(opened, args.text, scorer, stride, args.limit, progress=True)


def _write(path: str, rows: list[dict[str, Any]]) -> None:
    try:
        with open(os.path.expanduser(path), "w", encoding="utf-8") as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except OSError as e:
        raise UserError(
            f"--output={path} cannot be written ({e.strerror}). Name another file."
        ) from e


def text(r: dict[str, Any]) -> str:
    """A result for people."""
    if "acc" in r:

        def pm(name: str) -> str:
            error = r[f"{name}_stderr"]
            return f"{r[name]:.4f}" + (f" ± {error:.4f}" if error is not None else "")

        lines = [
            f"questions      {r['questions']:,}",
            f"acc            {pm('acc')}",
            f"acc_norm       {pm('acc_norm')}  (by characters)",
            f"acc_bytes      {pm('acc_bytes')}  (by bytes)",
        ]
        if r["truncated"]:
            lines.append(
                f"cut            {r['truncated']:,} prompts were longer than the model reads and lost "
                f"their beginning"
            )
    else:
        bits = "" if r["bits_per_byte"] is None else f"{r['bits_per_byte']:.4f}"
        lines = [
            f"perplexity     {r['perplexity']:.4f}",
            f"nats per token {r['nats_per_token']:.4f}",
            f"bits per byte  {bits}",
            f"text           {r['documents']:,} documents, {r['tokens']:,} tokens, {r['bytes']:,} bytes",
            f"windows        {r['window']:,} tokens, a new one every {r['stride']:,}",
        ]
    return "\n".join([*lines, f"took           {r['seconds']:.1f} s"])


if __name__ == "__main__":
    sys.exit(exit_code("evaluate", main))
