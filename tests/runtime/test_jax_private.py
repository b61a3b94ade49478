"""JAX's private parts: that what is used fits this version of JAX, and is still needed."""

import inspect
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import cache_key, distributed, shard_map, xla_bridge
from jax._src.clusters import ClusterEnv
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.cluster.ports import free_port
from deepseek_jax.runtime import jax_private
from tests.support import ROOT


def version(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:2])


OLDEST = version(re.search(r'"jax>=([\d.]+)', (ROOT / "pyproject.toml").read_text())[1])
INSTALLED = version(jax.__version__)


def test_nothing_private_is_used_elsewhere():
    files = [ROOT / "train.py", *(ROOT / "deepseek_jax").rglob("*.py")]
    found = {
        p.name
        for p in files
        if re.search(r"(import|from|\") *jax\._src", p.read_text(encoding="utf-8"))
    }
    assert found == {"jax_private.py"}


def gathers_of_a_partial_shard_map() -> int:
    mesh = jax.make_mesh(
        (2, 4), ("stage", "fsdp"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(
            lambda x: jnp.tanh(x) * 2,
            in_specs=P("stage"),
            out_specs=P("stage"),
            axis_names={"stage"},
        )
        sharding = NamedSharding(mesh, P("stage", "fsdp"))
        x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=sharding)
        return jax.jit(mapped).lower(x).compile().as_text().count("all-gather(")


def test_shard_map_needs_its_repair_in_jax_0_10_only(monkeypatch):
    assert OLDEST < (0, 11), "remove keep_explicit_axes_through_shard_map"
    name = "_shardy_shard_map_sharding"
    if hasattr(shard_map, name):
        monkeypatch.setattr(shard_map, name, inspect.unwrap(getattr(shard_map, name)))
    assert (gathers_of_a_partial_shard_map() > 0) == (INSTALLED < (0, 11))
    for _ in range(2):  # twice is as once
        jax_private.keep_explicit_axes_through_shard_map()
        assert gathers_of_a_partial_shard_map() == 0


def test_the_cache_key_of_cpus_can_be_repaired(monkeypatch):
    """Which name an entry has does not depend on the process after it. tests/run/test_profile.py
    reads such entries."""
    name = "_hash_accelerator_config"
    monkeypatch.setattr(cache_key, name, inspect.unwrap(getattr(cache_key, name)))
    before = getattr(cache_key, name)
    jax_private.name_cached_programs_by(lambda: "kind")
    assert getattr(cache_key, name) is not before, "its parameters have changed"
    told = []
    getattr(cache_key, name)(type("Hash", (), {"update": told.append})(), np.array(jax.devices()))
    assert len(told) == 1 and told[0].startswith(b"kind [(0, 0), (1, 0), ")


KEYS = """
import hashlib, sys, jax, numpy as np
from jax._src import cache_key
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
found = hashlib.sha256()
cache_key._hash_accelerator_config(found, np.array(jax.devices()))
print("\\nKEY", found.hexdigest())
"""


@pytest.mark.slow
def test_the_cache_key_of_cpus_still_depends_on_the_process():
    """If this fails, `name_cached_programs_by` can go."""
    port = str(free_port())
    both = [
        subprocess.Popen([sys.executable, "-c", KEYS, port, i], stdout=subprocess.PIPE, text=True)
        for i in "01"
    ]
    keys = [re.search("KEY (.*)", p.communicate(timeout=120)[0])[1] for p in both]
    assert keys[0] != keys[1]


def test_what_is_opened_has_the_parameters_that_are_given():
    """cluster/discovery.py, cluster/exchange.py, runtime/environment.py."""
    found = inspect.signature(ClusterEnv.auto_detect_unset_distributed_params).parameters
    assert list(found) == [
        "coordinator_address",
        "num_processes",
        "process_id",
        "local_device_ids",
        "cluster_detection_method",
        "initialization_timeout",
    ]
    assert distributed.global_state.client is None is jax_private.coordination_client()
    assert xla_bridge.backends_are_initialized() is True


def test_a_program_is_compiled_for_given_devices():
    """Here those of this process; deepseek_jax.plan compiles for GPUs that are not here."""
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    x = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, P("a", "b")))
    with jax.set_mesh(mesh):
        lowered = jax.jit(jnp.sum).lower(x)
    compiled = jax_private.compile_for(lowered, mesh.devices.reshape(-1), {})
    assert compiled.get_compiled_memory_stats().argument_size_in_bytes == 4 * 4
    assert "all-reduce" in compiled.hlo_modules()[0].to_string()


def test_cudnn_is_still_behind_a_private_door():
    """If the last part fails, jax.nn.dot_product_attention can take its place."""
    fused = jax_private.cudnn_attention()
    assert fused.AttentionLayout.BTNH.value == 0
    q, v = (jax.ShapeDtypeStruct((1, 128, 2, width), jnp.bfloat16) for width in (192, 128))

    def public(q, v):
        return jax.nn.dot_product_attention(q, q, v, is_causal=True, implementation="cudnn")

    with pytest.raises(ValueError):
        jax.eval_shape(public, q, v)
