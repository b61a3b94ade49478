"""The rules of thumb of the guides to FSDP and DeepSpeed, beside what the numbers say of each."""

from collections.abc import Callable
from typing import NamedTuple

from deepseek_jax.cli.texts import human
from deepseek_jax.plan.advise.candidates import Choice

SIZES = (  # parameters below which a strategy is recommended
    (3e9, "shard_grad_op", False),
    (13e9, "full_shard", False),
    (70e9, "full_shard", True),
    (float("inf"), "full_shard", False),
)


class Rule(NamedTuple):
    """Attributes:
    asks: what the rule decides by.
    says: what it recommends here.
    allows: whether a plan follows it.
    """

    asks: str
    says: str
    allows: Callable[[Choice], bool]


def rules(parameters: int, hosts: int, whole_state_fits: bool, some_fit: bool) -> list[Rule]:
    """Those of a model on a cluster.

    Args:
      parameters: of the model. hosts: of the cluster.
      whole_state_fits: a device can hold all weights with what is divided of the rest.
      some_fit: a plan with full_shard fits without offloading.
    """
    return [
        _by_size(parameters),
        _by_memory(whole_state_fits, some_fit),
        _by_hosts(hosts),
        Rule("block-level sharding", "stages of layers: simple, little traffic", _has_stages),
        Rule("expert-level sharding", "experts over devices: where links are fast", _has_experts),
    ]


def _by_size(parameters: int) -> Rule:
    strategy, offload = next((s, o) for most, s, o in SIZES if parameters < most)

    def allows(choice: Choice) -> bool:
        return choice.strategy == strategy and bool(choice.offload) == offload

    said = f"{strategy} with offloading to the host" if offload else strategy
    return Rule(f"model size, {human(parameters)}", said, allows)


def _by_memory(whole_state_fits: bool, some_fit: bool) -> Rule:
    if whole_state_fits:
        return Rule("the model fits a device", "shard_grad_op or no_shard", _keeps_weights_whole)
    if some_fit:
        return Rule(
            "the model does not fit a device", "full_shard, gradient checkpointing", _is_full_shard
        )
    return Rule("it does not fit divided either", "offload to the host", _offloads)


def _by_hosts(hosts: int) -> Rule:
    if hosts > 1:
        return Rule(f"{hosts} nodes", "hybrid_shard", _is_hybrid)
    return Rule("a single node", "full_shard, gradient checkpointing", _is_full_shard)


def _keeps_weights_whole(choice: Choice) -> bool:
    return choice.strategy in ("shard_grad_op", "no_shard") and not choice.offload


def _is_full_shard(choice: Choice) -> bool:
    return choice.strategy == "full_shard" and not choice.offload


def _offloads(choice: Choice) -> bool:
    return bool(choice.offload)


def _is_hybrid(choice: Choice) -> bool:
    return choice.strategy == "hybrid_shard"


def _has_stages(choice: Choice) -> bool:
    return choice.shape["stage"] > 1


def _has_experts(choice: Choice) -> bool:
    return choice.shape["expert"] > 1
