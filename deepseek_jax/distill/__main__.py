"""A teacher's logits, kept on disk for the runs that learn from them.

  python -m deepseek_jax.distill cache --config=configs/post/distil.py --config.init_from=STUDENT \\
      --config.data.path=FILE --teacher=TEACHER --top-k=64 --temperatures=1,2 --out=DIR
      asks TEACHER about every token of the run's data and keeps its K likeliest words; the same command goes
      on after a kill, and several with --worker=0/4 ... --worker=3/4 make a part each
  python train.py --config=configs/post/distil.py ... --config.distill.cache=DIR
      learns from what was kept, without the teacher
  python -m deepseek_jax.distill show DIR       what a cache is of, how much of it is there, its command
  python -m deepseek_jax.distill verify DIR     reads all of it, and names what is missing or damaged

--config with its options, or --workdir of a run, says which data, tokenizer, seed and sequence_length: those
of the training that is to read the cache, which refuses another. TEACHER is a Hugging Face checkpoint or the
workdir of a run. A record is K ids of 2 bytes (3 for vocabularies above 65,536), K logits of float16 and the
log-sum-exp of all logits at each temperature, so that the probability of all other words is exact: 328 bytes
for K=64, 3 and two temperatures. Training can take fewer words, and any of these temperatures.

Several hosts: python -m deepseek_jax.launch ... -m deepseek_jax.distill cache ..., as for train.py.

Exit codes: 0 done; 1 verify found damage, or that shards are missing; 2 a mistake, said in one line.
"""

if __name__ == "__main__":
    from deepseek_jax.runtime.huge_pages import use_huge_pages

    use_huge_pages()  # before all other work: it starts the program again

import argparse
import contextlib
import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from deepseek_jax.cli import arguments
from deepseek_jax.cli.command import exit_code
from deepseek_jax.cluster import gpus
from deepseek_jax.cluster.signals import Stopper
from deepseek_jax.config import paths
from deepseek_jax.config.configdict import from_config_dict
from deepseek_jax.config.options import OPTIONS, Config, replaced, value_of
from deepseek_jax.config.validation import validate
from deepseek_jax.distill import commands
from deepseek_jax.distill.maker import Worker
from deepseek_jax.errors import UserError
from deepseek_jax.run import caching, commandline
from deepseek_jax.run.processes import ending_together
from deepseek_jax.train import workdir as workdirs

PROGRAM = "python -m deepseek_jax.distill"


def parser() -> arguments.Parser:
    top = arguments.Parser(prog=PROGRAM, description=__doc__)
    of = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    p = of.add_parser("cache", description=__doc__)
    p.add_argument("--teacher", type=arguments.path, required=True, metavar="DIR", help="the model")
    p.add_argument(
        "--top-k",
        type=arguments.whole(1),
        default=64,
        metavar="K",
        help="words per token (default %(default)s)",
    )
    p.add_argument(
        "--temperatures",
        type=temperatures,
        default=(1.0, 2.0),
        metavar="T,...",
        help="of the log-sum-exps; 1 is always among them (default 1,2)",
    )
    p.add_argument("--out", type=arguments.path, required=True, metavar="DIR", help="the cache")
    p.add_argument(
        "--worker",
        type=worker,
        default=Worker(),
        metavar="I/N",
        help="make every N-th shard, from I on",
    )
    p.add_argument(
        "--rows-per-call",
        type=arguments.whole(1),
        metavar="N",
        help="rows of a forward pass, over the whole mesh (default: one for each device of the batch axes, "
        "as training does; more are faster where rows are short, and records differ in rounding then)",
    )
    p.add_argument(
        "--rows-per-shard",
        type=arguments.whole(1),
        metavar="N",
        help="rows of a file (default: 64 MiB of them)",
    )
    for name, text in (("show", "what a cache is of"), ("verify", "whether it is whole")):
        p = of.add_parser(name, description=text)
        p.add_argument("dir", type=arguments.path, metavar="DIR")
        p.add_argument("--json", action="store_true", help="print JSON")
    return top


