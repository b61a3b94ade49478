"""Compiles train steps for H200s, without one, and checks what their scheduled programs communicate.

  make gpu-aot                                  or, with the extra gpu-aot installed:
  python -m benchmarks gpu_aot [--strategies-only]

First four bfloat16 layers of 64 experts for 8 H200s, under every strategy and dispatch method, with
the XLA options of train.py. Checked in each scheduled program: which weights are gathered, how
gradients are reduced, that no more bytes move than the strategy needs, that tokens are exchanged
twice a round in forward, that gathers and scatters have computation between start and end, that no
layer's weight is gathered in float32, and that no array holds every expert's work on every token, or
attention scores of a whole sequence. What is wanted and does not hold yet (TO_COME) is counted and
fails nothing. Then
eight layers of V2-Lite for one H200: one kernel for all experts per product, and no rounds; attention of
packed documents by one kernel forward and two backward; with experts in FP8, products of numbers in FP8. Then
configs/v3.py for 256 and 2,048 H200s and configs/deepseek_7b.py for 8: bytes per device beside 141
GB. Takes 20 minutes on 2 cores and 4 GB of memory.

Exit code 1 if a check fails; it is named. Nothing is executed: times and NCCL's own memory need GPUs.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import ROOT
from benchmarks.gpu import facts
from benchmarks.gpu.aot_attention import check_attention
from benchmarks.gpu.aot_grouped import check_fp8, check_grouped
from benchmarks.memory import arrays, collectives, strategies
from deepseek_jax.cli import texts
from deepseek_jax.config.configdict import from_config_dict
from deepseek_jax.config.options import Config
from deepseek_jax.errors import UserError
from deepseek_jax.plan import options, topology
from deepseek_jax.xla import program

HARDWARE = topology.HARDWARE["h200"]
SLACK = 1.05  # bytes may be this multiple of the least
# Wanted of every step, and not so yet. What has come to hold is taken out here, and is checked from then on.
TO_COME = {
    "no further rounds in the program",
    "one grouped kernel per product of the experts",
    "no float32 gather of the embedding",
    "all-to-all: computation between start and end",
    "collective-permute: computation between start and end",
}
CONFIGS = ROOT / "configs"

# (config, devices, options of its own). One sequence a GPU in a micro-batch; the batch of 2,048 as
# configs/v3.py says.
FULL_SIZE = (
    (
        "v3.py",
        256,
        ("--config.mesh.fsdp=32", "--config.mesh.expert=8", "--config.train.accumulation=60"),
    ),
    (
        "v3.py",
        256,
        ("--config.mesh.fsdp=4", "--config.mesh.expert=64", "--config.train.accumulation=60"),
    ),
    (
        "v3.py",
        2048,
        (
            "--config.train.batch_size=16384",
            "--config.train.accumulation=8",
            "--config.train.batch_ramp_start=4096",
        ),
    ),
    ("deepseek_7b.py", 8, ()),
)


class Checks:
    """Prints each check and counts those that fail.

    Attributes:
      failed: names of checks.
      to_come: what TO_COME names -> of how many programs it holds, and of how many it does not.
    """

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.to_come: dict[str, Counter[bool]] = defaultdict(Counter)

    def __call__(self, name: str, holds: bool, found: str) -> None:
        wanted = next((w for w in TO_COME if name.endswith(w)), None)
        if wanted:
            self.to_come[wanted][holds] += 1
        print(f"  {'ok    ' if holds else 'to do ' if wanted else 'FAILED'}  {name}: {found}")
        if not (holds or wanted):
            self.failed.append(name)

    def summary(self) -> str:
        """Lines on what is to come, then on what has failed."""
        lines = [
            f"{name}: holds in {n[True]} of {n.total()} programs"
            + ("" if n[False] else ", all: take it out of TO_COME")
            for name, n in self.to_come.items()
        ]
        colon = ": " if self.failed else ""
        return "\n".join(
            [*lines, f"{len(self.failed)} checks failed{colon}{'; '.join(self.failed)}"]
        )


def main() -> int:
    parser = options.Parser(__doc__, json=False)
    parser.add_argument(
        "--strategies-only", action="store_true", help="Leave the full-size configs out: 6 minutes."
    )
    jax.config.update("jax_platforms", "cpu")
    own = parser.parse_args()
    if not topology.has_gpu_compiler():
        raise UserError(
            f"JAX's CUDA plugin is missing. Run make gpu-aot, or install it: {topology.INSTALL}."
        )
    check = Checks()
    devices = topology.gpu_devices(HARDWARE, 8, 8)
    base = collectives.one_stack(from_config_dict(collectives.get_config("large")))
    by_strategy = strategies.variants(base, devices)
    for config in [*by_strategy, *collectives.other_methods(base)]:
        print(f"\n{config.sharding.strategy}, {config.moe.dispatch}", flush=True)
        check_step(check, config, devices)
    check_prefetch(check, base, devices)
    check_grouped(check, devices)
    check_attention(check, devices)
    check_fp8(check, devices)
    for file, count, given in () if own.strategies_only else FULL_SIZE:
        print(f"\n{file} on {count} x {HARDWARE.name} {' '.join(given)}", flush=True)
        show_size(file, count, given)
    print(f"\n{check.summary()}")
    return 1 if check.failed else 0


def check_step(check: Checks, config: Config, devices: list[Any]) -> None:
    """Compiles one step and checks its collectives."""
    r = collectives.measure(config, devices, also=facts.of)
    strategy, method = r["strategy"], r["dispatch"]
    divided, reduced = r["parameters_divided"], r["gradients_divided"]

    def named(text):
        return f"{strategy}, {method}: {text}"

    groups = r["groups"]

    def said(group: str) -> str:
        g = groups[group]
        kinds = ", ".join(f"{n:.3g} {k}" for k, n in sorted(g["collectives"].items())) or "none"
        return f"{kinds}; {texts.gb(g['bytes'])}, least {texts.gb(g['least'] or 0)}"

    for group in ("weights, forward", "weights, backward"):
        gathers = groups[group]["collectives"].get("all-gather", 0)
        check(
            named(f"{'' if divided else 'no '}all-gather of {group}"),
            (gathers > 0) == divided,
            said(group),
        )
    if divided:
        check(
            named("weights are gathered a layer ahead (pipelined all-gather)"),
            r["gathered_ahead"] > 0,
            f"{r['gathered_ahead']:.0%} of the bytes before the loop over layers",
        )
    scatters = groups["gradients"]["collectives"].get("reduce-scatter", 0)
    check(
        named(f"{'' if reduced else 'no '}reduce-scatter of gradients"),
        (scatters > 0) == reduced,
        said("gradients"),
    )
    updates = groups["after the update"]["collectives"].get("all-gather", 0)
    check(
        named(f"{'' if r['updates_gathered'] else 'no '}all-gather after the update"),
        (updates > 0) == r["updates_gathered"],
        said("after the update"),
    )
    for group in ("weights, forward", "weights, backward", "gradients", *collectives.OF_MODEL):
        g = groups[group]
        if g["least"]:
            ratio = g["bytes"] / g["least"]
            check(
                named(f"bytes of {group} at most {SLACK:.2f} x the least"),
                ratio <= SLACK,
                f"{ratio:.2f} x",
            )
    wanted = 2 if method != "ring" else hops(r)
    again = 2 if method == "all_to_all" else 0
    first, further = r["token_exchanges_forward"], r["token_exchanges_further_round"]
    check(
        named(f"{wanted} token exchanges forward in the first round"), first == wanted, f"{first:g}"
    )
    check(
        named(f"{again} token exchanges forward in each further round"),
        further == again,
        f"{further:g}",
    )
    for what, name in (
        ("every_expert_on_every_token", "no array of every expert's work on every token"),
        ("whole_scores", "no attention scores of a whole sequence"),
    ):
        check(named(name), not r["too_large"][what], arrays.said(r["too_large"], what))
    for kind, share in r["overlapped"].items():
        if kind != "all-reduce":
            check(
                named(f"{kind}: computation between start and end"),
                share >= 0.9,
                f"of {share:.0%} of the bytes",
            )
    check_facts(check, r, named)


def check_facts(check: Checks, r: dict[str, Any], named: Callable[[str], str]) -> None:
    """What facts.py says of a step."""
    for whose, name in (
        ("layers", "no float32 gather of a layer's weight"),
        ("embedding", "no float32 gather of the embedding"),
    ):
        check(named(name), not r["wide_gathers"][whose], arrays.said(r["wide_gathers"], whose))
    check(
        named("no further rounds in the program"),
        not r["further_rounds"],
        "loops for them are there" if r["further_rounds"] else "none",
    )
    grouped, batched = r["grouped"], r["batched"]
    passes = ", ".join(
        f"{grouped.get(phase, 0):g} grouped and {batched.get(phase, 0):g} other kernels {phase}"
        for phase in ("forward", "recompute", "backward")
    )
    check(
        named("one grouped kernel per product of the experts"),
        not any(batched.values())
        and all(grouped.get(p, 0) == n for p, n in facts.PRODUCTS.items()),
        f"{passes} a layer",
    )
    print(
        f"  predicted: collectives take {r['busy'] * 1e3:.2f} ms, {r['exposed'] * 1e3:.2f} of it exposed"
    )


def check_prefetch(check: Checks, base: Config, devices: list[Any]) -> None:
    """Compiles full_shard under FSDP's prefetch options and checks that each moves what it says."""
    compiled: list[dict[str, Any]] = []
    for forward, backward, limit in (
        (False, "none", True),
        (True, "none", True),
        (False, "post", True),
        (True, "pre", True),
        (True, "pre", False),
    ):
        asked: dict[str, Any] = {
            "forward_prefetch": forward,
            "backward_prefetch": backward,
            "limit_all_gathers": limit,
        }
        name = ", ".join(f"{option}={value}" for option, value in asked.items())
        sharding = dataclasses.replace(base.sharding, strategy="full_shard", **asked)
        r = collectives.measure(dataclasses.replace(base, sharding=sharding), devices)
        compiled.append(r)
        print(
            f"\n{name}: {r['gathered_ahead']:.0%} of the weights gathered and "
            f"{r['reduced_behind']:.0%} of the gradients reduced outside the "
            f"loop over layers, {r['in_flight']} collectives in flight, temporaries "
            f"{texts.gb(r['temporaries'])}",
            flush=True,
        )
    none, ahead, post, both, free = compiled
    check(
        "without prefetch nothing is gathered ahead",
        none["gathered_ahead"] == 0,
        f"{none['gathered_ahead']:.0%}",
    )
    check(
        "forward_prefetch gathers ahead",
        ahead["gathered_ahead"] > 0,
        f"{ahead['gathered_ahead']:.0%}",
    )
    check(
        "backward_prefetch=post reduces a layer later",
        post["reduced_behind"] > none["reduced_behind"],
        f"{post['reduced_behind']:.0%}, without {none['reduced_behind']:.0%}",
    )
    check(
        "forward_prefetch and backward_prefetch=pre do both",
        both["gathered_ahead"] > 0 and both["reduced_behind"] > none["reduced_behind"],
        f"{both['gathered_ahead']:.0%} and {both['reduced_behind']:.0%}",
    )
    check(
        "limit_all_gathers keeps fewer in flight",
        both["in_flight"] <= free["in_flight"],
        f"{both['in_flight']}, without {free['in_flight']}",
    )


