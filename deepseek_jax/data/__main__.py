"""`python -m deepseek_jax.data`: trains a tokenizer, writes corpora of any size as memory-mapped
token files, shows what a step was trained on, keeps the good ones of generated answers."""

import argparse
import itertools
import os
import re
import sys
from collections.abc import Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from deepseek_jax.cli import arguments
from deepseek_jax.cli.command import exit_code
from deepseek_jax.cli.progress import Bar
from deepseek_jax.config.paths import check_output, temporary
from deepseek_jax.data import answer_filter
from deepseek_jax.data.documents import (
    TEXT_FORMS,
    DataNotes,
    SourceFile,
    find_files,
    no_text,
    split_paths,
)
from deepseek_jax.data.formats import read_text
from deepseek_jax.data.sources import encoded
from deepseek_jax.data.token_writer import TokenWriter
from deepseek_jax.data.tokenfile import DTYPES, is_sidecar_of, sidecar_paths
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import UserError

EOS = "<|endoftext|>"
PATH_HELP = (
    f"the text: {TEXT_FORMS}; several separated by commas. "
    f"In folders, what is none of these is skipped."
)


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, or 2 after one line on stderr about the user's mistake."""
    try:
        return exit_code("data", lambda: run(*_parser().parse_known_args(argv)))
    except KeyboardInterrupt:
        print("Stopped. No file was written.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has closed its end, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Runs a command with what it knows of a command line, and the rest of that."""
    args.overrides = [a for a in rest if re.match("--?config[.]", a)]
    if unknown := [a for a in rest if args.command is not show_rows or a not in args.overrides]:
        _parser().error(f"unrecognized arguments: {' '.join(unknown)}")
    args.command(args)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = arguments.Parser(
        prog="python -m deepseek_jax.data", description="Prepares training data."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    tokenizer = commands.add_parser(
        "tokenizer",
        help="train a byte-level BPE tokenizer on text",
        description=f"Trains a byte-level BPE tokenizer whose end-of-document token is {EOS}. "
        "The same text gives the same file.",
        epilog="example: python -m deepseek_jax.data tokenizer --path=stdlib --vocab-size=4096 "
        "--out=tokenizer.json",
    )
    tokenizer.add_argument("--path", type=arguments.path_list, required=True, help=PATH_HELP)
    tokenizer.add_argument(
        "--vocab-size",
        type=int,
        required=True,
        help="number of tokens, at least 257: the bytes and the end of a document",
    )
    tokenizer.add_argument(
        "--out", type=arguments.path, required=True, help="file to write, for config.data.tokenizer"
    )
    tokenizer.set_defaults(command=train_tokenizer)

    tokenize = commands.add_parser(
        "tokenize",
        help="write text as a memory-mapped token file",
        description="Writes a corpus of any size as token ids, for config.data.path. "
        "Beside NAME.npy or NAME.bin it writes\n"
        "NAME.json (what the file holds) and NAME.offsets (where its documents begin); keep the "
        "three together.",
        epilog="example: python -m deepseek_jax.data tokenize --path='text/*.jsonl' "
        "--tokenizer=tokenizer.json --out=corpus.npy",
    )
    tokenize.add_argument("--path", type=arguments.path_list, required=True, help=PATH_HELP)
    tokenize.add_argument(
        "--tokenizer",
        type=arguments.path,
        required=True,
        help="bytes, or the path of a tokenizer.json",
    )
    tokenize.add_argument("--out", type=arguments.path, required=True, help="NAME.npy or NAME.bin")
    tokenize.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *DTYPES],
        help="integer type of the ids (auto: the smallest that holds them)",
    )
    tokenize.add_argument(
        "--special-tokens",
        action="store_true",
        help="<|im_start|> and the like in the text are the tokenizer's special tokens, "
        "and eos ends a document (default: text)",
    )
    tokenize.set_defaults(command=tokenize_corpus)

    show = commands.add_parser(
        "show",
        help="print the documents or examples that a run is trained on",
        description="Prints the documents or examples in the rows of a step, or of the global data "
        "order, as metrics.jsonl names them for spikes\n"
        "of the loss, for skipped updates and for rollbacks. Reads config.json and metrics.jsonl of "
        "the run, which may be going on, and its\n"
        "data. With --config instead of --workdir: the first rows of a run that is to begin. Of "
        "examples for fine-tuning the trained tokens\n"
        "are in colour, or between marks where there is no colour.",
        epilog="examples: python -m deepseek_jax.data show --workdir=runs/tiny --step=310\n"
        "          python -m deepseek_jax.data show --config=configs/post/sft.py "
        "--config.init_from=MODEL --config.data.path=chats.jsonl",
    )
    show.add_argument("--workdir", type=arguments.path, help="folder of the run")
    show.add_argument(
        "--config",
        help="in its place: a config file; --config.KEY=VALUE overrides a key, as for train.py",
    )
    show.add_argument("--step", type=int, help="the step, from 1")
    show.add_argument(
        "--rows", help="in place of --step: rows FIRST-LAST of the global order, or one row"
    )
    show.add_argument(
        "--characters",
        type=int,
        default=300,
        help="of each document's piece to print; 0: all (default: 300)",
    )
    show.set_defaults(command=show_rows)
    answer_filter.add_parser(commands)
    return parser


