"""How the tests compile (support/quick.py)."""

import jax
import jax.numpy as jnp
import pytest

from tests.support import quick


@pytest.mark.parametrize(
    "dtype, narrow",
    [
        *((d, False) for d in ("float32", "int32", "bool", "int8", "uint16")),
        *((d, True) for d in ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")),
    ],
)
def test_narrow_floats_are_found(dtype, narrow):
    """Anywhere in a program: as an argument, a result, and between float32 ones."""
    programs = (
        (lambda x: (x > 0, x.astype(jnp.float32)), dtype),
        (lambda x: x.astype(dtype), "float32"),
        (lambda x: jnp.reshape(x, (2, 3)).astype(dtype).T.astype(jnp.float32), "float32"),
    )
    for f, given in programs:
        lowered = jax.jit(f).lower(jax.ShapeDtypeStruct((6,), given))
        assert quick.is_narrow(lowered.compiler_ir()) == narrow


def test_a_float32_program_is_compiled_the_older_way(monkeypatch):
    """Of these two programs the one: what quick.py replaces of JAX is still what compiles."""
    asked = []
    monkeypatch.setattr(quick, "older_loops", lambda: asked.append(True) or {})
    for dtype in ("float32", "bfloat16"):
        jax.jit(lambda x: x * 3 + 1).lower(jax.ShapeDtypeStruct((7,), dtype)).compile()
    assert asked == [True]
