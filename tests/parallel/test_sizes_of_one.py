"""Sizes of one, and other small ones, where an axis is divided: one head, a rope width of two, one sequence.

A mesh axis of one device divides these as well, and a layout that is guessed from a shape takes a dimension
of size one for none.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks.durability import fuzz_options
from deepseek_jax import objectives
from deepseek_jax.config.options import Config, MeshConfig, ModelConfig, ShardingConfig, TrainConfig
from deepseek_jax.config.validation import validate
from deepseek_jax.errors import UserError
from deepseek_jax.inference.generation import sample
from deepseek_jax.inference.generation.bound import BoundModel
from deepseek_jax.inference.generation.engine import Engine
from deepseek_jax.inference.generation.sampling import Sampling
from deepseek_jax.parallel.mesh import BATCH_AXES, make_mesh
from deepseek_jax.train import state, step
from deepseek_jax.train.batch import abstract_batch
from tests.support.small_runs import config_of as trainer_config
from tests.support.small_runs import losses_of, trainer

MODEL = ModelConfig(
    vocab_size=16,
    hidden_size=32,
    intermediate_size=24,
    moe_intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
)
STACK = dict(first_k_dense_replace=0)  # one of layers, not two
MQA, ONE_HEAD = dict(num_key_value_heads=1), dict(num_attention_heads=1, qk_rope_head_dim=8)


def config_of(model: dict, mesh: dict, train: dict | None = None, **sections) -> Config:
    options: dict[str, Any] = dict(
        steps=2, batch_size=8, sequence_length=8, dtype="float32", remat="none"
    )
    return Config(
        model=dataclasses.replace(MODEL, **model),
        mesh=MeshConfig(**dict(fsdp=1) | mesh),
        train=TrainConfig(**options | (train or {})),
        sharding=ShardingConfig(min_weight_size=0),
        **sections,
    )


def traced(config: Config) -> None:
    """A step and an evaluation, on the first devices; the step leaves the state's shapes as they are."""
    mesh = fuzz_options.accepted(config)
    with jax.set_mesh(mesh):
        layout = state.make_layout(config, mesh)
        held, batch = (
            layout.abstract_sharded(),
            abstract_batch(objectives.make(config).fields, config, mesh, 0),
        )
        new, metrics = jax.eval_shape(
            step.make_train_step(config, layout, objectives.make(config)), held, batch
        )
        rows = jax.NamedSharding(mesh, jax.P(BATCH_AXES, None))
        micro = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype, sharding=rows), batch
        )
        total = jax.eval_shape(
            step.make_eval_step(layout, objectives.make(config)), held.params, held.bias, micro
        )
    assert [a.shape for a in jax.tree.leaves(new)] == [a.shape for a in jax.tree.leaves(held)]
    assert metrics.loss.shape == total["nll"].shape == ()


ONES = {
    "one key-value head": (MQA, dict(fsdp=2), {}),
    "one head": (ONE_HEAD | dict(rope_interleave=False), {}, dict(batch_size=1)),
    "one head of both": (ONE_HEAD | MQA, dict(fsdp=2, expert=2), {}),
    "one head a device": (
        dict(num_key_value_heads=2, partial_rotary_factor=0.25, head_dim=8),
        dict(tensor=2),
        {},
    ),
    "rope width 2": (dict(qk_rope_head_dim=2), dict(expert=2, tensor=2), {}),
    "one head, in stages": (
        ONE_HEAD,
        dict(stage=2),
        dict(accumulation=2),
    ),
    "one expert a device, one sequence a device, one token": (
        dict(num_nextn_predict_layers=0),
        dict(expert=4),
        dict(batch_size=4, sequence_length=1),
    ),
    "everything": (
        ONE_HEAD
        | dict(
            first_k_dense_replace=1,
            kv_lora_rank=1,
            q_lora_rank=1,
            qk_nope_head_dim=1,
            v_head_dim=1,
            qk_rope_head_dim=2,
            vocab_size=1,
            hidden_size=1,
            intermediate_size=1,
            moe_intermediate_size=1,
            n_routed_experts=1,
            num_experts_per_tok=1,
        ),
        {},
        dict(batch_size=1, sequence_length=2),
    ),
}
SLOW = (
    "one head",
    "one head of both",
    "rope width 2",
    "one expert a device, one sequence a device, one token",
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in ONES]
)
def test_trains_and_evaluates(name):
    """The layouts fit one another: with Explicit axes one that does not is an error in tracing."""
    model, mesh, train = ONES[name]
    traced(config_of(STACK | model, mesh, train))


def test_one_token_at_a_time_is_refused():
    with pytest.raises(
        UserError,
        match="sequence_length=1 with batch_size 2 / accumulation 2 = 1 sequence trains on one token",
    ):
        validate(config_of({}, {}, dict(batch_size=2, accumulation=2, sequence_length=1)))


