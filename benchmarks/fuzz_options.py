"""Random options that validation accepts: every one of them must make a train step (make fuzz-options).

  python -m benchmarks fuzz_options [--count=150] [--seed=0] [--seconds=900] [--compiled=10] [--case=N]

Draws the sections model, moe, sharding, train, optimizer, fp16, offload and mesh, on up to eight CPU devices: small sizes, many of them
one, a third of all numbers not chosen to fit the others. A set that validation or the mesh refuses, by one line, is drawn again. Of
every other the train step and the step of the evaluation are traced and lowered; of every tenth (--compiled) both are compiled and run,
with a sample and, where generation serves the mesh, its programs; the loss must be a number. Anything that raises is a failure. Prints
each failure with its seed and case, so that --case=N repeats it alone, then what was refused how often; exit code 1 if anything failed.
"""

import collections
import dataclasses
import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from deepseek_jax import enough_threads
from deepseek_jax.config import (REMAT_NAMES, STRATEGIES, Config, Data, Fp16, Mesh, Model, Moe, Offload, Optimizer, RopeScaling, Sharding, Train,
                                 UserError)
from deepseek_jax.generation import sample
from deepseek_jax.generation.engine import Engine
from deepseek_jax.parallel.mesh import AXES, BATCH_AXES, make_mesh
from deepseek_jax.plan import options
from deepseek_jax.train import state, step
from deepseek_jax.validation import validate

DEVICES = 8
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
AS_DRAWN = 0.3  # share of the sizes that are not made to fit the mesh: validation has to find those that do not


class Result(NamedTuple):
    """What became of the sets that were drawn."""

    traced: int
    compiled: int
    refused: collections.Counter[str]  # by the option that the message begins with
    failures: list[str]


def run(count: int, seed: int, seconds: float, compiled: int, note: Callable[[str], None] = lambda line: None, first: int = 0) -> Result:
    """Tries `count` sets that validation accepts, or as many as `seconds` are enough for.

    Args:
      compiled: of every so many accepted sets one is compiled and run as well; 0: none.
      note: is told the progress. first: number of the first case.
    """
    until = time.monotonic() + seconds
    traced, ran, refused, failures = 0, 0, collections.Counter(), []
    for case in itertools.count(first):
        if traced + len(failures) >= count or time.monotonic() > until:
            return Result(traced, ran, refused, failures)
        config = draw(seed, case)
        try:
            mesh = accepted(config)
        except UserError as error:
            if "\n" in str(error):
                failures.append(f"seed {seed}, case {case}: refused in more than one line: {error}")
            refused[str(error).split("=")[0].split(" ")[0]] += 1
            continue
        try:
            whole = compiled and (traced + len(failures)) % compiled == compiled - 1
            (run_small if whole else trace)(config, mesh)
            traced, ran = traced + 1, ran + bool(whole)
        except Exception as error:
            last = [f for f in traceback.extract_tb(error.__traceback__) if "deepseek_jax" in f.filename][-1:]
            where = "".join(f" in {f.name}, line {f.lineno} of {f.filename}" for f in last)
            failures.append(f"seed {seed}, case {case}{where}: {type(error).__name__}: {' '.join(str(error).split())[:400]}\n  {differing(config)}")
        finally:
            jax.clear_caches()
        note(f"case {case}: {traced} traced, {ran} of them run, {sum(refused.values())} refused, {len(failures)} failures")


def accepted(config: Config) -> jax.sharding.Mesh:
    """The mesh of a config that validation accepts.

    Raises:
      UserError: validation or the mesh refuses it.
    """
    validate(config)
    size = int(np.prod([getattr(config.mesh, axis) for axis in AXES]))
    return make_mesh(config, jax.devices()[:size])


def lowered(config: Config, mesh: jax.sharding.Mesh, layout: state.Layout) -> tuple[Any, Any]:
    """The train step and the step of the evaluation, traced and lowered."""
    batch, abstract = step.abstract_batch(config, mesh, config.train.batch_ramp_steps), layout.abstract_sharded()
    of_step = jax.jit(step.make_train_step(config, layout), donate_argnums=0).lower(abstract, batch)
    one = jax.NamedSharding(mesh, jax.P(BATCH_AXES, None))
    micro = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype, sharding=one), batch)
    return of_step, jax.jit(step.make_eval_step(layout)).lower(abstract.params, abstract.bias, micro)


