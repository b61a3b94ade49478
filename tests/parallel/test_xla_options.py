"""FSDP's prefetch options: what they ask of XLA's GPU compiler, and what is said where they do nothing."""

import dataclasses

import jax
import numpy as np
import pytest

from deepseek_jax.config.options import Config, ModelConfig, ShardingConfig, TrainConfig
from deepseek_jax.config.validation import validate
from deepseek_jax.errors import UserError
from deepseek_jax.parallel import xla_options
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.plan import topology
from deepseek_jax.train.compiled_step import CompiledStep
from deepseek_jax.train.state import make_layout

AHEAD, SCATTER, REDUCE = (
    xla_options.pipelined(kind, True)[0] for kind in ("all_gather", "reduce_scatter", "all_reduce")
)
ON = xla_options.pipelined("all_gather", True)[1]
SCHEDULER = "xla_gpu_enable_latency_hiding_scheduler"
IN_FLIGHT = "xla_gpu_experimental_parallel_collective_overlap_limit"
GATHERS, SCATTERS = (
    f"xla_gpu_{kind}_combine_threshold_bytes" for kind in ("all_gather", "reduce_scatter")
)


def options(layer_bytes: int = 1000, flags: str = "", platform: str = "gpu", **given) -> dict:
    return xla_options.xla_options(
        Config(sharding=ShardingConfig(**given)), platform, layer_bytes, {"XLA_FLAGS": flags}
    )


@pytest.mark.parametrize(
    "forward, backward, scheduler, ahead, behind",
    [
        (True, "pre", True, True, True),
        (False, "pre", True, True, True),
        (True, "post", True, True, True),
        (True, "none", True, True, False),
        (False, "post", True, False, True),
        (False, "none", False, False, False),
    ],
)
def test_what_each_asks_for(forward, backward, scheduler, ahead, behind):
    found = options(forward_prefetch=forward, backward_prefetch=backward)
    assert (found[SCHEDULER], found[AHEAD] == ON, found[SCATTER] == ON, found[REDUCE] == ON) == (
        scheduler,
        ahead,
        behind,
        behind,
    )
    # What moves to another layer's time goes in one message a layer.
    assert (found.get(GATHERS), found.get(SCATTERS)) == (
        1000 if ahead else None,
        1000 if behind else None,
    )


@pytest.mark.parametrize("strategy", ["shard_grad_op", "zero1", "no_shard"])
def test_whole_weights_are_not_gathered_ahead(strategy):
    found = options(strategy=strategy)
    assert (found[SCHEDULER], found[AHEAD] == ON, found[SCATTER] == ON) == (True, False, True)
    assert GATHERS not in found and found[SCATTERS] == 1000
    config = Config(sharding=ShardingConfig(strategy=strategy, forward_prefetch=False))
    (said,) = xla_options.notes(config, "gpu")
    assert "forward_prefetch=False" in said and f"strategy={strategy}" in said


def test_limit_all_gathers():
    limited, free = options(), options(limit_all_gathers=False)
    assert limited[IN_FLIGHT] == 1 < free[IN_FLIGHT]
    assert limited | free == free, "only what is in flight differs"


def test_flags_of_the_user_win():
    flags = f"--xla_dump_to=/nowhere --{AHEAD}=false --{IN_FLIGHT}=7"
    assert set(options()) - set(options(flags=flags)) == {AHEAD, IN_FLIGHT}


@pytest.mark.parametrize("platform", ["gpu", "cuda", "rocm"])
def test_only_gpus_get_options(platform):
    assert options(platform=platform) and options(platform="cpu") == options(platform="tpu") == {}


def compiled(options) -> tuple[float, list[str]]:
    """What a program of one number computes with these options, and what was said of them. XLA checks a GPU's
    options on CPUs too."""
    said = []
    lowered = jax.jit(lambda x: 2 * x).lower(1.0)
    return float(
        xla_options.with_known_options(
            lambda known: lowered.compile(compiler_options=known), options, said.append
        )(3.0)
    ), said


