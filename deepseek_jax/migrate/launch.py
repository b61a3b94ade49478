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
    lines = [_wrapped(line.split()) for line in m.downloads.values()]
    words = ["python train.py", f"--config={shlex.quote(config)}"]
    workdir = m.flags.get("--workdir")
    words.append(f"--workdir={shlex.quote(str(workdir.value if workdir else 'runs/migrated'))}")
    if m.settings.get("init_from") and m.settings["init_from"].value:
        for name, setting in m.settings.items():
            if name.startswith("model."):
                words.append(f"--config.{name}={shlex.quote(str(setting.value))}")
    for flag, setting in m.flags.items():
        if flag != "--workdir":
            words.append(f"{flag}={shlex.quote(str(setting.value))}")
    lines.append(_wrapped(words))
    layout = m.devices or devices.world(m) or 1
    hosts = devices.hosts(m, layout)
    if hosts > 1:
        lines.insert(
            len(lines) - 1,
            f"# on each of {hosts} hosts, one process for its {layout // hosts} GPUs:",
        )
    return "\n".join(lines)


def _wrapped(words: list[str], width: int = 104) -> str:
    out, line = [], words[0]
    for word in words[1:]:
        if len(line) + len(word) + 3 > width:
            out.append(f"{line} \\")
            line = "  " + word
        else:
            line += f" {word}"
    return "\n".join([*out, line])
