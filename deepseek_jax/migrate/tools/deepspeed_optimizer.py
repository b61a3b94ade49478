"""optimizer and scheduler of DeepSpeed: deepspeed/runtime/lr_schedules.py of 0.19.6."""

from collections.abc import Mapping

from deepseek_jax.migrate.handlers import as_float, as_int, no_effect, refuse
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Entry, Rank
from deepseek_jax.migrate.tool import Handler
from deepseek_jax.migrate.tools.deepspeed_zero import auto, is_auto

OTHER_OPTIMIZER = "there is no such optimizer here"
OPTIMIZERS = {
    "adam": "adamw",
    "adamw": "adamw",
    "fusedadam": "adamw",
    "deepspeedcpuadam": "adamw",
    "cpuadam": "adamw",
    "muon": "muon",
    "lion": "lion",
    "fusedlion": "lion",
    "sgd": "sgd",
}
SCHEDULES = {
    "warmuplr": "constant_with_warmup",
    "warmupdecaylr": "linear",
    "warmupcosinelr": "cosine",
}


def optimizer_type(m: Migration, entry: Entry) -> None:
    """Adam is AdamW as well, as adam_w_mode is true unless said otherwise."""
    ours = OPTIMIZERS.get(str(entry.value).lower())
    if ours is None:
        m.refuse(entry, OTHER_OPTIMIZER, "Set it to AdamW")
        return
    m.tell(entry, "optimizer.name", ours)
    if ours == "sgd" and m.value("optimizer.params.momentum") is None:
        m.tell(entry, "optimizer.momentum", 0.0)


def betas(m: Migration, entry: Entry) -> None:
    """Two numbers."""
    if is_auto(entry):
        m.tell_auto(entry, "optimizer.b1")
        m.tell_auto(entry, "optimizer.b2")
    elif isinstance(entry.value, list) and len(entry.value) == 2:
        m.tell(entry, "optimizer.b1", float(entry.value[0]))
        m.tell(entry, "optimizer.b2", float(entry.value[1]))
    else:
        m.refuse(entry, "these are not two numbers")


def scheduler_type(m: Migration, entry: Entry) -> None:
    """It wins over lr_scheduler_type of the recipe."""
    ours = SCHEDULES.get(str(entry.value).lower())
    if ours is None:
        m.refuse(entry, "there is no such schedule here", "Set it to WarmupDecayLR")
    else:
        m.tell(entry, "schedule", ours, Rank.ABOVE)


def warmup_min(m: Migration, entry: Entry) -> None:
    """The rate of the first step."""
    if is_auto(entry) or not as_float(entry):
        m.no_effect(entry, "the warmup begins at 0")
    else:
        m.tell(entry, "warmup_init", as_float(entry), Rank.ABOVE)


def warmup_steps(m: Migration, entry: Entry) -> None:
    """Steps, or those of the recipe."""
    if is_auto(entry):
        told = "warmup_fraction" if m.told_of("warmup_fraction") else "warmup_steps"
        m.tell_auto(entry, told)
    else:
        m.tell(entry, "warmup_steps", as_int(entry), Rank.ABOVE)


def total_steps(m: Migration, entry: Entry) -> None:
    """Where the decay ends."""
    if is_auto(entry):
        m.no_effect(entry, "auto: the steps of the run")
    else:
        m.tell(entry, "schedule_steps", as_int(entry), Rank.ABOVE)


def above(name: str) -> Handler:
    """A fact of the scheduler, which wins over the recipe."""

    def handle(m: Migration, entry: Entry) -> None:
        if is_auto(entry):
            m.tell_auto(entry, name)
        else:
            m.tell(entry, name, as_float(entry), Rank.ABOVE)

    return handle


def warmup_type(m: Migration, entry: Entry) -> None:
    """log or linear."""
    if str(entry.value) in ("log", "linear"):
        m.tell(entry, "warmup_shape", entry.value, Rank.ABOVE)
    else:
        m.refuse(entry, "a warmup is log or linear")


TABLE: Mapping[str, Handler] = {
    "optimizer.type": optimizer_type,
    "optimizer.params.lr": auto("learning_rate", as_float),
    "optimizer.params.betas": betas,
    "optimizer.params.eps": auto("optimizer.eps", as_float),
    "optimizer.params.weight_decay": auto("optimizer.weight_decay", as_float),
    "optimizer.params.momentum": auto("optimizer.momentum", as_float),
    "optimizer.params.adam_w_mode": refuse(
        "weight decay is decoupled", "Set it to true", ("true", "auto")
    ),
    "optimizer.params.bias_correction": refuse(
        "moments are corrected", "Set it to true", ("true", "auto")
    ),
    "optimizer.params.torch_adam": no_effect("there is one implementation"),
    "optimizer.params.m*_coeff": no_effect("it is of Lamb"),
    "optimizer.params.*": refuse("no optimizer here reads it", "Take it out", ("auto",)),
    "scheduler.type": scheduler_type,
    "scheduler.params.warmup_min_lr": warmup_min,
    "scheduler.params.warmup_max_lr": above("learning_rate"),
    "scheduler.params.warmup_num_steps": warmup_steps,
    "scheduler.params.total_num_steps": total_steps,
    "scheduler.params.warmup_type": warmup_type,
    "scheduler.params.cos_min_ratio": above("min_lr_fraction"),
    "scheduler.params.warmup_min_ratio": refuse(
        "the warmup begins at 0", "Set it to 0", ("0", "0.0")
    ),
    "scheduler.params.last_batch_iteration": no_effect(
        "a run begins at its first step, or goes on"
    ),
    "scheduler.params.*": refuse("no schedule here reads it", "Take it out", ("auto",)),
}
