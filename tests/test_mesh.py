"""The mesh does not change the mathematics: one config, the same numbers on every mesh, strategy and accumulation."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import bridge
from deepseek_jax.config import Config, Mesh, Model, Moe, Optimizer, Sharding, Train, UserError
from deepseek_jax.validation import validate
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.train import state, step

SEQUENCES, LENGTH, STEPS = 16, 32, 5
MODEL = Model(vocab_size=128, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
              q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=8, num_experts_per_tok=2,
              n_group=4, topk_group=2, num_nextn_predict_layers=1, aux_loss_alpha=0.01, initializer_range=0.1)
# The learning rate warms up from 0: a first Adam step at full rate would turn the rounding noise of near-zero gradients
# into whole steps, and so into other routing on other meshes.
BASE = Config(model=MODEL, moe=Moe(capacity_factor=1.25), train=Train(steps=STEPS, batch_size=SEQUENCES, sequence_length=LENGTH, dtype="float32"),
              optimizer=Optimizer(warmup_steps=20, learning_rate=1e-3))


def rows(i: int) -> dict[str, np.ndarray]:
    """A packed batch with two documents a row and padding at the end of some rows."""
    rng = np.random.default_rng(i)
    ids = rng.integers(0, MODEL.vocab_size, (SEQUENCES, LENGTH + 1)).astype(np.int32)
    segments = np.broadcast_to(np.where(np.arange(LENGTH) < 12, 1, 2), (SEQUENCES, LENGTH)).copy()
    segments[::5, 25:] = 0
    positions = np.broadcast_to(np.where(np.arange(LENGTH) < 12, np.arange(LENGTH), np.arange(LENGTH) - 12), segments.shape)
    targets = ids[:, 1:].copy()
    targets[:, 11] = -100
    targets[::5, 24:] = -100
    return dict(tokens=ids[:, :-1], targets=targets, segment_ids=segments.astype(np.int32), positions=positions.astype(np.int32))


@functools.cache
def initial_state() -> state.TrainState:
    """Created on one device and held on the host: compiling its creation anew for every mesh would take half of the time."""
    config = dataclasses.replace(BASE, mesh=Mesh(fsdp=1))
    mesh = make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        return jax.device_get(state.init_state(config, state.make_layout(config, mesh)))


def train(config: Config, devices: int = 8) -> tuple[list[float], list[np.ndarray], state.TrainState]:
    validate(config)
    mesh = make_mesh(config, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        layout = state.make_layout(config, mesh)
        s = jax.device_put(initial_state(), layout.shardings)
        train_step = bridge.jit(step.make_train_step(config, layout))
        losses, counts = [], []
        for i in range(STEPS):
            s, m = train_step(s, step.put_batch(rows(i), config.micro_batch, mesh))
            losses.append(float(m.losses.loss))
            counts.append(np.asarray(m.expert_counts))
    return losses, counts, s


@pytest.fixture(scope="module")
def one_device():
    return train(dataclasses.replace(BASE, mesh=Mesh(fsdp=1)), devices=1)


def variant(strategy="full_shard", accumulation=1, remat="full", capacity_factor=1.25, **mesh) -> Config:
    return dataclasses.replace(BASE, mesh=Mesh(**mesh), sharding=Sharding(strategy), moe=Moe(capacity_factor=capacity_factor),
                               train=dataclasses.replace(BASE.train, accumulation=accumulation, remat=remat))


VARIANTS = {
    "8x1": variant(fsdp=8, expert=1),
    "4x2": variant(fsdp=4, expert=2, remat="none"),
    "2x4": variant(fsdp=2, expert=4, remat="exchange"),
    "1x8": variant(fsdp=1, expert=8, capacity_factor=0.3),
    "2x2x2 hybrid_shard, two micro-batches": variant("hybrid_shard", 2, data=2, fsdp=2, expert=2),
    "2x2x2 full_shard": variant("full_shard", data=2, fsdp=2, expert=2),
    "4x2 zero2": variant("zero2", fsdp=4, expert=2, remat="save:attention,mlp_hidden"),
    "2x4 zero1": variant("zero1", fsdp=2, expert=4),
    "4x2 no_shard": variant("no_shard", fsdp=4, expert=2),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_same_numbers_on_every_mesh(one_device, name):
    losses, counts, final = train(VARIANTS[name])
    # float32 sums in another order: 1e-5 relative, as the design states. Counts are integers: exactly.
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
    for a, b in zip(counts, one_device[1], strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(final.bias), jax.tree.leaves(one_device[2].bias), strict=True):
        np.testing.assert_array_equal(a, b)
        copies = [np.asarray(s.data) for s in a.addressable_shards]
        assert all(np.array_equal(c, copies[0]) for c in copies), "the bias differs between devices"


@pytest.mark.parametrize("name", ["2x4", "2x2x2 full_shard"])
def test_the_same_initial_state_on_every_mesh(name):
    config = VARIANTS[name]
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        layout = state.make_layout(config, mesh)
        s = state.init_state(config, layout)
    expected = zip(jax.tree.leaves(initial_state()), jax.tree.leaves(layout.shardings), strict=True)
    for (path, a), (b, sharding) in zip(jax.tree_util.tree_leaves_with_path(s), expected, strict=True):
        # The last bit of a normal deviate may depend on where a vector ends; what is drawn does not depend on the mesh.
        np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=jax.tree_util.keystr(path))
        assert a.sharding == sharding


def test_counts_are_of_the_global_batch(one_device):
    for i, counts in enumerate(one_device[1]):
        r = rows(i)
        tokens = int((r["segment_ids"] > 0).sum())
        ahead = int((r["targets"] >= 0).sum())  # the MTP layer routes positions that have a next token
        np.testing.assert_array_equal(counts.sum(axis=1), np.array([tokens, tokens, ahead]) * MODEL.num_experts_per_tok)


@pytest.mark.parametrize("strategy, shares", [("full_shard", (8, 8)), ("zero3", (8, 8)), ("shard_grad_op", (1, 8)), ("zero1", (1, 8)),
                                              ("no_shard", (1, 1))])
def test_bytes_of_each_strategy(strategy, shares):
    """Parameters and optimizer state a device, as shares of the whole; norms and the bias stay whole."""
    config = dataclasses.replace(BASE, sharding=Sharding(strategy), mesh=Mesh(fsdp=8))
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        layout = state.make_layout(config, mesh)
    for part, share in zip(("params", "opt_state"), shares, strict=True):
        held = getattr(layout.abstract, part), getattr(layout.shardings, part)
        for leaf, sharding in zip(*map(jax.tree.leaves, held), strict=True):
            if leaf.size > 1000:
                assert np.prod(sharding.shard_shape(leaf.shape)) * share == leaf.size


def exchanges(remat: str) -> int:
    """all_to_all operations in the lowered step of one MoE layer stack: forward and backward, first and later rounds."""
    config = variant(fsdp=2, expert=4, remat=remat)
    config = dataclasses.replace(config, model=dataclasses.replace(MODEL, num_nextn_predict_layers=0))
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        layout = state.make_layout(config, mesh)
        batch = step.put_batch(rows(0), config.micro_batch, mesh)
        text = jax.jit(step.make_train_step(config, layout)).lower(layout.abstract_sharded(), batch).as_text()
    assert text.count('"stablehlo.reduce_scatter"') == 2, "the gradients of gate_up_proj and down_proj are reduce-scattered"
    return text.count('"stablehlo.all_to_all"')


def test_remat_policies_save_what_they_say():
    """Forward exchanges twice a round. Backward: the output's gradient there, the input's back, one number a row each way, and in
    later rounds the rows once more: 2 + 2 + 4 + 5. Full remat sends the first round's rows again; `exchange` saves that."""
    assert {remat: exchanges(remat) for remat in ("none", "exchange", "save:attention,exchange", "full", "save:attention")} == {
        "none": 13, "exchange": 13, "save:attention,exchange": 13, "full": 14, "save:attention": 14}


