"""Causal attention, forward and backward, by sequence length, against plain softmax attention with
whole scores.

  python -m benchmarks attention [--lengths=512,1024,2048,4096,8192] [--tokens=4096] [--heads=8]
                                 [--qk=96] [--v=64]
                                 [--documents=2] [--turns=5] [--module] [--json]

Times: median of turns, for as many sequences as make --tokens, at least one; float32 on CPUs,
bfloat16 on GPUs. Bytes: temporaries of the compiled programs for one sequence, forward and backward
together. Programs with more temporaries than --memory are compiled and not run. The bars, printed
below the table: temporary bytes linear in the length; no slower than plain at the first length,
quicker at the others. --module measures the whole MultiHeadLatentAttention with either, at the
widths of the shape "mid" (benchmarks/support/shapes.py), and how much of it is not attention
itself.

All benchmarks run with huge pages, as train.py does: without them page faults of fresh memory are a
large part of what is measured, most of all of plain attention.
"""

import itertools
import statistics
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.support import turns
from benchmarks.support.report import Parser, machine, report
from deepseek_jax.cli import texts
from deepseek_jax.cli.arguments import numbers
from deepseek_jax.config.options import Config, MeshConfig, ModelConfig
from deepseek_jax.model.attention import causal, mla
from deepseek_jax.model.rope import rope_tables
from deepseek_jax.parallel.mesh import make_mesh

LINEAR = 1.1  # temporary bytes may grow by this much more than the length


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "--lengths",
        type=numbers,
        default="512,1024,2048,4096,8192",
        help="Sequence lengths, separated by commas.",
    )
    for name, default, about in (
        ("tokens", 4096, "Tokens to time, in whole sequences, at least one."),
        ("heads", 8, "Heads."),
        ("qk", 96, "Width of a query and key head."),
        ("v", 64, "Width of a value head."),
        ("documents", 2, "Documents packed into a sequence."),
        ("turns", 5, "Turns to time."),
        ("memory", 4_000_000_000, "Most bytes of temporaries of a program that is run."),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=about)
    parser.add_argument("--module", action="store_true", help="The whole attention module instead.")
    own = parser.parse_args()
    rows = []
    for length in own.lengths:
        print(f"{length} tokens ...", file=sys.stderr)
        rows.append((of_module if own.module else of_core)(length, own))
    result = {
        "machine": machine(),
        "what": "module" if own.module else "attention",
        "dtype": str(compute_dtype()),
        "rows": rows,
        "bars": bars(rows),
    }
    report(own, result, text)
    return 0


def compute_dtype() -> Any:
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def plain(
    q_BSNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNV: jax.Array,
    segment_ids_BS: jax.Array,
    scale: float,
    method: str = "auto",
) -> jax.Array:
    """`causal_attention` as one softmax over whole scores. gpu_bench compares with it too."""
    del method
    score_BNQK = (
        jnp.einsum("bqnh,bknh->bnqk", q_BSNH, k_BSNH, preferred_element_type=jnp.float32) * scale
    )
    causal_QK = jnp.tril(jnp.ones((q_BSNH.shape[1], k_BSNH.shape[1]), bool))
    mask_BQK = causal_QK & (segment_ids_BS[:, :, None] == segment_ids_BS[:, None, :])
    weight_BNQK = jax.nn.softmax(jnp.where(mask_BQK[:, None], score_BNQK, -1e30), axis=-1)
    return jnp.einsum("bnqk,bknv->bqnv", weight_BNQK.astype(v_BSNV.dtype), v_BSNV)


def core_programs(f: Callable, sequences: int, length: int, own: Any) -> dict[str, turns.Program]:
    """Forward alone, and forward and backward, of an attention function on random numbers."""
    keys = jax.random.split(jax.random.key(0), 4)
    widths = (own.qk, own.qk, own.v, own.v)
    q, k, v, dout = (
        jax.random.normal(key, (sequences, length, own.heads, w), compute_dtype())
        for key, w in zip(keys, widths, strict=True)
    )
    segments = jnp.broadcast_to(
        1 + jnp.arange(length) * own.documents // length, (sequences, length)
    )

    def call(q, k, v, segments):
        return f(q, k, v, segments, own.qk**-0.5)

    def both(q, k, v, segments, dout):
        return jax.vjp(lambda q, k, v: call(q, k, v, segments), q, k, v)[1](dout)

    return {
        "forward": turns.compiled(call, q, k, v, segments),
        "both": turns.compiled(both, q, k, v, segments, dout),
    }


