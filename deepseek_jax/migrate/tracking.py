"""Trackers of experiments, and options that a version of this trainer may not have."""

from collections.abc import Iterable
from typing import Any

from deepseek_jax.config.options import OPTIONS
from deepseek_jax.migrate.handlers import as_text
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Entry
from deepseek_jax.migrate.tool import Handler

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "clearml")
NO_TRACKERS = "metrics are in WORKDIR/metrics.jsonl and TensorBoard"


def trackers(m: Migration, entry: Entry, names: Iterable[str]) -> None:
    """What an entry says of where metrics go; names that are not known here have no effect."""
    wanted = [n for n in dict.fromkeys(names) if n]
    known = [n for n in wanted if n in TRACKERS]
    if "log.trackers" not in OPTIONS or (wanted and not known):
        m.no_effect(entry, NO_TRACKERS)
        return
    for name in wanted:
        if name not in known:
            m.note(f"{entry.where}: there is no {name} here; {NO_TRACKERS}.")
    m.tell(entry, "log.trackers", ",".join(known))


def report_to(m: Migration, entry: Entry) -> None:
    """`report_to` of transformers: none, all, one or a list."""
    names = as_text(entry).replace(" ", "").split(",")
    if names == ["all"]:
        m.no_effect(entry, f"of those that are installed: {NO_TRACKERS}")
    else:
        trackers(m, entry, [] if names in (["none"], [""]) else names)


def if_there(option: str, otherwise: str) -> Handler:
    """A handler for an option's text, of no effect in a version without the option."""

    def handle(m: Migration, entry: Entry) -> None:
        value: Any = as_text(entry)
        if option in OPTIONS and value:
            m.tell(entry, option, value)
        else:
            m.no_effect(entry, otherwise)

    return handle
