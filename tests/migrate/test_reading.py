"""YAML, JSON, Hydra and command lines as keys with places."""

import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.migrate import loading, references
from deepseek_jax.migrate.command import parse
from deepseek_jax.migrate.reading import from_text, scalar

# each level has nine of the one before
LAUGHS = "x0: &x0 {k: 1}\n" + "".join(
    f"x{i}: &x{i} {{{', '.join(f'k{j}: *x{i - 1}' for j in range(9))}}}\n" for i in range(1, 8)
)


def values(text):
    return {e.key: e.value for e in from_text(text, "a.yaml").entries}


def test_numbers_as_people_mean_them():
    """PyYAML alone reads 5e-5, 1e8 and 1.0e5 as texts; OmegaConf and argparse read numbers."""
    found = values(
        "a: 5e-5\nb: 1e8\nc: 1.0e5\nd: -2E+3\ne: .5e-1\nf: '5e-5'\ng: 100_000\nh: 1e\ni: e5\n"
    )
    assert found == {
        "a": 5e-5, "b": 1e8, "c": 1e5, "d": -2000.0, "e": 0.05, "f": "5e-5", "g": 100000, "h": "1e",
        "i": "e5",
    }  # fmt: skip
    # as YAML 1.1, which these tools read: `no` is False; a time and a date stay texts
    assert values("a: no\nb: 00:03:30:00\nc: 2025-01-01\nd: null\ne: ~\n") == {
        "a": False, "b": "00:03:30:00", "c": "2025-01-01", "d": None, "e": None,
    }  # fmt: skip
    assert [scalar(t) for t in ("5e-5", "8", "no", "a b", "<IP>", "x:y")] == [
        5e-5, 8, False, "a b", "<IP>", "x:y",
    ]  # fmt: skip


def test_keys_have_paths_and_lines():
    source = from_text(
        "a:\n  b: 1\n  c: [1, 2]\n  d:\n    - x: 1\n    - y\ne: {}\nf: []\n", "r.yaml"
    )
    assert [(e.key, e.value, e.where) for e in source.entries] == [
        ("a.b", 1, "r.yaml:2"),
        ("a.c", [1, 2], "r.yaml:3"),
        ("a.d.0.x", 1, "r.yaml:5"),
        ("a.d.1", "y", "r.yaml:6"),
        ("e", {}, "r.yaml:7"),
        ("f", [], "r.yaml:8"),
    ]


def test_duplicate_keys_are_kept():
    """A guide shows fsdp_auto_wrap_policy twice in one block: the last one counts, and both are said."""
    text = "fsdp_config:\n  wrap: TRANSFORMER\n  cls: X\n  wrap: SIZE\n  n: 1e8\n"
    source = from_text(text, "g.yaml")
    assert source.value("fsdp_config.wrap") == "SIZE"
    ((earlier, later),) = source.duplicates
    assert (earlier.value, earlier.where, later.where) == ("TRANSFORMER", "g.yaml:2", "g.yaml:4")
    nested = from_text("a:\n  x: 1\na:\n  y: 2\n", "g.yaml")
    assert [e.key for e in nested.entries] == ["a.y"] and nested.duplicates[0][0].key == "a.x"


def test_anchors_and_merges():
    found = values("base: &b {x: 1, y: 2}\nuse:\n  <<: *b\n  y: 3\nagain: *b\n")
    assert found == {"base.x": 1, "base.y": 2, "use.x": 1, "use.y": 3, "again.x": 1, "again.y": 2}


