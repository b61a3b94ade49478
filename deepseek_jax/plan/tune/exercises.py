"""What is compared: the rows of each exercise, as changes of options, on the mesh of the config."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from deepseek_jax.config.options import STRATEGIES, Config

Shape = Mapping[str, int]  # of the mesh


class Row(NamedTuple):
    """A configuration to try.

    Attributes:
      name: in the table.
      changes: of options.
      refused: why it makes no sense here; "": it may be tried.
    """

    name: str
    changes: dict[str, Any]
    refused: str = ""


class Exercise(NamedTuple):
    """Attributes:
    about: a line for --help.
    rows: of a config on a mesh of a shape, on a platform.
    """

    about: str
    rows: Callable[[Config, Shape, str], list[Row]]


def strategies(config: Config, shape: Shape, platform: str) -> list[Row]:
    """Every sharding strategy; hybrid_shard with two replicas where the mesh has none, as without them it is
    full_shard.
    """
    out = []
    for name in STRATEGIES:
        changes: dict[str, Any] = {"sharding.strategy": name}
        if name == "hybrid_shard" and shape["data"] == 1 and shape["fsdp"] % 2 == 0:
            changes |= {f"mesh.{axis}": n for axis, n in shape.items()}
            changes |= {"mesh.data": 2, "mesh.fsdp": shape["fsdp"] // 2}
        out.append(Row(name, changes))
    return out


def prefetch(config: Config, shape: Shape, platform: str) -> list[Row]:
    """From nothing ahead to everything."""
    forward, backward, limit = (
        f"sharding.{n}" for n in ("forward_prefetch", "backward_prefetch", "limit_all_gathers")
    )
    changes = {
        "off": {forward: False, backward: "none", limit: True},
        "reduce behind (post)": {forward: False, backward: "post", limit: True},
        "gather ahead (pre)": {forward: True, backward: "pre", limit: True},
        "pre, several in flight": {forward: True, backward: "pre", limit: False},
    }
    why = ""
    if platform == "cpu":
        why = "XLA's CPU compiler has no such options: all rows are the same program"
    return [Row(name, c, why if i else "") for i, (name, c) in enumerate(changes.items())]


def dispatch(config: Config, shape: Shape, platform: str) -> list[Row]:
    """The methods of the exchange between the experts' devices."""
    why = ""
    if not config.model.has_experts:
        why = "the model has no routed experts"
    elif shape["expert"] == 1:
        why = "mesh.expert=1: nothing is exchanged. Set --config.mesh.expert=2 or more"
    return [Row(name, {"moe.dispatch": name}, why) for name in ("all_to_all", "all_gather", "ring")]


def remat(config: Config, shape: Shape, platform: str) -> list[Row]:
    """What backward keeps."""
    kept = ["none", "dots", "full", "save:attention", "save:attention,mlp_gate_up"]
    if config.model.has_experts:
        kept += ["save:attention,experts_hidden"]
    if shape["expert"] > 1:
        kept += ["exchange"]
    without = {"offload.activations": ""} if config.offload.activations else {}
    return [Row(name, {"train.remat": name} | without) for name in kept]


def offload(config: Config, shape: Shape, platform: str) -> list[Row]:
    """What lies in the host's memory meanwhile; all rows with a recomputation that allows each of them."""
    optimizer, parameters, activations = (
        f"offload.{n}" for n in ("optimizer_state", "parameters", "activations")
    )
    kept = config.train.remat
    nothing: dict[str, Any] = {optimizer: False, parameters: False, activations: ""}
    nothing["train.remat"] = kept if kept.startswith("save:") else "full"
    return [
        Row("nothing", nothing),
        Row("optimizer state", nothing | {optimizer: True}),
        Row("parameters", nothing | {parameters: True}),
        Row("both", nothing | {optimizer: True, parameters: True}),
        Row("activations", nothing | {activations: "layer_input"}),
    ]


EXERCISES = {
    "strategies": Exercise("what is divided over devices: memory, time", strategies),
    "prefetch": Exercise("collectives ahead of their layer, or not", prefetch),
    "dispatch": Exercise("how tokens reach the experts: rounds, padding, time", dispatch),
    "remat": Exercise("what is kept for backward", remat),
    "offload": Exercise("what lies on the host", offload),
}
BATCH = "batch"
ABOUT = {BATCH: "the largest micro-batch that fits"} | {
    name: e.about for name, e in EXERCISES.items()
}
