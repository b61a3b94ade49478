"""The command that starts the new run, with what must be there before it."""

import shlex

from deepseek_jax.migrate.arithmetic import devices
from deepseek_jax.migrate.migration import Migration


def command(m: Migration, config: str) -> str:
    """Shell lines: downloads, then train.py.

    A checkpoint's config.json says what its model is, so that options of the model in a config file do not
    count there: they become flags.

    Args:
      m: the migration, done.
      config: path of the new file.
    """
    lines = [_wrapped([shlex.quote(word) for word in words]) for words in m.downloads.values()]
    program, first, *more = arguments(m, config)
    words = [program, first, f"--workdir={workdir(m)}", *more]
    layout = m.devices or devices.world(m) or 1
    hosts = devices.hosts(m, layout)
    if hosts > 1:
        lines.append(f"# on each of {hosts} hosts, one process for its {layout // hosts} GPUs;")
        lines.append("# --template=slurm|jobset|rayjob|ssh writes a file that does it:")
    lines.append(_wrapped(["python", *map(_quoted, words)]))
    return "\n".join(lines)


def arguments(m: Migration, config: str) -> list[str]:
    """train.py and its arguments, but for --workdir.

    Args:
      m: the migration, done.
      config: path of the new file.
    """
    words = ["train.py", f"--config={config}"]
    if m.settings.get("init_from") and m.settings["init_from"].value:
        for name, setting in m.settings.items():
            if name.startswith("model."):
                words.append(f"--config.{name}={setting.value}")
    return words + [f"{n}={s.value}" for n, s in m.flags.items() if n != "--workdir"]


def workdir(m: Migration) -> str:
    """Of the new run: theirs, where the files name one."""
    found = m.flags.get("--workdir")
    return str(found.value) if found else "runs/migrated"


def _quoted(word: str) -> str:
    """`--flag='a value'`, as people write it."""
    flag, equals, value = word.partition("=")
    return f"{flag}{equals}{shlex.quote(value)}" if equals and value else shlex.quote(word)


def _wrapped(words: list[str], width: int = 104) -> str:
    out, line = [], words[0]
    for word in words[1:]:
        if len(line) + len(word) + 3 > width:
            out.append(f"{line} \\")
            line = "  " + word
        else:
            line += f" {word}"
    return "\n".join([*out, line])
