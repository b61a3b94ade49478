"""What the tests of whole runs share."""

import numpy as np
import pytest


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for i in range(40):
        words = rng.choice(["route", "expert", "token", "mesh", "shard", "layer"], 400)
        (folder / f"{i:02d}.txt").write_text(" ".join(words))
    return folder