def temperatures(text: str) -> tuple[float, ...]:
    """The type of --temperatures: "1,2"."""
    try:
        out = {float(t) for t in text.split(",")} | {1.0}
    except ValueError:
        out = set()
    if not out or not all(0 < t < float("inf") for t in out):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of numbers above 0. Write it as 1,2"
        )
    return tuple(sorted(out))


def worker(text: str) -> Worker:
    """The type of --worker: "0/4"."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not found or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not one of some workers. Write the first of 4 as 0/4, the last as 3/4"
        )
    return Worker(int(found[1]), int(found[2]))


def main(argv: Sequence[str] | None = None, stopper: Stopper | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    args, rest = parser().parse_known_args(given)
    if args.command == "cache":
        kept = [a for a in _joined(given) if not a.startswith("--worker=")]
        cache(args, rest, shlex.join([*PROGRAM.split(), *kept]), stopper or Stopper())
        return 0
    if rest:
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    code, result, lines = getattr(commands, args.command)(args.dir)
    print(json.dumps(result, indent=2) if args.json else "\n".join(lines))
    return code


def cache(args: argparse.Namespace, rest: Sequence[str], command: str, stopper: Stopper) -> None:
    """Makes a cache, or goes on with one.

    Args:
      rest: of the command line: config, workdir, processes.
      command: the whole line, without the worker.

    Raises:
      UserError: about an argument, the config, data or teacher.
    """
    processes = commandline.find_cluster(["distill", *rest])
    with ending_together(processes), _naming():
        of_config = {"distill.teacher": args.teacher, "distill.top_k": args.top_k}
        overrides = {"objective": "distill", "distill.cache": ""} | of_config
        given = commandline.parse(
            [PROGRAM, *rest, *(_flags(overrides) if _has_config(rest) else ())]
        )
        config = _config(given, overrides)
        gpus.take_memory(processes.together)
        asked = {f"--{name}": str(value) for name, value in vars(args).items()}
        for name, option in OPTIONS.items():
            if not option.path:  # relative ones may begin in other folders on other hosts
                asked[option.full_name] = value_of(config, name)
        processes.join(asked, config.watchdog.heartbeat_timeout, stopper)
        request = caching.Request(
            args.out,
            args.temperatures,
            args.worker,
            args.rows_per_call,
            args.rows_per_shard,
            command,
            given.workdir,
        )
        caching.cache_teacher(config, request, processes)


@contextlib.contextmanager
def _naming() -> Iterator[None]:
    """A mistake inside that names an option of the training is one of this command's, and says so."""
    try:
        yield
    except UserError as e:
        text = str(e).replace(", or to 0 for the full vocabulary", "")  # a cache has none
        for theirs, ours in (("top_k", "--top-k"), ("teacher", "--teacher")):
            text = re.sub(rf"config\.distill\.{theirs}\b", ours, text)
        raise UserError(text) from e


def _has_config(arguments: Sequence[str]) -> bool:
    return any(re.match(r"--?config(=|$)", a) for a in arguments)


def _flags(overrides: dict[str, Any]) -> list[str]:
    return [f"--config.{name}={value}" for name, value in overrides.items()]


def _config(given: Any, overrides: dict[str, Any]) -> Config:
    """The options of the training, of a config file or of a run."""
    if given.config is not None:
        return commandline.read_config(given)
    if not given.workdir:
        raise UserError(
            "--config and --workdir are missing: they say what data are read. Name the config file of the "
            "training, with its options, or the folder of its run."
        )
    config = from_config_dict(workdirs.read_config(given.workdir))
    for name, value in overrides.items():
        config = replaced(config, name, value)
    config = paths.absolute_config(config)
    validate(config)
    return config


def _joined(argv: list[str]) -> list[str]:
    """`--worker 0/4` as `--worker=0/4`."""
    out: list[str] = []
    for argument in argv:
        if out and out[-1] == "--worker":
            out[-1] += f"={argument}"
        else:
            out.append(argument)
    return out


if __name__ == "__main__":
    # Nothing has to be saved: a signal ends it in one line, as a kill would.
    listening = Stopper("distill").install()
    sys.exit(exit_code("distill", lambda: main(None, listening)))
