"""The mesh does not change the mathematics: one config, the same numbers on every mesh, strategy, dispatch
and accumulation.
"""

import dataclasses
import re

import jax
import numpy as np
import pytest

from deepseek_jax import objectives
from deepseek_jax.config.options import MeshConfig, ShardingConfig
from deepseek_jax.config.validation import validate
from deepseek_jax.errors import UserError
from deepseek_jax.experts import dispatch
from deepseek_jax.model import lookup
from deepseek_jax.parallel.mesh import axes_across_hosts, make_mesh
from deepseek_jax.parallel.pipeline import Schedule, make_schedule
from deepseek_jax.train import state, step
from deepseek_jax.train.batch import abstract_batch, put_batch
from tests.support.invariance import (
    BASE,
    MODEL,
    created_state,
    differences,
    one_device,
    rows,
    train,
    variant,
)

MOE_ALONE = dataclasses.replace(
    MODEL, num_hidden_layers=2, first_k_dense_replace=0, num_nextn_predict_layers=0
)
VARIANTS = {
    "2x4": variant(fsdp=2, expert=4, remat="exchange"),
    "8x1": variant(fsdp=8),
    "4x2 all_gather": variant(dispatch="all_gather", fsdp=4, expert=2, remat="none"),
    "1x8 ring, small capacity": variant(dispatch="ring", expert=8, capacity_factor=0.3),
    "2x2x2 hybrid_shard, two micro-batches": variant(
        "hybrid_shard", "all_gather", 2, data=2, fsdp=2, expert=2
    ),
    "2x2x2 full_shard ring": variant("full_shard", "ring", data=2, fsdp=2, expert=2),
    "4x2 zero2, two micro-batches": variant(
        "zero2", accumulation=2, fsdp=4, expert=2, remat="save:attention,mlp_hidden"
    ),
    "2x4 zero1 all_gather": variant("zero1", "all_gather", fsdp=2, expert=4),
    "4x2 no_shard": variant("no_shard", fsdp=4, expert=2),
    "tensor 2, four micro-batches": variant(accumulation=4, remat="none", tensor=2),
    "2x2 tensor 2": variant(accumulation=2, fsdp=2, expert=2, tensor=2, remat="exchange"),
    "data 2 expert 2 tensor 2 hybrid_shard ring": variant(
        "hybrid_shard", "ring", data=2, expert=2, tensor=2
    ),
    # What `make test` runs: without dense layers, prediction of further tokens and recomputation, each of
    # which takes half as long again to compile.
    "data 2 expert 2 tensor 2 hybrid_shard ring, MoE alone": dataclasses.replace(
        variant("hybrid_shard", "ring", remat="none", data=2, expert=2, tensor=2), model=MOE_ALONE
    ),
    "stage 2, 2x2": variant(accumulation=4, stage=2, fsdp=2, expert=2),
    "stage 4 fsdp 2 zero2, without remat": variant(
        "zero2", accumulation=4, stage=4, fsdp=2, remat="none"
    ),
    "stage 4 expert 2 ring, one micro-batch": variant(dispatch="ring", stage=4, expert=2),
    "stage 2 expert 2 tensor 2 all_gather": variant(
        "full_shard", "all_gather", 2, stage=2, expert=2, tensor=2
    ),
    "stage 2 data 2 expert 2 zero1, 3 pieces": variant(
        "zero1", accumulation=4, virtual_stages=3, data=2, stage=2, expert=2
    ),
}


@pytest.mark.slow
def test_the_bias_is_the_same_on_all_devices_after_20_steps():
    """Bit for bit; devices that added up their own counts would drift apart within a few steps."""
    run = train(VARIANTS["2x4"], steps=20)
    leaves = jax.tree.leaves(run.state.bias)
    assert leaves and all(np.abs(b).max() > 0.005 for b in leaves)  # 20 steps of 0.001
    for leaf in leaves:
        copies = [np.asarray(s.data) for s in leaf.addressable_shards]
        assert len(copies) == 8 and all(np.array_equal(c, copies[0]) for c in copies)


