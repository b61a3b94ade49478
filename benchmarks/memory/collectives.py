"""What one MoE layer communicates under every sharding strategy and dispatch method, beside the
least it could.

  python -m benchmarks collectives [--config=configs/tiny.py] [--devices=8] [--hardware=cpu|h200]
                                   [--json] [--config.KEY=...]

Counts and bytes that a device receives come from the compiled step of a model of four of the
config's MoE layers, divided by four: first dispatch round, one micro-batch. Without --config, a
small layer on fsdp 4 x expert 2 (for GPUs a larger one). --hardware=h200 compiles for GPUs; what
that needs is in deepseek_jax.plan.

The least, with every byte moved once and all devices of a collective sharing the work:

    weights, forward    sum over weights of w (1 - 1/n)
                        w bytes of a weight as a device uses it, n devices that it is stored over
    weights, backward   the same; nothing with remat=none
    gradients           sum of w (1 - 1/g) + 2 w/g (1 - 1/m)
                        reduce-scatter over the g devices that divide the gradient,
                        all-reduce over the m others that have a part of it
    tokens, forward     all_to_all  2 T K (X-1)/X rows
                        all_gather  2 T (X-1) rows
                        ring        T (X-1) + T X rows: sums must come home, tokens need not
                        T tokens per device, K experts per token, X devices on the expert axis,
                        rows of hidden_size in the compute dtype
    tokens, backward    as many, and those to the experts again unless remat keeps them
    embedding and head  as weights, forward, and gradients, once per step; of the embedding in float32
    after the update    sum over all weights of v (1 - 1/u)
                        v float32 bytes, u devices over which only the optimizer divides them

all_to_all moves capacity_factor times as many rows, because the capacity of an expert is fixed;
    tokens, backward    as many; those to the experts again unless remat keeps them
all-reduces and slices: dense gradients are twice the least on CPU.
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.memory import arrays
from benchmarks.memory.strategies import variants
from benchmarks.support.report import Parser, report
from deepseek_jax.cli import texts
from deepseek_jax.config.configdict import base_config
from deepseek_jax.config.options import Config
from deepseek_jax.errors import UserError
from deepseek_jax.parallel import sharding
from deepseek_jax.parallel.mesh import TOKEN_AXES
from deepseek_jax.plan import exchange, options, topology
from deepseek_jax.train.state import Layout
from deepseek_jax.xla import origin, program

LAYERS = 4
METHODS = ("all_to_all", "all_gather", "ring")
WEIGHTS = tuple(p for p in origin.LAYER_PARTS if p not in ("dispatch", "statistics"))
REDUCTIONS = ("reduce-scatter", "all-reduce")
GROUPS = (
    "weights, forward",
    "weights, backward",
    "gradients",
    "tokens, forward",
    "tokens, backward",
    "counts and choices",
    "embedding and head",
    "after the update",
)
OF_MODEL = ("embedding and head", "after the update")  # once a step, not in every layer


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--devices", type=int, default=8, help="Devices in all.")
    parser.add_argument(
        "--hardware",
        default="cpu",
        choices=["cpu", *topology.HARDWARE],
        help="cpu, or h200 to compile for.",
    )
    jax.config.update("jax_platforms", "cpu")
    size = "small" if parser.parse_known_args(sys.argv[1:])[0].hardware == "cpu" else "large"
    own, config = options.read(parser, sys.argv[1:], f"{__file__}:{size}")
    if own.hardware == "cpu":
        devices = topology.cpu_devices(own.devices)
    elif topology.has_gpu_compiler():
        devices = topology.gpu_devices(topology.HARDWARE[own.hardware], own.devices, 8)
    else:
        raise UserError(
            f"--hardware={own.hardware} needs JAX's CUDA plugin. Install it: {topology.INSTALL}."
        )
    config = one_stack(config)
    results = []
    for variant in [*variants(config, devices), *other_methods(config)]:
        print(f"{variant.sharding.canonical}, {variant.moe.dispatch} ...", file=sys.stderr)
        results.append(measure(variant, devices))
    report(own, results, lambda results: "\n".join(map(text, results)))
    return 0


def get_config(arg: str) -> Any:
    """The layer that is measured unless a config is named: this file is its config file.

    Args:
      arg: "small", or "large" enough for the GPU compiler not to combine the collectives of several layers.
    """
    c = base_config()
    m, t = c.model, c.train
    if arg == "small":
        m.hidden_size = 256
        m.num_attention_heads = 4
        m.moe_intermediate_size = 128
        t.batch_size = 8
        t.sequence_length = 1024
        t.dtype = "float32"
    else:
        m.vocab_size = 32000
        m.hidden_size = 2048
        m.moe_intermediate_size = 1408
        m.n_routed_experts = 64
        m.num_attention_heads = 16
        m.kv_lora_rank = 512
        m.qk_nope_head_dim = 128
        m.qk_rope_head_dim = 64
        m.v_head_dim = 128
        t.batch_size = 8
        t.sequence_length = 1024
    c.mesh.expert = 2
    return c


def one_stack(config: Config) -> Config:
    """LAYERS of the config's MoE layers, alone, in one micro-batch."""
    model = dataclasses.replace(
        config.model, num_hidden_layers=LAYERS, first_k_dense_replace=0, num_nextn_predict_layers=0
    )
    one_batch: dict[str, Any] = {
        "batch_size": config.micro_batch,
        "accumulation": 1,
        "batch_ramp_start": 0,
        "batch_ramp_steps": 0,
    }
    return dataclasses.replace(
        config, model=model, train=dataclasses.replace(config.train, **one_batch)
    )


