"""What fits and what is fastest, tried on the devices of this machine.

  python -m deepseek_jax.plan tune batch --config=configs/tiny.py
  python -m deepseek_jax.plan tune strategies remat --config=... --devices=8 --out=tuned.json
  python -m deepseek_jax.plan tune all --config=... [--config.KEY=...]

{exercises}
  all         these, in this order

Every row is the train step of the config with the options that the table names, compiled for the
devices here and run: bytes of a device as the compiler plans them, so nothing that needs more than
there is gets started; the median time of steps, tokens and sequences per second. The rows of an
exercise run in turns in one process, state by state, so that their ratios are of one run. Rows that
the mesh or the options refuse are in the table with the reason. Tokens are random and fall by Zipf's
law; no data is read and nothing is learnt. Ctrl-C prints what there is.

CPU devices share the cores and the memory of this machine: --memory says how much each may have.
Exit codes: 0; 2 a mistake in the options; 130 interrupted.
"""

import itertools
import json
import signal
import sys
from typing import Any

import jax

from deepseek_jax.cli import arguments
from deepseek_jax.cli.texts import gb
from deepseek_jax.cluster.gpus import memory_fraction
from deepseek_jax.config.options import Config
from deepseek_jax.config.paths import check_output
from deepseek_jax.errors import ExitCode, UserError, stopped_by
from deepseek_jax.plan import host, options, present, rates_file
from deepseek_jax.plan.tune import batch, compare, exercises, tables
from deepseek_jax.plan.tune.steps import room_of
from deepseek_jax.run import commandline
from deepseek_jax.runtime.compile_cache import use_cache

ALL = "all"


def main(argv: list[str]) -> int:
    """The command. Arguments: without the program's name."""
    parser = options.Parser(
        __doc__.format(exercises=_listed()),
        further=lambda: commandline.help_text(commandline.define_flags()),
    )
    parser.prog = "deepseek_jax.plan tune"
    parser.add_argument("--devices", type=arguments.whole(1), help="How many; all by default.")
    parser.add_argument(
        "--memory",
        type=arguments.number(0),
        metavar="GB",
        help="Of a device that may be used; by default what JAX may take of a GPU, and of a CPU the "
        "host's memory over the devices.",
    )
    parser.add_argument("--steps", type=arguments.whole(1), default=6, help="Timed, of each row.")
    parser.add_argument(
        "--seconds", type=arguments.number(0), default=60.0, help="That a row's steps may take."
    )
    parser.add_argument(
        "--most", type=arguments.whole(1), default=batch.MOST, help="batch: sequences of a device."
    )
    parser.add_argument(
        "--out", type=arguments.path, metavar="FILE", help="Keep the result, as JSON."
    )
    wanted, rest = words(argv)
    own, config = options.read(parser, rest)
    if not wanted:
        raise UserError(f"say what to tune: {', '.join((*exercises.ABOUT, ALL))}. See --help.")
    if own.out:
        check_output("--out", own.out)
    devices = present.devices(own.devices)
    use_cache(config.compile.cache_dir, warn=_say)
    setting = compare.Setting(devices, room(own.memory, devices), own.steps, own.seconds, _say)
    others = host.Others()
    result: dict[str, Any] = {
        "device": host.cpu_name() if devices[0].platform == "cpu" else devices[0].device_kind,
        "platform": devices[0].platform,
        "devices": len(devices),
        "cores": host.cores(),
        "jax": jax.__version__,
        "room": setting.room,
        "flags": parser.parse_known_args(rest)[1],
        "tokens": "random, by Zipf's law",
        "exercises": {},
    }
    code: int = ExitCode.DONE
    try:
        for name in wanted:
            _one(name, config, setting, own.most, result["exercises"])
            _keep(own.out, result, others)
    except KeyboardInterrupt:
        code = stopped_by(signal.SIGINT)
        result["interrupted"] = True
    _keep(own.out, result, others)
    print(json.dumps(result, indent=1) if own.json else tables.text(result))
    return code


def words(argv: list[str]) -> tuple[list[str], list[str]]:
    """(exercises, in their order; the flags that follow) of a command line.

    Raises:
      UserError: a word names no exercise.
    """
    given = list(itertools.takewhile(lambda a: not a.startswith("-"), argv))
    known = [*exercises.ABOUT, ALL]
    for word in given:
        if word not in known:
            raise UserError(f"{word!r} is nothing to tune. Choose from: {', '.join(known)}.")
    chosen = list(exercises.ABOUT) if ALL in given else list(dict.fromkeys(given))
    return chosen, argv[len(given) :]


def room(memory: float | None, devices: list[jax.Device]) -> int:
    """Bytes of a device that may be used.

    Args:
      memory: GB, as given; None: what there is.
    """
    if memory is not None:
        return int(memory * 1e9)
    if (limit := room_of(devices)) is not None:
        return limit
    total = host.memory()
    if total is None:
        raise UserError(
            "this system does not say how much memory it has. Say what a device may use, for "
            "instance --memory=2 (GB)."
        )
    return int(total * memory_fraction(len(devices) > 1)) // len(devices)


def _one(
    name: str,
    config: Config,
    setting: compare.Setting,
    most: int,
    found: dict[str, Any],
) -> None:
    """One exercise, into `found`."""
    _say(f"{name}: {exercises.ABOUT[name]}; at most {gb(setting.room)} of a device")
    rows: list[dict[str, Any]] = []
    found[name] = {"rows": rows}
    if name == exercises.BATCH:
        largest = compare.largest_batch(config, setting, rows, most)
        found[name] |= {"largest": largest.largest, "ended": largest.ended}
    else:
        shape = dict(compare.make_mesh(config, setting.devices).shape)
        of_it = exercises.EXERCISES[name].rows(config, shape, setting.devices[0].platform)
        compare.compared(config, of_it, setting, rows)


def _keep(out: str | None, result: dict[str, Any], others: host.Others) -> None:
    result["other_cores"] = others.cores()
    if out:
        rates_file.write(out, result)


def _listed() -> str:
    return "\n".join(f"  {name:<11} {about}" for name, about in exercises.ABOUT.items())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # stdout may be JSON
