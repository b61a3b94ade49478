"""What gpu_bench measures: training, grouped expert products, attention. Each part returns plain values for JSON.

`toy` shrinks every part so that a CPU does it in seconds.
"""

import argparse
import collections
import dataclasses
import functools
import gzip
import importlib
import json
import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import attention as attention_bench
from benchmarks import turns
from deepseek_jax.config import Config, Mesh, UserError
from deepseek_jax.model import attention, moe
from deepseek_jax.model.count import count
from deepseek_jax.model.router import route
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.plan import options, program, topology
from deepseek_jax.train.state import init_state, make_layout
from deepseek_jax.train.step import put_batch
from deepseek_jax.validation import validate

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "v2_lite.py"
TOY = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
       "num_attention_heads": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 8,
       "num_experts_per_tok": 2}
BF16_TFLOPS = 989.0  # H200, dense


# ------------------------------------------------------------------------------------------------------------- training


def training_config(toy: bool, layers: int | None = None, attention_method: str = "auto") -> Config:
    """configs/v2_lite.py on one device: four sequences of 4,096 tokens a step, all recomputed in backward."""
    config = options.read(options.Parser(), [f"--config={CONFIG}"])[1]
    model = dataclasses.replace(config.model, **(TOY if toy else {}))
    model = dataclasses.replace(model, num_hidden_layers=layers or model.num_hidden_layers)
    train = dataclasses.replace(config.train, steps=1000, batch_size=2 if toy else 4, sequence_length=64 if toy else 4096, accumulation=1,
                                attention=attention_method)
    config = dataclasses.replace(config, model=model, train=train, mesh=Mesh(fsdp=1),
                                 sharding=dataclasses.replace(config.sharding, strategy="no_shard"))
    validate(config)
    return config


def compile_on(config: Config, device: Any) -> tuple[Any, Any, topology.Step]:
    """(mesh, layout, compiled step) on one device, which may be elsewhere."""
    mesh, layout = topology.lay_out(config, [device])
    return mesh, layout, topology.compile_step(config, mesh, layout)


def layers_that_fit(device: Any, limit: float) -> tuple[int, dict[int, int]]:
    """The most layers whose compiled step needs up to `limit` bytes, and the bytes of each number compiled to find it."""
    most = training_config(False).model.num_hidden_layers
    needed: dict[int, int] = {}

    def fits(layers: int) -> bool:
        if layers not in needed:
            needed[layers] = program.memory(compile_on(training_config(False, layers), device)[2].compiled).total
        return needed[layers] <= limit

    few = min(4, most)
    if not (fits(2) and fits(few)):
        if not fits(2):
            raise UserError(f"Two layers need {needed[2]:,} bytes, and this device has {limit:,.0f}.")
        return max(n for n, b in needed.items() if b <= limit), needed
    a_layer = max(1, (needed[few] - needed[2]) / max(1, few - 2))
    guess = few + int(min(most - few, (limit - needed[few]) / a_layer))
    while not fits(guess):
        guess -= 1
    return guess, needed


def balanced_route(x_TD: jax.Array, kernel_DE: jax.Array, bias_E: jax.Array, model: Any) -> Any:
    """`route` with choices that give every expert the same load, and the router's own weights of them."""
    routing = route(x_TD, kernel_DE, bias_E, model)
    tokens, choices = routing.expert_TK.shape
    expert_TK = (jnp.arange(tokens)[:, None] * choices + jnp.arange(choices)) % model.n_routed_experts
    expert_TK = expert_TK.astype(jnp.int32) + jnp.zeros_like(routing.expert_TK)  # varies over the mesh as the router's do
    return routing._replace(expert_TK=expert_TK, weight_TK=jnp.take_along_axis(routing.score_TE, expert_TK, axis=1))


