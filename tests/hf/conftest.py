"""Checkpoints that transformers saved, each made once per file of tests."""

import functools

import pytest


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """variant -> (transformers model, folder with its checkpoint, config.json as on the hub)."""
    from tests.support import hf_families as families  # needs torch

    @functools.cache
    def make(variant):
        folder = tmp_path_factory.mktemp(variant)
        return families.save(variant, folder), str(folder)

    return make
