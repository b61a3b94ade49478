"""Which kernels config.train.attention means on which GPU, and what is refused."""

import re
import warnings

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.config.options import Config, TrainConfig
from deepseek_jax.config.validation import validate
from deepseek_jax.errors import UserError
from deepseek_jax.model.attention import fused, implementations
from deepseek_jax.model.attention.fused import FusedAttention
from deepseek_jax.parallel.mesh import make_mesh

TRITON = FusedAttention("triton", interpret=True)


def test_what_a_kind_of_gpu_takes(monkeypatch):
    missing = implementations.missing
    assert missing("mosaic", "bfloat16", 9, 192, 128) is None
    assert missing("mosaic", "float16", 9, 96, 96) is None
    assert missing("triton", "float32", 8, 192, 128) is None
    assert "wgmma" in missing("mosaic", "bfloat16", 10, 192, 128)
    assert "16 bits" in missing("mosaic", "float32", 9, 192, 128)
    assert "the model's are 256 and 256" in missing("mosaic", "bfloat16", 9, 256, 256)
    assert "capability 8" in missing("triton", "bfloat16", 7, 64, 64)
    assert implementations.kernels("auto", jnp.bfloat16, 192, 128) is None  # a CPU
    monkeypatch.setattr(implementations, "on_cpu", lambda: False)
    monkeypatch.setattr(implementations, "DEFAULTS", {9: "mosaic"})
    implementations._default.cache_clear()
    for major, wanted in ((8, None), (9, FusedAttention("mosaic")), (10, None)):
        monkeypatch.setattr(implementations, "_major", lambda major=major: major)
        assert implementations.kernels("auto", jnp.bfloat16, 192, 128) == wanted
        assert implementations.kernels("blocks", jnp.bfloat16, 192, 128) is None
        assert implementations.kernels("cudnn", jnp.bfloat16, 192, 128) is None
    implementations._default.cache_clear()


def test_blocks_where_no_kernels_work(monkeypatch, capsys):
    """One line says why, once; kernels that were asked for by name are refused."""
    monkeypatch.setattr(implementations, "on_cpu", lambda: False)
    monkeypatch.setattr(implementations, "_major", lambda: 9)
    monkeypatch.setattr(implementations, "DEFAULTS", {9: "mosaic"})
    monkeypatch.setattr(implementations, "missing", lambda name, *_: f"no {name} today")
    implementations._default.cache_clear()
    for _ in range(2):
        assert implementations.kernels("auto", jnp.bfloat16, 192, 128) is None
    said = capsys.readouterr().err
    implementations._default.cache_clear()
    assert said.count("\n") == 1 and "mosaic: no mosaic today" in said and "blocks" in said
    with pytest.raises(UserError, match="config.train.attention=triton: no triton today. Set"):
        implementations.kernels("triton", jnp.bfloat16, 192, 128)


@pytest.mark.slow
def test_kernels_are_tried(monkeypatch):
    """Forward and all gradients against NumPy; wrong ones are found."""
    assert implementations.try_kernels(TRITON, "bfloat16", 24, 16, length=128) is None
    right = fused.backward

    def backward(*args):
        dq, dk, dv = right(*args)
        return dq, dk * 1.1, dv

    monkeypatch.setattr(fused, "backward", backward)
    said = implementations.try_kernels(TRITON, "bfloat16", 24, 16, length=128)
    assert said is not None and "gradient of keys is wrong by 0.1" in said


def test_options():
    for name in ("auto", "blocks", "mosaic", "triton"):
        validate(Config(train=TrainConfig(attention=name)))
    with pytest.raises(UserError, match="attention='flash' is not known"):
        validate(Config(train=TrainConfig(attention="flash")))
    for name in ("mosaic", "triton"):
        config = Config(train=TrainConfig(attention=name))
        wanted = f"config.train.attention={name} needs NVIDIA GPUs, and these are cpu"
        with pytest.raises(UserError, match=re.escape(wanted)):
            make_mesh(config, jax.devices()[:1])


def test_jax_still_has_the_triton_backend():
    """JAX 0.11 and 0.12 announce its end. When this fails, GPUs older or newer than Hopper have blocks and
    cuDNN: take the choice out of config.train.attention and say so in docs/gpu.md."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for name in fused.MODULES:
            assert implementations.missing(name, "bfloat16", 9, 128, 128) is None
