"""The vocabulary loss, forward and backward, against the plain one, which holds the logits of all tokens.

  python -m benchmarks vocabulary [--tokens=2048,4096] [--vocab=8192,32768] [--width=512] [--turns=5] [--json]

Ours: model/head.py `cross_entropy`, as in the train step: value, gradient of the hidden states
[T, D] and of the head [D, V]. Plain: optax.softmax_cross_entropy_with_integer_labels of hidden @
head, differentiated by JAX, in the same dtypes: float32 on CPUs, bfloat16 with float32 logits on
GPUs. Their gradients are compared before anything is timed.

Bytes are the temporaries of the compiled programs: arguments and the gradients, which must exist,
are not among them. Ours hold some arrays of a chunk of tokens x vocabulary, whatever T is. The
bars: from one number of tokens to the next they grow by no more than the gradient of the hidden
states and its copy in chunks, 2 T D; and the time, the median over turns of the ratio, is at most
1.10 of plain's.
"""

import itertools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.speed.attention import compute_dtype
from benchmarks.support import turns
from benchmarks.support.report import Parser, machine, report
from deepseek_jax.cli import texts
from deepseek_jax.cli.arguments import numbers
from deepseek_jax.config.options import Config, MeshConfig
from deepseek_jax.model import head, logit_functions
from deepseek_jax.parallel import sharding
from deepseek_jax.parallel.mesh import TOKENS, make_mesh

BAR = 1.10
CONFIG = Config(mesh=MeshConfig(fsdp=1))


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "--tokens",
        type=numbers,
        default="2048,4096",
        help="Tokens, separated by commas, the fewest first.",
    )
    parser.add_argument(
        "--vocab", type=numbers, default="8192,32768", help="Words, separated by commas."
    )
    parser.add_argument("--width", type=int, default=512, help="Hidden size.")
    parser.add_argument("--turns", type=int, default=5, help="Turns to time.")
    own = parser.parse_args()
    with jax.set_mesh(make_mesh(CONFIG, jax.devices()[:1])):
        rows = [measure(t, v, own.width, own.turns) for v in own.vocab for t in own.tokens]
    result = {
        "machine": machine(),
        "dtype": str(compute_dtype()),
        "width": own.width,
        "chunk": head.CHUNK_TOKENS,
        "rows": rows,
        "bars": bars(rows),
    }
    report(own, result, text)
    return 0


def ours(hidden_TD: jax.Array, kernel_DV: jax.Array, targets_T: jax.Array) -> jax.Array:
    """The sum of -log p, as the train step makes it."""
    stored = jax.sharding.reshard(
        kernel_DV, sharding.spec(("embed", "vocab"), sharding.storage_rules(CONFIG)[0])
    )
    weight = nnx.Param(stored, out_sharding=("embed", "vocab"), eager_sharding=False)
    hidden_BSD, targets_BS = (jax.sharding.reshard(a[None], TOKENS) for a in (hidden_TD, targets_T))
    untied = head.Head(weight, tied=False)
    return head.scan_vocab_sum(logit_functions.cross_entropy, hidden_BSD, untied, targets_BS)[0]


def plain(hidden_TD: jax.Array, kernel_DV: jax.Array, targets_T: jax.Array) -> jax.Array:
    """The same loss with the logits of all tokens in memory."""
    logits_TV = jnp.einsum(
        "td,dv->tv",
        hidden_TD,
        kernel_DV.astype(hidden_TD.dtype),
        preferred_element_type=jnp.float32,
    )
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits_TV, targets_T))


def measure(tokens: int, vocab: int, width: int, count: int) -> dict[str, Any]:
    """One row: bytes, times, and how far the gradients are apart."""
    print(f"{tokens} tokens, {vocab} words ...", file=sys.stderr)
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (tokens, width), compute_dtype())
    kernel = jax.random.normal(keys[1], (width, vocab), jnp.float32) * width**-0.5
    given = hidden, kernel, jax.random.randint(keys[2], (tokens,), 0, vocab)
    built = {
        f.__name__: turns.compiled(jax.value_and_grad(f, argnums=(0, 1)), *given)
        for f in (ours, plain)
    }
    (value, grads), (value_plain, grads_plain) = (built[name]() for name in ("ours", "plain"))
    pairs = zip((value, *grads), (value_plain, *grads_plain), strict=True)
    apart = max(
        float(jnp.max(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32))) / jnp.max(jnp.abs(b)))
        for a, b in pairs
    )
    if not apart < (1e-4 if compute_dtype() == np.float32 else 3e-2):
        raise FloatingPointError(f"ours and plain differ by {apart:.1e} of the largest number")
    del value, grads, value_plain, grads_plain
    times = turns.seconds(built, count)
    return {
        "tokens": tokens,
        "vocab": vocab,
        "hidden_bytes": hidden.nbytes,
        "temporaries": {name: p.temporaries for name, p in built.items()},
        "seconds": {name: float(np.median(t)) for name, t in times.items()},
        "times_of_plain": turns.ratio(times, "ours", "plain"),
        "apart": apart,
    }


def bars(rows: list[dict[str, Any]]) -> dict[str, bool | None]:
    """What must hold; None where it cannot be said."""
    steps = [
        (a, b)
        for a, b in itertools.pairwise(rows)
        if a["vocab"] == b["vocab"] and head.CHUNK_TOKENS <= a["tokens"] < b["tokens"]
    ]
    flat = [
        b["temporaries"]["ours"] - a["temporaries"]["ours"]
        <= 2 * (b["hidden_bytes"] - a["hidden_bytes"])
        for a, b in steps
    ]
    return {
        "temporary bytes independent of tokens x vocabulary": all(flat) if flat else None,
        f"bar {BAR:.2f} of plain's time": all(r["times_of_plain"] <= BAR for r in rows),
    }


def text(r: dict[str, Any]) -> str:
    """The table for a person."""
    lines = [
        [
            "tokens",
            "vocabulary",
            "ours",
            "plain",
            "ours / plain",
            "temporaries",
            "plain's",
            "plain's logits",
        ]
    ]
    lines += [
        [
            f"{row['tokens']:,}",
            f"{row['vocab']:,}",
            *(f"{row['seconds'][n] * 1e3:,.0f} ms" for n in ("ours", "plain")),
            f"{row['times_of_plain']:.2f}",
            *(texts.gb(row["temporaries"][n]) for n in ("ours", "plain")),
            texts.gb(4 * row["tokens"] * row["vocab"]),
        ]
        for row in r["rows"]
    ]
    said = {True: "met", False: "MISSED", None: "not measured"}
    return (
        f"vocabulary loss, width {r['width']}, {r['dtype']}, {r['machine']['device']}, "
        f"{r['machine']['cores']} cores; "
        f"chunks of {r['chunk']} tokens\n\n{texts.table(lines)}\n\n"
        + "\n".join(f"{name}: {said[met]}" for name, met in r["bars"].items())
    )
