"""Documents that follow from the table of options.

python -m deepseek_jax.config words                         # from the words of FSDP, DeepSpeed, NeMo, Hugging
Face to ours python -m deepseek_jax.config words --out=docs/words.md     # into a file python -m
deepseek_jax.config options                       # every option: default, unit, limits, choices
"""

import sys

from deepseek_jax.cli import arguments
from deepseek_jax.cli.command import exit_code
from deepseek_jax.config import help, paths, words


def parser() -> arguments.Parser:
    """The command line of this command."""
    out = arguments.Parser(prog="python -m deepseek_jax.config", description=__doc__)
    out.add_argument("what", choices=("words", "options"), help="Which document.")
    out.add_argument(
        "--out", type=arguments.path, metavar="FILE", help="A file to write instead of stdout."
    )
    return out


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    text = words.table() if args.what == "words" else f"{help.describe()}\n"
    if args.out is None:
        print(text, end="")
        return 0
    paths.check_output("--out", args.out)
    with open(args.out, "w", encoding="utf-8") as f:
        f.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code("deepseek_jax.config", lambda: main(sys.argv[1:])))
