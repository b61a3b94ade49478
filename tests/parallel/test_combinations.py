"""Options of which each has tests of its own, together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config.options import MeshConfig, OffloadConfig, OptimizerConfig, ShardingConfig
from deepseek_jax.errors import UserError
from deepseek_jax.inference.opener import open_model
from deepseek_jax.model.layout import place_model
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.train import loss_scale, state, workdir
from tests.support import conversion
from tests.support.small_runs import ADAMW, config_of, losses_of, same, trainer

REPLICAS = MeshConfig(data=2, fsdp=1, expert=2)
FLOAT16 = config_of(
    ADAMW,
    REPLICAS,
    sharding=ShardingConfig("hybrid_shard", min_weight_size=0, gradient_compression="int8"),
    dtype="float16",
)


@pytest.mark.slow
def test_float16_with_compressed_gradients():
    """The scaled gradients of each replica are divided by the scale before they are rounded: what is owed
    does not depend on the scale, so that it may change. 20 steps stay as near to float32's, whose loss falls
    by 1, as int8 and float16 alone do: see their own tests.
    """
    t, full = (
        trainer(FLOAT16),
        trainer(
            config_of(ADAMW, REPLICAS, sharding=ShardingConfig("hybrid_shard", min_weight_size=0))
        ),
    )
    (s, ours), (_, exact) = t.run(t.start(), 20), full.run(full.start(), 20)
    ours, expected = losses_of(ours), losses_of(exact)
    assert expected[-1] < expected[0] - 0.8
    assert 0 < np.abs(ours - expected).max() < 0.05 and int(s.skipped_steps) == 0
    owed = jax.tree.leaves(s.residual)
    assert (
        all(a.dtype == jnp.float32 for a in owed) and max(float(jnp.abs(a).max()) for a in owed) > 0
    )
    with jax.set_mesh(t.mesh):

        def at(scale: float) -> state.TrainState:
            scaled = s.loss_scale._replace(scale=np.float32(scale))
            placed = jax.device_put(scaled, t.layout.shardings.loss_scale)
            return s._replace(loss_scale=placed)

    (low, (m,)), (usual, (n,)) = (t.run(at(2.0**power), 1, 20) for power in (14, 16))
    assert float(m.grad_norm) == pytest.approx(float(n.grad_norm), rel=1e-2)
    # A quantum of int8 either way, where float16 rounded a gradient otherwise.
    for a, b, before in zip(*(jax.tree.leaves(x.residual) for x in (low, usual, s)), strict=True):
        largest = max(np.abs(a).max(), np.abs(b).max(), np.abs(before).max())
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= 4 * largest
        assert np.median(np.abs(np.asarray(a) - np.asarray(b))) <= 0.2 * largest + 1e-12


@pytest.mark.slow
def test_an_overflow_leaves_what_compression_owes():
    t = trainer(FLOAT16)
    first, _ = t.run(t.start(), 2)
    with jax.set_mesh(t.mesh):
        high = jax.device_put(
            loss_scale.LossScale(np.float32(2.0**30), np.int32(7), np.int32(1)),
            t.layout.shardings.loss_scale,
        )
    s, (m,) = t.run(first._replace(loss_scale=high), 1, 2)
    assert (
        not np.isfinite(m.grad_norm)
        and int(s.skipped_steps) == 1
        and float(s.loss_scale.scale) == 2.0**29
    )
    assert same(
        (s.params, s.opt_state, s.bias, s.residual),
        (first.params, first.opt_state, first.bias, first.residual),
    )
    usual, _ = t.run(first, 1, 2)
    again, (m,) = t.run(s._replace(loss_scale=first.loss_scale), 1, 2)
    assert np.isfinite(m.grad_norm) and same(
        (again.params, again.residual), (usual.params, usual.residual)
    )


OPTIMIZERS = {
    "muon": OptimizerConfig("muon", learning_rate=1e-2, warmup_steps=2),
    "adafactor": OptimizerConfig("adafactor", learning_rate=3e-2, warmup_steps=2),
    "adafactor moment": OptimizerConfig(
        "adafactor", learning_rate=3e-2, warmup_steps=2, first_moment=0.9, min_dim_size_to_factor=1
    ),
    "lion": OptimizerConfig("lion", learning_rate=1e-3, warmup_steps=2),
    "sgd": OptimizerConfig("sgd", learning_rate=3e-2, warmup_steps=2, momentum=0.9),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_streamed_updates_of_every_optimizer(name):
    """The update layer by layer, from the host's memory, against that of the whole state. Float32 rounding;
    muon's Newton-Schulz steps enlarge that of small directions.
    """
    whole, streamed = (
        trainer(
            config_of(
                OPTIMIZERS[name],
                MeshConfig(fsdp=2, expert=2),
                offload=OffloadConfig(optimizer_state=on),
            )
        )
        for on in (False, True)
    )
    kinds = {a.sharding.memory_kind for a in jax.tree.leaves(streamed.start().opt_state) if a.ndim}
    assert kinds == {"pinned_host"}
    (s, plain), (o, ours) = (t.run(t.start(), 5) for t in (whole, streamed))
    assert {a.sharding.memory_kind for a in jax.tree.leaves(o.opt_state) if a.ndim} == {
        "pinned_host"
    }
    np.testing.assert_allclose(losses_of(ours), losses_of(plain), rtol=1e-5)
    start = jax.tree.leaves(whole.start().params)
    for (path, a), b, first in zip(
        jax.tree_util.tree_leaves_with_path(o.params), jax.tree.leaves(s.params), start, strict=True
    ):
        conversion.assert_close(
            a - first, b - first, 1e-3 if name == "muon" else 1e-4, conversion.path_of(path)
        )
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(o.opt_state), jax.tree.leaves(s.opt_state), strict=True
    ):
        conversion.assert_close(a, b, 1e-3 if name == "muon" else 1e-4, conversion.path_of(path))


@pytest.mark.slow
def test_generate_from_a_float16_run(tmp_path):
    """The likeliest tokens after a prompt, in float16 from its checkpoint, are those that the same weights
    choose in float32.
    """
    t = trainer(FLOAT16)
    s, _ = t.run(t.start(), 12)
    config = dataclasses.replace(
        FLOAT16, model=dataclasses.replace(FLOAT16.model, max_position_embeddings=64)
    )
    workdir.write_config(str(tmp_path), config)
    with jax.set_mesh(t.mesh):
        checkpointer = Checkpointer(str(tmp_path / "checkpoints"))
        checkpointer.save(12, state.to_tree(s), {"tokens_seen": 1})
        checkpointer.close()
    model = open_model(str(tmp_path), dtype="float16").model
    assert model.full_config.train.dtype == "float16"

    def is_rounded(a, b) -> bool:
        return np.array_equal(a, np.asarray(b).astype(a.dtype))

    assert all(
        is_rounded(np.asarray(a), b)
        for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(s.params), strict=True)
    )
    prompt = [5, 17, 3]
    ids = model.generate(prompt, max_tokens=8, stop_ids=())
    with jax.set_mesh(model.mesh):
        c = model.full_config
        train = dataclasses.replace(c.train, dtype="float32")
        exact = place_model(dataclasses.replace(c, train=train), model.mesh)

        @jax.jit
        def logits(params, bias, tokens):
            net: Transformer = exact.merge_for_inference(params, bias)
            place = jnp.arange(tokens.shape[1])[None]
            return net.logits(net(tokens, jnp.ones_like(tokens), place).hidden_BSD)

        text = conversion.put(np.asarray([prompt + ids]))
        found_SV = np.asarray(logits(model.params, model.bias, text))[0, len(prompt) - 1 : -1]
    assert len(ids) == 8
    for chosen, logit_V in zip(
        ids, found_SV, strict=True
    ):  # float16 has 11 bits: two that are nearer than this may change places
        assert logit_V[chosen] >= logit_V.max() - 4e-3 * np.abs(logit_V).max(), (
            chosen,
            logit_V.argmax(),
        )


def test_float16_is_refused_where_the_host_would_convert():
    with pytest.raises(UserError, match="config.train.dtype=float16"):
        config_of(
            ADAMW,
            MeshConfig(fsdp=2),
            offload=OffloadConfig(parameters=True),
            dtype="float16",
            remat="full",
        )
