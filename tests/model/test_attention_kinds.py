"""Attention is chosen in one place, and a further kind is one class."""

import dataclasses
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.config import attention_shape
from deepseek_jax.config.options import ModelConfig
from deepseek_jax.inference.generation.bound import BoundModel
from deepseek_jax.inference.generation.engine import Engine
from deepseek_jax.model.attention import kinds
from deepseek_jax.model.attention.interface import Attention, CacheShape
from deepseek_jax.model.layers import Linear
from deepseek_jax.train.state import make_layout
from tests.support import ROOT, conversion

# What only the one question asks: config/options.py.
QUESTION = re.compile(r"num_key_value_heads (is|==|!=)|if \w+(\.\w+)*\.num_key_value_heads\b")
MODEL = ModelConfig(
    vocab_size=16,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    v_head_dim=4,
)


def test_one_place_asks_which_attention_a_model_has():
    asking = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "deepseek_jax").rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if QUESTION.search(line)
    ]
    assert asking == ["deepseek_jax/config/sections/model.py"]


def test_every_kind_has_widths_and_a_class():
    assert kinds.KINDS.keys() == attention_shape._SHAPES.keys()
    public = {n for n in vars(Attention) if not n.startswith("_")} | {"__init__", "__call__"}
    for name, kind in kinds.KINDS.items():
        assert not {method for method in public if method not in vars(kind)}, name


class Projected(NamedTuple):
    v_BSF: jax.Array


class SumOfValues(nnx.Module):
    """Attention with equal weights: the mean of all values so far. Its cache holds the values."""

    def __init__(self, config, rngs, method="auto"):
        self.config = config
        width = config.num_attention_heads * config.value_head_dim
        self.v_proj = Linear(config, config.hidden_size, width, ("embed", "heads"), rngs)
        self.o_proj = Linear(config, width, config.hidden_size, ("heads", "embed"), rngs)

    @staticmethod
    def cache_shapes(config):
        return (CacheShape(None, config.num_attention_heads * config.value_head_dim),)

    def __call__(self, x_BSD, rope, segment_ids_BS):
        return self.attend(self.project(x_BSD, rope), segment_ids_BS)

    def project(self, x_BSD, rope):
        return Projected(self.v_proj(x_BSD))

    def attend(self, projected, segment_ids_BS):
        count_S1 = jnp.arange(1, projected.v_BSF.shape[1] + 1)[:, None]
        return self.o_proj(jnp.cumsum(projected.v_BSF, axis=1) / count_S1)

    def cache_entries(self, projected):
        return (projected.v_BSF,)

    def decoding_weights(self, mesh):
        return ()

    def decode(self, projected, cache, weights, start_B):
        new_BF, start = projected.v_BSF[:, 0], start_B[0]  # of one sequence, one token at a time
        values_BZF = cache[0].at[:, start].set(new_BF)
        seen_Z1 = (jnp.arange(values_BZF.shape[1]) <= start)[:, None]
        mean_BF = jnp.sum(values_BZF * seen_Z1, axis=1) / (start + 1)
        return self.o_proj(mean_BF[:, None]), (values_BZF,)


@pytest.mark.slow
def test_a_further_kind_is_one_class(monkeypatch):
    """It trains, prefills and decodes: the answer is that of whole forward passes."""
    monkeypatch.setitem(kinds.KINDS, "sum", SumOfValues)
    monkeypatch.setitem(
        attention_shape._SHAPES, "sum", lambda m: attention_shape.AttentionShape(4, 4, 2, 2)
    )
    monkeypatch.setattr(ModelConfig, "attention_kind", "sum")
    config = conversion.config_of(dataclasses.replace(MODEL, first_k_dense_replace=1))
    with conversion.on_mesh(config):
        mesh = jax.sharding.get_mesh()
        layout = make_layout(config, mesh)
        rng = np.random.default_rng(0)
        params, bias = (
            jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), state)
            for state in (layout.abstract.params, layout.abstract.bias)
        )
        params, bias = jax.device_put(
            (params, bias), (layout.shardings.params, layout.shardings.bias)
        )
        placed = BoundModel(layout.model, params, bias, mesh)
        ids = [3, 5, 7]
        for _ in range(4):
            net = placed.net()
            tokens = conversion.put(np.asarray([ids], np.int32))
            place = conversion.put(np.arange(len(ids), dtype=np.int32)[None])
            out = net(tokens, jnp.ones_like(tokens), place)
            ids.append(int(jnp.argmax(net.logits(out.hidden_BSD)[0, -1])))
    assert Engine(placed).generate([[3, 5, 7]], 4) == [ids[3:]]