def train(toy: bool) -> dict[str, Any]:
    """Tokens a second of the real step; natural and balanced routing, and on GPUs cuDNN attention; the profile of the first."""
    device = jax.devices()[0]
    whole = training_config(toy)
    limit = (device.memory_stats() or {}).get("bytes_limit", 141e9)
    layers, needed = (whole.model.num_hidden_layers, {}) if toy else layers_that_fit(device, limit)
    out = {"device": device.device_kind, "layers": layers, "layers_of_the_model": whole.model.num_hidden_layers,
           "bytes_by_layers": {str(n): b for n, b in needed.items()}, "sequence_length": whole.train.sequence_length,
           "batch_size": whole.train.batch_size, "runs": []}
    variants = [("natural", "auto"), ("balanced", "auto")] + [("balanced", "cudnn")] * (device.platform != "cpu")
    for routing, method in variants:
        run = {"routing": routing, "attention": method}
        try:
            run |= _train(training_config(toy, layers, method), routing == "balanced", 2 if toy else 8, profile=not out["runs"])
        except Exception as e:  # a method that this GPU or cuDNN refuses must not hide what the others reach
            run["failed"] = str(e).splitlines()[0][:300]
        out["runs"].append(run)
    flops = _flops(whole)
    for run in out["runs"]:
        if "tokens_per_s" in run:
            per_token = _flops(training_config(toy, layers))
            run["tflops"] = run["tokens_per_s"] * per_token / 1e12
            run["share_of_peak"] = run["tflops"] / BF16_TFLOPS
            run["tokens_per_s_of_the_whole_model"] = run["tokens_per_s"] * per_token / flops
    return out


def _flops(config: Config) -> float:
    """Model FLOPs of a token, by model/count.py."""
    mesh = make_mesh(config, jax.devices()[:1])
    return count(config.model, make_layout(config, mesh).abstract.params, config.train.sequence_length).flops_per_token


def _train(config: Config, balanced: bool, steps: int, profile: bool) -> dict[str, Any]:
    t = config.train
    with mock.patch.object(moe, "route", balanced_route if balanced else route):
        mesh, layout, step = compile_on(config, jax.devices()[0])
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (t.batch_size, t.sequence_length + 1), np.int32)
    positions = np.broadcast_to(np.arange(t.sequence_length, dtype=np.int32), (t.batch_size, t.sequence_length))
    rows = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": np.ones_like(positions), "positions": positions}
    with jax.set_mesh(mesh):
        state, batch = init_state(config, layout), put_batch(rows, config.micro_batch, mesh)
        seconds = []
        for _ in range(steps + 2):
            started = time.perf_counter()
            state, metrics = jax.block_until_ready(step.compiled(state, batch))
            seconds.append(time.perf_counter() - started)
        out = {"step_s": statistics.median(seconds[2:]), "compile_s": step.compile_seconds, "bytes": program.memory(step.compiled).total,
               "loss": float(metrics.losses.loss), "dispatch_rounds": int(jnp.max(metrics.load.rounds))}
        if profile:
            out["largest_costs"] = costs(lambda state=state: jax.block_until_ready(step.compiled(state, batch)), step.compiled.as_text())
    if not math.isfinite(out["loss"]):
        raise FloatingPointError(f"the loss is {out['loss']}")
    return out | {"tokens_per_s": t.batch_size * t.sequence_length / out["step_s"]}


