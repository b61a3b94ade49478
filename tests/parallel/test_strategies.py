"""Each sharding strategy is what its name says: read from the compiled step on eight devices."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from deepseek_jax import objectives
from deepseek_jax.config.options import Config, ShardingConfig
from deepseek_jax.parallel import sharding
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.train import state, step
from deepseek_jax.train.batch import put_batch
from deepseek_jax.xla import program
from tests.support import conversion
from tests.support.invariance import MODEL, rows, variant

# Wide and short, so that weights are most of the bytes; 11 layers, all of them MoE: loops of this length are
# the layers'.
WIDE = dataclasses.replace(
    MODEL,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=128,
    num_hidden_layers=11,
    first_k_dense_replace=0,
    num_nextn_predict_layers=0,
)


@functools.cache
def compiled(config: Config) -> tuple[list[program.Collective], program.Memory, state.Layout]:
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        layout = state.make_layout(config, mesh)
        batch = put_batch({k: a[:, :8] for k, a in rows(0).items()}, config.micro_batch, mesh)
        done = jax.jit(
            step.make_train_step(config, layout, objectives.make(config)), donate_argnums=0
        )
        done = done.lower(layout.abstract_sharded(), batch).compile()
        return program.collectives(done.as_text(), mesh.shape), program.memory(done), layout


def strategy(name: str, layers: int = 11, **mesh) -> Config:
    return dataclasses.replace(
        variant(name, **(mesh or dict(fsdp=8))),
        model=dataclasses.replace(WIDE, num_hidden_layers=layers),
    )


def of_layers(found, *phases: str) -> dict[str, int]:
    """Bytes a layer of each kind in the loop over MoE layers, in these phases."""
    return program.by(
        [
            dataclasses.replace(c, times=1)
            for c in found
            if 11 in c.loops and c.phase in phases and not c.further
        ],
        lambda c: c.kind,
    )


def layer_bytes(layout: state.Layout) -> int:
    """float32 bytes of the divided weights of one MoE layer."""
    leaves = zip(
        jax.tree.leaves(layout.abstract.params["layers"]),
        jax.tree.leaves(layout.opt_specs["layers"]),
        strict=True,
    )
    return sum(a.size // 11 * 4 for a, s in leaves if any(s))


# strategy -> is a layer's whole weight gathered in forward, and again in backward; are gradients divided
EXPECTED = {
    "full_shard": (True, True),
    "shard_grad_op": (False, True),
    "zero1": (False, False),
    "no_shard": (False, False),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            n, marks=[pytest.mark.slow] if n in ("shard_grad_op", "zero1", "no_shard") else []
        )
        for n in EXPECTED
    ],
)
def test_what_a_layer_communicates(name):
    """full_shard gathers a layer's weights in forward and once more in backward; the others never. Every
    gradient is reduced once: the experts' by a reduce-scatter where they are divided (XLA's CPU partitioner
    makes an all-reduce and a slice of the rest).
    """
    found, _, layout = compiled(strategy(name))
    gathers, divides = EXPECTED[name]
    whole = layer_bytes(layout)
    forward, again = of_layers(found, "forward"), of_layers(found, "recompute", "backward")
    if gathers:
        np.testing.assert_allclose(forward["all-gather"], whole * 7 / 8, rtol=0.01)
        np.testing.assert_allclose(again["all-gather"], whole * 7 / 8, rtol=0.01)
        assert again["reduce-scatter"] > 0.5 * whole * 7 / 8  # the experts
    else:
        assert forward.get("all-gather", 0) + again.get("all-gather", 0) < 0.01 * whole
    reduced = again.get("all-reduce", 0) / 2 + again.get("reduce-scatter", 0)
    np.testing.assert_allclose(reduced, whole * 7 / 8, rtol=0.02)
    outside = program.by([c for c in found if 11 not in c.loops], lambda c: c.kind)
    # ZeRO-1 and ZeRO-2 gather the updated parameters once a step.
    parameters = sum(a.size * 4 for a in jax.tree.leaves(layout.abstract.params))
    assert (outside.get("all-gather", 0) > 0.8 * parameters) == (name in ("shard_grad_op", "zero1"))


def held(name: str) -> dict[str, int]:
    """Bytes a device of the state's parts, from the layout."""
    config = strategy(name)
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        layout = state.make_layout(config, mesh)

    def bytes_of(specs) -> int:
        return sharding.bytes_per_device(layout.abstract.params, sharding.shardings(specs, mesh))

    return {
        "parameters": bytes_of(layout.param_specs),
        "gradients": bytes_of(layout.grad_specs),
        "optimizer": sharding.bytes_per_device(
            layout.abstract.opt_state, layout.shardings.opt_state
        ),
    }


EIGHTHS = {
    "full_shard": (1, 1, 1),
    "shard_grad_op": (8, 1, 1),
    "no_shard": (8, 8, 8),
    "zero1": (8, 8, 1),
    "zero3": (1, 1, 1),
    "zero2": (8, 1, 1),
    "ddp": (8, 8, 8),
}


