"""lr_scheduler_type and lr_scheduler_kwargs of transformers: transformers.optimization.get_scheduler."""

from collections.abc import Mapping

from deepseek_jax.migrate.handlers import as_int, fact, no_effect, one_of, refuse
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.tool import Handler

NO_PLATEAU = "a schedule here follows from the step, and not from the loss"

SCHEDULES: Mapping[str, str] = {
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "cosine_with_restarts": "cosine_with_restarts",
    "polynomial": "polynomial",
    "constant": "constant",
    "constant_with_warmup": "constant_with_warmup",
    "inverse_sqrt": "inverse_sqrt",
    "warmup_stable_decay": "wsd",
}

SCHEDULE: Mapping[str, Handler] = {
    "lr_scheduler_type": one_of(
        {name: {"schedule": ours} for name, ours in SCHEDULES.items()},
        f"there is no such schedule here: {NO_PLATEAU}",
        f"Choose of {', '.join(SCHEDULES)}",
    ),
    "lr_scheduler_kwargs": no_effect("it is empty"),
    "lr_scheduler_kwargs.min_lr": fact("min_lr"),
    "lr_scheduler_kwargs.min_lr_rate": fact("min_lr_fraction"),
    "lr_scheduler_kwargs.min_lr_ratio": fact("min_lr_fraction"),
    "lr_scheduler_kwargs.lr_end": fact("min_lr"),
    "lr_scheduler_kwargs.power": fact("power"),
    "lr_scheduler_kwargs.num_cycles": fact("cycles"),
    "lr_scheduler_kwargs.timescale": fact("timescale", as_int),
    "lr_scheduler_kwargs.num_decay_steps": fact("decay_steps", as_int),
    "lr_scheduler_kwargs.num_stable_steps": fact("stable_steps", as_int),
    "lr_scheduler_kwargs.decay_type": one_of(
        {
            "linear": {"decay_shape": "linear"},
            "cosine": {"decay_shape": "cosine"},
            "1-sqrt": {"decay_shape": "sqrt"},
        },
        "there is no decay of that shape",
    ),
    "lr_scheduler_kwargs.warmup_type": one_of(
        {"linear": "warmups are linear"}, "a warmup here is linear"
    ),
    "lr_scheduler_kwargs.*": refuse("no schedule here reads it"),
}


def defaults(m: Migration) -> None:
    """What get_scheduler does where the kwargs are silent."""
    m.default("schedule", "linear")
    m.default("warmup_steps", 0)
    name = m.told_of("schedule")
    if name == "polynomial":
        m.default("min_lr", 1e-7)
    elif name == "wsd":
        m.default("decay_shape", "cosine")
        m.default("min_lr_fraction", 0.0)
        # get_wsd_schedule rises from the last rate, and not from 0
        m.default("warmup_init", m.told_of("min_lr_fraction") * m.told_of("learning_rate"))
    else:
        m.default("min_lr_fraction", 0.0)
