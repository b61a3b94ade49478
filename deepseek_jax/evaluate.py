"""Measure a model on text:

  python -m deepseek_jax.evaluate MODEL --text=FILE|FOLDER|stdlib   perplexity, bits per byte
  python -m deepseek_jax.evaluate RUN                  the same of what the run held out
  python -m deepseek_jax.evaluate MODEL --questions=FILE.jsonl      multiple choice
  python -m deepseek_jax.evaluate MODEL --tasks=arc_easy,piqa       tasks of lm-evaluation-harness
  python -m deepseek_jax.evaluate RUN --watch [one of these]        checkpoints as they appear

MODEL: a checkpoint of Hugging Face, or the folder of a run of train.py or of `python -m
deepseek_jax.hf import`; --model=MODEL is the same. Questions are lines {"prompt": ..., "choices": [...],
"answer": ...}. Choices follow the prompt as they are: " Paris" begins with a space if the prompt ends
without one. All of lm-evaluation-harness' own options: python -m deepseek_jax.hf.lm_eval.

--watch measures what the run began with, then each of its checkpoints once, oldest first, into
RUN/evaluations.jsonl (or --output), until the run's last step; killed, it goes on where it was. It runs
beside the training process, on other devices: JAX_PLATFORMS=cpu or CUDA_VISIBLE_DEVICES choose these.
"""

if __name__ == "__main__":
    from deepseek_jax.runtime.huge_pages import use_huge_pages

    use_huge_pages()  # before all other work: it starts the program again

import argparse
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from deepseek_jax.cli import arguments
from deepseek_jax.cli.command import exit_code
from deepseek_jax.config.options import DTYPES, CompileConfig
from deepseek_jax.config.paths import check_output
from deepseek_jax.data.documents import find_files, split_paths
from deepseek_jax.data.row_file import RowFile
from deepseek_jax.errors import UserError, stopped_by
from deepseek_jax.hf.provenance import model_files
from deepseek_jax.hf.tensors import read_config
from deepseek_jax.inference.evaluation import choices, perplexity, watch
from deepseek_jax.inference.evaluation.measurement import Measurement, check_tasks
from deepseek_jax.inference.opener import open_model, parse_mesh
from deepseek_jax.runtime import compile_cache

INTERVAL = 60.0  # seconds between two looks at a run


def parser() -> arguments.Parser:
    parser = arguments.Parser(prog="python -m deepseek_jax.evaluate", description=__doc__)
    arguments.add_model(parser, "folder with the model, or of a run")
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
    what.add_argument(
        "--tasks", metavar="NAMES", help="of lm-evaluation-harness, separated by commas"
    )
    parser.add_argument(
        "--watch", action="store_true", help="measure a run's checkpoints as they appear"
    )
    parser.add_argument(
        "--watch-interval",
        "--watch_interval",
        type=float,
        metavar="SECONDS",
        help=f"from one look to the next (default {INTERVAL})",
    )
    parser.add_argument(
        "--watch-timeout",
        "--watch_timeout",
        type=float,
        metavar="SECONDS",
        help="without a new checkpoint, after which it ends (default: it waits as long as the run takes)",
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
    arguments.take_model(args)
    _check(args)
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
    check_tasks(args.tasks.split(",") if args.tasks else ())
    compile_cache.use_cache(
        CompileConfig().cache_dir, warn=lambda line: print(line, file=sys.stderr)
    )
    measurement = Measurement(
        text=args.text,
        questions=questions,
        tasks=args.tasks.split(",") if args.tasks else (),
        window=args.window,
        stride=args.stride,
        batch_size=args.batch_size,
        limit=args.limit,
        dtype=args.dtype,
        mesh=parse_mesh(args.mesh),
    )
    if args.watch:
        return _watch(args, measurement)
    if args.tasks:
        result = measurement.of_path(args.model, args.step)
    else:
        result = _once(args, measurement)
    result = {"model": args.model, **result}
    if args.output:
        details = measurement.details
        _write(args.output, details if details is not None else [result])
    print(json.dumps(result, allow_nan=False) if args.json else text(result))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for options that do not fit each other."""
    other = "--questions" if args.questions else "--tasks" if args.tasks else ""
    for name in ("window", "stride"):
        if getattr(args, name) is not None and other:
            raise UserError(
                f"--{name}={getattr(args, name)} is for text, and {other} has none. Leave it out."
            )
    for name in ("watch_interval", "watch_timeout"):
        value, option = getattr(args, name), f"--{name.replace('_', '-')}"
        if value is not None and not args.watch:
            raise UserError(f"{option}={value:g} has no effect without --watch. Add it.")
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{option}={value:g} must be above 0 and finite. Give seconds.")
    for name in ("step", "adapter"):
        value = getattr(args, name)
        if value is not None and (args.watch or name == "adapter" and args.tasks):
            other = "--watch" if args.watch else "--tasks"
            raise UserError(f"--{name}={value} does not go with {other}. Leave one of them out.")


def _once(args: argparse.Namespace, measurement: Measurement) -> dict[str, Any]:
    opened = open_model(args.model, args.step, args.dtype, measurement.mesh, args.adapter)
    if args.output and opened.run and not args.text and not args.questions:
        held_out = (
            f.path
            for spec in split_paths(opened.run.data.path, "config.data.path")
            for f in find_files(spec, "config.data.path")
        )
        check_output("--output", args.output, held_out)
    begun = time.perf_counter()
    result = measurement.of_model(opened)
    return {**result, "seconds": round(time.perf_counter() - begun, 2)}


def _watch(args: argparse.Namespace, measurement: Measurement) -> int:
    config = os.path.join(args.model, "config.json")
    if os.path.isfile(config) and not isinstance(read_config(args.model).get("model"), dict):
        raise UserError(
            f"--watch is for the folder of a run, and {args.model} is a checkpoint. Leave it out."
        )
    if not os.path.isdir(args.model):
        raise UserError(
            f"--watch: there is no folder {args.model}. Name the --workdir of a run, or make it if that is "
            f"still to begin."
        )
    output = args.output or os.path.join(args.model, watch.ROWS)

    def tell(row: dict[str, Any]) -> None:
        print(
            json.dumps(row) if args.json else f"step           {row['step']:,}\n{text(row)}\n",
            flush=True,
        )

    watching = watch.Watch(
        run=args.model,
        interval=args.watch_interval or INTERVAL,
        timeout=args.watch_timeout or 0,
        measure=lambda path, step: measurement.of_path(path, step, args.model),
        measured={
            "text": args.text,
            "questions": args.questions,
            "tasks": args.tasks,
            "window": args.window,
            "stride": args.stride,
            "limit": args.limit,
            "dtype": args.dtype,
        },
        tell=tell,
    )
    try:
        with RowFile(output, "--output") as rows:
            watching(rows)
    except KeyboardInterrupt:
        print(
            f"\nevaluate: stopped by Ctrl-C. The same command goes on after {output}.",
            file=sys.stderr,
        )
        return stopped_by(signal.SIGINT)
    print(f"wrote          {output}", file=sys.stderr)
    return 0


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
    if "results" in r:
        lines = [
            f"{task:<15}"
            + ", ".join(f"{k} {v:.4f}" for k, v in found.items() if isinstance(v, float))
            for task, found in r["results"].items()
        ]
    elif "acc" in r:

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