@pytest.mark.parametrize(
    "model, mesh, message",
    [
        (
            MQA,
            dict(tensor=2),
            r"num_key_value_heads=1 is not divisible by the tensor mesh axis \(2 devices\)",
        ),
        (
            ONE_HEAD,
            dict(tensor=2),
            r"num_attention_heads=1 is not divisible by the tensor mesh axis",
        ),
        (
            dict(n_routed_experts=1, num_experts_per_tok=1),
            dict(expert=2),
            r"n_routed_experts=1 is not divisible by the expert mesh axis",
        ),
        (
            dict(vocab_size=1),
            dict(tensor=2),
            r"vocab_size=1 is not divisible by the tensor mesh axis",
        ),
        (
            dict(num_hidden_layers=1),
            dict(stage=2),
            r"config.mesh.stage=2 is above the number of layers",
        ),
        (
            dict(hidden_size=1),
            dict(fsdp=2),
            r"hidden_size=1 \(a width of 1\) is not divisible by the 2 devices",
        ),
        (dict(qk_rope_head_dim=1), {}, r"qk_rope_head_dim=1 is odd, but rotation works on pairs"),
        (dict(qk_rope_head_dim=3), {}, r"qk_rope_head_dim=3 is odd"),
        (
            dict(num_key_value_heads=1, head_dim=1),
            {},
            r"partial_rotary_factor=1.0 rotates 1 of a head's 1 numbers, which must be an even number",
        ),
        (
            dict(num_key_value_heads=1, head_dim=6, partial_rotary_factor=0.5),
            {},
            r"rotates 3 of a head's 6 numbers",
        ),
        (
            dict(num_key_value_heads=1, head_dim=4, partial_rotary_factor=0.1),
            {},
            r"rotates 0 of a head's 4 numbers",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(model, mesh, message):
    with pytest.raises(UserError, match=message) as error:
        config = config_of(model, mesh)
        validate(config)
        make_mesh(config, jax.devices()[: int(np.prod([*mesh.values()], initial=1))])
    assert "\n" not in str(error.value)


STRATEGIES = ("shard_grad_op", "full_shard", "zero1", "hybrid_shard", "no_shard")
BETWEEN = 2000  # the experts' weights have 3072 and 1536 numbers a layer


@pytest.mark.parametrize(
    "strategy, least",
    [
        ("shard_grad_op", BETWEEN),
        *(
            pytest.param(s, n, marks=pytest.mark.slow)
            for s in STRATEGIES
            for n in (0, 200, BETWEEN, 10**8)
            if (s, n) != ("shard_grad_op", BETWEEN)
        ),
    ],
)
def test_weights_on_both_sides_of_min_weight_size(strategy, least):
    """A layer's weights differ in how many arrays they are, and in their layout."""
    config = config_of(STACK, dict(fsdp=2, expert=2))
    traced(dataclasses.replace(config, sharding=ShardingConfig(strategy, min_weight_size=least)))


@pytest.mark.slow
@pytest.mark.parametrize("least", [200, BETWEEN])
def test_min_weight_size_changes_no_number(least):
    """Five steps of ZeRO-2 on four devices against one: losses within 1e-5 of themselves (float32 sums)."""
    one = trainer(trainer_config())
    some = trainer(
        trainer_config(
            mesh=MeshConfig(fsdp=2, expert=2),
            sharding=ShardingConfig("shard_grad_op", min_weight_size=least),
        )
    )
    ours, theirs = (losses_of(t.run(t.start(), 5)[1]) for t in (some, one))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        dict(ONE_HEAD, qk_rope_head_dim=2, qk_nope_head_dim=1, v_head_dim=1, kv_lora_rank=1),
        pytest.param(
            dict(ONE_HEAD, **MQA, head_dim=4, partial_rotary_factor=0.5), marks=pytest.mark.slow
        ),
    ],
    ids=["latent", "grouped"],
)
def test_generates(model):
    """One row, token and head, halves of one number: with the cache what whole forward passes give."""
    config = config_of(dict(model, num_hidden_layers=1, initializer_range=0.5), {})
    mesh = fuzz_options.accepted(config)
    with jax.set_mesh(mesh):
        layout = state.make_layout(config, mesh)
        held = jax.tree.map(
            lambda a: np.random.default_rng(a.size).normal(size=a.shape).astype(a.dtype),
            layout.abstract,
        )
        params, bias = (
            jax.device_put(a, s)
            for a, s in ((held.params, layout.shardings.params), (held.bias, layout.shardings.bias))
        )
        placed = BoundModel(layout.model, params, bias, mesh)
        whole = list(sample.tokens(placed, [3, 5], 5, Sampling(), 16, ()))
    assert Engine(placed).generate([[3, 5]], 5) == [whole]


@pytest.mark.slow
def test_fuzz_of_options():
    """A few sets of a fixed seed; `make fuzz-options` is the whole."""
    result = fuzz_options.run(2, seed=3, seconds=240, compiled=0)
    assert result.traced == 2 and not result.failures and sum(result.refused.values()) > 0


def test_fuzz_of_options_finds(monkeypatch):
    """A crash is a failure with its case, which draws the same set again; so is a refusal of two lines."""

    def crash(config, mesh):
        raise ValueError("out of\nshape")

    monkeypatch.setattr(fuzz_options, "trace", crash)
    found = fuzz_options.run(2, seed=0, seconds=60, compiled=0)
    assert found.traced == 0 and len(found.failures) == 2
    case = int(found.failures[0].removeprefix("seed 0, case ").split(" ")[0].rstrip(":"))
    assert "ValueError: out of shape" in found.failures[0]
    assert found.failures[0].splitlines()[1].strip() == fuzz_options.differing(
        fuzz_options.draw(0, case)
    )
    fuzz_options.accepted(fuzz_options.draw(0, case))

    def refuse(config):
        raise UserError("two\nlines")

    monkeypatch.setattr(fuzz_options, "validate", refuse)
    assert (
        "refused in more than one line"
        in fuzz_options.run(1, seed=0, seconds=60, compiled=0).failures[0]
    )