@pytest.mark.parametrize(
    "text, named",
    [
        ("a: !!python/object/apply:os.system ['ls']\n", "tag"),
        ("a: !include x.yaml\n", "tag"),
        ("a: [1, 2\n", "not YAML"),
        ("{\"a\": 1,}", "not JSON"),
        ("a: 1\n---\nb: 2\n", "2 documents"),
        ("", "is empty"),
        ("- 1\n", "no mapping"),
        ("a: &a [*a]\n", "too deep"),
        (LAUGHS, "more than"),
        ("{{ template }}", "template"),
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_one_line(text, named):
    name = "a.json" if text.startswith("{") else "a.yaml"
    with pytest.raises(UserError, match=named) as error:
        from_text(text, name)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_yaml_with_braces():
    """gpt-neox writes it, with commas at the end and comments."""
    assert values('{\n  # sizes\n  "a": 1e-3,\n}\n') == {"a": 1e-3}


def test_json_keeps_lines_and_duplicates():
    source = from_text('{\n\t"a": {"b": 1e9, "b": "auto"},\n\t"c": [0.9, 0.95]\n}\n', "ds.json")
    assert [(e.key, e.value, e.where) for e in source.entries] == [
        ("a.b", "auto", "ds.json:2"),
        ("c", [0.9, 0.95], "ds.json:3"),
    ]
    assert source.duplicates[0][0].value == 1e9 and source.form == "json"


def test_references():
    """As OmegaConf has them; what leads nowhere stays as it is."""
    text = (
        "a: {b: 4, c: 2e-4, name: x}\nd: ${a.b}\ne: ${multiply:${a.b},${d}}\nf: ${.g}\ng: 7\n"
        "h: {i: '${..g}', j: '${a.name}-run'}\nk: ${a}\nl: ${nowhere}\nm: ${m}\nn: ${oc.env:HOME_X,3}\n"
        "o: ${oc.env:SET}\np: ${oc.env:MY_TOKEN}\nq: ${divide_ceil:7,2}\nr: ${oc.select:no.such,5}\n"
    )
    source = references.resolved(from_text(text, "a.yaml"), {"SET": "1e-3", "MY_TOKEN": "secret"})
    found = {e.key: e.value for e in source.entries}
    assert (found["d"], found["e"], found["f"]) == (4, 16, 7)
    assert (found["h.i"], found["h.j"], found["k.b"], found["k.c"]) == (7, "x-run", 4, 2e-4)
    assert (found["l"], found["m"]) == ("${nowhere}", "${m}")
    assert (found["n"], found["o"], found["p"]) == (3, 1e-3, "${oc.env:MY_TOKEN}")
    assert (found["q"], found["r"]) == (4, 5)


def test_defaults_of_hydra(tmp_path):
    """Groups from folders beside the file; its own keys win, unless _self_ stands first."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "small.yaml").write_text("n_layers: 2\nname: ${..tag}\n")
    (tmp_path / "base.yaml").write_text("lr: 1e-3\ntag: base\n")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "defaults:\n  - base\n  - model: small\n  - override hydra/launcher: x\nlr: 5e-5\n"
    )
    (source,) = loading.load([str(recipe)], [], {})
    found = {e.key: e.value for e in source.entries}
    assert found["lr"] == 5e-5 and found["model.n_layers"] == 2 and found["model.name"] == "base"
    assert (
        source.duplicates[0][0].where == "base.yaml:1"
        or "base.yaml" in source.duplicates[0][0].where
    )
    recipe.write_text("defaults:\n  - _self_\n  - base\nlr: 5e-5\n")
    (source,) = loading.load([str(recipe)], [], {})
    assert source.value("lr") == 1e-3
    recipe.write_text("defaults:\n  - optim: adam\n")
    with pytest.raises(UserError, match="optim/adam.yaml"):
        loading.load([str(recipe)], [], {})
    recipe.write_text("defaults:\n  - ../../../etc/passwd\n")
    with pytest.raises(UserError, match="not in"):
        loading.load([str(recipe)], [], {})


@pytest.mark.parametrize(
    "line, launcher, script, flags",
    [
        (
            "NCCL_DEBUG=INFO torchrun --nproc_per_node=8 --nnodes 2 --master_addr=<IP> run.py a.b='x' --bf16",
            (
                "torchrun",
                {"env.NCCL_DEBUG": "INFO", "nproc_per_node": 8, "nnodes": 2, "master_addr": "<IP>"},
            ),
            "run.py",
            {"a.b": "x", "bf16": True},
        ),
        (
            "accelerate launch --config_file f.yaml -m pkg.sft --report_to wandb tensorboard --no_cuda",
            ("accelerate launch", {"config_file": "f.yaml"}),
            "pkg.sft",
            {"report_to": ["wandb", "tensorboard"], "cuda": False},
        ),
        (
            "deepspeed --num_gpus 4 train.py --lr_scheduler_kwargs '{\"min_lr_rate\": 0.1}' --bf16 True",
            ("deepspeed", {"num_gpus": 4}),
            "train.py",
            {"lr_scheduler_kwargs.min_lr_rate": 0.1, "bf16": True},
        ),
        (
            "python -u -m torch.distributed.run --nproc-per-node 2 t.py --data-path 0.5 a 0.5 b --eps -1e-8",
            ("torchrun", {"nproc_per_node": 2}),
            "t.py",
            {"data-path": [0.5, "a", 0.5, "b"], "eps": -1e-8},
        ),
        (
            "export A=1\ntrl sft \\\n  --x 1 --x 2",
            ("the environment", {"env.A": 1}),
            "trl sft",
            {"x": 2},
        ),
    ],
)
def test_command_lines(line, launcher, script, flags):
    first, second = parse(line).sources
    assert (first.name, {e.key: e.value for e in first.entries}) == launcher
    assert (second.name, {e.key: e.value for e in second.entries}) == (script, flags)


def test_files_that_a_command_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.yaml").write_text("compute_environment: LOCAL_MACHINE\n")
    (tmp_path / "r.yaml").write_text("learning_rate: 1e-5\ndeepspeed: ds.json\n")
    (tmp_path / "ds.json").write_text('{"train_batch_size": 8}')
    line = "accelerate launch --config_file f.yaml s.py --config r.yaml --max_steps 5"
    found = loading.load([], [line], {})
    assert [s.name for s in found] == ["f.yaml", "r.yaml", "ds.json", "accelerate launch", "s.py"]
    assert [s.name for s in loading.load(["r.yaml"], [line], {})][:2] == ["r.yaml", "ds.json"]


def test_configs_by_name(tmp_path, monkeypatch):
    """As Hydra finds them; the flag is said to be read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scripts" / "conf").mkdir(parents=True)
    (tmp_path / "scripts" / "conf" / "gpt.yaml").write_text("max_steps: 5\n")
    for line in (
        "python scripts/pretrain.py --config-path=conf --config-name=gpt trainer.devices=8",
        "python scripts/pretrain.py --config gpt trainer.devices=8",
    ):
        assert [s.name for s in loading.load([], [line], {})] == ["gpt.yaml", "scripts/pretrain.py"]


def test_a_command_that_cannot_be_read():
    for line in ("torchrun 'x", "  ", "A=1"):
        with pytest.raises(UserError, match="--command"):
            parse(line)