# The others run in `make test-slow`; tests/support/invariance.py has the whole product.
QUICK = ("data 2 expert 2 tensor 2 hybrid_shard ring, MoE alone",)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in VARIANTS],
)
def test_same_numbers_on_every_mesh(name, monkeypatch):
    """Five steps. Sums of float32 are in another order, so losses and every gradient agree to 1e-5 relative.
    Counts are integers, so they and the bias are equal on every device. The embedding's gradient is summed as
    on GPUs; the run on one device sums it as on a CPU."""
    one = one_device(VARIANTS[name].model)
    monkeypatch.setattr(lookup, "on_cpu", lambda: False)
    run = train(VARIANTS[name])
    loss, gradient, worst, counts = differences(run, one)
    assert counts and loss < 1e-5
    assert gradient < 1e-5, worst
    for a, b in zip(jax.tree.leaves(run.state.bias), jax.tree.leaves(one.state.bias), strict=True):
        for shard in a.addressable_shards:
            np.testing.assert_array_equal(shard.data, b)


def test_no_sum_of_floats_is_left_to_a_scatter(monkeypatch):
    """On a GPU its order would be any, and no run would resume exactly. One is left: the router's, in which
    every number of the scores is met by one choice at most."""
    monkeypatch.setattr(lookup, "on_cpu", lambda: False)
    monkeypatch.setattr(dispatch, "on_cpu", lambda: False)
    config = variant(remat="none")  # what recomputes repeats sums that are there already
    mesh = make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        layout = state.make_layout(config, mesh)
        objective = objectives.make(config)
        traced = jax.make_jaxpr(step.make_train_step(config, layout, objective))
        batch = abstract_batch(objective.fields, config, mesh, 0)
        program = str(traced(layout.abstract_sharded(), batch))
    tokens = config.train.batch_size * config.train.sequence_length
    sums = set(re.findall(r":(f\w+\[[^\]]*\])\S* = scatter-add\[", program))
    assert sums == {f"f32[{tokens},{MODEL.n_routed_experts}]"}


MODELS = {
    "V2": (
        dict(
            topk_method="greedy",
            scoring_func="softmax",
            seq_aux=False,
            q_lora_rank=None,
            tie_word_embeddings=True,
            num_nextn_predict_layers=2,
            n_shared_experts=0,
        ),
        variant(accumulation=2, stage=2, expert=2, tensor=2),
    ),
    "no experts": (
        dict(first_k_dense_replace=6, num_nextn_predict_layers=0),
        variant("zero2", accumulation=2, stage=2, fsdp=2, tensor=2),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODELS))
def test_other_models_on_stages_and_tensor(name):
    """The balance loss over the batch, tied embeddings, deeper prediction; a dense model, whose blocks are
    the dense layers.
    """
    changes, config = MODELS[name]
    model = dataclasses.replace(MODEL, **changes)
    loss, gradient, worst, counts = differences(
        train(dataclasses.replace(config, model=model), 2), one_device(model, 2)
    )
    assert counts and loss < 1e-5
    assert gradient < 1e-5, worst


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2x4", "stage 2 expert 2 tensor 2 all_gather"])
def test_the_same_initial_state_on_every_mesh(name):
    config = VARIANTS[name]
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        layout = state.make_layout(config, mesh)
        s = state.init_state(config, layout)
    expected = zip(jax.tree.leaves(created_state()), jax.tree.leaves(layout.shardings), strict=True)
    for (path, a), (b, sharding) in zip(
        jax.tree_util.tree_leaves_with_path(s), expected, strict=True
    ):
        # The last bit of a normal deviate may depend on where a vector ends; what is drawn does not depend on
        # the mesh.
        np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=jax.tree_util.keystr(path))
        assert a.sharding == sharding


@pytest.mark.parametrize("model", [MOE_ALONE, pytest.param(MODEL, marks=pytest.mark.slow)])
def test_counts_are_of_the_global_batch(model):
    """Those of a layer that predicts ahead: test_boundary.py, from a forward pass."""
    layers = model.num_hidden_layers - model.first_k_dense_replace
    for i, counts in enumerate(one_device(model).counts):
        r = rows(i)
        tokens = int((r["segment_ids"] > 0).sum())
        ahead = int(
            (r["targets"] >= 0).sum()
        )  # the MTP layer routes positions that have a next token
        expected = [tokens] * layers + [ahead] * model.num_nextn_predict_layers
        np.testing.assert_array_equal(
            counts.sum(axis=1), np.array(expected) * model.num_experts_per_tok
        )


@pytest.mark.parametrize(
    "strategy, shares",
    [
        ("full_shard", (8, 8)),
        ("zero3", (8, 8)),
        ("shard_grad_op", (1, 8)),
        ("zero1", (1, 8)),
        ("no_shard", (1, 1)),
    ],
)
def test_bytes_of_each_strategy(strategy, shares):
    """Parameters and optimizer state a device, as shares of the whole; norms and the bias stay whole."""
    config = variant(strategy, fsdp=8)
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        layout = state.make_layout(config, mesh)
    for part, share in zip(("params", "opt_state"), shares, strict=True):
        held = getattr(layout.abstract, part), getattr(layout.shardings, part)
        for leaf, sharding in zip(*map(jax.tree.leaves, held), strict=True):
            if leaf.size > 1000:
                assert np.prod(sharding.shard_shape(leaf.shape)) * share == leaf.size