def hops(r: dict[str, Any]) -> int:
    """Messages of a ring: one a hop, of tokens and sums together, as the GPU compiler combines them."""
    return r["mesh"]["expert"]


def show_size(file: str, count: int, given: tuple[str, ...]) -> None:
    """Compiles a config for so many H200s and prints its memory."""
    _, config = options.read(options.Parser(), [f"--config={CONFIGS / file}", *given])
    mesh, layout = topology.lay_out(config, topology.gpu_devices(HARDWARE, count, 8))
    step = topology.compile_step(config, mesh, layout)
    m = program.memory(step.compiled)
    room = HARDWARE.memory or 0
    over = m.total - room
    found = [c for c in program.collectives(step.compiled.as_text(), mesh.shape) if not c.further]
    kinds = ", ".join(
        f"{kind} {texts.gb(n)}" for kind, n in program.by(found, lambda c: c.kind).items()
    )
    verdict = "fits" if over <= 0 else f"does not fit, {texts.gb(over)} too much"
    took = f"traced in {step.lower_seconds:.0f} s, compiled in {step.compile_seconds:.0f} s"
    print(
        f"  mesh {' x '.join(f'{a} {n}' for a, n in mesh.shape.items() if n > 1)}\n"
        f"  {texts.gb(m.arguments)} of arguments + {texts.gb(m.temporaries)} of temporaries"
        f" = {texts.gb(m.total)} of {texts.gb(room)}: {verdict}\n"
        f"  receives {texts.gb(sum(c.bytes_per_step for c in found))} per step: {kinds}\n"
        f"  {took}, {texts.gb(step.peak_bytes or 0)} of memory so far",
        flush=True,
    )
