"""93 public files: each migrates to a config that validates, or is refused for a known reason."""

import csv
import functools
import os

import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.migrate import report
from deepseek_jax.migrate.registry import TOOLS
from tests.support.migration import loaded, of_files

FOLDER = os.path.join(os.path.dirname(os.path.dirname(__file__)), "files", "migrate")
UNKNOWN = "no table knows this key"


@functools.cache
def expected():
    """What each ends in: devices ("-": as the file says), tool, outcome, keys or words of the refusal."""
    with open(os.path.join(FOLDER, "expected.tsv"), encoding="utf-8", newline="") as f:
        return {row["file"]: row for row in csv.DictReader(f, delimiter="\t")}


def migrated(name, **options):
    asked = expected()[name]["devices"]
    devices = None if asked == "-" else int(asked)
    return of_files([os.path.join(FOLDER, name)], devices=devices, **options)


def test_every_file_has_a_row():
    there = {f for f in os.listdir(FOLDER) if f not in ("SOURCES.md", "expected.tsv")}
    assert there == expected().keys()
    assert len(there) == 93


@pytest.mark.parametrize("name", list(expected()))
def test_each_ends_as_expected(name, tmp_path):
    """No traceback, no key unmentioned (of_files counts them), and the tool and the refusals of the table."""
    row = expected()[name]
    if row["outcome"] == "error":  # what no key alone says
        with pytest.raises(UserError) as e:
            migrated(name)
        assert row["refused"] in str(e.value)
        assert "\n" not in str(e.value)
        return
    found = migrated(name)
    assert found.m.readings[0].title == row["tool"]
    assert found.refused() == set(row["refused"].split())
    unknown = {e.key for e, v in found.lists.refused if v.why == UNKNOWN}
    assert unknown == ({"invalid_key", "another_invalid_key"} if "invalid_keys" in name else set())
    if row["outcome"] == "refused":
        line = report.refusal(found.lists)
        assert "\n" not in line
        assert "--allow=" in line
    else:
        written = loaded(os.path.join(tmp_path, "mine.py"), found)
        assert written == found.config  # what is written is what was validated


def test_tools_are_told_apart():
    """A file is of one tool: no two recognise it as well."""
    for name in expected():
        found = of_sources(name)
        for source in found:
            scores = sorted((tool.recognise(source) for tool in TOOLS.values()), reverse=True)
            assert scores[0] > 0, name
            kin = {t.kin for t in TOOLS.values() if t.recognise(source) == scores[0]}
            assert len(kin) == 1, (name, kin)


def of_sources(name):
    from deepseek_jax.migrate import loading

    return loading.load([os.path.join(FOLDER, name)], [], {})


def test_recipes_with_the_files_they_name():
    """What alone is refused for a file that is not here, is migrated with it."""
    factory = "hiyouga+LLaMA-Factory__examples__"
    names = ("train_full__qwen3_full_sft.yaml", "deepspeed__ds_z3_config.json")
    found = of_files([os.path.join(FOLDER, factory + name) for name in names], devices=8)
    assert not found.refused()
    assert found.option("sharding.strategy") == "full_shard"
    assert found.option("train.batch_size") == 16
    names = ("ascend__qwen3moe_full_sft_fsdp.yaml", "accelerate__fsdp_config.yaml")
    found = of_files([os.path.join(FOLDER, factory + name) for name in names])
    assert not found.refused()
    assert found.option("sharding.strategy") == "full_shard"