def trace(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raises what tracing raises."""
    with jax.set_mesh(mesh):
        lowered(config, mesh, state.make_layout(config, mesh))


def run_small(config: Config, mesh: jax.sharding.Mesh) -> None:
    """A step, an evaluation, a sample and two answers. Raises what any of them raises, and FloatingPointError for a loss that is no number."""
    t, m = config.train, config.model
    with jax.set_mesh(mesh):
        layout = state.make_layout(config, mesh)
        train_step, eval_step = (program.compile() for program in lowered(config, mesh, layout))
        rng = np.random.default_rng(0)
        rows = step.sequences_at(config, t.batch_ramp_steps)
        text = rng.integers(0, m.vocab_size, (rows, t.sequence_length + 1), np.int32)
        place = np.broadcast_to(np.arange(t.sequence_length, dtype=np.int32), (rows, t.sequence_length))
        batch = {"tokens": text[:, :-1], "targets": text[:, 1:], "segment_ids": np.ones_like(place), "positions": place}
        held, metrics = train_step(state.init_state(config, layout), step.put_batch(batch, config.micro_batch, mesh))
        one = jax.NamedSharding(mesh, jax.P(BATCH_AXES, None))
        micro = {name: jax.device_put(a[: config.micro_batch], one) for name, a in batch.items()}
        found = float(metrics.losses.loss), float(eval_step(held.params, held.bias, micro))
        if not np.isfinite(found).all():
            raise FloatingPointError(f"losses {found}")
        prompt = text[0, :1].tolist()
        list(sample.tokens(layout, held.params, held.bias, mesh, prompt, 2, m.vocab_size, None, 0.0, 1.0, 0))
    if mesh.shape["stage"] == 1 and not config.offload.parameters:
        drafts = min(1, m.num_nextn_predict_layers)
        Engine(layout, mesh, held.params, held.bias).generate([prompt, text[-1].tolist()], 2, draft_tokens=drafts)


def differing(config: Config) -> str:
    """The options that are not the defaults, as flags."""

    def flags(section: Any, default: Any, where: str) -> list[str]:
        out = []
        for field in dataclasses.fields(section):
            value, usual = getattr(section, field.name), getattr(default, field.name)
            if dataclasses.is_dataclass(value):
                out += flags(value, usual, f"{where}.{field.name}")
            elif value != usual:
                out.append(f"--{where}.{field.name}={value}")
        return out

    return " ".join(flags(config, Config(), "config"))


def draw(seed: int, case: int) -> Config:
    """The options of one case. Not all of them fit together."""
    rng = np.random.default_rng([seed, case])
    chance = lambda share: rng.random() < share
    pick = lambda *values: values[int(rng.integers(len(values)))]

    def size(*sizes: int, of: int = 1) -> int:
        """One of the sizes, mostly made a multiple."""
        return pick(*sizes) if chance(AS_DRAWN / 3) else pick(*sizes) * of

    devices = int(rng.integers(1, DEVICES + 1)) if chance(AS_DRAWN) else pick(1, 2, 4, 8)
    mesh = Mesh(**dict.fromkeys(AXES, 1) | _factors(devices, ("data", "stage", "fsdp", "expert", "tensor"), rng))
    ways = mesh.data * mesh.fsdp * mesh.expert  # of a batch; of a dense weight, times stage and tensor
    divided = ways * mesh.stage * mesh.tensor
    grouped = chance(0.4)
    heads = size(1, 1, 2, 3, 4, of=mesh.tensor)
    width = size(1, 1, 2, 8, of=divided)  # of nope and value together, times what divides them: an odd one of them rarely fits
    depth = pick(0, 0, 0, 1, 2)
    layers, dense = pick(1, 1, 2, 3, 5), pick(0, 0, 1, 1, 2, 5)
    group = pick(1, 1, 2, 4)
    experts = size(1, 1, 2, 3, 4, of=mesh.expert * group)
    groups, method = pick(1, group), pick("noaux_tc", "greedy", "group_limited_greedy")
    reachable = max(1, experts * groups // group)
    model = Model(
        vocab_size=size(1, 2, 17, 64, of=mesh.tensor), hidden_size=size(1, 2, 8, 24, 32, of=divided), intermediate_size=size(1, 2, 24, of=mesh.tensor),
        moe_intermediate_size=size(1, 2, 12, of=mesh.tensor), num_hidden_layers=layers, first_k_dense_replace=min(dense, layers),
        num_attention_heads=heads, q_lora_rank=None if grouped else pick(None, 1, 12), kv_lora_rank=pick(1, 8, 16),
        qk_nope_head_dim=width, v_head_dim=pick(1, 1, 3) * width, qk_rope_head_dim=1 if chance(0.05) else 2 * pick(1, 1, 2, 4) * (1 if chance(AS_DRAWN) else divided),
        num_key_value_heads=pick(1, heads, max(1, heads // 2), mesh.tensor) if grouped else None,
        head_dim=1 if grouped and chance(0.05) else pick(None, 2, 4, 8) if grouped else None, attention_bias=grouped and chance(0.3), attention_out_bias=grouped and chance(0.3),
        use_qk_norm=grouped and chance(0.3), partial_rotary_factor=pick(1.0, 1.0, 0.5) if grouped else 1.0,
        n_routed_experts=experts, num_experts_per_tok=pick(1, 2, experts) if chance(AS_DRAWN) else pick(1, reachable), n_shared_experts=pick(0, 1, 2), n_group=group,
        topk_group=groups, topk_method=method, scoring_func=pick("sigmoid", "softmax"),
        norm_topk_prob=chance(0.7), aux_loss_alpha=pick(0.0, 0.01), seq_aux=chance(0.6), num_nextn_predict_layers=depth,
        rms_norm_eps=pick(1e-6, 0.1), rope_interleave=chance(0.7), tie_word_embeddings=chance(0.3),
        rope_scaling=RopeScaling(type=pick("default", "default", "linear", "yarn", "llama3"), factor=pick(1.0, 4.0), mscale=pick(0.0, 1.0),
                                 mscale_all_dim=pick(0.0, 1.0)))
    accumulation = pick(1, 1, 2, 3)
    micro = size(1, 1, 2, of=ways)
    batch = micro * accumulation
    ramp = chance(0.2)
    dtype = pick("float32", "bfloat16", "float16")
    names = ",".join(rng.permutation(REMAT_NAMES)[: int(rng.integers(1, 4))].tolist())
    offload = Offload(optimizer_state=chance(0.15), parameters=chance(0.1),
                      activations=str(pick(*REMAT_NAMES)) if chance(0.1) else "")
    train = Train(
        steps=pick(1, 40), batch_size=batch, sequence_length=pick(1, 2, 7, 16, 65, 300) if chance(0.5) else depth + pick(1, 1, 16), accumulation=accumulation,
        batch_ramp_start=micro if ramp else 0, batch_ramp_steps=int(ramp) * 3, dtype=dtype,
        accumulation_dtype=pick("float32", "bfloat16") if accumulation > 1 else "float32", remat=pick("none", "dots", "full", "full", "exchange", f"save:{names}"),
        mtp_switch_fraction=pick(0.0, 1.0))
    moe = Moe(dispatch=pick("all_to_all", "all_gather", "ring"), capacity_factor=pick(0.01, 1.25, 100.0), drop=chance(0.2),
              drop_policy=pick("probability", "position"), bias_update_rate=pick(0.0, 0.001), bias_centre=chance(0.3),
              router_z_loss_coef=pick(0.0, 0.001))
    strategy = pick(*STRATEGIES)
    compressible = mesh.data > 1 and mesh.stage == 1 and strategy not in ("full_shard", "shard_grad_op")
    sharding = Sharding(strategy=strategy, min_weight_size=pick(0, 0, 1, 100, 1000, 2048, 10**8), virtual_stages=pick(0, 0, 1, 2) if mesh.stage > 1 else pick(0, 1),
                        gradient_compression=pick("none", "bfloat16", "int8") if compressible or chance(0.05) else "none")
    optimizer = Optimizer(name=pick("adamw", "adafactor", "muon"), grad_clip=pick(0.0, 1.0), weight_decay=pick(0.0, 0.1),
                          schedule=pick("constant", "cosine", "wsd", "deepseek_v2", "deepseek_v3"), warmup_steps=pick(0, 100))
    if optimizer.name != "adafactor":
        optimizer = dataclasses.replace(optimizer, moment_dtype=pick("float32", "bfloat16"))
    fp16 = Fp16(loss_scale=pick(0.0, 128.0)) if dtype == "float16" else Fp16()
    return Config(seed=case, model=model, mesh=mesh, sharding=sharding, moe=moe, data=Data(), train=train, fp16=fp16, optimizer=optimizer,
                  offload=offload)


def _factors(devices: int, axes: Sequence[str], rng: np.random.Generator) -> dict[str, int]:
    """The devices as a product over some of the axes."""
    out = dict.fromkeys(axes, 1)
    for prime in (2, 3, 5, 7):
        while devices % prime == 0:
            out[axes[int(rng.integers(len(axes)))]] *= prime
            devices //= prime
    return out


def main() -> int:
    parser = options.Parser(__doc__, json=False)
    parser.add_argument("--count", type=int, default=150, help="Sets that validation accepts.")
    parser.add_argument("--seed", type=int, default=0, help="Of the sets.")
    parser.add_argument("--seconds", type=float, default=900.0, help="Ends after so long, however many there were.")
    parser.add_argument("--compiled", type=int, default=10, help="Of so many sets one is compiled and run as well; 0: none.")
    parser.add_argument("--case", type=int, default=None, help="One case alone, compiled and run.")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    enough_threads(DEVICES)
    # Compiling is most of the work: LLVM optimises less. The passes over the program and the partitioning are as ever.
    os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()
    note = lambda line: print(line, file=sys.stderr, flush=True)
    if args.case is not None:
        config = draw(args.seed, args.case)
        print(differing(config))
        run_small(config, accepted(config))
        return 0
    result = run(args.count, args.seed, args.seconds, args.compiled, note)
    refused = [f"  {n:5} {option}" for option, n in result.refused.most_common()]
    print("\n".join([*result.failures, "refused by", *refused, f"{result.traced} traced, {result.compiled} of them compiled and run, "
                     f"{sum(result.refused.values())} refused, {len(result.failures)} failures"]))
    return int(bool(result.failures) or result.traced < args.count)
