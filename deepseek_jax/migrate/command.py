"""Command lines as sources: what starts a script (torchrun, accelerate, deepspeed), and the script's flags.

    NCCL_DEBUG=INFO torchrun --nproc_per_node=8 --nnodes=2 sft.py --config recipe.yaml --learning_rate 1e-5

gives the launcher's flags, the flags of the script, and the files that either names.
"""

import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from deepseek_jax.errors import UserError
from deepseek_jax.migrate.reading import flattened, scalar
from deepseek_jax.migrate.source import Entry, Rank, Source

# Flags that name a file of the run.
FILES = {"config", "config_file", "config-file", "deepspeed", "deepspeed_config", "config_path"}
ENDINGS = (".yaml", ".yml", ".json")
# Of launchers, those that take no value.
SWITCHES = set(
    "standalone no_python run_path module m multi_gpu cpu use_cpu tpu use_fsdp use_deepspeed use_megatron_lm "
    "quiet q debug same_network use_env no_local_rank no_ssh force_multi bind_cores_to_rank use_xpu "
    "dynamo_use_fullgraph dynamo_use_dynamic use_parallelism_config enable_cpu_affinity".split()
)
# Programs that start others, and how many words after them belong to their name.
LAUNCHERS = {
    ("torchrun",): "torchrun",
    ("torch.distributed.run",): "torchrun",
    ("torch.distributed.launch",): "torchrun",
    ("accelerate", "launch"): "accelerate launch",
    ("accelerate.commands.launch",): "accelerate launch",
    ("deepspeed",): "deepspeed",
}
# Programs that are the trainer: their words are its name.
TRAINERS = {
    "trl": ("sft", "dpo", "grpo", "kto", "reward", "rloo"),
    "llamafactory-cli": ("train",),
    "axolotl": ("train", "preprocess"),
    "swift": ("sft", "pt", "rlhf"),
    "megatron": ("sft", "pt", "rlhf"),
    "automodel": (),
}
BEFORE = {"srun", "nohup", "exec", "uv", "run", "sudo", "env", "time", "bash", "-c", "then", "do"}
PYTHON = re.compile(r"^(.*/)?python[\d.]*$")
ASSIGNED = re.compile(r"^[A-Za-z_]\w*=")
OVERRIDE = re.compile(r"^[+~]{0,2}[A-Za-z_][\w./@]*=")


@dataclass
class Command:
    """A command line, taken apart."""

    sources: list[Source] = field(default_factory=list)
    files: list[Entry] = field(default_factory=list)  # each names one


def parse(text: str) -> Command:
    """What a command line says.

    Args:
      text: as it is typed, with line ends escaped or not.

    Raises:
      UserError: its quotes do not match, or nothing in it is a program.
    """
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as e:
        raise UserError(f"--command={text[:60]!r}... cannot be read: {e}. Quote it whole.") from e
    out = Command()
    environment: list[Entry] = []
    launcher: list[Entry] = []
    name, words = _skip_to_program(words, environment)
    launched = ""
    while name in LAUNCHERS.values():
        launched = name
        found, words = _launcher_flags(words, name)
        launcher += found
        name, words = _program(words)
    if not name:
        raise UserError(
            f"--command={text[:60]!r} names no program. Write the line that starts the run."
        )
    if launcher or environment or launched:
        entries = [*environment, *launcher]
        out.sources.append(Source(launched or "the environment", tuple(entries), "launcher"))
    entries = list(_script_flags(words))
    out.sources.append(Source(name, tuple(entries), "flags"))
    out.files = [
        e
        for e in (*launcher, *entries)
        if isinstance(e.value, str)
        and (e.key in FILES or e.key.startswith("argument "))
        and e.value.endswith(ENDINGS)
    ]
    return out


