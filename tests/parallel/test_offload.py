"""What is offloaded is in the host's memory between steps, and nothing else about a run changes."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from deepseek_jax import objectives
from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config.options import (
    Config,
    MeshConfig,
    ModelConfig,
    OffloadConfig,
    ShardingConfig,
    TrainConfig,
)
from deepseek_jax.config.validation import validate
from deepseek_jax.errors import UserError
from deepseek_jax.experts import cpu_grouped_matmul
from deepseek_jax.model.remat import rematerialise
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.train import state, step
from deepseek_jax.train.batch import abstract_batch, put_batch
from tests.support import conversion
from tests.support.invariance import MODEL, initial_state, rows, variant

STEPS = 3
SMALL = dataclasses.replace(
    MODEL, num_hidden_layers=4, n_group=1, topk_group=1, num_nextn_predict_layers=0
)
# One stack instead of two: half of the program.
STACK = dataclasses.replace(SMALL, num_hidden_layers=3, first_k_dense_replace=0)
DENSE = dataclasses.replace(SMALL, num_hidden_layers=2, first_k_dense_replace=2)
EVERYTHING = OffloadConfig(
    optimizer_state=True, parameters=True, activations="layer_input,attention"
)
ALONE, MESH = dict(), dict(fsdp=2, expert=2)


def config_of(
    offload: OffloadConfig,
    accumulation: int = 1,
    strategy: str = "full_shard",
    model: ModelConfig = SMALL,
    remat: str = "full",
    **mesh: int,
) -> Config:
    config = dataclasses.replace(
        variant(strategy, accumulation=accumulation, remat=remat, **mesh),
        model=model,
        offload=offload,
    )
    validate(config)
    return config


def mesh_of(config: Config) -> jax.sharding.Mesh:
    return make_mesh(
        config, jax.devices()[: config.mesh.data * config.mesh.fsdp * config.mesh.expert]
    )


@functools.cache
def compiled(config: Config):
    """(mesh, layout, jitted step)."""
    mesh = mesh_of(config)
    with jax.set_mesh(mesh):
        layout = state.make_layout(config, mesh)
    return (
        mesh,
        layout,
        jax.jit(step.make_train_step(config, layout, objectives.make(config)), donate_argnums=0),
    )


def kinds(tree) -> dict[str, str]:
    return {
        conversion.path_of(path): a.sharding.memory_kind
        for path, a in jax.tree_util.tree_leaves_with_path(tree)
    }


def expected_kinds(tree, params: bool) -> dict[str, str]:
    """Of parameters: the stacked layers' on the host. Of the optimizer's state: all but counters."""

    def on_host(name, a) -> bool:
        return "layers/" in name if params else a.ndim > 0

    leaves = [
        (conversion.path_of(path), a) for path, a in jax.tree_util.tree_leaves_with_path(tree)
    ]
    return {name: "pinned_host" if on_host(name, a) else "device" for name, a in leaves}


@functools.cache
def run(config: Config) -> tuple[list[float], list[float], state.TrainState]:
    """(losses, gradient norms, last state) of STEPS steps from the same start."""
    mesh, layout, train_step = compiled(config)
    with jax.set_mesh(mesh):
        s = jax.device_put(initial_state(config.model), layout.shardings)
        losses, norms = [], []
        for i in range(STEPS):
            s, m = train_step(s, put_batch(rows(i), config.micro_batch, mesh))
            losses.append(float(m.loss))
            norms.append(float(m.grad_norm))
    return losses, norms, s


# Float32 rounding: the update of one layer is compiled on its own, which may fuse a multiplication with an
# addition or not, and the gradient norm adds up its squares layer by layer. Moments hold the gradients: the
# first one a tenth of their running sum.
@pytest.mark.parametrize(
    "offload, mesh, accumulation",
    [
        pytest.param(OffloadConfig(optimizer_state=True), ALONE, 1),
        (EVERYTHING, ALONE, 1),
        pytest.param(EVERYTHING, MESH, 2),
    ],
    ids=["optimizer_state", "everything", "everything on a mesh"],
)
@pytest.mark.slow
def test_the_numbers_stay(offload, mesh, accumulation):
    ours, plain = (
        run(config_of(offload, accumulation, **mesh)),
        run(config_of(OffloadConfig(), **ALONE)),
    )
    np.testing.assert_allclose(ours[0], plain[0], rtol=2e-6)
    np.testing.assert_allclose(ours[1], plain[1], rtol=2e-6)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours[2]), jax.tree.leaves(plain[2]), strict=True
    ):
        conversion.assert_close(a, b, 2e-5, conversion.path_of(path))


def test_where_a_fresh_state_is():
    # Few weights: each is a random generator to compile.
    few = dataclasses.replace(STACK, q_lora_rank=None, n_shared_experts=0)
    config = config_of(EVERYTHING, model=few)
    with jax.set_mesh(mesh_of(config)):
        made = state.init_state(config, state.make_layout(config, mesh_of(config)))
    assert kinds(made.params) == expected_kinds(made.params, True)
    assert kinds(made.opt_state) == expected_kinds(made.opt_state, False)


@pytest.mark.parametrize(
    "offload, options",
    [
        # What makes no difference to where a stack lies is left out, as it takes long to compile.
        (EVERYTHING, dict(model=STACK)),
        pytest.param(
            OffloadConfig(optimizer_state=True),
            dict(model=DENSE, remat="none"),
            marks=pytest.mark.slow,
        ),
        pytest.param(OffloadConfig(optimizer_state=True), {}, marks=pytest.mark.slow),
        pytest.param(EVERYTHING, {}, marks=pytest.mark.slow),
    ],
    ids=["everything", "optimizer_state", "optimizer_state, two stacks", "everything, two stacks"],
)
def test_where_the_state_is_after_a_step(offload, options):
    s = run(config_of(offload, **options))[2]
    assert kinds(s.opt_state) == expected_kinds(s.opt_state, False)
    assert kinds(s.params) == (
        expected_kinds(s.params, True)
        if offload.parameters
        else dict.fromkeys(kinds(s.params), "device")
    )
    assert {*kinds(s.bias).values()} <= {"device"}
    assert kinds(s.bias) or options["model"] == DENSE


@pytest.mark.slow
def test_where_the_state_is_without_offloading():
    s = run(config_of(OffloadConfig()))[2]
    assert {*kinds(s).values()} == {"device"}


def lowered_for_gpus(config: Config) -> str:
    mesh, layout, train_step = compiled(config)
    with jax.set_mesh(mesh):
        return (
            train_step.trace(
                layout.abstract_sharded(),
                abstract_batch(objectives.make(config).fields, config, mesh, 0),
            )
            .lower(lowering_platforms=("cuda",))
            .as_text()
        )


@pytest.mark.slow
def test_the_program_for_gpus():
    """It takes and gives what is offloaded in the host's memory, and brings one layer of it at a time: no
    whole stack goes to the device.
    """
    text = lowered_for_gpus(config_of(EVERYTHING, 2, **MESH))
    _, layout, _ = compiled(config_of(EVERYTHING, 2, **MESH))
    host = sum(s.memory_kind == "pinned_host" for s in jax.tree.leaves(layout.shardings))
    assert host > 50 and text.count('mhlo.memory_kind = "pinned_host"') == 2 * host
    moved = re.findall(
        r'custom_call @annotate_device_placement\(.*_xla_buffer_placement = "(\w+)"'
        r".*\(tensor<([\dx]+)x\w+>\)",
        text,
    )
    stacks = {
        "x".join(map(str, a.shape))
        for path, a in jax.tree_util.tree_leaves_with_path(layout.abstract.params)
        if conversion.path_of(path).startswith("layers/") and a.shape[0] > 1
    }
    assert {kind for kind, _ in moved} == {"pinned_host", "device"} and len(moved) > 100
    # What goes to the host as a whole is the results, which are there already.
    assert not stacks & {shape for kind, shape in moved if kind == "device"}
    assert "pinned_host" not in lowered_for_gpus(config_of(OffloadConfig()))


def test_activations_are_offloaded_by_name():
    """What a layer keeps for backward: the named arrays in the host's memory, those of remat=save: on the
    device, and nothing else of its size.
    """
    from jax.ad_checkpoint import checkpoint_name

    def layer(x, w):
        for name in ("attention", "mlp_hidden", "layer_input"):
            x = jax.numpy.sin(checkpoint_name(x @ w, name))
        return x

    def kept(remat, offload):
        x = jax.ShapeDtypeStruct((64, 8), np.float32)
        w = jax.ShapeDtypeStruct((8, 8), np.float32)
        forward = functools.partial(jax.vjp, rematerialise(layer, remat, offload))
        avals = jax.make_jaxpr(forward)(x, w).out_avals[1:]  # without the result

        def of(space: str) -> int:
            return sum(a.shape == (64, 8) and a.memory_space.name == space for a in avals)

        return of("Device"), of("Host")

    assert kept("full", "") == (1, 0)
    assert kept("save:attention", "") == (2, 0)
    assert kept("full", "attention,mlp_hidden") == (1, 2)
    assert kept("save:attention", "layer_input,mlp_hidden") == (2, 2)


@functools.cache
def matmuls(model: ModelConfig, remat: str) -> int:
    config = config_of(OffloadConfig(), model=model, remat=remat)
    mesh, layout, train_step = compiled(config)
    with jax.set_mesh(mesh):
        return (
            train_step.lower(
                layout.abstract_sharded(),
                abstract_batch(objectives.make(config).fields, config, mesh, 0),
            )
            .as_text()
            .count("stablehlo.dot_general")
        )


@pytest.mark.parametrize("model", [STACK, pytest.param(SMALL, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name, spared",
    [
        pytest.param("mla_latent", 2, marks=pytest.mark.slow),
        ("attention", 2),
        pytest.param("mlp_gate_up", 2, marks=pytest.mark.slow),
        ("experts_hidden", len(cpu_grouped_matmul.BLOCKS_PER_PRODUCT)),
    ],
)
def test_what_a_kept_name_spares(name, spared, model):
    """Matmuls that backward does not do again, in the loops over dense and over MoE layers. Gate and up of
    the routed experts are one, in blocks of several sizes.
    """
    loops = 1 if name == "experts_hidden" or model == STACK else 2
    assert matmuls(model, "full") - matmuls(model, f"save:{name}") == loops * spared


def test_checkpoints(tmp_path):
    """Saved from the host's memory, restored into it bit by bit, on another mesh too; the run goes on as if
    it had not stopped.
    """
    config = config_of(EVERYTHING, model=STACK)
    mesh, layout, train_step = compiled(config)
    with jax.set_mesh(mesh):
        batch = put_batch(rows(7), config.micro_batch, mesh)
        checkpointer = Checkpointer(str(tmp_path))
        s = run(config)[2]
        donated = jax.device_put(jax.tree.map(np.array, jax.device_get(s)), layout.shardings)
        checkpointer.save(STEPS, state.to_tree(donated), {})
        b, n = train_step(donated, batch)  # writes over what a thread may still be saving
        checkpointer.wait()
        tree, _ = checkpointer.restore(state.to_tree(layout.abstract_sharded()))
        again = state.from_tree(tree, layout.abstract)
        assert kinds(again) == kinds(s)
        for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(s), strict=True):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
        a, m = train_step(again, batch)
        assert float(m.loss) == float(n.loss)
        assert all(
            np.array_equal(x, y)
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        )
    for offload, axes in ((EVERYTHING, MESH), (OffloadConfig(), ALONE)):
        elsewhere = config_of(offload, model=STACK, **axes)
        with jax.set_mesh(mesh_of(elsewhere)):
            wanted = state.make_layout(elsewhere, mesh_of(elsewhere)).abstract_sharded()
            tree, _ = checkpointer.restore(state.to_tree(wanted))
            moved = state.from_tree(tree, wanted)
            assert kinds(moved) == {
                conversion.path_of(p): a.sharding.memory_kind
                for p, a in jax.tree_util.tree_leaves_with_path(wanted)
            }
            assert all(
                np.array_equal(x, y)
                for x, y in zip(jax.tree.leaves(moved), jax.tree.leaves(s), strict=True)
            )
    checkpointer.close()


def evaluate(layout):
    return jax.jit(step.make_eval_step(layout, objectives.make(config_of(EVERYTHING, model=STACK))))


def test_evaluation_reads_offloaded_parameters():
    (mesh, layout, _), (_, plain, _) = (
        compiled(config_of(EVERYTHING, model=STACK)),
        compiled(config_of(OffloadConfig(), model=STACK)),
    )
    with jax.set_mesh(mesh):
        batch = jax.tree.map(lambda a: a[0], put_batch(rows(0), 16, mesh))
        nll = [
            float(evaluate(placed)(s.params, s.bias, batch)["nll"])
            for placed in (layout, plain)
            for s in [jax.device_put(initial_state(STACK), placed.shardings)]
        ]
    assert nll[0] == nll[1]


def test_bytes_a_device():
    """What the host holds instead is said apart, and all is held somewhere."""
    (mesh, everything, _), (_, plain, _) = (
        compiled(config_of(EVERYTHING)),
        compiled(config_of(OffloadConfig())),
    )
    ours, theirs = everything.bytes_per_device(mesh), plain.bytes_per_device(mesh)
    stacks = sum(
        a.size * 4
        for path, a in jax.tree_util.tree_leaves_with_path(plain.abstract.params)
        if "layers/" in conversion.path_of(path)
    )
    assert (
        ours["parameters"] == ours["gradients"] == theirs["parameters"] - stacks
        and "host" not in theirs
    )
    assert (
        sum(ours.values()) == sum(theirs.values()) and ours["optimizer"] == 8
    )  # two int32 counters


@pytest.mark.parametrize(
    "sections, message",
    [
        (
            dict(offload=OffloadConfig(parameters=True), sharding=ShardingConfig("zero2")),
            "config.offload.parameters=True and config.sharding.strategy=zero2",
        ),
        (
            dict(offload=OffloadConfig(parameters=True), mesh=MeshConfig(stage=2)),
            "config.offload.parameters=True and config.mesh.stage=2",
        ),
        (
            dict(offload=OffloadConfig(parameters=True), train=TrainConfig(remat="none")),
            "config.offload.parameters=True and config.train.remat=none",
        ),
        (
            dict(offload=OffloadConfig(activations="attention"), train=TrainConfig(remat="none")),
            "config.offload.activations=attention and config.train.remat=none",
        ),
        (
            dict(
                offload=OffloadConfig(activations="attention"),
                train=TrainConfig(remat="save:attention"),
            ),
            "both name attention",
        ),
        (
            dict(offload=OffloadConfig(activations="attention,atention")),
            "config.offload.activations=attention,atention: 'atention' is not known. Did you mean attention?",
        ),
    ],
)
def test_what_cannot_act_is_refused(sections, message):
    with pytest.raises(UserError) as error:
        validate(Config(**sections))
    assert message in str(error.value) and re.search("Set |Leave ", str(error.value))
