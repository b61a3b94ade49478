"""One small run on any mesh, strategy, dispatch and accumulation: what it computes must not depend on them.

    python -m tests.support.invariance --help     the full product, or a part of it (make mesh-product)

Gradients are taken out of the step by an optimizer that keeps them, so that the program compared is
the one that trains.
"""

import argparse
import dataclasses
import functools
import itertools
import random
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

if __name__ == "__main__":
    from tests import conftest  # noqa: F401  it makes eight devices

from deepseek_jax import objectives
from deepseek_jax.config.options import (
    Config,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    MoeConfig,
    OptimizerConfig,
    ShardingConfig,
    TrainConfig,
)
from deepseek_jax.config.validation import validate
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.train import state, step
from deepseek_jax.train.batch import put_batch
from tests.support import conversion

SEQUENCES, LENGTH, STEPS = 16, 32, 5
# One dense layer, five MoE layers (no number of stages divides them), one MTP layer, groups of
# experts, balance loss.
MODEL = ModelConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=6,
    num_attention_heads=4,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    num_nextn_predict_layers=1,
    aux_loss_alpha=0.01,
    initializer_range=0.1,
)
# The learning rate warms up from 0: a first Adam step at full rate would turn the rounding noise of
# near-zero gradients into whole steps, and so into other routing on other meshes.
BASE = Config(
    model=MODEL,
    train=TrainConfig(steps=STEPS, batch_size=SEQUENCES, sequence_length=LENGTH, dtype="float32"),
    optimizer=OptimizerConfig(warmup_steps=20, learning_rate=1e-3),
)
AXES = ("data", "stage", "fsdp", "expert", "tensor")


class Run(NamedTuple):
    """What five steps computed, on the host."""

    losses: list[float]
    counts: list[np.ndarray]  # of each step, [L, E]
    gradients: list[tuple[str, np.ndarray]]  # of the first step, by parameter
    state: state.TrainState  # on the devices


def variant(
    strategy="full_shard",
    dispatch="all_to_all",
    accumulation=1,
    remat="full",
    capacity_factor=1.25,
    virtual_stages=0,
    **mesh,
) -> Config:
    """BASE on a mesh of these axes, every weight divided, however small."""
    return dataclasses.replace(
        BASE,
        mesh=MeshConfig(**{"fsdp": 1} | mesh),
        sharding=ShardingConfig(strategy, 0, virtual_stages=virtual_stages),
        moe=MoeConfig(dispatch=dispatch, capacity_factor=capacity_factor),
        train=dataclasses.replace(BASE.train, accumulation=accumulation, remat=remat),
    )


def devices_of(config: Config) -> int:
    return int(np.prod([getattr(config.mesh, a) for a in AXES]))


def rows(i: int) -> dict[str, np.ndarray]:
    """A packed batch with two documents per sequence and padding at the end of some rows."""
    rng = np.random.default_rng(i)
    ids = rng.integers(0, MODEL.vocab_size, (SEQUENCES, LENGTH + 1)).astype(np.int32)
    segments = np.broadcast_to(np.where(np.arange(LENGTH) < 12, 1, 2), (SEQUENCES, LENGTH)).copy()
    segments[::5, 25:] = 0
    positions = np.broadcast_to(
        np.where(np.arange(LENGTH) < 12, np.arange(LENGTH), np.arange(LENGTH) - 12), segments.shape
    )
    targets = ids[:, 1:].copy()
    targets[:, 11] = -100
    targets[::5, 24:] = -100
    return dict(
        tokens=ids[:, :-1],
        targets=targets,
        next_tokens=np.where(targets == -100, -1, targets),
        segment_ids=segments.astype(np.int32),
        positions=positions.astype(np.int32),
    )


NO_LORA = LoraConfig()


@functools.cache
def initial_state(model: ModelConfig = MODEL, lora: LoraConfig = NO_LORA) -> state.TrainState:
    """What all runs of a model begin with, on the host: weights distributed as those of `created_state`,
    but drawn by NumPy, as compiling their creation would take as long as compiling a forward pass. With
    LoRA, or a shared core, they are created, and no factor is zero."""
    rng = np.random.default_rng(0)
    if lora.r or model.shared_core_rank:
        created = created_state(model, lora)

        def filled(a: np.ndarray) -> np.ndarray:
            return a if a.any() else (rng.standard_normal(a.shape) * 0.1).astype(a.dtype)

        return created._replace(params=jax.tree.map(filled, created.params))

    def drawn(path, a) -> np.ndarray:
        *_, module, name = ("", *conversion.path_of(path).split("/"))
        if name == "bias":
            return np.zeros(a.shape, a.dtype)
        if module.endswith("norm"):
            return np.ones(a.shape, a.dtype)
        return (rng.standard_normal(a.shape) * model.initializer_range).astype(a.dtype)

    config = dataclasses.replace(variant(), model=model)
    mesh = make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        abstract = state.make_layout(config, mesh).abstract
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), abstract)
    return zeros._replace(params=jax.tree_util.tree_map_with_path(drawn, abstract.params))


def created_state(model: ModelConfig = MODEL, lora: LoraConfig = NO_LORA) -> state.TrainState:
    """The state as a run creates it, on one device, held on the host."""
    config = dataclasses.replace(variant(), model=model, lora=lora)
    mesh = make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        return jax.device_get(state.init_state(config, state.make_layout(config, mesh)))


