"""The flags of train.py: a config file, overrides of its keys, and one line for every mistake in them."""

import os
import re
from typing import Any

from absl import flags
from ml_collections import config_flags

from deepseek_jax.cluster.discovery import find
from deepseek_jax.cluster.processes import Cluster
from deepseek_jax.config import paths, suggestions, words
from deepseek_jax.config.configdict import from_config_dict
from deepseek_jax.config.help import describe
from deepseek_jax.config.options import OPTIONS, Config, value_of
from deepseek_jax.config.validation import validate
from deepseek_jax.errors import UserError
from deepseek_jax.run import init_from

HELP = {"--help", "-help", "-h"}


def define_flags(argv: list[str] | None = None) -> flags.FlagValues:
    """Flags of their own, not the process's, so that several command lines can be read in one process.

    Args:
      argv: the command line, in which ml_collections looks for overrides of the config; None: for their help
        only.
    """
    f = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        None,
        "configs/NAME.py or configs/NAME.py:ARG; --config.KEY=VALUE overrides a key.",
        flag_values=f,
        lock_config=True,
        sys_argv=[] if argv is None else argv,
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
    """The flags of a command line. Neither sys.argv nor the process's own flags are read or changed.

    Args:
      argv: the program's name, and what follows it.

    Raises:
      UserError: an unknown flag or option, a value of the wrong type, a config file that cannot be used.
    """
    if HELP & set(argv[1:]):
        argv = [argv[0], "--help"]
    argv = [argv[0], *(_spelled_for_absl(a) for a in argv[1:])]
    _check_config_file(_config_file(argv))
    for argument in argv[1:]:
        _check_name(argument)
    given = define_flags(argv)
    try:
        rest = given(argv)[1:]
        if given.config is not None:
            # a file that could not be loaded raises here at the latest
            given.config.seed  # noqa: B018
    except flags.Error as e:
        raise UserError(f"{str(e).splitlines()[0].rstrip('.')}. See --help.") from e
    except UserError as e:  # of the config file
        raise UserError(f"--config={_config_file(argv)}: {e}") from e
    except Exception as e:  # a config file is a program, which may raise anything: one line of it
        raise UserError(_explain(e, argv)) from e
    if rest:
        meant = words.find_path(rest[0].partition("=")[0])  # as Hydra takes them
        raise UserError(
            f"{rest[0]!r} is not an option. {meant}{' ' if meant else ''}Options look like "
            "--config.train.steps=100. See --help."
        )
    if given.workdir:
        given.workdir = paths.expanded(given.workdir, "--workdir")
    return given


def _spelled_for_absl(argument: str) -> str:
    """An argument as absl and ml_collections read it: None of an optional option is 0, and ~ is the user's
    folder.
    """
    name, _, value = argument.partition("=")
    name = re.sub("^--?", "", name)
    if name == "config" and value.startswith("~"):
        return f"--config={paths.expanded(value, '--config')}"
    if value == "None" and name.startswith("config."):
        option = OPTIONS.get(name.removeprefix("config."))
        if option is not None and option.optional:
            return f"--{name}=0"
    return argument


def _check_config_file(path: str) -> None:
    """Raises UserError: it is a recipe of another trainer."""
    if path.lower().endswith((".yaml", ".yml", ".json")):
        raise UserError(
            f"--config={path} is of another trainer. Migrate it: python -m deepseek_jax.migrate {path} "
            f"--devices=N --out=configs/mine.py, and then --config=configs/mine.py."
        )


def _check_name(argument: str) -> None:
    """Checks that an override of the config names an option.

    Raises:
      UserError: it does not. The message says what was probably meant.
    """
    found = re.match(r"--?(no)?config\.([^=]+)", argument)
    if found and not suggestions.is_known(found[2]):
        part, meant = suggestions.unknown_part(found[2]), suggestions.suggestion(found[2])
        raise UserError(f"{argument}: {part!r} is not an option. {meant}")


def read_config(given: flags.FlagValues) -> Config:
    """The validated options, with model and tokenizer of the run in the workdir, of an import or of
    `config.init_from`.

    Args:
      given: what `parse` returned.

    Raises:
      UserError: the first wrong one.
    """
    if given.config is None:
        raise UserError(
            "--config is missing. Name a config file, for instance --config=configs/tiny.py."
        )
    set_by_flag = [f"--config.{name}=" for name in given["config"].override_values]
    config = init_from.with_what_is_known(
        paths.absolute_config(from_config_dict(given.config)), given.workdir, set_by_flag
    )
    validate(config)
    return config


def find_cluster(argv: list[str]) -> Cluster:
    """The cluster of this process, not joined yet. Its flags are read first, so that one process can report
    the mistakes in the others.

    Args:
      argv: the program's name, and what follows it.

    Raises:
      UserError: a wrong flag, an incomplete cluster, or process 0 cannot listen at its address.
    """
    f = flags.FlagValues()
    _define_cluster_flags(f)
    program = os.path.basename(argv[0])
    if (HELP | {"--print_config"}) & {a.partition("=")[0] for a in argv[1:]}:
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

    Paths are as they were given: relative ones may begin in other folders on other hosts, and what they hold
    is compared later.
    """
    as_given = from_config_dict(given.config)
    out = {"--workdir": os.path.abspath(given.workdir)}
    for name, option in OPTIONS.items():
        out[option.full_name] = value_of(as_given if option.path else config, name)
    return out


def help_text(given: flags.FlagValues) -> str:
    """All flags, then all options of the config."""
    names = sorted({given[n].name for n in given} - {"flagfile", "undefok"})
    lines = [f"  --{n}\n        {given[n].help}" for n in names]
    return "\n".join(["Flags:", *lines, "", "Options, with their defaults:", describe()])


def _config_file(argv: list[str]) -> str:
    """The value of --config, "" without one."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        if re.match(r"--?config=", argument):
            return argument.split("=", 1)[1]
        if argument in ("--config", "-config"):
            return following
    return ""


def _explain(error: Exception, argv: list[str]) -> str:
    """One line for what ml_collections, or the config file itself, raises while it is read."""
    text, path = str(error).replace("\\", ""), _config_file(argv)
    if isinstance(error, OSError):
        return f"--config={path} cannot be read. Name a config file, for instance --config=configs/tiny.py."
    if "attribute 'get_config'" in text or "attribute 'seed'" in text:
        return (
            f"--config={path} has no get_config() that returns a ConfigDict. "
            f"Start from deepseek_jax.config.base_config(), as configs/tiny.py does."
        )
    last = [line for line in text.splitlines() if line.strip()] or [""]
    return f"--config={path} cannot be used: {type(error).__name__}: {last[-1].strip()}. Repair that file."