def other_methods(config: Config) -> list[Config]:
    """The config with every dispatch method but its own."""
    others = (
        dataclasses.replace(config.moe, dispatch=m) for m in METHODS if m != config.moe.dispatch
    )
    return [dataclasses.replace(config, moe=moe) for moe in others]


def measure(
    config: Config,
    devices: list[Any],
    compiler_options: dict[str, Any] | None = None,
    also: Callable[[str, Config, dict[str, int]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """One layer's collectives by group, and how often tokens are exchanged.

    Args:
      also: further facts, of the program's text, the config and the mesh's shape.
    """
    mesh, layout = topology.lay_out(config, devices)
    compiled = topology.compile_step(config, mesh, layout, compiler_options).compiled
    text = compiled.as_text()
    found = program.collectives(text, mesh.shape)
    least = least_bytes(config, mesh, layout)
    rows: dict[str, dict[str, Any]] = {
        group: {"collectives": {}, "bytes": 0.0, "least": least.get(group)} for group in GROUPS
    }
    biggest = max((c.bytes for c in found if c.part == "dispatch"), default=0)
    exchanges, again = 0, 0
    for c in found:
        is_rows = c.part == "dispatch" and 8 * c.bytes >= biggest
        if is_rows and c.phase == "forward":
            exchanges, again = exchanges + (not c.further) * c.times, again + c.further * c.times
        for phase, part, share in () if c.further else c.shares:
            if group := _group(c, phase, part, is_rows):
                layers = 1 if group in OF_MODEL else LAYERS
                kinds = rows[group]["collectives"]
                kinds[c.kind] = kinds.get(c.kind, 0) + share * c.times / layers
                rows[group]["bytes"] += share * c.bytes_per_step / layers
    buffers = exchange.buffers(config, mesh.shape)
    assert buffers is not None  # there is an expert axis
    return {
        "strategy": config.sharding.canonical,
        "dispatch": config.moe.dispatch,
        "mesh": {a: n for a, n in mesh.shape.items() if n > 1},
        **_divisions(mesh, layout),
        "overlapped": _overlapped(found),
        "gathered_ahead": _gathered_ahead(found),
        "reduced_behind": _reduced_behind(found),
        "in_flight": program.most_in_flight(text),
        "groups": rows,
        "token_exchanges_forward": exchanges / LAYERS,
        "token_exchanges_further_round": again / LAYERS,
        "too_large": arrays.too_large(text, config, mesh.shape),
        "exchange": buffers._asdict(),
        "temporaries": program.memory(compiled).temporaries,
        **(also(text, config, dict(mesh.shape)) if also else {}),
    }


def _divisions(mesh: jax.sharding.Mesh, layout: Layout) -> dict[str, bool]:
    """What the layout divides over devices that use it whole."""
    used = sharding.specs(layout.abstract.params, sharding.COMPUTE_RULES)

    def size(specs: Any) -> int:
        return sharding.bytes_per_device(layout.abstract.params, sharding.shardings(specs, mesh))

    return {
        "parameters_divided": size(layout.param_specs) < size(used),
        "gradients_divided": size(layout.grad_specs) < size(used),
        "updates_gathered": size(layout.opt_specs) < size(layout.param_specs),
    }


def _overlapped(found: list[program.Collective]) -> dict[str, float]:
    """Share of the bytes, by kind of collective, that is scheduled with computation between start and
    end. Embedding and head are left out: XLA gathers them at the start of a step, where nothing can be
    computed without them."""
    found = [c for c in found if not c.further and c.part not in ("embed", "loss", "head")]
    total = program.by(found, lambda c: c.kind)
    beside = program.by((c for c in found if c.overlapped), lambda c: c.kind)
    return {kind: beside.get(kind, 0) / n for kind, n in total.items() if n}


def _gathered_ahead(found: list[program.Collective]) -> float:
    """Share of the weights' bytes in forward that is gathered outside the loop over layers: a loop
    that gathers the next layer's weights during a layer has the first one's before it."""
    weights = [
        c for c in found if c.kind == "all-gather" and c.phase == "forward" and c.part in WEIGHTS
    ]
    return sum(c.bytes_per_step for c in weights if not c.loops) / (
        sum(c.bytes_per_step for c in weights) or 1
    )


def _reduced_behind(found: list[program.Collective]) -> float:
    """Share of the gradients' bytes that is reduced outside the loop over layers: a loop that
    reduces the last layer's gradients during a layer leaves the first one's for after it."""
    gradients = [
        c
        for c in found
        if c.kind == "reduce-scatter" and c.phase == "backward" and c.part in WEIGHTS
    ]
    return sum(c.bytes_per_step for c in gradients if not c.loops) / (
        sum(c.bytes_per_step for c in gradients) or 1
    )


def _group(c: program.Collective, phase: str, part: str, is_rows: bool) -> str | None:
    """Which group a share of a collective belongs to; None for what is not the layer's."""
    if phase == "optimizer":
        return "after the update" if c.kind == "all-gather" else None
    if part in ("embed", "loss"):  # the loss goes through the head's weight
        return "embedding and head"
    if part in WEIGHTS and c.kind in REDUCTIONS:
        return "gradients" if phase == "backward" else "counts and choices"
    if part in WEIGHTS:
        return "weights, forward" if phase == "forward" else "weights, backward"
    if part == "dispatch" and is_rows:
        return "tokens, forward" if phase == "forward" else "tokens, backward"
    return "counts and choices" if part in ("dispatch", "statistics") else None


def least_bytes(config: Config, mesh: jax.sharding.Mesh, layout: Layout) -> dict[str, float]:
    """The least of each group, by the formulas above, for one layer (OF_MODEL: for the model)."""
    item = exchange.ITEM_BYTES[config.train.dtype]
    batch = math.prod(mesh.shape[a] for a in TOKEN_AXES)
    used = sharding.specs(layout.abstract.params, sharding.COMPUTE_RULES)
    forward = gradients = update = ends = 0.0
    trees = (used, layout.param_specs, layout.grad_specs, layout.opt_specs)
    leaves = jax.tree_util.tree_leaves_with_path(layout.abstract.params)
    for (path, leaf), *spec_of in zip(leaves, *map(_specs, trees), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        sizes = [
            math.prod(jax.sharding.NamedSharding(mesh, s).shard_shape(leaf.shape)) for s in spec_of
        ]
        used_size, stored, summed, optimized = sizes
        update += 4 * stored * (1 - optimized / stored)
        parts = batch // (mesh.shape["expert"] if "/experts/" in name else 1)
        divided = used_size / summed
        gather = used_size * (1 - stored / used_size)
        reduce = used_size * (1 - 1 / divided) + 2 * used_size / divided * (1 - divided / parts)
        if name.startswith(("embed_tokens/", "lm_head/")):
            ends += gather * item + reduce * (4 if name.startswith("embed") else item)
        if name.startswith("layers/"):
            size = (4 if "norm" in name or "gate/" in name else item) / leaf.shape[0]
            forward, gradients = forward + gather * size, gradients + reduce * size
    again = config.train.remat != "none"
    kept = config.train.remat == "none" or "exchange" in config.train.remat
    tokens = config.micro_batch * config.train.sequence_length // batch
    x, k = mesh.shape["expert"], config.model.num_experts_per_tok
    there, back = {
        "all_to_all": (tokens * k * (x - 1) / x,) * 2,
        "all_gather": (tokens * (x - 1),) * 2,
        "ring": (tokens * (x - 1), tokens * x if x > 1 else 0),
    }[config.moe.dispatch]
    row = config.model.hidden_size * item
    return {
        "weights, forward": forward,
        "weights, backward": forward * again,
        "gradients": gradients,
        "embedding and head": ends,
        "after the update": update,
        "tokens, forward": (there + back) * row,
        "tokens, backward": (there + back + (0 if kept else there)) * row,
    }


def _specs(tree: Any) -> list[jax.P]:
    return jax.tree.leaves(tree, is_leaf=lambda s: isinstance(s, jax.P))


def text(r: dict[str, Any]) -> str:
    """One measurement for a person."""
    rows = [["", "collectives", "bytes", "least", "ratio"]]
    for group, g in r["groups"].items():
        if g["collectives"] or g["least"]:
            kinds = ", ".join(f"{n:.3g} {kind}" for kind, n in sorted(g["collectives"].items()))
            ratio = f"{g['bytes'] / g['least']:.2f}" if g["least"] else ""
            least = texts.gb(g["least"]) if g["least"] is not None else ""
            rows.append(
                [
                    group + (" (of the model)" if group in OF_MODEL else ""),
                    kinds,
                    texts.gb(g["bytes"]),
                    least,
                    ratio,
                ]
            )
    e = r["exchange"]
    mesh = " x ".join(f"{a} {n}" for a, n in r["mesh"].items())
    first, further = f"{r['token_exchanges_forward']:g}", f"{r['token_exchanges_further_round']:g}"
    buffer_rows = f"{e['exchanged_rows']} exchanged + {e['expert_rows']} computed rows"
    return f"""{r["strategy"]}, {r["dispatch"]}, {mesh}: a layer
{texts.table(rows, "  ")}
  token exchanges forward: {first} in the first round, {further} in each further one
  dispatch buffers: {buffer_rows} = {texts.gb(e["bytes"])}, whatever the routing;
  a ragged exchange must be ready for {e["ragged_rows"]} rows = {texts.gb(e["ragged_bytes"])}:
  expert axis x tokens x min(experts per token, experts of a device).
  Temporaries of the step: {texts.gb(r["temporaries"])}.
"""
