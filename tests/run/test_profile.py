"""Profile of a run, compilation cache, and the lines about both."""

import dataclasses
import glob
import gzip
import json
import os
import re
import subprocess
import sys
from collections import Counter

import jax
import numpy as np
import pytest

from deepseek_jax.cluster.ports import free_port
from deepseek_jax.config.options import MeshConfig, MoeConfig
from deepseek_jax.run import profile
from deepseek_jax.runtime import compile_cache
from deepseek_jax.xla import hlo, origin
from tests.support import ROOT, small_runs
from tests.support.runs import SHARED_CACHE, command, losses, with_own_cache


def environment(**more: str) -> dict[str, str]:
    """Of a process whose cache is its own."""
    return with_own_cache(os.environ) | {"JAX_PLATFORMS": "cpu"} | more


def run(args: list[str], cache, devices: int = 1) -> subprocess.CompletedProcess:
    env = environment(JAX_NUM_CPU_DEVICES=str(devices), XDG_CACHE_HOME=str(cache))
    return subprocess.run(
        [sys.executable, "train.py", *args],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory, corpus):
    """The same run twice, the second with a profile; both share a cache."""
    cache, out = tmp_path_factory.mktemp("cache"), []
    for more in ([], ["--config.profile.start=3", "--config.profile.steps=2"]):
        workdir = tmp_path_factory.mktemp("run")
        done = run(
            command(
                workdir,
                corpus,
                "--config.train.steps=6",
                "--config.model.num_nextn_predict_layers=0",
                "--config.eval.sample_prompt=",
                *more,
            ),
            cache,
        )
        assert done.returncode == 0, done.stderr
        out.append((workdir, done))
    return cache, out


@pytest.mark.slow
def test_the_second_start_reads_the_cache(runs):
    cache, [(first_dir, first), (second_dir, second)] = runs
    assert re.search(r"first step after [\d.]+ s \(compiled in [\d.]+ s\)", first.stdout), (
        first.stdout
    )
    assert re.search(
        r"first step after [\d.]+ s \(read from the cache in [\d.]+ s\)", second.stdout
    ), second.stdout
    kept = {
        os.path.basename(f).split("-")[0]
        for f in glob.glob(f"{cache}/deepseek_jax/cpu-{compile_cache.cpu_kind()}/*-cache")
    }
    assert {"jit_train_step", "jit_create", "jit_eval_step"} <= kept, kept
    # A program from the cache is the same machine code: the losses are equal to the last bit, with
    # a profile as without.
    assert losses(first_dir) == losses(second_dir)
    assert "First" not in second.stderr and "cache entry" not in second.stderr


def test_a_damaged_cache_stops_nothing(tmp_path):
    """As a kill in the middle of a write leaves it: the program is compiled again."""
    program = """
import glob, os, sys, jax, jax.numpy as jnp
from deepseek_jax.runtime import compile_cache
compile_cache.MIN_SECONDS = 0
compile_cache.use_cache(sys.argv[1], print)
def start():
    jax.clear_caches()  # what a process has read or compiled
    before = compile_cache.hits()
    result = float(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.arange(9.0)))
    print(result, compile_cache.hits() - before)
start()
start()
(file,) = glob.glob(sys.argv[1] + "/cpu-*/jit__lambda*-cache")
os.truncate(file, os.path.getsize(file) // 2)
start()
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    results, found = zip(*map(str.split, done.stdout.splitlines()), strict=True)
    assert len(results) == 3 and len(set(results)) == 1
    assert int(found[0]) == 0 and int(found[1]) == int(found[2]) + 1


def test_all_processes_find_what_process_0_kept(tmp_path):
    """Two processes with one folder: both read it the second time, with the same result."""
    program = """
import sys, numpy as np, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from deepseek_jax.runtime import compile_cache
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
compile_cache.MIN_SECONDS = 0
compile_cache.use_cache(sys.argv[3], print)
mesh = jax.make_mesh((4,), ("x",))
a = np.arange(32, dtype=np.float32).reshape(8, 4)
a = jax.make_array_from_callback(a.shape, NamedSharding(mesh, P("x")), lambda i: a[i])
for _ in range(2):
    jax.clear_caches()  # what a process has read or compiled
    before = compile_cache.hits()
    with jax.set_mesh(mesh):
        total = jax.jit(lambda a: jnp.sum(jnp.sin(a) * jnp.arange(4.0)))(a)
    print("\\nFOUND", float(total), compile_cache.hits() - before)
