"""How long a run is, and what is done every so many steps of it: checkpoints, evaluation, rows of the log."""

import math
from typing import NamedTuple

from deepseek_jax.migrate.migration import Migration


class Event(NamedTuple):
    """What a run does from time to time."""

    when: str  # fact
    every: str  # fact
    option: str  # of steps
    by_epochs: str  # option


SAVE = Event("save_when", "save_every", "checkpoint.every_steps", "checkpoint.every_epochs")
EVAL = Event("eval_when", "eval_every", "eval.every_steps", "eval.every_epochs")


def settle(m: Migration) -> None:
    """Sets steps or epochs, and the intervals."""
    _set_length(m)
    _set_event(m, SAVE)
    if m.fact("eval_when") == "no":
        if not m.fact("data.split"):  # which keeps its documents from training all the same
            m.set("data.eval_fraction", 0.0, "eval_when", how="nothing is held out")
        m.set("eval.every_steps", 0, "eval_when")
        m.without_effect("eval_every", "nothing is evaluated")
    else:
        _set_event(m, EVAL)
    if m.fact("log_every") is not None:
        every = float(m.fact("log_every"))
        total = steps(m)
        if 0 < every < 1:
            every = every * total if total else 10
        m.set("log.every_steps", max(math.ceil(every), 1), "log_every")


def steps(m: Migration) -> int:
    """Steps of the run; 0: they follow from the data."""
    found = m.settings.get("train.steps")
    return int(found.value) if found else 0


def estimated(m: Migration) -> int:
    """Steps of the run, with --rows also where epochs are counted and a row is an example; 0: not known."""
    epochs, size = m.fact("epochs"), m.settings["train.batch_size"].value
    if steps(m) or not (m.rows and epochs and m.fact("unpacked", True)):
        return steps(m)
    return max(int(-(-m.rows // size) * float(epochs)), 1)


def _set_length(m: Migration) -> None:
    total, samples, epochs = m.fact("steps"), m.fact("samples"), m.fact("epochs")
    if total and total > 0:
        m.set("train.steps", int(total), "steps")
        m.set("train.epochs", 0.0, how="steps count")
        m.without_effect("epochs", f"{int(total)} steps win")
        m.without_effect("samples", f"{int(total)} steps win")
        return
    m.without_effect("steps", "it says nothing: epochs count")
    if samples:
        size = m.settings["train.batch_size"].value
        m.set(
            "train.steps",
            max(int(samples) // size, 1),
            "samples",
            how=f"{int(samples)} sequences / {size} per step",
        )
        m.set("train.epochs", 0.0, how="steps count")
    elif epochs:
        m.set("train.steps", 0, "epochs", how="by the data")
        m.set("train.epochs", float(epochs), "epochs")
    else:
        m.note("No file says how long the run is: set train.steps or train.epochs.")
        m.set("train.steps", 1000, how="no file says; ours")


def _set_event(m: Migration, event: Event) -> None:
    when, every = m.fact(event.when), m.fact(event.every)
    if when is None and every is None:
        return
    names = (event.when, event.every)
    if when == "no":
        m.set(event.option, 0, event.when)
        m.without_effect(event.every, f"{event.when.partition('_')[0]} strategy: no")
    elif when == "epoch":
        m.set(event.option, 0, event.when)
        m.set(event.by_epochs, float(m.fact("epoch_interval") or 1.0), event.when)
        m.without_effect(event.every, "it is by epochs")
    elif every is None or float(every) <= 0:
        m.set(event.option, 0, *names)
    elif float(every) < 1:
        _set_share(m, event, float(every))
    else:
        m.set(event.option, int(every), *names)


def _set_share(m: Migration, event: Event, share: float) -> None:
    """A share of all steps."""
    total, epochs = steps(m), m.fact("epochs")
    if total:
        count = max(math.ceil(share * total), 1)
        m.set(event.option, count, event.when, event.every, how=f"{share:g} of {total} steps")
    elif epochs:
        m.set(event.option, 0, event.when, event.every)
        m.set(
            event.by_epochs,
            share * float(epochs),
            event.every,
            how=f"{share:g} of {float(epochs):g} epochs",
        )
