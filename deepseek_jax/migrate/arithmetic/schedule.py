"""The learning rate over the steps: warmup, schedule, end."""

import math

from deepseek_jax.migrate.arithmetic.length import estimated, steps
from deepseek_jax.migrate.migration import Migration

WARMUP = ("warmup_steps", "warmup_fraction", "warmup_samples")
LAST = ("min_lr", "min_lr_fraction")
SPAN = ("schedule_steps", "schedule_samples")
# schedule -> what it reads beside the warmup
READS = {
    "constant": (),
    "constant_with_warmup": (),
    "linear": (*LAST, *SPAN, "hold_steps"),
    "cosine": (*LAST, *SPAN, "hold_steps", "cycles"),
    "polynomial": (*LAST, *SPAN, "hold_steps", "power"),
    "cosine_with_restarts": (*LAST, *SPAN, "hold_steps", "cycles"),
    "inverse_sqrt": (*LAST, "timescale"),
    "wsd": (
        *LAST,
        *SPAN,
        "hold_steps",
        "decay_steps",
        "decay_samples",
        "decay_shape",
        "stable_steps",
    ),
}


def settle(m: Migration) -> None:
    """Sets the options of config.optimizer that have to do with the schedule."""
    if m.fact("learning_rate") is not None:
        m.set("optimizer.learning_rate", float(m.fact("learning_rate")), "learning_rate")
    name = m.fact("schedule")
    if name is None:
        return
    if name not in READS:
        m.refuse_fact("schedule", f"there is no schedule {name}", "Choose linear or cosine")
        return
    ours = "constant" if name.startswith("constant") else name
    m.set("optimizer.schedule", ours, "schedule")
    _set_warmup(m, name)
    _leave_out(m, name)
    _set_span(m, name)
    _set_last(m, name)
    if name == "polynomial":
        m.set("optimizer.power", float(m.fact("power", 1.0)), "power")
    if name == "inverse_sqrt" and m.fact("timescale"):
        m.set("optimizer.timescale", int(m.fact("timescale")), "timescale")
    if name == "cosine_with_restarts":
        m.set("optimizer.cycles", int(m.fact("cycles") or 1), "cycles")
    if name == "cosine" and float(m.fact("cycles", 0.5)) != 0.5:
        m.refuse_fact("cycles", "a cosine here falls once", "Take cosine_with_restarts")
    if name == "wsd":
        _set_decay(m)


def _set_warmup(m: Migration, name: str) -> None:
    count, share, samples = (m.fact(n) for n in WARMUP)
    if name == "constant":
        m.set("optimizer.warmup_steps", 0, "schedule", how="this schedule has none")
        for told in (*WARMUP, "warmup_shape", "warmup_init"):
            m.without_effect(told, "schedule constant has no warmup: constant_with_warmup has")
        return
    if samples and not count:
        size = m.settings["train.batch_size"].value
        warm = int(samples) // size
        m.set(
            "optimizer.warmup_steps",
            warm,
            "warmup_samples",
            how=f"{int(samples)} sequences / {size}",
        )
    elif count and float(count) >= 1:
        m.set("optimizer.warmup_steps", int(count), "warmup_steps")
        m.without_effect("warmup_fraction", f"{int(count)} warmup steps win")
    elif share := float(count or 0) or float(share or 0):
        names = ("warmup_steps",) if count else ("warmup_fraction", "warmup_steps")
        m.set("optimizer.warmup_steps", 0, *names, how="as a share, below")
        m.set("optimizer.warmup_fraction", share, *names)
        m.without_effect("warmup_fraction", f"{share:g} of the steps wins")
    else:
        m.set("optimizer.warmup_steps", 0, *WARMUP)
    if m.fact("warmup_shape") == "log" or m.said("warmup_shape"):
        m.set("optimizer.warmup_shape", m.fact("warmup_shape"), "warmup_shape")
    peak = float(m.fact("learning_rate") or 0)
    if m.fact("warmup_init") and peak:
        m.set("optimizer.warmup_init_fraction", float(m.fact("warmup_init")) / peak, "warmup_init")
    else:
        m.without_effect("warmup_init", "it is 0, as here")


def _leave_out(m: Migration, name: str) -> None:
    """Facts of other schedules."""
    for facts in READS.values():
        for fact in facts:
            if fact not in READS[name]:
                m.without_effect(fact, f"schedule {name} has none")


def _set_span(m: Migration, name: str) -> None:
    if not any(fact in READS[name] for fact in SPAN):
        return
    span, samples, total = m.fact("schedule_steps"), m.fact("schedule_samples"), steps(m)
    if samples and not span:
        span = int(samples) // m.settings["train.batch_size"].value
    if span:
        same = int(span) == total
        how = "the run's" if same else ""
        m.set("optimizer.schedule_steps", 0 if same else int(span), *SPAN, how=how)
    if m.fact("hold_steps"):
        m.set("optimizer.hold_steps", int(m.fact("hold_steps")), "hold_steps")
    else:
        m.without_effect("hold_steps", "it is 0, as here")


def _set_last(m: Migration, name: str) -> None:
    if "min_lr" not in READS[name]:
        return
    peak, last, share = m.fact("learning_rate"), m.fact("min_lr"), m.fact("min_lr_fraction")
    if m.said("min_lr_fraction") or not m.said("min_lr"):
        if share is not None:
            m.set("optimizer.final_fraction", float(share), "min_lr_fraction")
            return
    if last is not None and peak:
        how = f"{float(last):g} / {float(peak):g}" if last else ""
        fraction = min(float(last) / float(peak), 1.0)
        m.set("optimizer.final_fraction", fraction, "min_lr", "learning_rate", how=how)
    elif name == "inverse_sqrt":
        m.set("optimizer.final_fraction", 0.0)


def _set_decay(m: Migration) -> None:
    """Of wsd: how long it decays, and in which shape."""
    if m.fact("decay_shape"):
        m.set("optimizer.decay_shape", m.fact("decay_shape"), "decay_shape")
    decay = m.fact("decay_steps")
    if m.fact("decay_samples") and not decay:
        decay = int(m.fact("decay_samples")) // m.settings["train.batch_size"].value
    total = int(m.settings["optimizer.schedule_steps"].value) if m.fact("schedule_steps") else 0
    total = total or estimated(m)
    names = ("decay_steps", "decay_samples")
    if m.fact("stable_steps") and decay:
        total = (
            int(m.settings["optimizer.warmup_steps"].value)
            + int(m.fact("stable_steps"))
            + int(decay)
        )
        m.set("optimizer.schedule_steps", 0 if total == steps(m) else total, "stable_steps")
    if decay is None:
        m.note("The schedule does not say how long it decays: train.decay_fraction is ours.")
    elif 0 < float(decay) < 1:
        m.set("optimizer.decay_fraction", float(decay), *names)
    elif total:
        share = min(int(decay) / total, 1.0)
        m.set("optimizer.decay_fraction", share, *names, how=f"{int(decay)} of {total} steps")
        if math.isclose(share, 1.0):
            m.note("The whole run is decay: it never stays at the peak.")
    else:
        for fact in names:
            m.refuse_fact(
                fact,
                "its share of the steps is not known, as the run is counted in epochs",
                "Set max_steps, or say --rows",
            )
