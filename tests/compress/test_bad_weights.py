"""Weights that are not finite: every operation refuses them in one line, and writes nothing."""

import numpy as np
import pytest

from deepseek_jax.compress import __main__ as command
from deepseek_jax.errors import UserError
from tests.support import compression, conversion

TENSOR = "model.layers.2.mlp.experts.5.up_proj.weight"
OPERATIONS = {
    "merge": ["--experts=4"],
    "prune": ["--experts=4"],
    "prune by router norm": ["--experts=4", "--method=router_norm"],
    "layers": ["--drop=1"],
    "width": ["--moe-intermediate=8"],
    "shared-core": ["--rank=4", "--steps=1"],
}
QUICK = ("merge", "prune by router norm")  # weights read to be run, and copied without a look


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with one NaN."""
    weights = conversion.random_weights(compression.SIGMOID, 0)
    weights[TENSOR] = weights[TENSOR].copy()
    weights[TENSOR][3, 1] = np.nan
    path = tmp_path_factory.mktemp("bad")
    return compression.folder(path / "model", compression.SIGMOID, weights=weights)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in OPERATIONS]
)
def test_not_finite(name, folder, tmp_path):
    out = tmp_path / "out"
    given = ["--text=" + compression.text(tmp_path / "text.txt")]
    kind = name.split()[0]
    with pytest.raises(UserError) as refused:
        command.main([kind, folder, str(out), *OPERATIONS[name], *given])
    said = str(refused.value)
    assert TENSOR in said and "not finite" in said and "\n" not in said
    left = {p.name for p in tmp_path.iterdir()} - {"text.txt"}
    assert left <= {"out.fit"}  # where a fit goes on, which is not the model