def exchanges(remat: str) -> int:
    """all_to_all operations in the lowered step of one MoE layer stack: forward and backward, first and later
    rounds.
    """
    config = variant(fsdp=2, expert=4, remat=remat)
    config = dataclasses.replace(
        config, model=dataclasses.replace(MODEL, num_nextn_predict_layers=0)
    )
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        layout = state.make_layout(config, mesh)
        batch = put_batch(rows(0), config.micro_batch, mesh)
        text = (
            jax.jit(step.make_train_step(config, layout, objectives.make(config)))
            .lower(layout.abstract_sharded(), batch)
            .as_text()
        )
    assert text.count('"stablehlo.reduce_scatter"') == 4, (
        "the gradients of embedding, experts (two) and head are reduce-scattered"
    )
    return text.count('"stablehlo.all_to_all"')


@pytest.mark.slow
def test_remat_policies_save_what_they_say():
    """Forward exchanges twice a round. Backward: the output's gradient there, the input's back, one number a
    row each way, and in later rounds the rows once more: 2 + 2 + 4 + 5. Full remat sends the first round's
    rows again; `exchange` saves that.
    """
    assert {
        remat: exchanges(remat)
        for remat in ("none", "exchange", "save:attention,exchange", "full", "save:attention")
    } == {
        "none": 13,
        "exchange": 13,
        "save:attention,exchange": 13,
        "full": 14,
        "save:attention": 14,
    }


def layers(count: int, dense: int = 1):
    return dataclasses.replace(MODEL, num_hidden_layers=count, first_k_dense_replace=dense)


@pytest.mark.parametrize(
    "blocks, stages, micro_batches, virtual, expected",
    [
        (8, 4, 8, 1, (1, 2, 11, 1 - 64 / 88)),  # GPipe: 3 of 11 ticks are filling and draining
        (
            8,
            4,
            8,
            2,
            (2, 1, 19, 1 - 64 / 76),
        ),  # interleaved: half as much time, as each tick is half as long
        (61, 4, 8, 1, (1, 16, 11, 1 - 8 * 61 / (4 * 11 * 16))),  # the guide's: 16 + 16 + 16 + 13
        (61, 4, 8, 0, (4, 4, 35, 1 - 8 * 61 / (4 * 35 * 4))),
        (5, 2, 1, 1, (1, 3, 3, 1 - 5 / 18)),  # one micro-batch: stages take turns
    ],
)
def test_schedule(blocks, stages, micro_batches, virtual, expected):
    config = variant(accumulation=micro_batches, virtual_stages=virtual, stage=stages)
    config = dataclasses.replace(config, model=layers(blocks + 1))
    schedule = make_schedule(config, stages)
    assert schedule == Schedule(blocks, stages, expected[0], expected[1], micro_batches)
    assert schedule.ticks == expected[2] and schedule.bubble_share == pytest.approx(expected[3])


class Device:
    """What make_mesh reads of a device."""

    def __init__(self, number: int, host: int):
        self.id, self.process_index, self.platform, self.device_kind = number, host, "gpu", "test"