"""
    port = free_port()
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(port), str(i), str(tmp_path)],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    out = [p.communicate(timeout=200) for p in both]
    assert all(p.returncode == 0 for p in both), out
    # Gloo prints too.
    found = [re.findall(r"^FOUND (\S+) (\d+)$", text, re.MULTILINE) for text, _ in out]
    expected = np.sum(np.sin(np.arange(32.0).reshape(8, 4)) * np.arange(4.0))
    # On a busy machine process 1 may come to compile after process 0 has written, the first time too.
    for (first, second), allowed in zip(found, (("0",), ("0", "1")), strict=True):
        assert first[1] in allowed and second[1] == "1", found
        assert all(abs(float(total) - expected) < 1e-4 for total, _ in (first, second)), found
    assert len(glob.glob(f"{tmp_path}/cpu-*/jit__lambda*-cache")) == 1


def test_the_cache_does_not_grow_without_limit(tmp_path):
    for i, name in enumerate(("new-cache", "old-cache", "older-cache", "other")):
        (tmp_path / name).write_bytes(b"x" * 100)
        os.utime(tmp_path / name, (1000 - i, 1000 - i))
    compile_cache.forget_oldest(str(tmp_path), 200)
    assert sorted(os.listdir(tmp_path)) == ["new-cache", "old-cache", "other"]
    os.utime(tmp_path / "old-cache", (2000, 999))  # read since
    compile_cache.forget_oldest(str(tmp_path), 199)
    assert sorted(os.listdir(tmp_path)) == ["old-cache", "other"]
    compile_cache.forget_oldest(str(tmp_path), 0)
    assert os.listdir(tmp_path) == ["other"]


def test_use_cache(tmp_path, monkeypatch):
    names = (
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before, warned = {name: getattr(jax.config, name) for name in names}, []
    for name in SHARED_CACHE:
        monkeypatch.delenv(name, raising=False)
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
        default = compile_cache.use_cache("", warned.append)
        assert (
            default
            == str(tmp_path / "home" / "deepseek_jax" / f"cpu-{compile_cache.cpu_kind()}")
            == jax.config.jax_compilation_cache_dir
        )
        assert (
            jax.config.jax_persistent_cache_min_compile_time_secs == compile_cache.MIN_SECONDS
            and os.listdir(default) == []
        )
        assert compile_cache.use_cache(str(tmp_path / "own"), warned.append).startswith(
            str(tmp_path / "own")
        )
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "outside"))
        assert compile_cache.use_cache("", warned.append) == str(tmp_path / "outside")
        assert (
            compile_cache.use_cache("off", warned.append) == ""
            and not jax.config.jax_enable_compilation_cache
            and not warned
        )
        (tmp_path / "file").write_text("")  # root may write to any folder, but not below a file
        assert compile_cache.use_cache(str(tmp_path / "file"), warned.append) == ""
        assert (
            len(warned) == 1
            and "cannot be written" in warned[0]
            and "config.compile.cache_dir" in warned[0]
        )
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.mark.slow
def test_the_trace_and_its_table(runs):
    _, [_, (workdir, done)] = runs
    folder = workdir / "profile"
    [trace] = glob.glob(f"{folder}/plugins/profile/*/*.trace.json.gz")
    with gzip.open(trace) as f:
        assert len(json.load(f)["traceEvents"]) > 100
    lines = done.stdout.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("part "))
    rows = {
        line.split()[0]: line.split()[1:]
        for line in lines[
            head + 1 : lines.index(next(x for x in lines if x.startswith("profile of")))
        ]
    }
    shares = {name: float(cells[1].rstrip("%")) / 100 for name, cells in rows.items()}
    assert set(profile.PARTS) <= set(shares) and shares.pop("all") == 1
    assert abs(sum(shares.values()) - 1) < 0.0005 * len(
        shares
    )  # each is printed to a tenth of a percent
    # The others may print as 0.0% on a machine that does something else meanwhile.
    assert all(shares[name] > 0 for name in ("attention", "experts", "loss", "optimizer")), shares
    order = [
        line.split()[1].split("/")[0]
        for line in lines
        if line.startswith("step ") and "loss" in line and "held-out" not in line
    ]
    assert order == [str(n) for n in range(1, 7)], "a step was lost around the profile"
    assert f"profile of steps 3 to 4: {folder}" in done.stdout
    kept = json.loads((workdir / profile.SUMMARY).read_text())
    times = {name: sum(phases.values()) * 1e3 for name, phases in kept["parts"].items()}
    for name, cells in rows.items():
        if name != "all":
            assert abs(times[name] - float(cells[0])) <= 0.0051, name  # printed with two decimals
    assert kept["steps"] == "3 to 4"
    assert f"per device; steps {kept['steps']}" in (workdir / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["all_to_all", "all_gather", "ring"])
def test_parts_where_tokens_are_exchanged(method, tmp_path):
    """Dispatch, experts and combine apart, in both passes, with collectives where they belong."""
    config = dataclasses.replace(
        small_runs.config_of(mesh=MeshConfig(fsdp=1, expert=2)), moe=MoeConfig(dispatch=method)
    )
    t = small_runs.Trainer(config)
    s, _ = t.run(t.start(), 1)
    jax.profiler.start_trace(str(tmp_path))
    jax.block_until_ready(t.run(s, 2))
    jax.profiler.stop_trace()
    text = t.compiled.as_text()
    cost = profile.read(str(tmp_path), text, 2)
    assert cost.devices == 2
    for part in ("dispatch", "experts", "combine"):
        for phase in ("forward", "backward"):
            assert cost.part(part, phase) > 0, (part, phase, cost.seconds)
    module = hlo.Module(text)
    sources = origin.by_name(module)
    found = {
        (sources[i.name][:2], i.opcode)
        for instructions in module.computations.values()
        for i in instructions.values()
        if i.name in sources
    }
    opcode = {"all_to_all": "all-to-all", "all_gather": "all-gather", "ring": "collective-permute"}[
        method
    ]
    assert (("dispatch", "forward"), opcode) in found
    assert any(
        (("combine", "forward"), o) in found for o in (opcode, "reduce-scatter", "all-reduce")
    ), found
    assert not any(
        part not in ("experts", "attention", "route", "mlp", "loss")
        for (part, _), o in found
        if o == "dot"
    ), found


def test_time_is_counted_once(tmp_path):
    """A loop in a loop: only what runs inside counts, as often as it runs, for the scope it is in."""

    def f(x):
        def layer(x, w):
            with jax.named_scope("attention"):
                x = x @ w
            with jax.named_scope("experts"):
                return jax.lax.fori_loop(0, 3, lambda _, y: jax.numpy.tanh(y @ w), x), None

        return jax.lax.scan(layer, x, np.full((4, 256, 256), 1e-3, np.float32))[0]

    compiled = jax.jit(f).lower(np.ones((256, 256), np.float32)).compile()
    x = np.ones((256, 256), np.float32)
    jax.block_until_ready(compiled(x))
    jax.profiler.start_trace(str(tmp_path))
    for _ in range(2):
        jax.block_until_ready(compiled(x))
    jax.profiler.stop_trace()
    text = compiled.as_text()
    opcodes = {
        i.name: i.opcode
        for instructions in hlo.Module(text).computations.values()
        for i in instructions.values()
    }
    assert "while" in opcodes.values()
    events = profile.instructions(str(tmp_path), text)
    assert not {opcodes[e.name] for e in events} & set(profile.CONTAINERS)
    runs = {
        part: max(Counter(e.name for e in events if e.part == part).values())
        for part in ("attention", "experts")
    }
    assert runs == {"attention": 4 * 2, "experts": 4 * 3 * 2}
    cost = profile.read(str(tmp_path), text, 2)
    assert cost.devices == 1 and abs(sum(cost.shares().values()) - 1) < 1e-9
    np.testing.assert_allclose(cost.total * 2, sum(e.seconds for e in events), rtol=1e-9)
    assert max(e.seconds for e in events) <= cost.busy <= cost.total * 2 * (1 + 1e-9)
    with pytest.raises(ValueError, match="no trace"):
        profile.read(str(tmp_path / "none"), compiled.as_text(), 2)


def test_scopes():
    assert origin.scope_of("jit(train_step)/transpose(jvp(attention))/norm/mul") == "norm"
    assert (
        origin.scope_of("jit(train_step)/jvp(while)/body/attention/while/body/dot_general")
        == "attention"
    )
    assert origin.scope_of("jit(train_step)/jvp(jit(silu))/mul") == ""
    assert (
        hlo.Module(
            "HloModule jit_f, is_scheduled=true\n\n"
            "ENTRY %main (x: f32[]) -> f32[] {\n  ROOT %x = f32[] parameter(0)\n}\n"
        ).name
        == "jit_f"
    )


def test_init_is_the_same_at_any_optimisation_level():
    """The level that init_state compiles at changes no bit; others might contract other additions."""

    def draw(key):
        return jax.random.normal(key, (257, 129)) * 0.02

    key = jax.random.key(7)
    one, other = (
        jax.jit(draw, compiler_options={"xla_backend_optimization_level": level})(key)
        for level in (1, 3)
    )
    assert (np.asarray(one) == np.asarray(other)).all()
