"""plan tune: the search for the largest batch, refused rows, tables; and real rows on two devices."""

import itertools
import json
import random

import jax
import numpy as np
import pytest

from deepseek_jax.config.options import IGNORE, STRATEGIES, Config, MoeConfig, TrainConfig, value_of
from deepseek_jax.data import fields
from deepseek_jax.errors import UserError
from deepseek_jax.plan import __main__ as plan
from deepseek_jax.plan import host, topology
from deepseek_jax.plan.tune import batch, changes, command, compare, exercises, rows, steps, tables
from deepseek_jax.xla import program
from tests.support import ROOT
from tests.support.small_runs import TINY

SHAPE = {"data": 1, "stage": 1, "fsdp": 2, "expert": 1, "context": 1, "tensor": 1}
SMALL = Config(model=TINY, train=TrainConfig(batch_size=4, sequence_length=16, dtype="float32"))
FLAGS = [
    f"--config={ROOT / 'configs' / 'tiny.py'}",
    "--config.model.num_hidden_layers=1",
    "--config.model.first_k_dense_replace=0",
    "--config.model.vocab_size=320",
    "--config.train.sequence_length=16",
    "--config.train.batch_size=4",
]


def searched(bytes_of, room: int, most: int) -> tuple[batch.Found, list[int]]:
    """What is found, and the sizes that were compiled, in order."""
    compiled: list[int] = []

    def compile_(size: int) -> int:
        compiled.append(size)
        return bytes_of(size)

    return batch.search(compile_, room, most), compiled


