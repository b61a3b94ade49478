"""The flags of train.py: a config file, overrides of its keys, and one clear line for every mistake in them."""

import os
import re
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from deepseek_jax.cluster.discovery import find
from deepseek_jax.cluster.processes import Cluster
from deepseek_jax.config import paths
from deepseek_jax.config.configdict import OPTIONAL, describe, from_config_dict
from deepseek_jax.config.options import PATH_OPTIONS, Config, replaced, value_of
from deepseek_jax.config.validation import validate
from deepseek_jax.errors import UserError
from deepseek_jax.run import init_from


def define_flags() -> flags.FlagValues:
    """Flags of their own, not the process's, so that several command lines can be read in one process."""
    f = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        None,
        "configs/NAME.py or configs/NAME.py:ARG; --config.KEY=VALUE overrides a key.",
        flag_values=f,
        lock_config=True,
    )
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder of this run: checkpoints/, metrics.jsonl, tensorboard/, config.json.",
        f,
    )
    flags.DEFINE_bool("print_config", False, "Print the resolved options as JSON and exit.", f)
    flags.DEFINE_bool("help", False, "Show this help and exit.", f, short_name="h")
    _define_cluster_flags(f)
    return f


def _define_cluster_flags(f: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "HOST:PORT of process 0, where no scheduler or launcher names it.",
        f,
    )
    flags.DEFINE_integer(
        "num_processes",
        None,
        "How many processes train together; 1 means this one only.",
        lower_bound=1,
        flag_values=f,
    )
    flags.DEFINE_integer(
        "process_id", None, "This process's number, from 0.", lower_bound=0, flag_values=f
    )
    flags.DEFINE_integer(
        "cluster_timeout",
        300,
        "Seconds until all processes must have come.",
        lower_bound=1,
        flag_values=f,
    )


def parse(argv: list[str]) -> flags.FlagValues:
    """The flags of a command line, which must be `sys.argv`: ml_collections looks for overrides there.

    Raises:
      UserError: an unknown flag or option, a value of the wrong type, a config file that cannot be used.
    """
    given = define_flags()
    if {"--help", "-help", "-h"} & set(argv[1:]):
        argv = [argv[0], "--help"]
    # absl reads an int flag with int(); for the optional options 0 means None.
    argv = [
        re.sub(r"=None$", "=0", a) if re.match(rf"--?config\.({'|'.join(OPTIONAL)})=", a) else a
        for a in argv
    ]
    argv = [
        re.sub(r"^(--?config=)(~.*)$", lambda m: m[1] + paths.expanded(m[2], "--config"), a)
        for a in argv
    ]
    try:
        rest = given(argv)[1:]
        if given.config is not None:
            given.config.seed  # a file that could not be loaded raises here at the latest
    except flags.Error as e:
        raise UserError(f"{str(e).splitlines()[0].rstrip('.')}. See --help.") from e
    except UserError:
        raise
    except (
        Exception
    ) as e:  # a config file is a program: whatever it raises is the user's to see, in one line
        raise UserError(_explain(e, argv)) from e
    if rest:
        raise UserError(
            f"{rest[0]!r} is not an option. Options look like --config.train.steps=100. See --help."
        )
    if given.workdir:
        given.workdir = paths.expanded(given.workdir, "--workdir")
    return given


def read_config(given: flags.FlagValues, argv: Sequence[str] = ()) -> Config:
    """The validated options, with model and tokenizer of the run in the workdir, of an import or of
    `config.init_from`.

    Args:
      argv: the command line, for the model's options that were set there.

    Raises:
      UserError: the first wrong one.
    """
    if given.config is None:
        raise UserError(
            "--config is missing. Name a config file, for instance --config=configs/tiny.py."
        )
    config = init_from.with_what_is_known(
        paths.absolute_config(from_config_dict(given.config)), given.workdir, argv
    )
    validate(config)
    return config


def find_cluster(argv: list[str]) -> Cluster:
    """The cluster of this process, not joined yet. Its flags are read before the others, whose mistakes can then be said once.

    Raises:
      UserError: a wrong flag, an incomplete cluster, or process 0 cannot listen at its address.
    """
    f = flags.FlagValues()
    _define_cluster_flags(f)
    program = os.path.basename(argv[0])
    if {"--help", "-help", "-h", "--print_config"} & {a.partition("=")[0] for a in argv[1:]}:
        return Cluster(None, 0, program)
    try:
        f(argv, known_only=True)
    except flags.Error as e:
        raise UserError(f"{str(e).splitlines()[0].rstrip('.')}. See --help.") from e
    place = find(
        f.coordinator_address, f.num_processes, f.process_id, f.cluster_timeout, os.environ
    )
    return Cluster(place, f.cluster_timeout, program)


def options(config: Config, given: flags.FlagValues) -> dict[str, Any]:
    """What every process must have got from its command, by full name.

    Paths are as they were given: relative ones may begin in other folders on other hosts, and what they hold is compared later.
    """
    out, as_given = {"--workdir": os.path.abspath(given.workdir)}, from_config_dict(given.config)
    for name in PATH_OPTIONS:
        config = replaced(config, name, value_of(as_given, name))

    def add(values: dict[str, Any], where: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                add(value, f"{where}.{name}")
            else:
                out[f"{where}.{name}"] = value

    add(config.to_json(), "config")
    return out


def help_text(given: flags.FlagValues) -> str:
    """All flags, then all options of the config with defaults and comments."""
    names = sorted({given[n].name for n in given} - {"flagfile", "undefok"})
    lines = [f"  --{n}\n        {given[n].help}" for n in names]
    return "\n".join(["Flags:", *lines, "", "Options, with their defaults:", describe()])


def _explain(error: Exception, argv: list[str]) -> str:
    """One line for what ml_collections raises while it reads a config file or an override."""
    text = str(error).replace("\\", "")
    key = re.search(r"'(\w+)'", text)
    path = next((a.split("=", 1)[1] for a in argv if re.match(r"--?config=", a)), "")
    flag = key and next((a for a in argv if re.match(rf"--?config\.(.*\.)?{key[1]}\b", a)), None)
    if isinstance(error, (AttributeError, KeyError)) and flag:
        hint = re.search(r"Did you mean \W*(\w+)", text)
        repair = f"Did you mean {hint[1]}?" if hint else "See --help for all options."
        return f"{flag}: {key[1]!r} is not an option. {repair}"
    if isinstance(error, OSError):
        return f"--config={path} cannot be read. Name a config file, for instance --config=configs/tiny.py."
    if "attribute 'get_config'" in text or "attribute 'seed'" in text:
        return (
            f"--config={path} has no get_config() that returns a ConfigDict. "
            f"Start from deepseek_jax.config.configdict.base_config(), as configs/tiny.py does."
        )
    last = [line for line in text.splitlines() if line.strip()] or [""]
    return f"--config={path} cannot be used: {type(error).__name__}: {last[-1].strip()}. Repair that file."
