"""Sharded checkpoints as they are written into a bucket of S3, here into a folder: the way there is the
same but for the names of the two. tests/launch/test_ray.py has a server of S3 and two processes."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from deepseek_jax.checkpoint import object_store
from deepseek_jax.checkpoint.sharded import ShardedTensors
from deepseek_jax.tensorfile import regions
from deepseek_jax.tensorfile.arrays import flatten
from tests.support.checkpoints import abstract, assert_same_bits, explicit_mesh, put, values


def written(folder):
    state, mesh = values(), explicit_mesh(2, 4)
    with jax.set_mesh(mesh):
        sharded = put(state, mesh)
        finish = object_store.start(folder, sharded)
        for array in jax.tree.leaves(sharded):
            array.delete()  # as donation does
        finish()
    object_store.merge(folder, jax.process_count())
    return state


def test_what_is_written_is_read(tmp_path):
    (tmp_path / "state").mkdir()
    state = flatten(written(tmp_path / "state"))
    reader = ShardedTensors(tmp_path / "state")
    assert reader.shapes.keys() == state.keys()
    for name, array in state.items():
        got = reader.read(name, regions.whole(array.shape))
        assert got.dtype == array.dtype and got.tobytes() == array.tobytes(), name


def test_orbax_reads_a_copy_on_a_disk(tmp_path):
    (tmp_path / "state").mkdir()
    state = written(tmp_path / "state")
    with ocp.StandardCheckpointer() as orbax:
        got = orbax.restore(tmp_path / "state", abstract(state, explicit_mesh(4, 1)))
    assert_same_bits(got, state)


def test_the_server_of_a_bucket():
    base = object_store.base
    assert object_store.is_needed("s3://bucket/a") and not object_store.is_needed("gs://bucket/a")
    assert base("gs://bucket/a", {}) == "gs://bucket/a/" and base("/a b", {}) == "file:///a%20b/"
    amazon = {"driver": "s3", "bucket": "bucket", "path": "a/b/"}
    assert base("s3://bucket/a/b", {}) == amazon
    assert base("s3://bucket/a/b/", {"AWS_REGION": "eu-west-1"}) == amazon | {
        "aws_region": "eu-west-1"
    }
    other = amazon | {"endpoint": "http://127.0.0.1:9", "aws_region": "us-east-1"}
    assert base("s3://bucket/a/b", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9/"}) == other
    with_key = base("s3://bucket/a/b", {"AWS_ACCESS_KEY_ID": "key"})
    assert with_key == amazon | {"aws_credentials": {"type": "environment"}}


@pytest.mark.parametrize(
    ("limit", "chunk"), [(1 << 20, [4, 6]), (64, [2, 6]), (12, [1, 3]), (4, [1, 1])]
)
def test_a_chunk_is_a_part_of_a_shard(monkeypatch, limit, chunk):
    """No two devices have a part of the same one."""
    monkeypatch.setattr(object_store, "CHUNK_BYTES", limit)
    mesh = explicit_mesh(2, 4)
    array = jax.device_put(
        np.zeros((8, 24), np.float32), jax.NamedSharding(mesh, jax.P(*mesh.axis_names[:2]))
    )
    assert object_store.chunk_of(array) == chunk
