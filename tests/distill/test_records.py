"""What a teacher says of a token: against NumPy and transformers, on several meshes; and that it does not
depend on the rows beside it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.config.options import MeshConfig, ModelConfig
from deepseek_jax.distill.program import RecordProgram
from deepseek_jax.model import head
from deepseek_jax.model.layout import ModelWeights, place_model
from deepseek_jax.objectives.base import Frozen
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.train.batch import put_batch
from tests.support import conversion, invariance

B, S, D, V = 4, 7, 16, 40
TEMPERATURES = (1.0, 2.0, 0.5)


def expected(logits: np.ndarray, top: int, words: int) -> tuple[np.ndarray, ...]:
    """A loop over tokens in float64: (ids, logits less the largest, log-sum-exps)."""
    ids, values, lse = [], [], []
    for z in logits.reshape(-1, logits.shape[-1])[:, :words].astype(np.float64):
        order = sorted(range(words), key=lambda i: (-z[i], i))[:top]
        ids.append(order)
        values.append(z[order] - z.max())
        lse.append([np.log(np.sum(np.exp((z - z.max()) / t))) for t in TEMPERATURES])
    return tuple(np.array(a).reshape(*logits.shape[:-1], -1) for a in (ids, values, lse))


@pytest.mark.parametrize(
    ("mesh", "top", "words"),
    [
        pytest.param({"fsdp": 2}, 5, V, marks=pytest.mark.slow),
        pytest.param({"fsdp": 2, "tensor": 2}, 5, V, marks=pytest.mark.slow),
        ({"tensor": 4}, 12, V),  # more than a device has
        ({"fsdp": 2, "tensor": 2}, 23, 23),  # all words but padding
    ],
)
def test_the_likeliest_words_of_a_sharded_vocabulary(mesh, top, words, monkeypatch):
    """Whole numbers as logits, exact in float32 and many of them equal: of these the lowest ids, whatever
    device has them. In chunks that do not divide the tokens.
    """
    monkeypatch.setattr(head, "CHUNK_TOKENS", 3)
    rng = np.random.default_rng(0)
    hidden = rng.integers(-2, 3, (B, S, D)).astype(np.float32)
    kernel = rng.integers(-1, 2, (D, V)).astype(np.float32)
    config = dataclasses.replace(
        conversion.config_of(ModelConfig()), mesh=MeshConfig(**{"fsdp": 1} | mesh)
    )
    with jax.set_mesh(make_mesh(config, jax.devices()[: invariance.devices_of(config)])):
        weight = jax.device_put(kernel, jax.P("fsdp", "tensor"))

        def run(hidden, weight):
            one = nnx.Param(weight, out_sharding=("embed", "vocab"), eager_sharding=False)
            scales = jnp.float32(TEMPERATURES)
            return head.scan_vocab_top(hidden, head.Head(one, tied=False), top, words, scales)

        found = jax.jit(run)(conversion.put(hidden), weight)
    ids, values, lse = expected(hidden @ kernel, top, words)
    np.testing.assert_array_equal(found[0], ids)
    np.testing.assert_array_equal(found[1], values)
    np.testing.assert_allclose(found[2], lse, rtol=2e-6, atol=2e-6)  # float32 sums of 40 words


# Groups of experts, MTP layers and dense layers; a router whose rows fill several rounds.
MODEL = dataclasses.replace(
    invariance.MODEL, num_hidden_layers=3, num_nextn_predict_layers=0, aux_loss_alpha=0.0
)


@functools.cache
def teacher(dtype: str = "float32", **mesh):
    """(program, weights, mesh) of a small model."""
    given = {k: mesh.pop(k) for k in ("dispatch", "capacity_factor") if k in mesh}
    config = dataclasses.replace(invariance.variant(**given, **mesh), model=MODEL)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, dtype=dtype))
    on = make_mesh(config, jax.devices()[: invariance.devices_of(config)])
    with jax.set_mesh(on):
        placed = place_model(config, on)
        same = invariance.initial_state(MODEL)
        weights = jax.device_put(ModelWeights(same.params, same.bias), placed.shardings)
        frozen = Frozen(placed, lambda: weights)
        program = RecordProgram(frozen, 6, MODEL.vocab_size, invariance.LENGTH, on)
        program.compile()
    return program, weights, on


def records(rows: dict[str, np.ndarray], micro: int, **mesh) -> dict[str, np.ndarray]:
    """Of rows [n, S], in micro-batches of so many."""
    program, weights, on = teacher(**mesh)
    with jax.set_mesh(on):
        batch = put_batch(rows, micro, on)
        found = program.of_batch(weights, batch, (1.0, 2.0))
        return {k: np.asarray(a).reshape(-1, *a.shape[2:]) for k, a in found.items()}


MESHES = [
    {},
    {"fsdp": 4},
    {"fsdp": 4, "expert": 2},
    {"fsdp": 2, "tensor": 2},
    {"fsdp": 2, "expert": 2, "capacity_factor": 0.5},  # several rounds
    {"fsdp": 2, "expert": 2, "dtype": "bfloat16"},
]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_record_does_not_depend_on_its_neighbours(mesh):
    """Rows in another order, in other micro-batches, among padding: bit for bit the same."""
    rows = {
        k: a for k, a in invariance.rows(0).items() if k in ("tokens", "segment_ids", "positions")
    }
    plain = records(rows, 16, **mesh)
    order = np.random.default_rng(1).permutation(16)
    moved = records({k: a[order] for k, a in rows.items()}, 8, **mesh)
    for name, a in plain.items():
        np.testing.assert_array_equal(moved[name], a[order], err_msg=name)
    alone = {k: np.zeros_like(a) for k, a in rows.items()}
    for k, a in rows.items():
        alone[k][5] = a[3]
    found = records(alone, 8, **mesh)
    for name, a in plain.items():
        np.testing.assert_array_equal(found[name][5], a[3], err_msg=name)
        assert not np.delete(found[name], 5, axis=0).any()
    padding = rows["segment_ids"] == 0
    assert padding.any() and not any(a[padding].any() for a in plain.values())