def test_this_compiler_knows_them():
    """Under the names of this jaxlib, and under those of others."""
    assert compiled(options()) == (6.0, [])
    for renamed in (True, False):
        for on in (True, False):
            assert compiled(
                dict(xla_options.pipelined(kind, on, renamed) for kind in xla_options.PIPELINED)
            ) == (6.0, [])
    assert xla_options.pipelined("all_gather", False, True) == (
        "xla_gpu_pipeline_all_gather",
        "COLLECTIVE_PIPELINING_MODE_OFF",
    )
    assert xla_options.pipelined("all_gather", False, False) == (
        "xla_gpu_enable_pipelined_all_gather",
        False,
    )


def test_what_the_compiler_does_not_know_is_dropped():
    """Each with one line; the rest is kept, and other errors are errors."""
    result, said = compiled(
        {
            "xla_gpu_no_such_thing": 1,
            "xla_backend_optimization_level": 1,
            "xla_gpu_all_gather_combine_threshold_bytes": "many",
        }
    )
    assert result == 6.0 and len(said) == 2 and all("\n" not in line for line in said)
    assert (
        "xla_gpu_no_such_thing=1" in said[0]
        and "xla_gpu_all_gather_combine_threshold_bytes=many" in said[1]
    )

    def fails(known):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory"):
        xla_options.with_known_options(fails, {"a": 1}, print)


def test_a_step_and_a_plan_drop_what_is_not_known(capsys, monkeypatch):
    """Both ways in which a train step is compiled; here a trivial one."""
    monkeypatch.setattr(
        topology,
        "make_train_step",
        lambda config, layout, objective: lambda state, batch: (state, batch["tokens"]),
    )
    said = []
    mesh = make_mesh(Config(), jax.devices()[:1])
    step = CompiledStep(
        lambda state, batch, frozen: (state + batch, batch),
        mesh,
        {"xla_gpu_no_such_thing": 1},
        said.append,
    )
    with jax.set_mesh(mesh):
        assert int(step(jax.numpy.int32(1), jax.numpy.int32(2))[0]) == 3 and len(said) == 1
    model = ModelConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        first_k_dense_replace=1,
        intermediate_size=16,
        num_attention_heads=2,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
    )
    config = Config(model=model, train=TrainConfig(batch_size=1, sequence_length=16))
    topology.compile_step(
        config, *topology.lay_out(config, jax.devices()[:1]), {"xla_gpu_no_such_thing": 1}
    )
    assert capsys.readouterr().err.count("does not know the option xla_gpu_no_such_thing=1") == 1


def test_what_is_said():
    def said(platform, **given) -> list[str]:
        return xla_options.notes(Config(sharding=ShardingConfig(**given)), platform)

    assert said("cpu") == said("gpu") == []
    assert said("cpu", backward_prefetch="post", limit_all_gathers=False) == [
        "has no effect on CPU: sharding.backward_prefetch=post, sharding.limit_all_gathers=False"
    ]
    assert said("gpu", forward_prefetch=False, backward_prefetch="post") == []
    assert "one switch" in said("gpu", forward_prefetch=False)[0]
    with pytest.raises(UserError, match="config.sharding.backward_prefetch='behind' is not known"):
        validate(Config(sharding=ShardingConfig(backward_prefetch="behind")))


@pytest.mark.parametrize("dtype, item", [("bfloat16", 2), ("float32", 4)])
def test_bytes_of_a_layer(dtype, item):
    """By hand: all weights of the larger kind of layer, experts divided over their axis of two."""
    model = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        moe_intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
    )
    config = Config(
        model=model, train=dataclasses.replace(TrainConfig(), dtype=dtype, batch_size=8)
    )
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, fsdp=2, expert=2))
    mesh = make_mesh(config, jax.devices()[:4])
    with jax.set_mesh(mesh):
        params = make_layout(config, mesh).abstract.params
    attention = 32 * 2 * 12 + 32 * (8 + 4) + 8 + 8 * 2 * (8 + 8) + 2 * 8 * 32
    norms, router, shared, experts = 2 * 32, 32 * 4, 3 * 32 * 24, 4 * 3 * 32 * 24
    expected = attention + norms + router + shared + experts // 2
    assert xla_options.bytes_of_a_layer(config, params, mesh) == expected * item
    assert np.prod([n for n in mesh.shape.values()]) == 4