def keeping_gradients(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, with the last gradients as the first part of its state."""
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    return optax.chain(optax.GradientTransformation(zeros, lambda g, _, params: (g, g)), optimizer)


@functools.lru_cache(maxsize=4)
def program(config: Config) -> tuple[jax.sharding.Mesh, state.Layout, Callable]:
    """(mesh of the first devices there are, layout, jitted step)."""
    validate(config)
    mesh = make_mesh(config, jax.devices()[: devices_of(config)])
    with jax.set_mesh(mesh):
        layout = state.make_layout(config, mesh)
        layout = layout._replace(optimizer=keeping_gradients(layout.optimizer))
        return (
            mesh,
            layout,
            jax.jit(step.make_train_step(config, layout, objectives.make(config))),
        )


def train(config: Config, steps: int = STEPS) -> Run:
    """Trains from `initial_state`."""
    mesh, layout, train_step = program(config)
    with jax.set_mesh(mesh):
        start = initial_state(config.model, config.lora)
        s = jax.device_put(start, layout.shardings)
        kept = jax.device_put(
            jax.tree.map(np.zeros_like, start.params),
            jax.tree.map(
                lambda spec: jax.NamedSharding(mesh, spec),
                layout.opt_specs,
                is_leaf=lambda x: isinstance(x, jax.P),
            ),
        )
        s = s._replace(opt_state=(kept, s.opt_state))
        losses, counts, gradients = [], [], []
        for i in range(steps):
            s, m = train_step(s, put_batch(rows(i), config.micro_batch, mesh))
            losses.append(float(m.loss))
            counts.append(np.asarray(m.load.expert_counts))
            if i == 0:
                gradients = [
                    (conversion.path_of(path), np.asarray(g))
                    for path, g in jax.tree_util.tree_leaves_with_path(s.opt_state[0])
                ]
    return Run(losses, counts, gradients, s)


@functools.cache
def one_device(model: ModelConfig = MODEL, steps: int = STEPS) -> Run:
    return train(dataclasses.replace(variant(remat="none"), model=model), steps)


def differences(run: Run, one: Run) -> tuple[float, float, str, bool]:
    """(worst loss, worst gradient, its parameter, whether all counts are equal) of two runs; errors
    are relative."""
    loss = max(abs(a - b) / abs(b) for a, b in zip(run.losses, one.losses, strict=True))
    gradient = max(
        (conversion.error_of(a, b), name)
        for (name, a), (_, b) in zip(run.gradients, one.gradients, strict=True)
    )
    return (
        loss,
        *gradient,
        all(np.array_equal(a, b) for a, b in zip(run.counts, one.counts, strict=True)),
    )


def product() -> list[dict]:
    """Every combination that the batch of 16 sequences allows."""
    meshes = [
        dict(fsdp=8),
        dict(fsdp=4, expert=2),
        dict(fsdp=2, expert=4),
        dict(expert=8),
        dict(data=2, fsdp=2, expert=2),
        dict(tensor=2),
        dict(fsdp=2, expert=2, tensor=2),
        dict(stage=2, fsdp=2, expert=2),
        dict(stage=2, expert=2, tensor=2),
        dict(stage=4, fsdp=2),
        dict(data=2, stage=2, expert=2),
    ]
    strategies = ("full_shard", "shard_grad_op", "zero1", "hybrid_shard", "no_shard")
    every = itertools.product(
        meshes, ("all_to_all", "all_gather", "ring"), strategies, (1, 2, 4), ("full", "none")
    )
    out = [dict(m, dispatch=d, strategy=s, accumulation=a, remat=r) for m, d, s, a, r in every]

    def fits(case: dict[str, Any]) -> bool:
        """Every device has a sequence in every micro-batch."""
        ways = case.get("data", 1) * case.get("fsdp", 1) * case.get("expert", 1)
        return SEQUENCES // case["accumulation"] % ways == 0

    return [case for case in out if fits(case)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Five float32 steps on every mesh x dispatch x strategy x accumulation x remat, "
        "against one device."
    )
    parser.add_argument(
        "--sample", type=int, default=0, help="only so many, drawn at random (0: all, some hours)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    args = parser.parse_args()
    cases = product()
    if args.sample:
        cases = random.Random(args.seed).sample(cases, min(args.sample, len(cases)))
    bad = 0
    print(f"{len(cases)} of {len(product())} combinations")
    print(
        f"{'mesh':<40}{'dispatch':<12}{'strategy':<15}{'acc':>4}{'remat':>6}"
        f"{'loss':>10}{'gradient':>10}  counts"
    )
    for case in cases:
        start = time.perf_counter()
        loss, gradient, name, counts = differences(train(variant(**case)), one_device())
        ok = loss < 1e-5 and gradient < 1e-5 and counts
        bad += not ok
        mesh = " x ".join(f"{a} {case[a]}" for a in AXES if a in case)
        print(
            f"{mesh:<40}{case['dispatch']:<12}{case['strategy']:<15}"
            f"{case['accumulation']:>4}{case['remat']:>6}"
            f"{loss:>10.1e}{gradient:>10.1e}  "
            f"{'equal' if counts else 'DIFFER'}{'' if ok else f'  FAILED ({name})'}  "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
        jax.clear_caches()
    print(f"{len(cases) - bad} equal to one device, {bad} not")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
