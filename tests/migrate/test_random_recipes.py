"""Whatever stands in a file, each key is in one list, and what is wrong is one line."""

import random

import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.migrate import config_file, engine, launch, report
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.registry import TOOLS
from deepseek_jax.migrate.source import Entry, Source

VALUES = [
    True, False, None, "auto", "none", "no", "steps", "epoch", 0, 1, 2, 8, -1, 0.5, 1e-4, 1e30, "x", "1e-5",
    [], {}, [1, 2], ["a", "b"], "a\nb", "\x00\u2028'\"\"\"\\", float("nan"), float("inf"), "linear", "cosine",
    "bf16", "full_shard", "cpu", "3", "FULL_SHARD", 10**30, "???", "${a}",
]  # fmt: skip


def sources(rng):
    for name in rng.sample(list(TOOLS), rng.choice([1, 1, 2])):
        keys = rng.sample(list(TOOLS[name].table), min(len(TOOLS[name].table), rng.randint(1, 12)))
        entries = tuple(
            Entry(key.replace("*", "0"), rng.choice(VALUES), f"{name}.yaml:{i}")
            for i, key in enumerate(keys)
        )
        yield Source(name, entries, rng.choice(["yaml", "json", "flags", "launcher"]))


@pytest.mark.parametrize("seed", range(3))
def test_random_values(seed):
    rng = random.Random(seed)
    finished = 0
    for _ in range(60):
        given = list(sources(rng))
        m = Migration(devices=rng.choice([1, 8, 6, None]))
        try:
            engine.migrate(given, [s.name for s in given], m)
            found = report.lists(m)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        finished += 1
        lists = (found.became, found.no_effect, found.refused)
        keys = sum(len(r.source.all_keys()) for r in m.readings) + len(m.absent)
        assert sum(map(len, lists)) == keys
        command = launch.command(m, "mine.py")
        assert report.text(m, found, command, 100) and report.as_json(m, found, command)
        compile(config_file.text(m, "a test", command), "mine.py", "exec")
    assert finished