def _skip_to_program(words: Sequence[str], environment: list[Entry]) -> tuple[str, list[str]]:
    """The first program that counts; what is assigned or exported before it goes to `environment`."""
    rest = list(words)
    while rest:
        word = rest[0]
        if ASSIGNED.match(word):
            key, _, value = word.partition("=")
            environment.append(Entry(f"env.{key}", scalar(value), f"${key}", Rank.FLAG))
            rest.pop(0)
        elif word in ("export", "&&", ";") or word in BEFORE:
            rest.pop(0)
        elif word.startswith("-") and not environment and rest is not words:
            rest.pop(0)  # an option of srun and the like
        else:
            name, left = _program(rest)
            if name:
                return name, left
            rest.pop(0)
    return "", []


def _program(words: Sequence[str]) -> tuple[str, list[str]]:
    """The name of the program that the words begin with, "" for none, and what follows it."""
    rest = list(words)
    if rest and PYTHON.match(rest[0]):
        rest.pop(0)
        while rest and rest[0] in ("-u", "-B", "-O", "-X", "-W"):
            del rest[: 2 if rest[0] in ("-X", "-W") else 1]
        if rest and rest[0] in ("-m", "--module"):
            rest.pop(0)
    elif rest and rest[0] in ("-m", "--module"):
        rest.pop(0)
    for names, launcher in LAUNCHERS.items():
        if tuple(os.path.basename(w) for w in rest[: len(names)]) == names:
            return launcher, rest[len(names) :]
    if not rest or rest[0].startswith("-"):
        return "", rest
    program = rest.pop(0)
    following = TRAINERS.get(os.path.basename(program))
    if following is not None:
        while rest and (rest[0] in following or (not following and not rest[0].startswith("-"))):
            program += f" {rest.pop(0)}"
    return program, rest


def _launcher_flags(words: Sequence[str], name: str) -> tuple[list[Entry], list[str]]:
    """A launcher's flags, up to the script."""
    rest, out = list(words), []
    while rest and rest[0].startswith("-"):
        flag, equals, value = rest.pop(0).partition("=")
        key = flag.lstrip("-").replace("-", "_")
        if key in ("m", "module"):
            break
        if equals:
            told: Any = scalar(value)
        elif key in SWITCHES or not rest or rest[0].startswith("--"):
            told = True
        else:
            told = scalar(rest.pop(0))
        out.append(Entry(key, told, f"{name} {flag}", Rank.FLAG))
    return out, rest


def _script_flags(words: Sequence[str]) -> list[Entry]:
    """Flags, overrides in Hydra's form and plain arguments."""
    rest, out, plain = list(words), [], 0
    while rest:
        word = rest.pop(0)
        if re.match(r"^--?[A-Za-z]", word):
            flag, equals, value = word.partition("=")
            values = [value] if equals else []
            while not equals and rest and not re.match(r"^--?[A-Za-z]", rest[0]):
                if values and OVERRIDE.match(rest[0]):
                    break
                values.append(rest.pop(0))
            out += _flag(flag, values)
        elif OVERRIDE.match(word):
            key, _, value = word.partition("=")
            out += _entries(key.lstrip("+~"), [value], key.lstrip("+~"))
        elif word not in (";", "&&", "&", "|"):
            plain += 1
            out.append(Entry(f"argument {plain}", word, f"argument {plain}", Rank.FLAG))
        else:
            break
    return _last_of_each(out)


def _flag(flag: str, values: list[str]) -> list[Entry]:
    key = flag.lstrip("-")
    if not values:
        if key.startswith(("no_", "no-")):
            return [Entry(key[3:], False, flag, Rank.FLAG)]
        return [Entry(key, True, flag, Rank.FLAG)]
    return _entries(key, values, flag)


def _entries(key: str, values: list[str], where: str) -> list[Entry]:
    if len(values) == 1 and values[0].lstrip().startswith(("{", "[")):
        try:
            return list(flattened(json.loads(values[0]), where, Rank.FLAG, key))
        except (ValueError, RecursionError):  # no JSON: the text itself
            return [Entry(key, values[0], where, Rank.FLAG)]
    value = scalar(values[0]) if len(values) == 1 else [scalar(v) for v in values]
    return [Entry(key, value, where, Rank.FLAG)]


def _last_of_each(entries: list[Entry]) -> list[Entry]:
    """Of a flag that stands several times the last, as argparse has it."""
    return list({e.key: e for e in entries}.values())