def show_rows(args: argparse.Namespace) -> None:
    """Prints what was trained on.

    Raises:
      UserError: about an argument, the run's folder or its data.
    """
    # above this package: only this command reads a run
    from deepseek_jax.run import commandline, data_show

    if args.config is None and args.workdir is not None and not args.overrides:
        data_show.show(args.workdir, args.step, args.rows, args.characters)
        return
    if args.workdir is not None or args.config is None:
        raise UserError(
            "--workdir and --config: give one of them, the folder of a run or the config file of one that "
            "is to begin."
        )
    if args.step is not None:
        raise UserError(f"--step={args.step} is of a run. Give its --workdir, or --rows.")
    flags = commandline.parse(["data show", f"--config={args.config}", *args.overrides])
    data_show.show_config(commandline.read_config(flags), args.rows, args.characters)


def train_tokenizer(args: argparse.Namespace) -> None:
    """Trains byte-level BPE on `args.path` and writes `args.out`.

    Raises:
      UserError: about an argument or the text.
    """
    if args.vocab_size < 257:
        raise UserError(
            f"--vocab-size={args.vocab_size} is too small for the 256 bytes and {EOS}. Set it to 257 or more."
        )
    notes = DataNotes()
    sources = _text_sources(args.path, notes)
    check_output("--out", args.out, _paths(sources))
    out = os.path.expanduser(args.out)
    if os.path.exists(out) and not os.path.isfile(out):  # a rename would put a file in its place
        raise UserError(f"--out={args.out!r} is no file. Name one.")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        special_tokens=[EOS],
        show_progress=sys.stderr.isatty(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts, characters = 0, 0

    def pieces(bar: Bar) -> Iterator[str]:
        nonlocal texts, characters
        for spec, files in sources:
            for file in files:
                for piece in read_text(file, spec, "--path", notes):
                    bar.advance(piece.read)
                    texts, characters = texts + bool(piece.text), characters + len(piece.text)
                    yield piece.text

    with Bar("Reading text", _bytes(sources), show=True) as bar:
        tokenizer.train_from_iterator(pieces(bar), trainer)
    if not texts:
        raise no_text(args.path, "--path", notes)
    temp = temporary(out)
    try:
        try:
            with open(temp, "x", encoding="utf-8") as f:
                f.write(tokenizer.to_str(pretty=True))
            os.replace(temp, out)
        finally:
            if os.path.exists(temp):
                os.unlink(temp)
    except OSError as e:
        raise _not_written(args.out, e) from None
    size = tokenizer.get_vocab_size()
    short = (
        f" (fewer than --vocab-size={args.vocab_size}: the text has no more pairs to merge)"
        if size < args.vocab_size
        else ""
    )
    print(
        f"Wrote {args.out}: {size:,} tokens{short}, from {characters:,} characters.\n{_lines(notes)}"
        f"Use it with --config.data.tokenizer={args.out} --config.model.vocab_size={size}"
    )


def tokenize_corpus(args: argparse.Namespace) -> None:
    """Streams `args.path` through the tokenizer into the token file `args.out`.

    Raises:
      UserError: about an argument or the text.
    """
    if os.path.splitext(args.out)[1].lower() not in (".npy", ".bin"):
        raise UserError(
            f"--out={args.out!r} ends in neither .npy nor .bin. Name it NAME.npy or NAME.bin."
        )
    if args.special_tokens and args.tokenizer == "bytes":
        raise UserError(
            "--special-tokens has no effect with --tokenizer=bytes, which has none that text "
            "could spell. Leave it out, or give a tokenizer.json."
        )
    tokenizer = load_tokenizer(args.tokenizer, "--tokenizer", args.special_tokens)
    dtype = (
        next(d for d, size in DTYPES.items() if tokenizer.vocab_size <= size)
        if args.dtype == "auto"
        else args.dtype
    )
    if tokenizer.vocab_size > DTYPES[dtype]:
        raise UserError(
            f"--dtype={dtype} holds ids below {DTYPES[dtype]}, but --tokenizer={args.tokenizer!r} has "
            f"{tokenizer.vocab_size} tokens. Set --dtype=auto."
        )
    notes = DataNotes()
    sources = _text_sources(args.path, notes)
    out = os.path.expanduser(args.out)
    inputs = itertools.chain(
        _paths(sources), [] if args.tokenizer == "bytes" else [os.path.expanduser(args.tokenizer)]
    )
    check_output(
        "--out", args.out, inputs, {p: lambda _: is_sidecar_of(out) for p in sidecar_paths(out)}
    )
    try:
        with TokenWriter(out, dtype, tokenizer) as writer:
            with Bar("Tokenizing", _bytes(sources), show=True) as bar:
                for spec, files in sources:
                    for batch in encoded(files, spec, "--path", tokenizer, bar, notes):
                        for ids, ends in batch:
                            writer.write(ids, ends)
            if not writer.documents:
                raise no_text(args.path, "--path", notes)
            writer.finish(args.path)
    except OSError as e:
        raise _not_written(args.out, e) from None
    print(
        f"Wrote {args.out}: {writer.tokens:,} tokens of {dtype} in {writer.documents:,} "
        f"documents.\n{_lines(notes)}"
        f"Use it with --config.data.path={args.out} --config.data.tokenizer={args.tokenizer} "
        f"{'--config.data.special_tokens=True ' if args.special_tokens else ''}"
        f"--config.model.vocab_size={tokenizer.vocab_size}"
    )


def _text_sources(paths: str, notes: DataNotes) -> list[tuple[str, list[SourceFile]]]:
    sources = [(spec, find_files(spec, "--path", notes)) for spec in split_paths(paths, "--path")]
    for spec, files in sources:
        tokens = next((f.path for f in files if f.kind == "tokens"), None)
        if tokens:
            raise UserError(
                f"--path={spec!r}: {tokens} holds token ids, not text. Give the text they were made of."
            )
    return sources


def _lines(notes: DataNotes) -> str:
    return "".join(f"{line}\n" for line in notes.lines())


def _paths(sources: list[tuple[str, list[SourceFile]]]) -> Iterator[str]:
    return (f.path for _, files in sources for f in files)


def _bytes(sources: list[tuple[str, list[SourceFile]]]) -> int:
    return sum(f.size for _, files in sources for f in files)


def _not_written(out: str, error: OSError) -> UserError:
    return UserError(
        f"--out={out!r} cannot be written ({error.strerror or error}). Make room and the folder writable, or "
        f"choose another name."
    )


if __name__ == "__main__":
    sys.exit(main())
