"""What backward computes again, counted in the products of a traced step: `config.train.remat`."""

import dataclasses

import jax
import pytest

from deepseek_jax import objectives
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.train import state, step
from deepseek_jax.train.batch import abstract_batch
from tests.support import small_runs

LATENT = dataclasses.replace(small_runs.TINY, q_lora_rank=12)
GROUPED = dataclasses.replace(
    small_runs.TINY, kv_lora_rank=None, q_lora_rank=None, num_key_value_heads=1, head_dim=16
)
MODELS = {
    "latent, experts": LATENT,
    "grouped queries, dense": dataclasses.replace(GROUPED, first_k_dense_replace=2),
    "latent, both": dataclasses.replace(LATENT, first_k_dense_replace=1),
    "grouped queries, both": dataclasses.replace(GROUPED, first_k_dense_replace=1),
}


def products(model, remat: str) -> int:
    config = dataclasses.replace(small_runs.config_of(remat=remat), model=model)
    mesh = make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        layout = state.make_layout(config, mesh)
        objective = objectives.make(config)
        batch = abstract_batch(objective.fields, config, mesh, 0)
        traced = jax.make_jaxpr(step.make_train_step(config, layout, objective))
        return str(traced(layout.abstract_sharded(), batch)).count(" dot_general[")


@pytest.mark.parametrize(
    "model",
    [pytest.param(m, marks=pytest.mark.slow) if m.endswith("both") else m for m in MODELS],
)
def test_dots_computes_no_product_again(model):
    """As `none`, which keeps everything; `full` computes all of a layer's again but its last."""
    counts = {remat: products(MODELS[model], remat) for remat in ("none", "dots", "full")}
    assert counts["none"] == counts["dots"] < counts["full"], counts
