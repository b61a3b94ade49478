"""What a step compiled for GPUs does not do yet, or does: further rounds, kernels of the experts' products,
float32 weights on the links, communication that nothing hides."""

from collections import Counter
from typing import Any

from benchmarks.memory import collectives
from deepseek_jax.config.options import Config
from deepseek_jax.plan.rates import SPEEDS
from deepseek_jax.plan.timeline import Program, Timeline
from deepseek_jax.xla import hlo

# Gate and up, down; and of each the gradients of rows and matrices.
PRODUCTS = {"forward": 2, "backward": 4}


def of(text: str, config: Config, mesh_shape: dict[str, int]) -> dict[str, Any]:
    """Facts of a step of collectives.LAYERS layers, all on one host.

    further_rounds: whether the program has loops for further rounds of the dispatch.
    grouped, batched: kernels of experts' products in a layer, by pass: grouped ones, and others.
    wide_gathers: float32 weights that are gathered, larger than the router's, of layers and of the embedding.
    exposed, busy: predicted seconds of collectives in a step, one round, derated rates of an H200.
    """
    compiled = Program(text, mesh_shape, mesh_shape)
    spent = Timeline(compiled, SPEEDS["h200"].derated).run()
    grouped, batched = Counter[str](), Counter[str]()
    for c in spent.costs:
        if c.of.part == "experts" and c.work.flops:
            kinds = grouped if "grouped" in c.work.flops else batched
            kinds[c.of.phase] += round(c.times)
    return {
        "further_rounds": compiled.further_rounds,
        "grouped": {phase: n / collectives.LAYERS for phase, n in grouped.items()},
        "batched": {phase: n / collectives.LAYERS for phase, n in batched.items()},
        "wide_gathers": wide_gathers(compiled, config),
        "exposed": sum(w.exposed for w in spent.waits.values()),
        "busy": sum(w.busy for w in spent.waits.values()),
    }


def wide_gathers(compiled: Program, config: Config) -> dict[str, list[str]]:
    """Weights that are gathered in float32 where bfloat16 would do, as "f32[...] name", by whose they are.

    The router's weight is float32 by design, and so small that it counts for nothing.
    """
    m = config.model
    found: dict[str, list[str]] = {"layers": [], "embedding": []}
    for body in compiled.module.computations.values():
        for i in body.values():
            c = compiled.collectives.get(i.name)
            if c is None or c.kind != "all-gather" or c.phase == "optimizer":
                continue
            if c.part not in (*collectives.WEIGHTS, "embed", "loss"):
                continue
            for a in [a for o in i.operands if o in body for a in hlo.arrays(body[o].shape)]:
                # The compiler joins the gathers of the embedding and of the first layer.
                of_words = {m.vocab_size, m.vocab_size // c.group} & set(a.dims)
                if a.dtype == "f32" and a.size * c.group > m.hidden_size * m.n_routed_experts:
                    said = f"f32[{','.join(map(str, a.dims))}] {i.name}"
                    found["embedding" if of_words else "layers"].append(said)
    return found