def costs(run: Callable[[], Any], hlo: str, most: int = 3) -> list[dict[str, Any]]:
    """The instructions that take most of one run, by JAX's profiler: where they come from and their share of all device time."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        files = list(pathlib.Path(folder).rglob("*.trace.json.gz"))
        events = json.loads(gzip.decompress(files[0].read_bytes()))["traceEvents"] if files else []
    total: collections.Counter = collections.Counter()
    for e in events:
        name = e.get("args", {}).get("hlo_op")
        # A loop's own event holds those of its body.
        if e.get("ph") == "X" and name and not name.startswith(("while", "call", "conditional")):
            total[name] += e["dur"]
    source = {}
    for line in hlo.splitlines():
        name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
        if 'op_name="' in rest:
            source[name.lstrip("%")] = rest.partition('op_name="')[2].partition('"')[0]
    whole = sum(total.values())
    return [{"instruction": name, "from": source.get(name, ""), "ms": us / 1e3, "share": us / whole} for name, us in total.most_common(most)]


# -------------------------------------------------------------------------------------------------------------- experts

PRODUCTS = {  # experts on the device, rows of all, hidden size, expert width
    "V2-Lite": (64, 24576, 2048, 1408),  # 4,096 tokens, 6 experts each
    "V3, 32 of 256 experts": (32, 32768, 7168, 2048),
}


def experts(toy: bool) -> dict[str, Any]:
    """[rows, D] x [E, D, F], each row by its expert: forward, and with both gradients. Equal loads, rows sorted by expert."""
    shapes = {"toy": (4, 64, 16, 8)} if toy else PRODUCTS
    out = []
    for name, (e, rows, d, f) in shapes.items():
        keys = jax.random.split(jax.random.key(0), 3)
        x, w, dy = (jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, ((rows, d), (e, d, f), (rows, f)), strict=True))
        sizes = jnp.full(e, rows // e, jnp.int32)
        built, refused = {}, {}
        for method, call in products(rows, e).items():
            try:
                both = lambda x, w, sizes, dy, call=call: jax.vjp(lambda x, w: call(x, w, sizes), x, w)[1](dy)
                programs = {"forward": turns.compiled(call, x, w, sizes)}
                programs["forward"]()
                try:
                    programs["both"] = turns.compiled(both, x, w, sizes, dy)
                    programs["both"]()
                except Exception as error:  # some kernels have no gradient
                    programs.pop("both", None)
                    refused[f"{method}, backward"] = str(error).splitlines()[0][:200]
                built |= {(method, part): p for part, p in programs.items()}
            except Exception as error:
                refused[method] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        times = turns.medians(built, 3 if toy else 10)
        flops = {"forward": 2 * rows * d * f, "both": 4 * rows * d * f}  # the gradients alone need no forward product
        rates = {part: {m: flops[part] / t / 1e12 for (m, p), t in times.items() if p == part} for part in flops}
        out.append({"shape": name, "experts": e, "rows": rows, "hidden": d, "width": f, "tflops": rates, "not_measured": refused,
                    "temporaries": {f"{m}, {p}": built[m, p].temporaries for m, p in built},
                    "fastest": {part: max(r, key=r.get) for part, r in rates.items() if r}})
    return {"rows": out}


def products(rows: int, e: int) -> dict[str, Callable]:
    """(x [rows, D], w [E, D, F], sizes [E]) -> [rows, F], by method; a method that is not there raises when called."""

    def equal_slots(x, w, sizes):
        return jnp.einsum("esd,edf->esf", x.reshape(e, rows // e, -1), w, preferred_element_type=jnp.float32).astype(x.dtype).reshape(rows, -1)

    def tokamax(x, w, sizes):
        return importlib.import_module("tokamax").ragged_dot(x, w, group_sizes=sizes)

    def tokamax_triton(x, w, sizes):
        return importlib.import_module("tokamax").ragged_dot(x, w, group_sizes=sizes, implementation="triton")

    def mosaic(x, w, sizes):
        ragged = importlib.import_module("jax.experimental.pallas.ops.gpu.ragged_dot_mgpu")
        return ragged.ragged_dot(x, w, group_sizes=sizes, block_m=128, block_n=128, block_k=64, max_concurrent_steps=4, grid_block_n=2)

    return {"equal slots": equal_slots, "ragged_dot": jax.lax.ragged_dot, "tokamax": tokamax, "tokamax Pallas-Triton": tokamax_triton,
            "jax.experimental Pallas-Mosaic": mosaic}


# ------------------------------------------------------------------------------------------------------------ attention


def attentions(toy: bool) -> dict[str, Any]:
    """Attention of V2-Lite's heads: blocks, cuDNN (on GPUs) and plain softmax; how far cuDNN is from blocks."""
    lengths = (64,) if toy else (2048, 4096, 8192)
    own = argparse.Namespace(heads=2 if toy else 16, qk=24 if toy else 192, v=16 if toy else 128, documents=1)
    methods = {"blocks": functools.partial(attention.causal_attention, method="blocks"), "plain": attention_bench.plain}
    if jax.default_backend() != "cpu":
        methods["cudnn"] = functools.partial(attention.causal_attention, method="cudnn")
    out = []
    for length in lengths:
        built, failed = {}, {}
        for name, f in methods.items():
            try:
                programs = attention_bench.core_programs(f, max(1, 8192 // length) if not toy else 1, length, own)
                for p in programs.values():
                    p()
                built |= {(name, part): p for part, p in programs.items()}
            except Exception as e:
                failed[name] = f"{type(e).__name__}: {e}".splitlines()[0][:200]
        times = turns.medians(built, 3 if toy else 10)
        calls = {n: p.compiled.as_text().count("__cudnn$fmha") for (n, part), p in built.items() if part == "both"}
        row = {"length": length, "failed": failed, "custom_calls": calls}
        row |= {f"{part}_s": {n: t for (n, p), t in times.items() if p == part} for part in ("forward", "both")}
        if ("cudnn", "both") in built:
            pairs = zip(built["cudnn", "both"](), built["blocks", "both"](), strict=True)
            largest = lambda a: jnp.max(jnp.abs(a)).astype(jnp.float32)
            row["cudnn_is_from_blocks"] = max(float(largest(a - b) / largest(b)) for a, b in pairs)
        out.append(row)
    return {"heads": own.heads, "qk": own.qk, "v": own.v, "rows": out}
