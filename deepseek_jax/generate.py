"""Text from a model: a Hugging Face checkpoint, or the folder of a run.

  python -m deepseek_jax.generate MODEL --prompt=TEXT          one text, as it comes
  python -m deepseek_jax.generate MODEL --chat                 a conversation; Ctrl-D ends it
  python -m deepseek_jax.generate MODEL --prompts=FILE         many; JSONL to stdout or --out
  python -m deepseek_jax.generate MODEL --prompts=FILE --samples=N --out=FILE
      N answers to each prompt, as rows that fine-tuning reads (messages, or prompt and completion); the same
      command goes on after a kill. `python -m deepseek_jax.data filter` keeps the good ones.

MODEL is a folder with config.json and safetensors, a WORKDIR of train.py, or one of `python -m
deepseek_jax.hf import`.
"""

import argparse
import itertools
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import jax

from deepseek_jax.cli import arguments
from deepseek_jax.cli.command import exit_code
from deepseek_jax.cli.texts import clean_text
from deepseek_jax.config.options import DTYPES, CompileConfig
from deepseek_jax.config.paths import check_output
from deepseek_jax.errors import UserError, stopped_by
from deepseek_jax.hf.provenance import model_files
from deepseek_jax.inference.generation import samples
from deepseek_jax.inference.generation.answers import Answers
from deepseek_jax.inference.generation.bound import BoundModel
from deepseek_jax.inference.generation.engine import Engine
from deepseek_jax.inference.generation.prompts import encode_all, read_prompts
from deepseek_jax.inference.generation.sample import check_prompt, encode_prompt, sample, tokens
from deepseek_jax.inference.generation.sampling import Sampling
from deepseek_jax.inference.opener import open_model, parse_mesh
from deepseek_jax.runtime import compile_cache

__all__ = ["check_prompt", "encode_prompt", "main", "sample", "tokens"]


def parser() -> argparse.ArgumentParser:
    p = arguments.Parser(prog="python -m deepseek_jax.generate", description=__doc__)
    arguments.add_model(p, "checkpoint, or folder of a run", "--workdir")
    p.add_argument("--step", type=int, help="checkpoint of the run (default: the newest)")
    p.add_argument(
        "--adapter",
        type=arguments.path,
        metavar="DIR",
        help="folder of a LoRA adapter as PEFT writes it, merged into the checkpoint",
    )
    what = p.add_mutually_exclusive_group()
    what.add_argument("--prompt", default="", help="text to go on from")
    what.add_argument(
        "--prompts",
        type=arguments.path,
        metavar="FILE",
        help='prompts: lines of text, or with the ending .jsonl objects with "prompt", or with '
        '"messages" and what the chat template reads: tools, documents, '
        "chat_template_kwargs, chat_template, "
        "add_generation_prompt, continue_final_message; - is stdin",
    )
    what.add_argument(
        "--chat",
        action="store_true",
        help="a conversation, by the checkpoint's chat template; lines are read from stdin",
    )
    p.add_argument("--system", help="with --chat: the system message")
    p.add_argument(
        "--out",
        "--output",
        dest="output",
        type=arguments.path,
        metavar="FILE",
        help="with --prompts: where results go (default: stdout)",
    )
    p.add_argument(
        "--samples",
        "--num-return-sequences",
        "--num_return_sequences",
        type=int,
        metavar="N",
        help="with --prompts and --out: so many answers to each prompt, as rows for fine-tuning",
    )
    p.add_argument(
        "--batch-size",
        "--batch_size",
        type=int,
        default=8,
        help="with --prompts: how many at once (default %(default)s)",
    )
    p.add_argument(
        "--max-tokens",
        "--max_tokens",
        type=int,
        default=200,
        help="tokens of an answer at most (default %(default)s)",
    )
    p.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="0: always the likeliest token (default %(default)s)",
    )
    p.add_argument(
        "--top-k",
        "--top_k",
        type=int,
        default=0,
        help="sample from so many of the likeliest tokens; 0: all (default)",
    )
    p.add_argument(
        "--top-p",
        "--top_p",
        type=float,
        default=0.95,
        help="sample from the likeliest tokens that make up this probability (default %(default)s)",
    )
    p.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end an answer before this text; may be given several times",
    )
    p.add_argument(
        "--seed",
        type=int,
        default=0,
        help="an answer depends on it, its prompt, the prompt's number in the file and the sample's alone",
    )
    p.add_argument(
        "--draft-tokens",
        "--draft_tokens",
        type=int,
        default=0,
        metavar="N",
        help="multi-token prediction layers draft N tokens per step; the text stays the same (default: 0)",
    )
    p.add_argument(
        "--mesh",
        default="",
        help="devices along axes, for instance fsdp=2,expert=4 (default: one device)",
    )
    p.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of weights and computation (default: float32 on CPUs, bfloat16 elsewhere)",
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return exit_code("generate", lambda: run(parser().parse_args(argv)), "result")
    except KeyboardInterrupt:
        print("\ngenerate: stopped by Ctrl-C.", file=sys.stderr)
        return stopped_by(signal.SIGINT)


