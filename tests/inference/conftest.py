"""What the tests of evaluation share."""

import pytest


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(transformers model, folder with its checkpoint and tokenizer): see `evaluation.write_model`."""
    from tests.support import evaluation  # with torch, which other tests of this folder do without

    folder = tmp_path_factory.mktemp("model")
    return evaluation.write_model(folder), folder
