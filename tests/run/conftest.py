"""What the tests of whole runs share."""

import numpy as np
import pytest

from deepseek_jax.parallel import xla_options
from tests.support.quick import options_of, quick_options


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    """Steps of runs in this process, as quick.jit compiles them. A teacher has dtypes of its own."""
    own = xla_options.xla_options

    def options(config, *more):
        quickly = quick_options() if config.distill.teacher else options_of(config)
        return own(config, *more) | quickly

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla_options, "xla_options", options)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for i in range(40):
        words = rng.choice(["route", "expert", "token", "mesh", "shard", "layer"], 400)
        (folder / f"{i:02d}.txt").write_text(" ".join(words))
    return folder
