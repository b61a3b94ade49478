"""train.remat=auto: what is kept by the memory of a device, beside what compiled steps keep."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from deepseek_jax.config.options import Config, MeshConfig, OffloadConfig, TrainConfig
from deepseek_jax.config.sections.training import REMAT_NAMES
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.plan import topology
from deepseek_jax.run import remat
from deepseek_jax.train import kept, state
from deepseek_jax.xla import program
from tests.support import invariance
from tests.support.small_runs import TINY, config_of

# Wide and short, so that what layers keep is most of a step's memory.
MODEL = dataclasses.replace(
    TINY, num_hidden_layers=8, first_k_dense_replace=2, n_shared_experts=2, q_lora_rank=24
)


def of(**options) -> Config:
    return dataclasses.replace(config_of(**{"dtype": "bfloat16"} | options), model=MODEL)


@functools.cache
def laid_out(config: Config) -> tuple[jax.sharding.Mesh, state.Layout]:
    mesh = make_mesh(config, jax.devices()[: invariance.devices_of(config)])
    return mesh, state.make_layout(config, mesh)


def sizes(config: Config) -> kept.Sizes:
    return kept.sizes_of(config, *laid_out(config))


def chosen(config: Config, room: int | None, beside: int = 0) -> tuple[str, str]:
    found, said = kept.chosen(config, *laid_out(config), room, beside)
    assert dataclasses.replace(found, train=config.train) == config
    return found.train.remat, said


def test_what_fits_is_kept():
    """From nothing to all, in the order of ORDER; what lies beside takes room; a name that is left out for
    want of room does not keep a smaller one out.
    """
    config = of(remat="auto")
    s = sizes(config)
    names = tuple(n for n in kept.ORDER if s.kept[n])
    assert set(names) == set(REMAT_NAMES) - {"layer_input", "exchange"}
    assert chosen(config, s.total(()) - 1)[0] == "full" == chosen(config, None)[0]
    for i in range(1, len(names) + 1):
        room = s.total(names[:i])
        found, said = chosen(config, room)
        assert found.startswith(f"save:{','.join(names[:i])}")
        assert said.startswith(f"remat auto: {found}, about ")
        assert chosen(config, room + 1000, 1000)[0] == found
    smallest = min(names, key=s.kept.get)
    assert chosen(config, s.total((smallest,)))[0] == f"save:{smallest}"


def test_where_auto_is_full():
    """On CPUs, where a run is told nothing; with stages; where it was not asked for nothing is said."""
    assert Config().train.remat == TrainConfig().remat == "auto"
    config = of(remat="auto", mesh=MeshConfig(fsdp=1, stage=2), accumulation=2)
    assert chosen(config, 10**15)[0] == "full"
    assert chosen(of(remat="dots"), 10**15) == ("dots", "")
    mesh = make_mesh(of(), jax.devices()[:1])
    assert remat.settled(of(remat="auto"), mesh, None, None).train.remat == "full"
    offload = OffloadConfig(activations="layer_input,attention")
    assert "attention" not in chosen(of(remat="auto", offload=offload), 10**15)[0]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=1), MeshConfig(fsdp=2, expert=2)])
def test_bytes_of_each_name_beside_compiled_steps(mesh):
    """What a name adds to a step's temporaries on CPUs, in float32: the estimate, to a quarter of it. XLA
    rounds buffers up, and what is kept for backward was alive for a while without that.
    """
    base = of(mesh=mesh, dtype="float32", remat="full", sequence_length=128)
    base = dataclasses.replace(base, moe=dataclasses.replace(base.moe, capacity_factor=2.0))
    expected = sizes(base).kept

    def temporaries(choice: str) -> int:
        config = dataclasses.replace(base, train=dataclasses.replace(base.train, remat=choice))
        placed, layout = topology.lay_out(config, jax.devices()[: invariance.devices_of(config)])
        step = topology.compile_step(config, placed, layout, {})
        return program.memory(step.compiled).temporaries

    full = temporaries("full")
    for name in (n for n in kept.ORDER if expected[n]):
        more = temporaries(f"save:{name}") - full
        assert more == pytest.approx(expected[name], rel=0.25), name
    assert np.all([expected[n] > 0 for n in ("attention", "experts_hidden", "mlp_gate_up")])