@pytest.mark.parametrize("name", list(EIGHTHS))
def test_bytes_a_device(name):
    """Shares of what no_shard holds; norms and the step's counters, 1% here, are whole everywhere."""
    ours, whole = held(name), held("no_shard")
    for part, share in zip(("parameters", "gradients", "optimizer"), EIGHTHS[name], strict=True):
        np.testing.assert_allclose(ours[part], whole[part] * share / 8, rtol=0.02)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n == "full_shard" else [pytest.mark.slow]) for n in EIGHTHS],
)
def test_bytes_of_the_programs_arguments(name):
    """The compiled step's own count: state and batch, whose rows are 8 KB a device."""
    ours = held(name)
    arguments = compiled(strategy(name))[1].arguments
    np.testing.assert_allclose(arguments, ours["parameters"] + ours["optimizer"], rtol=0.01)


@pytest.mark.slow
def test_hybrid_shard_repeats_along_data():
    """Divided over fsdp, not over data: twice the bytes on 2x4, and a second sum of gradients, along data."""
    (_, hybrid, _), (_, full, _) = (
        compiled(strategy("hybrid_shard", data=2, fsdp=4)),
        compiled(strategy("full_shard", data=2, fsdp=4)),
    )
    np.testing.assert_allclose(hybrid.arguments, 2 * full.arguments, rtol=0.03)
    found = compiled(strategy("hybrid_shard", data=2, fsdp=4))[0]
    along = {c.axes for c in found if c.kind == "all-gather" and 11 in c.loops}
    assert along == {("fsdp",)}
    assert any("data" in c.axes for c in found if c.kind == "all-reduce")


@pytest.mark.slow
def test_one_layer_is_whole_at_a_time():
    """Eight more layers: temporaries grow by the gradients' shards and the saved inputs, far from the layers'
    whole weights.
    """
    (_, few, _), (_, many, layout) = (
        compiled(strategy("full_shard", layers=3)),
        compiled(strategy("full_shard")),
    )
    growth = (many.temporaries - few.temporaries) / 8
    whole = layer_bytes(layout)
    assert growth < 0.35 * whole, (
        growth,
        whole,
    )  # seen: 0.23; an eighth each for gradients and new moments
    # Under no_shard the gradients of all layers are whole: what the growth would be if layers stayed so.
    (_, few, _), (_, many, _) = (
        compiled(strategy("no_shard", layers=3)),
        compiled(strategy("no_shard")),
    )
    assert (many.temporaries - few.temporaries) / 8 > 0.9 * whole


@pytest.mark.slow
@pytest.mark.parametrize("virtual_stages", [1, 2])
def test_a_stage_holds_its_blocks_divided(virtual_stages):
    """Outside of the loops only embedding and head are gathered over fsdp and expert, never
    all blocks of a stage at once; the blocks' way to their stages is an all-to-all. More micro-batches need
    more memory for activations only.
    """
    config = dataclasses.replace(
        strategy("full_shard", stage=2, fsdp=2, expert=2),
        sharding=ShardingConfig("full_shard", 0, virtual_stages=virtual_stages),
    )
    few, many = (
        dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation=a))
        for a in (2, 4)
    )
    found, memory, layout = compiled(few)
    stack = 11 * layer_bytes(layout)
    outside = program.by([c for c in found if not c.loops], lambda c: (c.kind, c.axes))
    gathered = sum(
        n for (kind, axes), n in outside.items() if kind == "all-gather" and axes != ("stage",)
    )
    assert gathered < 0.1 * stack
    # Two ways of 11 layers and one missing one, there in forward, back in backward; a device receives half of
    # its part.
    np.testing.assert_allclose(
        outside["all-to-all", ("stage",)], 2 * stack * 12 / 11 / 8 / 2, rtol=0.01
    )
    assert compiled(many)[1].temporaries < 1.1 * memory.temporaries


def test_small_weights_stay_whole():
    """min_weight_size counts a layer's elements; a stack of small weights is still small."""
    config = strategy("full_shard")
    mesh = make_mesh(config)
    for least in (0, 10_000):
        chosen = dataclasses.replace(
            config, sharding=dataclasses.replace(config.sharding, min_weight_size=least)
        )
        with jax.set_mesh(mesh):
            layout = state.make_layout(chosen, mesh)
        leaves = jax.tree_util.tree_leaves_with_path(layout.abstract.params)
        for (path, a), s in zip(leaves, jax.tree.leaves(layout.shardings.params), strict=True):
            name = conversion.path_of(path)
            a_layer = (
                a.size // a.shape[0] if name.startswith(("layers", "dense_layers")) else a.size
            )
            divided = np.prod(s.shard_shape(a.shape)) < a.size
            assert divided == ("norm" not in name and a_layer >= least), name


@pytest.mark.slow
def test_further_rounds_are_a_loop():
    """The program is compiled without data, so its memory cannot depend on the routing; what depends on it is
    how often this loop runs.
    """
    found, memory, _ = compiled(strategy("full_shard", fsdp=2, expert=4))
    in_forward = [c for c in found if c.kind == "all-to-all" and c.phase == "forward"]
    assert memory.temporaries > 0 and {c.kind for c in found if c.further} == {"all-to-all"}
    assert [len([c for c in in_forward if c.further == further]) for further in (False, True)] == [
        2,
        2,
    ]
