"""One small model for the tests of evaluation, and programs that compile quickly."""

import pytest

from deepseek_jax.inference import opener
from deepseek_jax.inference.evaluation import scorer
from tests.support import conversion


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Programs compile quickly."""
    with pytest.MonkeyPatch.context() as m:
        program = scorer._program
        m.setattr(scorer, "_program", lambda layout: conversion.jit(program(layout).__wrapped__))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(transformers model, folder with checkpoint and tokenizer): routed experts, grouped-query attention."""
    from tests.support import small_lm  # needs torch

    return small_lm.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def opened(made):
    return opener.open_model(str(made[1]))
