"""What gpt-neox's keys say that hang together: widths, routing, stages, the end of a linear decay.

Sources: megatron/model/transformer.py and megatron/learning_rates.py of gpt-neox.
"""

from deepseek_jax.migrate.handlers import as_bool, as_float, as_int, as_text, is_off
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Entry
from deepseek_jax.migrate.tools.megatron_handlers import whole
from deepseek_jax.migrate.tracking import trackers

STAGES = {0: "no_shard", 1: "zero1", 2: "shard_grad_op", 3: "full_shard"}


def stage_of_zero(m: Migration, entry: Entry) -> None:
    """zero_optimization.stage."""
    m.tell(entry, "strategy", STAGES.get(as_int(entry), "full_shard"))


def optimizer(m: Migration, entry: Entry) -> None:
    """optimizer.type: Adam is decoupled there."""
    name = {"adam": "adamw", "adamw": "adamw", "sgd": "sgd", "lion": "lion", "muon": "muon"}.get(
        as_text(entry).lower()
    )
    if name is None:
        m.refuse(entry, "there is no such optimizer", "Set it to Adam")
    else:
        m.tell(entry, "optimizer.name", name)


def experts(m: Migration, entry: Entry) -> None:
    """moe_num_experts: 1 is a dense model."""
    if as_int(entry) > 1:
        m.tell(entry, "model.n_routed_experts", as_int(entry))
    else:
        m.no_effect(entry, "the model has no experts")


def stages(m: Migration, entry: Entry) -> None:
    """pipe_parallel_size: 0 is one stage as well."""
    m.tell(entry, "stage", max(as_int(entry), 1))


def remat(m: Migration, entry: Entry) -> None:
    """checkpoint_activations."""
    m.tell(entry, "train.remat", "full" if as_bool(entry) else "none")


def router(m: Migration, entry: Entry) -> None:
    """moe_router_type."""
    if as_text(entry) == "topk":
        m.tell(entry, "model.scoring_func", "softmax")
    else:
        m.refuse(entry, "experts are chosen by the highest scores here", "Set it to topk")


def gated_width(m: Migration, whole_width: int) -> int:
    """A gated MLP has a third of the width that is written: as many parameters as one without gate."""
    multiple = whole(m, "mlp_multiple_of", 1)
    return -(-(int(whole_width * 2 / 3) // 2) // multiple) * multiple


def width(m: Migration, entry: Entry) -> None:
    """intermediate_size."""
    m.tell(entry, "model.intermediate_size", gated_width(m, as_int(entry)))


def last_rate(m: Migration, entry: Entry) -> None:
    """min_lr: a linear decay goes to 0 there, and no further than this."""
    if as_float(entry) and m.value("lr_decay_style", "linear") == "linear":
        m.refuse(
            entry,
            "a linear decay ends at this rate here; there it goes to 0 and stops on its way",
            "Set it to 0, or lr_decay_style to cosine",
        )
    else:
        m.tell(entry, "min_lr", as_float(entry))


def kinds_of_attention(m: Migration, entry: Entry) -> None:
    """attention_config: a kind and a number of layers, in turn."""
    words = entry.value if isinstance(entry.value, list) else [entry.value]
    if all(str(w).isdigit() or w in ("global", "flash", "all") for w in words):
        m.no_effect(entry, "attention is over the whole sequence")
    else:
        m.refuse(entry, "attention is over the whole sequence here", "Set it to global")


def weights_and_biases(m: Migration, entry: Entry) -> None:
    """use_wandb."""
    trackers(m, entry, [] if is_off(entry.value) else ["wandb"])