def test_the_largest_that_fits_is_found():
    """Beside trying all sizes, on rising functions: lines, steps, powers, plateaus."""
    rng = random.Random(0)
    for _ in range(300):
        most = rng.choice([1, 2, 7, 64, 300])
        fixed, slope, power = rng.randrange(0, 50), rng.randrange(0, 9), rng.choice([0.5, 1, 1.7])
        block = rng.choice([1, 1, 4, 32])
        room = rng.randrange(1, 900)

        def bytes_of(n, fixed=fixed, slope=slope, power=power, block=block):
            return fixed + int(slope * (-(-n // block) * block) ** power)

        found, compiled = searched(bytes_of, room, most)
        fitting = [n for n in range(1, most + 1) if bytes_of(n) <= room]
        assert found.largest == max(fitting, default=0)
        assert found.ended == (found.largest == most)
        assert found.bytes == {n: bytes_of(n) for n in compiled}
        assert len(compiled) == len(set(compiled)) <= 2 * most.bit_length() + 2
        # Nothing is compiled that is more than twice what is known to fit by then, nor at a size beyond one
        # that does not fit.
        for i, size in enumerate(compiled):
            fits = [n for n in compiled[:i] if bytes_of(n) <= room]
            too_much = [n for n in compiled[:i] if bytes_of(n) > room]
            assert size <= 2 * max(fits, default=0.5) and size < min(too_much, default=most + 1)


def test_a_line_takes_few_programs():
    """As memory is: a state and so much a sequence. 1, 2, then where the line says and one beyond."""
    found, compiled = searched(lambda n: 1000 + 10 * n, 1000 + 10 * 37, 1024)
    assert found.largest == 37 and compiled == [1, 2, 4, 8, 16, 32, 37, 38]
    found, compiled = searched(lambda n: 1000 + 10 * n, 1005, 1024)
    assert (found.largest, compiled) == (0, [1])


def test_words_of_the_command_line():
    assert command.words(["remat", "batch", "--devices=2"]) == (["remat", "batch"], ["--devices=2"])
    assert command.words(["all", "--json"]) == (list(exercises.ABOUT), ["--json"])
    assert command.words(["--config", "batch"]) == ([], ["--config", "batch"])
    with pytest.raises(UserError, match="'speed' is nothing to tune. Choose from: batch, "):
        command.words(["speed"])


@pytest.mark.parametrize(
    "argv, said",
    [
        ([], "say what to tune"),
        (["batch", "--steps=0"], "whole number of 1 or more"),
        (["batch", "--memory=0"], "not a number above 0"),
        (["batch", "--out=/no/such/folder/x.json"], "does not exist"),
        (["batch", "--config.train.batches=3"], "batches"),
    ],
)
def test_mistakes(argv, said):
    with pytest.raises(UserError, match=said) as error:
        plan.main(["tune", *argv, *FLAGS])
    assert "\n" not in str(error.value)


def test_rows_that_make_no_sense_are_refused():
    of = {name: e.rows(SMALL, SHAPE, "cpu") for name, e in exercises.EXERCISES.items()}
    assert [r.name for r in of["strategies"]] == list(STRATEGIES)
    hybrid = next(r for r in of["strategies"] if r.name == "hybrid_shard")
    assert hybrid.changes["mesh.data"] == 2 and hybrid.changes["mesh.fsdp"] == 1
    assert all("mesh.expert=1" in r.refused for r in of["dispatch"])
    for row in of["offload"]:  # each is possible, and they differ in what is offloaded alone
        changes.checked(SMALL, row.changes)
        assert row.changes["train.remat"] == "full"
    assert [bool(r.refused) for r in of["prefetch"]] == [False, True, True, True]
    on_experts = exercises.dispatch(SMALL, SHAPE | {"expert": 2}, "gpu")
    assert [r.refused for r in on_experts] == ["", "", ""]
    assert not any(r.refused for r in exercises.prefetch(SMALL, SHAPE, "gpu"))


def test_every_row_names_options_that_there_are():
    for exercise, platform in itertools.product(exercises.EXERCISES.values(), ("cpu", "gpu")):
        for row in exercise.rows(SMALL, SHAPE | {"expert": 2}, platform):
            changed = changes.with_options(SMALL, row.changes)
            assert all(value_of(changed, n) == value for n, value in row.changes.items())
    with pytest.raises(TypeError):
        changes.with_options(SMALL, {"train.no_such": 1})
    with pytest.raises(UserError, match="offload.activations"):
        changes.checked(SMALL, {"offload.activations": "layer_input", "train.remat": "none"})


def test_rows_of_a_step():
    config = changes.with_options(SMALL, {"train.batch_size": 8, "train.sequence_length": 64})
    found = rows.of_a_step(config, fields.EXAMPLES)
    assert found.keys() == fields.EXAMPLES.keys()
    fields.check_batch(found, fields.EXAMPLES)
    scored = found["targets"] != IGNORE
    assert np.array_equal(found["next_tokens"] >= 0, scored) and 0.5 < scored.mean() < 1
    assert found["tokens"].max() < TINY.vocab_size


def test_a_drawn_state_is_one_of_the_layout():
    """The same arrays in the same places as the state that training begins with."""
    config = changes.with_options(SMALL, {"mesh.fsdp": 1, "mesh.expert": 2})
    mesh, layout = topology.lay_out(config, jax.devices()[:2])
    with jax.set_mesh(mesh):
        drawn = steps.drawn_state(config, layout)
    like = layout.abstract_sharded()  # what a run is created or restored in
    assert jax.tree.structure(drawn) == jax.tree.structure(like)
    for a, b in zip(*map(jax.tree.leaves, (drawn, like)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        assert np.isfinite(np.asarray(a)).all()


class FakeStep:
    """A step of so many bytes a sequence, that takes a second a sequence."""

    made: list["FakeStep"] = []

    def __init__(self, config: Config, devices, room) -> None:
        if config.train.batch_size == 6:
            raise UserError("train.batch_size=6 is refused here.")
        self.config, self.mesh = config, jax.make_mesh(tuple(SHAPE.values()), tuple(SHAPE))
        self.memory = program.Memory(1, 0, 100 * config.train.batch_size - 1, 0)
        self.compile_seconds = 0.0
        self.ran = self.freed = 0
        self.made.append(self)

    def run(self) -> float:
        self.ran += 1
        return float(self.config.train.batch_size) + self.ran  # the first does not count

    def rounds(self) -> list[int]:
        return [1]

    def free(self) -> None:
        self.freed += 1


def test_rows_in_turns(monkeypatch):
    """What does not fit is compiled and not run; the others twice, the second time backwards."""
    monkeypatch.setattr(compare, "Step", FakeStep)
    FakeStep.made = []
    said: list[str] = []
    setting = compare.Setting(jax.devices()[:2], 1000, 4, 60.0, said.append)
    sizes = {"two": 2, "six": 6, "four": 4, "many": 12}
    given = [exercises.Row(n, {"train.batch_size": size}) for n, size in sizes.items()]
    given.append(exercises.Row("no", {}, "there is none"))
    results: list[dict] = []
    compare.compared(SMALL, given, setting, results)
    found = {r["name"]: r for r in results}
    assert found["six"]["refused"].startswith("train.batch_size=6") and "bytes" not in found["six"]
    assert found["no"]["refused"] == "there is none"
    assert found["many"]["fits"] is False and "seconds" not in found["many"]
    # Runs 1 and 4 warm up; 2, 3, 5 and 6 count: 2 + the mean of 3 and 5.
    assert found["two"]["seconds"] == 2 + 4 and found["two"]["steps"] == 4
    assert found["four"]["tokens_per_second"] == 4 * 16 / (4 + 4)
    assert [s.ran for s in FakeStep.made] == [6, 6, 0] and FakeStep.made[0].freed == 2
    assert [s for s in said if " ms" in s][:4] == [
        "two: 4,500.0 ms",
        "four: 6,500.0 ms",
        "four: 8,000.0 ms",
        "two: 6,000.0 ms",
    ]


def result_of(found: dict) -> dict:
    return {
        "devices": 2,
        "device": "Some CPU",
        "cores": 2,
        "jax": "0",
        "room": 10**9,
        "tokens": "random",
        "other_cores": 0.0,
        "flags": ["--config=c.py", "--config.train.batch_size=4", "--config.seed=3"],
        "exercises": found,
    }


def test_tables(monkeypatch):
    monkeypatch.setattr(compare, "Step", FakeStep)
    setting = compare.Setting(jax.devices()[:2], 1000, 1, 60.0, lambda _: None)
    results: list[dict] = []
    largest = compare.largest_batch(SMALL, setting, results, most=16)
    assert largest.largest == 5 and not largest.ended  # 2 devices: 10 sequences of 100 bytes
    batch_found = {"rows": results, "largest": 5, "ended": False}
    text = tables.text(result_of({"batch": batch_found}))
    assert "the largest that fits: 5: python train.py --config=c.py --config.seed=3" in text
    assert text.count("--config.train.batch_size=10") >= 1 and "batch_size=4" not in text
    assert "NO" in text
    nothing = {"rows": [], "largest": 0, "ended": False}
    interrupted = result_of({"batch": nothing}) | {"interrupted": True}
    assert "not even one sequence" in tables.text(interrupted)
    assert "Interrupted" in tables.text(interrupted)


def test_what_was_found_is_kept_when_interrupted(monkeypatch, tmp_path, capsys):
    def stop(config, rows, setting, results):
        results.append({"name": "full_shard", "options": {}, "bytes": 5, "fits": True})
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "compared", stop)
    out = tmp_path / "tuned.json"
    argv = ["tune", "strategies", "remat", "--devices=2", f"--out={out}", "--json", *FLAGS]
    assert plan.main([*argv, "--config.compile.cache_dir=off"]) == 130
    kept = json.loads(out.read_text(encoding="utf-8"))
    assert kept == json.loads(capsys.readouterr().out) and kept["interrupted"]
    assert kept["exercises"]["strategies"]["rows"][0]["name"] == "full_shard"
    assert "remat" not in kept["exercises"]


def test_memory_of_the_host():
    """As /proc/meminfo has it, or less in a control group."""
    with open("/proc/meminfo", encoding="ascii") as f:
        total = int(f.readline().split()[1]) * 1024
    found = host.memory()
    assert found is not None and 0 < found <= total
    assert command.room(None, jax.devices()[:2]) <= found // 2 and command.room(2, []) == 2 * 10**9


@pytest.mark.slow
def test_strategies_and_batch_for_real(tmp_path, capsys):
    """On two devices: what fits is run, bytes are those of the compiler, and divided states are smaller."""
    out = tmp_path / "tuned.json"
    flags = [*FLAGS, "--config.train.dtype=float32", "--config.compile.cache_dir=off"]
    argv = ["tune", "strategies", "batch", "dispatch", "--devices=2", "--steps=2", "--most=2"]
    assert plan.main([*argv, f"--out={out}", "--json", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(out.read_text(encoding="utf-8"))
    by_name = {r["name"]: r for r in found["exercises"]["strategies"]["rows"]}
    assert by_name.keys() == set(STRATEGIES) and all(r["fits"] for r in by_name.values())
    assert by_name["full_shard"]["arguments"] < by_name["zero1"]["arguments"]
    assert by_name["zero1"]["arguments"] < by_name["no_shard"]["arguments"]
    for r in by_name.values():
        assert r["tokens_per_second"] == pytest.approx(4 * 16 / r["seconds"])
    sizes = found["exercises"]["batch"]["rows"]
    assert [r["micro_batch"] for r in sizes] == [1, 2] and found["exercises"]["batch"]["ended"]
    assert sizes[0]["bytes"] <= sizes[1]["bytes"]
    assert all("mesh.expert=1" in r["refused"] for r in found["exercises"]["dispatch"]["rows"])
    # Too little room for anything: nothing runs, and that is said.
    assert plan.main([*argv[:3], "--devices=2", "--memory=0.0001", *flags]) == 0
    said = capsys.readouterr().out
    assert "not even one sequence of a device fits" in said and " ms" not in said


@pytest.mark.slow
def test_dispatch_for_real(capsys):
    """On mesh.expert=2 all three methods run, with their padding and rounds."""
    config = changes.with_options(SMALL, {"moe": MoeConfig(experts_implementation="rounds")})
    config = changes.with_options(config, {"mesh.fsdp": 1, "mesh.expert": 2})
    setting = compare.Setting(jax.devices()[:2], 10**9, 2, 60.0, lambda _: None)
    results: list[dict] = []
    shape = SHAPE | {"fsdp": 1, "expert": 2}
    compare.compared(config, exercises.dispatch(config, shape, "cpu"), setting, results)
    assert [r["name"] for r in results] == ["all_to_all", "all_gather", "ring"]
    assert all(r["seconds"] > 0 and r["padding"] >= 1 and r["rounds"] >= 1 for r in results)