def of_core(length: int, own: Any) -> dict[str, Any]:
    """One row: times, and temporaries of one sequence."""
    sequences = max(1, own.tokens // length)
    methods = {"ours": causal.causal_attention, "plain": plain}
    built = {name: core_programs(f, sequences, length, own) for name, f in methods.items()}
    one = {
        name: built[name] if sequences == 1 else core_programs(f, 1, length, own)
        for name, f in methods.items()
    }
    return _row(
        length, sequences, built, {name: p["both"].temporaries for name, p in one.items()}, own
    )


def of_module(length: int, own: Any) -> dict[str, Any]:
    """The same for the whole module, with the share that attention itself takes."""
    sequences = max(1, own.tokens // length)
    built, one = {}, {}
    for name, f in (("ours", causal.causal_attention), ("plain", plain)):
        with mock.patch.object(mla, "causal_attention", f):
            built[name] = module_programs(sequences, length, own)
            one[name] = built[name] if sequences == 1 else module_programs(1, length, own)
    row = _row(
        length, sequences, built, {name: p["both"].temporaries for name, p in one.items()}, own
    )
    core = turns.medians(
        {"both": core_programs(causal.causal_attention, sequences, length, own)["both"]},
        own.turns,
    )["both"]
    return row | {"attention_alone_s": core}


def module_programs(sequences: int, length: int, own: Any) -> dict[str, turns.Program]:
    """Programs of MultiHeadLatentAttention on one device: its gradients of weights and input."""
    rope = own.qk // 3 // 2 * 2
    model = ModelConfig(
        hidden_size=64 * own.heads,
        num_attention_heads=own.heads,
        qk_rope_head_dim=rope,
        qk_nope_head_dim=own.qk - rope,
        v_head_dim=own.v,
        q_lora_rank=24 * own.heads,
        kv_lora_rank=16 * own.heads,
    )
    config = Config(model=model, mesh=MeshConfig(fsdp=1))
    mesh = make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        graphdef, weights = nnx.split(mla.MultiHeadLatentAttention(model, nnx.Rngs(0)))
        x = jax.random.normal(
            jax.random.key(1), (sequences, length, model.hidden_size), compute_dtype()
        )
        segments = jnp.broadcast_to(
            1 + jnp.arange(length) * own.documents // length, (sequences, length)
        )

        def call(weights, x, segments):
            positions = jnp.broadcast_to(jnp.arange(length), x.shape[:2])
            return nnx.merge(graphdef, weights)(x, rope_tables(model, positions), segments)

        def both(weights, x, segments):
            return jax.vjp(lambda w, x: call(w, x, segments), weights, x)[1](x)

        return {
            "forward": turns.compiled(call, weights, x, segments),
            "both": turns.compiled(both, weights, x, segments),
        }


def _row(
    length: int, sequences: int, built: dict, temporaries: dict[str, int], own: Any
) -> dict[str, Any]:
    runs = {
        (name, part): p
        for name, parts in built.items()
        for part, p in parts.items()
        if parts["both"].temporaries <= own.memory
    }
    times = turns.seconds(runs, own.turns)
    row = {"length": length, "sequences": sequences, "temporaries_of_one": temporaries}

    def median(name, part):
        return statistics.median(times[name, part]) if (name, part) in times else None

    row |= {
        f"{part}_s": {name: median(name, part) for name in built} for part in ("forward", "both")
    }
    row["times_of_plain"] = (
        turns.ratio(times, ("ours", "both"), ("plain", "both")) if len(runs) == 4 else None
    )
    return row


def bars(rows: list[dict[str, Any]]) -> dict[str, bool | None]:
    """What must hold; None where it cannot be said."""
    linear = [
        b["temporaries_of_one"]["ours"] / a["temporaries_of_one"]["ours"]
        <= LINEAR * b["length"] / a["length"]
        for a, b in itertools.pairwise(rows)
    ]
    slower = [r["times_of_plain"] for r in rows]
    later = [t for t in slower[1:] if t is not None]
    return {
        "temporary bytes linear in the length": all(linear) if linear else None,
        f"no slower than plain at {rows[0]['length']}": None
        if slower[0] is None
        else slower[0] <= 1,
        "quicker than plain beyond": all(t < 1 for t in later) if later else None,
    }


def text(r: dict[str, Any]) -> str:
    """The table for a person."""

    def ms(t):
        return "not run" if t is None else f"{t * 1e3:,.1f} ms"

    head = [
        "length",
        "sequences",
        "forward",
        "plain's",
        "forward + backward",
        "plain's",
        "ours / plain",
        "bytes of one",
        "plain's",
    ]

    def times(row):
        return [
            ms(row[part][name]) for part in ("forward_s", "both_s") for name in ("ours", "plain")
        ]

    lines = [head] + [
        [
            str(row["length"]),
            str(row["sequences"]),
            *times(row),
            "" if row["times_of_plain"] is None else f"{row['times_of_plain']:.2f}",
            *(texts.gb(row["temporaries_of_one"][name]) for name in ("ours", "plain")),
        ]
        for row in r["rows"]
    ]
    if r["what"] == "module":
        lines = [
            line + [extra]
            for line, extra in zip(
                lines,
                ["attention alone", *(ms(row["attention_alone_s"]) for row in r["rows"])],
                strict=True,
            )
        ]
    said = {True: "met", False: "MISSED", None: "not measured"}
    return (
        f"{r['what']}, {r['dtype']}, {r['machine']['device']}, {r['machine']['cores']} "
        f"cores\n\n{texts.table(lines)}\n\n"
        + "\n".join(f"{said[met]}: {name}" for name, met in r["bars"].items())
    )
