"""compression.json: what it says is read back, composes over operations, and is checked."""

import json

import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.hf import compression_map
from deepseek_jax.hf.compression_map import Document
from tests.support.compression import GROUPED

BEFORE = compression_map.unchanged(GROUPED)


def test_a_model_that_nothing_was_done_to():
    assert compression_map.expert_rows(GROUPED) == (
        1,
        2,
        3,
        4,
    )  # one dense, the last predicts ahead
    assert BEFORE.layer_map == (0, 1, 2, 3) and len(BEFORE.expert_map) == 4
    assert BEFORE.expert_map[0] == tuple((e,) for e in range(8))
    assert BEFORE[2:] == (8, 4)


def test_operations_compose():
    """Layers dropped, experts pruned twice, then merged: always numbers of the first source."""
    fewer = BEFORE.of_layers([0, 1, 3], [0, 2, 3])
    assert fewer.layer_map == (0, 1, 3)
    kept = [[(1,), (4,), (6,), (7,)], [(0,), (2,), (3,), (5,)], [(0,), (1,), (2,), (3,)]]
    pruned = fewer.of_experts(kept)
    assert pruned.expert_map[1] == ((0,), (2,), (3,), (5,))
    again = pruned.of_experts([[(0,), (3,)]] * 3)
    assert [row for row in again.expert_map] == [((1,), (7,)), ((0,), (5,)), ((0,), (3,))]
    merged = pruned.of_experts([[(0, 2), (1, 3)]] * 3)
    assert merged.expert_map[0] == ((1, 6), (4, 7))
    assert merged.of_experts([[(0, 1)]] * 3).expert_map[1] == ((0, 3, 2, 5),)
    assert len(merged.without_mtp(1).expert_map) == 2
    assert merged[2:] == (8, 4)


def test_a_file_is_read_back(tmp_path):
    document = Document(BEFORE, (), "abc").then({"kind": "prune", "method": "reap"}, BEFORE)
    path = tmp_path / "compression.json"
    path.write_text(compression_map.dump(document))
    assert compression_map.read_document(str(path)) == document
    assert compression_map.read(str(tmp_path)) == BEFORE


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version=1"),
        ({"layer_map": [0, 4]}, "4 is not a whole number from 0 to 3"),
        ({"expert_map": [[[8]]]}, "8 is not a whole number from 0 to 7"),
        ({"expert_map": [[0]]}, "a list is missing"),
        ({"layer_map": [True]}, "True is not a whole number"),
        ({"operations": [{"kind": "magic"}]}, "an operation is of none of the kinds"),
        ({"teacher": {}}, "it has no 'num_experts'"),
    ],
)
def test_another_file_is_refused(tmp_path, change, said):
    value = json.loads(compression_map.dump(Document(BEFORE, (), "abc")))
    path = tmp_path / "compression.json"
    path.write_text(json.dumps(value | change))
    with pytest.raises(UserError) as error:
        compression_map.read(str(path))
    assert said in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="missing"):
        compression_map.read(str(tmp_path / "none.json"))