def run(args: argparse.Namespace) -> int:
    arguments.take_model(args)
    check(args)
    args.prompt = clean_text(args.prompt)
    args.stop = [clean_text(s) for s in args.stop]
    if args.output:
        check_output(
            "--output",
            args.output,
            itertools.chain(
                [args.prompts], *map(model_files, filter(None, [args.model, args.adapter]))
            ),
        )
    prompts = read_prompts(args.prompts) if args.prompts else []
    output = None
    if args.samples:
        output = samples_output(args, prompts)
        if output.is_complete():
            print(f"{args.output} is complete. Delete it for new answers.", file=sys.stderr)
            return 0
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    opened = open_model(args.model, args.step, dtype, parse_mesh(args.mesh), args.adapter)
    model = opened.model
    encoder = opened.encoder()
    if args.draft_tokens and not model.config.num_nextn_predict_layers:
        raise UserError(
            f"--draft-tokens={args.draft_tokens} needs multi-token prediction layers, and {args.model} has "
            f"none (num_nextn_predict_layers=0). Leave --draft-tokens out."
        )
    if not args.prompts and not args.chat:
        prompts = [{"prompt": args.prompt}]
    messages = []
    if args.system is not None:
        messages.append({"role": "system", "content": clean_text(args.system)})
    if args.chat:  # a template that is missing is found out before anything is compiled
        encoder.chat.encode([*messages, {"role": "user", "content": ""}])
    chats = args.chat or any("messages" in p for p in prompts)
    if chats and (end := encoder.chat.turn_end()) and end not in args.stop:
        print(
            f"note           the chat template ends an answer with {end}, which is no stop token by "
            f"generation_config.json or eos_token. --stop='{end}' makes it one.",
            file=sys.stderr,
        )
    ids = encode_all(encoder, prompts, args.prompts, model.config.max_position_embeddings)
    if any("prompt" in p for p in prompts):
        encoder.say_prefix()
    if output:
        output.begin(samples.fingerprint(model))
    cache_dir = (opened.run.compile if opened.run else CompileConfig()).cache_dir
    compile_cache.use_cache(cache_dir, warn=lambda line: print(line, file=sys.stderr))
    engine = Engine(
        BoundModel(model.layout, model.params, model.bias, model.mesh),
        give=True,
        vocab=encoder.vocab_size,
        note=lambda line: print(line, file=sys.stderr),
    )
    model.params = model.bias = None  # the engine has its own by now
    answers = Answers(
        engine,
        encoder,
        sampling=Sampling(args.temperature, args.top_k, args.top_p, args.seed),
        stop=args.stop,
        max_tokens=args.max_tokens,
        draft_tokens=args.draft_tokens,
    )
    if args.chat:
        answers.chat(messages)
    elif output:
        samples.write(answers, prompts, ids, args.samples, args.batch_size, output)
    elif args.prompts:
        answers.write(prompts, ids, args.batch_size, args.output)
    else:
        print(args.prompt, end="", flush=True)
        answers.show(ids[0], 0)
    if args.draft_tokens:
        print(engine.acceptance, file=sys.stderr)
    return 0


def samples_output(args: argparse.Namespace, prompts: list[dict[str, Any]]) -> samples.Output:
    """Where the rows of --samples go, and what they are made of."""
    samples.check_prompts(prompts, args.prompts)
    return samples.Output(
        args.output,
        {
            "model": os.path.abspath(args.model),
            "step": args.step,
            "adapter": args.adapter,
            "prompts": samples.digest(prompts),
            "samples": args.samples,
            "seed": args.seed,
            "temperature": args.temperature,
            "top-k": args.top_k,
            "top-p": args.top_p,
            "max-tokens": args.max_tokens,
            "stop": args.stop,
        },
    )


def check(args: argparse.Namespace) -> None:
    """Raises UserError for options that do not fit each other or are out of range."""
    if not 0 <= args.temperature < float("inf") or not 0 < args.top_p <= 1 or args.max_tokens < 1:
        raise UserError(
            f"--temperature={args.temperature} must be 0 or more and finite, --top-p={args.top_p} above 0 "
            f"and at most 1, --max-tokens={args.max_tokens} at least 1."
        )
    if (
        args.top_k < 0
        or args.batch_size < 1
        or not 0 <= args.draft_tokens <= 16
        or not 0 <= args.seed < 2**32
    ):
        raise UserError(
            f"--top-k={args.top_k} must be 0 or more, --batch-size={args.batch_size} at least 1, "
            f"--draft-tokens={args.draft_tokens} from 0 to 16, --seed={args.seed} from 0 to {2**32 - 1}."
        )
    if "" in args.stop:
        raise UserError(
            "--stop is empty, and every text ends before that. Give the text to stop before."
        )
    if args.samples is not None and (
        args.samples < 1 or args.samples > 1 and args.temperature == 0
    ):
        raise UserError(
            f"--samples={args.samples} with --temperature={args.temperature:g}: give 1 or more, and several "
            f"only with a temperature above 0, without which they are the same."
        )
    for name, needs, given in (
        ("--system", "--chat", args.system is not None and not args.chat),
        ("--output", "--prompts", args.output and not args.prompts),
        ("--samples", "--prompts", args.samples and not args.prompts),
        ("--samples", "--out", args.samples and not args.output),
    ):
        if given:
            raise UserError(
                f"{name} has no effect without {needs}. Add {needs}, or leave {name} out."
            )


if __name__ == "__main__":
    sys.exit(main())
