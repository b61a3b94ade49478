"""`fsdp` and `fsdp_config` of TrainingArguments, which transformers 4 and 5 read differently.

transformers 4.57: sharding follows from the words in `fsdp`; of fsdp_config only prefetching, wrapping and
loading are read. transformers 5.24: `fsdp` switches FSDP2 on, and fsdp_config says how
(`reshard_after_forward`).
"""

from collections.abc import Mapping

from deepseek_jax.migrate.handlers import (
    as_bool,
    as_text,
    is_off,
    no_effect,
    one_of,
    refuse,
)
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Entry
from deepseek_jax.migrate.tool import Handler

BY_LAYER = "one layer is gathered at a time, whatever its class or size"
OWN_SHARDS = "every device makes or reads its own shards"
ONE_KIND = "there is one implementation"
NOT_READ = "transformers {} does not read it"
STRATEGIES = {
    "full_shard": "full_shard",
    "shard_grad_op": "shard_grad_op",
    "no_shard": "no_shard",
    "hybrid_shard": "hybrid_shard",
    "hybrid_shard_zero2": "hybrid_shard",
}
PREFETCH: Mapping[object, Mapping[str, str]] = {
    "backward_pre": {"sharding.backward_prefetch": "pre"},
    "backward_post": {"sharding.backward_prefetch": "post"},
    "no_prefetch": {"sharding.backward_prefetch": "none"},
    "none": {"sharding.backward_prefetch": "none"},
}
STATE_DICTS: Mapping[object, Mapping[str, str]] = {
    "full_state_dict": {"checkpoint.kind": "full"},
    "sharded_state_dict": {"checkpoint.kind": "sharded"},
    "local_state_dict": {"checkpoint.kind": "local"},
}
backward_prefetch = one_of(PREFETCH, "it is neither BACKWARD_PRE, BACKWARD_POST nor NO_PREFETCH")
state_dict_type = one_of(STATE_DICTS, "there is no such kind of checkpoint")


def tell_offload(m: Migration, entry: Entry) -> None:
    """PyTorch's offload takes parameters, gradients and the optimizer's state."""
    m.tell(entry, "offload.parameters", True)
    m.tell(entry, "offload.optimizer_state", True)


def words(entry: Entry) -> list[str]:
    """`fsdp` as a list: "full_shard auto_wrap", a list, true."""
    text = as_text(entry).lower().replace(",", " ")
    return [] if is_off(entry.value) else text.split()


def fsdp_is_on(m: Migration) -> bool:
    """Whether TrainingArguments switch FSDP on: without `fsdp`, fsdp_config says nothing."""
    found = m.entry("fsdp")
    return found is not None and not is_off(found.value)


def only_with_fsdp(handler: Handler) -> Handler:
    """A key of fsdp_config."""

    def handle(m: Migration, entry: Entry) -> None:
        if fsdp_is_on(m):
            handler(m, entry)
        else:
            m.no_effect(entry, "fsdp is not set, and fsdp_config alone switches nothing on")

    return handle


def bool_of(name: str) -> Handler:
    """A bool that is an option of ours."""
    return lambda m, entry: m.tell(entry, name, as_bool(entry))


def fsdp4(m: Migration, entry: Entry) -> None:
    """`fsdp` of transformers 4: strategy, auto_wrap, offload."""
    found = words(entry)
    if not found:
        m.no_effect(entry, "FSDP is off")
    for word in found:
        if word in STRATEGIES or word == "true":
            m.tell(entry, "strategy", STRATEGIES.get(word, "full_shard"))
        elif word == "offload":
            tell_offload(m, entry)
        elif word != "auto_wrap":
            m.refuse(entry, f"{word!r} is no word of fsdp")
    if found and "auto_wrap" not in found:
        m.note(
            f"{entry.label}: without auto_wrap transformers 4 wraps the model as one unit; "
            f"here one layer is gathered at a time, with the same numbers."
        )


def fsdp5(m: Migration, entry: Entry) -> None:
    """`fsdp` of transformers 5: on or off; the words of 4 are taken where FSDP2 has them."""
    found = words(entry)
    if not found:
        m.no_effect(entry, "FSDP is off")
        return
    version1 = str(m.value("fsdp_config.version", 2)) == "1"
    strategy = "full_shard"
    reshard = m.value("fsdp_config.reshard_after_forward")
    for word in found:
        if word in ("no_shard", "hybrid_shard", "hybrid_shard_zero2") and not version1:
            m.refuse(
                entry,
                f"transformers 5 raises at {word} under FSDP2",
                "Set fsdp_config.version to 1",
            )
            return
        if word == "offload":
            tell_offload(m, entry)
        elif word in STRATEGIES:
            strategy = STRATEGIES[word]
        elif word not in ("auto_wrap", "true", "1", "yes"):
            m.refuse(entry, f"{word!r} is no word of fsdp")
    if reshard is None:  # else the key of fsdp_config says so
        m.tell(entry, "strategy", strategy)
    else:
        m.tell(entry, "strategy", reshard_strategy(reshard))