MESH_ERRORS = [
    (dict(mesh=Mesh(fsdp=3, expert=2)), "config.mesh (fsdp 3 x expert 2) has 6 devices, but there are 8."),
    (dict(mesh=Mesh(fsdp=16)), "config.mesh (fsdp 16) has 16 devices, but there are 8."),
    (dict(mesh=Mesh(fsdp=-1, expert=3)), "config.mesh (fsdp -1 x expert 3) asks for a multiple of 3 devices, but there are 8."),
    (dict(mesh=Mesh(fsdp=-1, expert=-1)), "only one axis may take the devices that are left"),
    (dict(mesh=Mesh(fsdp=0)), "config.mesh.fsdp=0 is not a number of devices"),
    (dict(mesh=Mesh(fsdp=1, expert=8), model=dataclasses.replace(MODEL, n_routed_experts=12)),
     "n_routed_experts=12 is not divisible by the expert mesh axis (8 devices). Set config.mesh.expert to a divisor of 12."),
    (dict(mesh=Mesh(fsdp=8), train=dataclasses.replace(BASE.train, batch_size=12)), "Set config.train.batch_size to a multiple of 8."),
    (dict(mesh=Mesh(fsdp=8), model=dataclasses.replace(MODEL, hidden_size=60)),
     "config.model.hidden_size=60 (a width of 60) is not divisible by the 8 devices of data x fsdp x expert"),
]


@pytest.mark.parametrize("changes, message", MESH_ERRORS)
def test_mesh_errors(changes, message):
    with pytest.raises(UserError) as error:
        make_mesh(dataclasses.replace(BASE, **changes))
    assert message in str(error.value) and "\n" not in str(error.value)