@pytest.mark.parametrize(
    "axes, across",
    [
        (dict(data=2, fsdp=4, expert=2), {"data"}),
        (dict(stage=2, fsdp=2, expert=2, tensor=2), {"stage"}),
        (dict(fsdp=4, expert=4), {"fsdp"}),
        (dict(fsdp=16), {"fsdp"}),
        (dict(data=4, fsdp=2, tensor=2), {"data"}),
    ],
)
def test_axes_that_send_most_stay_inside_a_host(axes, across):
    """Two hosts of eight, whose devices are listed in no order."""
    devices = [Device(i, i // 8) for i in np.random.default_rng(0).permutation(16)]
    mesh = make_mesh(dataclasses.replace(BASE, mesh=MeshConfig(**{"fsdp": 1} | axes)), devices)
    assert set(axes_across_hosts(mesh)) == across


MESH_ERRORS = [
    (
        dict(mesh=MeshConfig(fsdp=3, expert=2)),
        "config.mesh (fsdp 3 x expert 2) has 6 devices, but there are 8.",
    ),
    (dict(mesh=MeshConfig(fsdp=16)), "config.mesh (fsdp 16) has 16 devices, but there are 8."),
    (
        dict(mesh=MeshConfig(fsdp=-1, expert=3)),
        "config.mesh (fsdp -1 x expert 3) asks for a multiple of 3 devices, but there are 8.",
    ),
    (dict(mesh=MeshConfig(fsdp=-1, expert=-1)), "only one axis may take the devices that are left"),
    (dict(mesh=MeshConfig(fsdp=0)), "config.mesh.fsdp=0 is not a number of devices"),
    (
        dict(
            mesh=MeshConfig(fsdp=1, expert=8), model=dataclasses.replace(MODEL, n_routed_experts=12)
        ),
        "n_routed_experts=12 is not divisible by the expert mesh axis (8 devices). Set config.mesh.expert "
        "to a divisor of 12.",
    ),
    (
        dict(mesh=MeshConfig(fsdp=8), train=dataclasses.replace(BASE.train, batch_size=12)),
        "Set config.train.batch_size to a multiple of 8.",
    ),
    (
        dict(mesh=MeshConfig(fsdp=8), model=dataclasses.replace(MODEL, hidden_size=60)),
        "config.model.hidden_size=60 (a width of 60) is not divisible by the 8 devices of fsdp that weights "
        "are divided over",
    ),
    (
        dict(mesh=MeshConfig(data=4, fsdp=2), model=dataclasses.replace(MODEL, hidden_size=60)),
        "8 devices of data x fsdp that",
    ),
    (
        dict(
            mesh=MeshConfig(fsdp=4, tensor=2),
            model=dataclasses.replace(MODEL, num_attention_heads=3),
        ),
        "config.model.num_attention_heads=3 is not divisible by the tensor mesh axis (2 devices). Set "
        "config.mesh.tensor to a divisor of 3.",
    ),
    (
        dict(mesh=MeshConfig(fsdp=2, tensor=4), model=dataclasses.replace(MODEL, vocab_size=129)),
        "config.model.vocab_size=129 is not divisible by the tensor",
    ),
    (
        dict(
            mesh=MeshConfig(fsdp=2, tensor=4),
            model=dataclasses.replace(MODEL, moe_intermediate_size=30),
        ),
        "config.model.moe_intermediate_size=30 is not",
    ),
    (
        dict(
            mesh=MeshConfig(fsdp=2, tensor=4),
            model=dataclasses.replace(MODEL, intermediate_size=90),
        ),
        "config.model.intermediate_size=90 is not divisible",
    ),
    (
        dict(mesh=MeshConfig(fsdp=1, stage=8)),
        "config.mesh.stage=8 is above the number of MoE layers to divide, 5.",
    ),
    (
        dict(
            mesh=MeshConfig(fsdp=1, stage=8),
            model=dataclasses.replace(
                MODEL, num_hidden_layers=8, first_k_dense_replace=0, hidden_size=60
            ),
        ),
        "config.model.hidden_size=60 (a width of 60) is not divisible by the 8 devices of stage that",
    ),
    (
        dict(mesh=MeshConfig(fsdp=4, stage=2), sharding=ShardingConfig(virtual_stages=4)),
        "config.sharding.virtual_stages=4 is above the 3 layers of a stage",
    ),
]
MESH_ERRORS += [
    (
        dict(
            mesh=MeshConfig(fsdp=4, stage=-1),
            train=dataclasses.replace(BASE.train, remat="exchange"),
        ),
        "config.train.remat=exchange and config.mesh.stage=2",
    ),
    (
        dict(sharding=ShardingConfig(virtual_stages=2)),
        "config.sharding.virtual_stages=2 needs stages, but config.mesh.stage=1.",
    ),
]

OPTION_ERRORS = [
    (
        dict(mesh=MeshConfig(context=2)),
        "config.mesh.context=2 is not in this version. Set config.mesh.context=1.",
    ),
    (dict(sharding=ShardingConfig(min_weight_size=-1)), "config.sharding.min_weight_size=-1"),
]


@pytest.mark.parametrize("changes, message", OPTION_ERRORS)
def test_option_errors(changes, message):
    with pytest.raises(UserError) as error:
        validate(dataclasses.replace(BASE, **changes))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("changes, message", MESH_ERRORS)
def test_mesh_errors(changes, message):
    with pytest.raises(UserError) as error:
        make_mesh(dataclasses.replace(BASE, **changes))
    assert message in str(error.value) and "\n" not in str(error.value)
