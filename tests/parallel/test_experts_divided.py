"""Experts divided by experts: which meshes and numbers allow it, and that one gather brings them together.

What they compute is compared with one device by test_mesh.py and test_strategies.py, in the same layouts.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.config.options import Config, EsftConfig, MeshConfig, ShardingConfig
from deepseek_jax.parallel import sharding
from deepseek_jax.parallel.mesh import make_mesh, per_device
from deepseek_jax.parallel.weights import gather_on_device, stored_arrays

AXES = ("experts", "expert_embed", "pair", "expert_mlp")


def spec_of(experts: int, strategy: str = "full_shard", esft: str = "", **mesh: int) -> jax.P:
    config = dataclasses.replace(
        Config(),
        mesh=MeshConfig(**{"fsdp": 1} | mesh),
        sharding=ShardingConfig(strategy, 0),
        esft=EsftConfig(experts=esft),
    )
    devices = int(np.prod([getattr(config.mesh, a) for a in mesh])) if mesh else 1
    placed = make_mesh(config, jax.devices()[:devices])
    w = nnx.Param(jnp.zeros((experts, 16, 2, 8)), out_sharding=AXES, eager_sharding=False)
    with jax.sharding.use_abstract_mesh(placed.abstract_mesh):
        found = sharding.specs(nnx.State({"w": w}), sharding.storage_rules(config)[0])
    return found["w"].get_value()


BY_EXPERTS = jax.P(("expert", "data", "fsdp"), ("stage",), None, "tensor")
BY_EMBED = jax.P("expert", ("data", "fsdp", "stage"), None, "tensor")


@pytest.mark.parametrize(
    "experts, options, wanted",
    [
        (8, dict(fsdp=4, expert=2), BY_EXPERTS),
        (8, dict(fsdp=2, data=2), BY_EXPERTS),
        (6, dict(fsdp=4), BY_EMBED),
        (8, dict(expert=4), BY_EMBED),  # nothing divides further
        (8, dict(fsdp=4, esft="table.json"), BY_EMBED),
        (8, dict(fsdp=4, strategy="hybrid_shard"), jax.P(("expert", "fsdp"), *BY_EXPERTS[1:])),
        (8, dict(fsdp=4, strategy="no_shard"), jax.P("expert", ("stage",), None, "tensor")),
    ],
    ids=str,
)
def test_specs(experts, options, wanted):
    assert spec_of(experts, **options) == wanted


def test_a_gather_brings_a_device_its_experts():
    """In their order, on 2 x 4 devices; its transpose sums over the devices that used them."""
    config = dataclasses.replace(Config(), mesh=MeshConfig(fsdp=4, expert=2))
    w_EDPF = np.arange(8 * 16 * 2 * 8, dtype=np.float32).reshape(8, 16, 2, 8)
    with jax.set_mesh(make_mesh(config, jax.devices()[:8])):
        w = jax.device_put(w_EDPF, BY_EXPERTS)

        def used(w):
            v = nnx.Param(w, out_sharding=AXES, eager_sharding=False)
            arrays, specs = stored_arrays(v)
            out = jax.P(("data", "fsdp", "expert"), None, None, None, "tensor")

            def one_device(*arrays):
                mine = gather_on_device(arrays, specs, jnp.float32)
                return mine[None]

            return per_device(one_device, tuple(specs), out)(*arrays)

        found, back = jax.vjp(used, w)
        assert found.shape == (8, 4, 16, 2, 8)
        for place, mine in enumerate(np.asarray(found)):
            half = place % 2  # the expert axis is the innermost of the devices
            assert np.array_equal(mine, w_EDPF[4 * half : 4 * half + 4])
        (gradient,) = back(jnp.ones_like(found))
    assert np.array_equal(np.asarray(gradient), np.full_like(w_EDPF, 4))
