"""A config of ours from the files and command lines of another trainer, and what became of every key.

  python -m deepseek_jax.migrate recipe.yaml fsdp.yaml ds.json --devices=8 --out=configs/mine.py
  python -m deepseek_jax.migrate recipe.yaml --command='torchrun --nproc_per_node=8 sft.py --bf16' --check
  python -m deepseek_jax.migrate recipe.yaml --from=hf4 --devices=8 --allow=lora_target_parameters

Give all that makes one run: recipe, Accelerate's file, DeepSpeed's, the command line. Three lists say what
each key became, what has no effect here and why, and what is refused as training would not be theirs;
--allow=KEY leaves such a key out. The new config has every default of the other trainer that differs from
ours, and beside each option where it came from. Without --out it is printed.

Exit codes: 0; 2 where something is refused or wrong, and then nothing is written.
"""

import functools
import json
import os
import sys

from deepseek_jax.cli import arguments
from deepseek_jax.cli.command import exit_code
from deepseek_jax.config import paths
from deepseek_jax.errors import ExitCode, UserError
from deepseek_jax.launch.template import command as template
from deepseek_jax.migrate import check, cluster_file, config_file, engine, launch, loading, report
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.registry import TOOLS


def parser() -> arguments.Parser:
    """The command line of this command."""
    names = "\n".join(f"  {tool.name:<18}{tool.title}" for tool in TOOLS.values())
    out = arguments.Parser(
        prog="python -m deepseek_jax.migrate",
        description=__doc__,
        epilog=f"--from takes, separated by commas (guessed otherwise, and said):\n{names}",
    )
    out.add_argument(
        "files", nargs="*", type=arguments.path, metavar="FILE", help="YAML, JSON; shell scripts."
    )
    out.add_argument(
        "--command",
        action="append",
        default=[],
        metavar="LINE",
        help="The command line that starts the run; may be repeated.",
    )
    out.add_argument("--from", dest="tools", default="", metavar="TOOL", help="See below.")
    out.add_argument(
        "--devices", type=_count, metavar="N", help="GPUs of the new run, of all hosts together."
    )
    out.add_argument("--gpus_per_node", type=_count, metavar="N", help="GPUs of one host.")
    out.add_argument(
        "--allow", action="append", default=[], metavar="KEY", help="Leave out what is refused."
    )
    out.add_argument("--check", action="store_true", help="Print the lists alone.")
    out.add_argument(
        "--match",
        choices=["sequences", "tokens"],
        default="sequences",
        help="Of one example a row, padded: keep the sequences of a step, or its tokens in packed rows.",
    )
    out.add_argument(
        "--mean_length", type=_length, metavar="TOKENS", help="Of an example, for --match=tokens."
    )
    out.add_argument(
        "--rows", type=_count, metavar="N", help="Examples of the data: how many steps epochs are."
    )
    out.add_argument("--out", type=arguments.path, metavar="FILE", help="The new config.")
    out.add_argument(
        "--template",
        metavar="'KIND ...'",
        help="With --out: also a file that starts the run on a cluster: slurm, jobset, rayjob or ssh, and "
        "behind it options of `launch template`: --template='slurm --partition=h100 --time=1-0'.",
    )
    out.add_argument("--json", action="store_true", help="The lists as JSON.")
    return out


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if not args.files and not args.command:
        raise UserError("nothing to migrate. Name a recipe, or give --command. See --help.")
    if args.out:
        paths.check_output("--out", args.out, args.files)
        stem, ending = os.path.splitext(args.out)
        if ending != ".py" and (os.path.isfile(args.out) or not os.path.exists(args.out)):
            raise UserError(
                f"--out={args.out} will be a Python file, as train.py reads it. Name it {stem}.py."
            )
    elif args.template is not None:
        raise UserError(
            f"--template={args.template!r} starts a config that is written. Give --out=configs/NAME.py too."
        )
    m = Migration(
        devices=args.devices,
        gpus_per_node=args.gpus_per_node,
        match_tokens=args.match == "tokens",
        mean_length=args.mean_length,
        rows=args.rows,
    )
    sources = loading.load(args.files, args.command, os.environ)
    engine.migrate(sources, [n for n in args.tools.split(",") if n], m)
    found = report.lists(m, args.allow)
    out = args.out or "configs/migrated.py"
    command = launch.command(m, out)
    if args.json:
        print(json.dumps(report.as_json(m, found, command), indent=2))
    elif args.check or args.out or found.refused:
        print(report.text(m, found, command, args.rows))
    if found.refused:
        raise UserError(report.refusal(found))
    check.check(m)
    title = f"The run of {', '.join(s.name for s in sources)}, migrated."
    written = config_file.text(m, title, command)
    made = None
    if args.template is not None:
        made = cluster_file.make(m, args.template, args.out, args.files)
    if args.out:
        write(args.out, written)
        say = functools.partial(print, file=sys.stderr if args.json else sys.stdout)
        say(f"\nWritten: {args.out}")
        if made:
            template.save(made)
            say(f"Written: {made.path}, to be started by: {cluster_file.submitted(made)}")
            if made.report:
                print(made.report, file=sys.stderr)
    elif not args.check and not args.json:
        print(written, end="")
    return ExitCode.DONE


def write(path: str, content: str) -> None:
    """Writes a file whole or not at all."""
    temporary = paths.temporary(path)
    try:
        with open(temporary, "w", encoding="utf-8") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _count(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 1 << 24:
        raise ValueError(text)
    return number


def _length(text: str) -> float:
    number = float(text)
    if not 1 <= number <= 1 << 24:
        raise ValueError(text)
    return number


if __name__ == "__main__":
    sys.exit(exit_code("deepseek_jax.migrate", lambda: main(sys.argv[1:])))