def reshard_strategy(value: object) -> str:
    """reshard_after_forward: true and false of FSDP2, a number of GPUs, or a strategy of FSDP1."""
    text = str(value).lower()
    if text in STRATEGIES:
        return STRATEGIES[text]
    if text.isdecimal() and int(text) > 1:
        return "hybrid_shard"
    return "full_shard" if text in ("true", "1") else "shard_grad_op"


def reshard5(m: Migration, entry: Entry) -> None:
    """reshard_after_forward of transformers 5."""
    m.tell(entry, "strategy", reshard_strategy(entry.value))


def offload5(m: Migration, entry: Entry) -> None:
    """cpu_offload of transformers 5."""
    if as_bool(entry):
        tell_offload(m, entry)
    else:
        m.no_effect(entry, "it is off")


def checkpointing(m: Migration, entry: Entry) -> None:
    """activation_checkpointing of fsdp_config."""
    if as_bool(entry):
        m.tell(entry, "train.remat", "full")
    else:
        m.no_effect(entry, "it is off")


def _ignored(version: int, hint: str = "") -> Handler:
    return no_effect(NOT_READ.format(version) + (f"; {hint}" if hint else ""))


def _with_version1(handler: Handler) -> Handler:
    """Of transformers 5: FSDP1 alone reads it."""

    def handle(m: Migration, entry: Entry) -> None:
        if str(m.value("fsdp_config.version", 2)) == "1":
            handler(m, entry)
        else:
            m.no_effect(entry, "FSDP2, which transformers 5 takes, does not read it")

    return handle


_BOTH: Mapping[str, Handler] = {
    "fsdp_config": no_effect("it is empty, or read beside it"),
    "fsdp_config.auto_wrap_policy": no_effect(BY_LAYER),
    "fsdp_config.transformer_layer_cls_to_wrap": no_effect(BY_LAYER),
    "fsdp_config.transformer_cls_names_to_wrap": no_effect(BY_LAYER),
    "fsdp_config.min_num_params": no_effect(
        f"{BY_LAYER}; sharding.min_weight_size is the other way round: what is below stays whole"
    ),
    "fsdp_config.cpu_ram_efficient_loading": no_effect(OWN_SHARDS),
    "fsdp_config.sync_module_states": no_effect(OWN_SHARDS),
    "fsdp_config.use_orig_params": no_effect(ONE_KIND),
    "fsdp_config.activation_checkpointing": only_with_fsdp(checkpointing),
    "fsdp_config.xla*": no_effect("everything here is XLA"),
    "fsdp_config.ignored_modules": refuse("no module is left out of sharding", unless=(None, "")),
    "fsdp_config._*": no_effect("it is a comment"),
}
FSDP4: Mapping[str, Handler] = {
    **_BOTH,
    "fsdp": fsdp4,
    "fsdp_transformer_layer_cls_to_wrap": no_effect(BY_LAYER),
    "fsdp_min_num_params": no_effect(BY_LAYER),
    "fsdp_config.version": _ignored(4),
    "fsdp_config.sharding_strategy": _ignored(4, "the words in fsdp say it"),
    "fsdp_config.reshard_after_forward": _ignored(4, "the words in fsdp say it"),
    "fsdp_config.offload_params": _ignored(4, "fsdp: 'full_shard offload' does it"),
    "fsdp_config.cpu_offload": _ignored(4, "fsdp: 'full_shard offload' does it"),
    "fsdp_config.state_dict_type": _ignored(4),
    "fsdp_config.backward_prefetch": only_with_fsdp(backward_prefetch),
    "fsdp_config.forward_prefetch": only_with_fsdp(bool_of("sharding.forward_prefetch")),
    "fsdp_config.limit_all_gathers": only_with_fsdp(bool_of("sharding.limit_all_gathers")),
}
FSDP5: Mapping[str, Handler] = {
    **_BOTH,
    "fsdp": fsdp5,
    "fsdp_config.version": no_effect(ONE_KIND),
    "fsdp_config.sharding_strategy": _ignored(5, "reshard_after_forward says it"),
    "fsdp_config.reshard_after_forward": only_with_fsdp(reshard5),
    "fsdp_config.offload_params": _ignored(5, "cpu_offload does it"),
    "fsdp_config.cpu_offload": only_with_fsdp(offload5),
    "fsdp_config.state_dict_type": only_with_fsdp(state_dict_type),
    "fsdp_config.backward_prefetch": only_with_fsdp(_with_version1(backward_prefetch)),
    "fsdp_config.forward_prefetch": only_with_fsdp(
        _with_version1(bool_of("sharding.forward_prefetch"))
    ),
    "fsdp_config.limit_all_gathers": only_with_fsdp(
        _with_version1(bool_of("sharding.limit_all_gathers"))
    ),
}
