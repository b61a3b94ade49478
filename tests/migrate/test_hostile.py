"""Files and command lines that nobody should have written: each ends in one line, soon, and harms nothing."""

import json
import time

import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.migrate import command, loading, references, script
from deepseek_jax.migrate.arithmetic.batch import _micro_batches
from deepseek_jax.migrate.arithmetic.devices import Layout
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.reading import LARGEST, from_text
from deepseek_jax.migrate.source import Entry
from deepseek_jax.migrate.tools import megatron_handlers
from tests.support.migration import migrate

RECIPE = "model_name_or_path: a\ndataset_name: b\nper_device_train_batch_size: 2\nmax_length: 128\n"
DIGITS = "9" * 4000


def values(text, name="a.yaml"):
    return {e.key: e.value for e in from_text(text, name).entries}


def multiplied(first: str, times: int, levels: int, of: str) -> str:
    """Each anchor has so many of the one before."""
    lines = [f"x0: &x0 {first}"]
    for i in range(1, levels):
        inner = ", ".join([f"*x{i - 1}"] * times)
        lines.append(f"x{i}: &x{i} {of.format(inner)}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "text, named",
    [
        (multiplied("[1, 2]", 9, 9, "[{}]"), "more than"),
        (multiplied("{<<: {}}", 9, 30, "[{}]"), "more than"),  # no leaf in it
        (multiplied("{k: 1}", 9, 30, "{{<<: [{}]}}"), "more than"),
        (f"x: &x {list(range(5000))}\n" + "".join(f"y{i}: *x\n" for i in range(9)), "more than"),
        ("x: &x {a: 1, b: 2}\n" + "y: *x\n" * 7_000, "more than"),
        ("a: &x {<<: *x, b: 1}\n", "too deep"),
        ("a: " + "[" * 1200, "too deep"),
        ("".join(" " * i + "a:\n" for i in range(500)), "too deep"),
        ("a: {<<: words}\n", "<< with no mapping"),
        ("a: {<<: [1]}\n", "<< with no mapping"),
        ("a: *nothing\n", "undefined alias"),
        ("a:\n\tb: 1\n", "a.yaml:2 is not YAML"),
        ("a: \x00\n", "not YAML"),
        ("a: 'b\n", "not YAML"),
        ("? [a]\n: 1\n", "no plain text"),
        ("# nothing\n", "is empty"),
        ("[]", "no mapping"),
    ],
    ids=lambda v: v[:20] if len(v) < 200 else "",
)
def test_yaml(text, named):
    started = time.monotonic()
    with pytest.raises(UserError, match=named) as error:
        values(text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert time.monotonic() - started < 20


def test_what_is_odd_and_can_be_read():
    """Byte order mark, CRLF, merges of merges, tags on scalars, halves of characters, control characters."""
    assert values("x: &x {a: 1, b: 1}\ny: &y {<<: *x, b: 2}\nz: {<<: *y, c: 3}\n") == {
        "x.a": 1, "x.b": 1, "y.a": 1, "y.b": 2, "z.a": 1, "z.b": 2, "z.c": 3,
    }  # fmt: skip
    assert values("a: 1\r\nb:\r\n  c: 2\r\n") == {"a": 1, "b.c": 2}
    found = values("a: .inf\nb: !!float hello\nc: !!bool maybe\nd: !!int x\ne: 1_0e3\n")
    assert found == {"a": float("inf"), "b": "hello", "c": "maybe", "d": "x", "e": 10_000.0}
    assert values(f"a: {DIGITS}{DIGITS}\n") == {
        "a": DIGITS * 2
    }  # more than Python makes a number of
    assert values("a: 1\nb: {<<: {}}\n") == {"a": 1, "b": {}}
    assert values('{"a": "\\ud83d\\ude00", "b": "\\ud83d"}', "a.json") == {"a": "😀", "b": "�"}
    (entry,) = from_text('"\\e[31mred\\n": "\\e[0m"\n', "a.yaml").entries
    assert entry.label == "a.yaml:1 ?[31mred=?[0m"
    twice = from_text("a: 1\na: {<<: {}}\n", "a.yaml")
    assert [e.key for e in twice.entries] == ["a"] and twice.duplicates[0][0].value == 1


def test_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "latin.yaml").write_bytes("a: é\n".encode("latin-1"))
    (tmp_path / "wide.yaml").write_text("a: 1\n", encoding="utf-16")
    (tmp_path / "large.yaml").write_text("a: 1\n" * (LARGEST // 5 + 1))
    (tmp_path / "mark.yaml").write_bytes(b"\xef\xbb\xbf" + RECIPE.replace("\n", "\r\n").encode())
    for name, said in {
        "folder.yaml": "Is a directory",
        "latin.yaml": "no text in UTF-8",
        "wide.yaml": "no text in UTF-8",
        "large.yaml": "and a recipe at most",
        "missing.yaml": "No such file",
        "/dev/zero": "more than",
    }.items():
        with pytest.raises(UserError, match=said):
            loading.load([name], [], {})
    assert loading.load(["mark.yaml"], [], {})[0].value("per_device_train_batch_size") == 2


@pytest.mark.parametrize(
    "value",
    [DIGITS, f"-{DIGITS}", "1e999", "[[1]]", "{a: {b: 1}}", "'1'", ".nan", "-1", "0", "1e30"],
)
@pytest.mark.parametrize(
    "key",
    ["per_device_train_batch_size", "learning_rate", "max_steps", "warmup_steps", "save_steps", "seed",
     "max_length", "num_train_epochs", "optim", "report_to", "lr_scheduler_kwargs", "fsdp"],
)  # fmt: skip
def test_values(key, value):
    """A verdict or one line, whatever a key holds."""
    text = "".join(line for line in RECIPE.splitlines(True) if not line.startswith(key))
    try:
        found = migrate(f"{text}{key}: {value}\n", devices=8)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert len(found.lists.became) + len(found.lists.no_effect) + len(found.lists.refused) >= 4


def test_references_that_multiply():
    """Lists are refused; texts and numbers that grow too large stay as they are written."""

    def resolved(text, **environ):
        source = references.resolved(from_text(text, "a.yaml"), environ)
        return {e.key: e.value for e in source.entries}

    chain = "v0: xxxxxxxxxx\n"
    for i in range(1, 30):
        chain += f"v{i}: " + f"${{v{i - 1}}}" * 4 + "\n"
    assert max(len(str(v)) for v in resolved(chain).values()) <= references.LONGEST + 20
    numbers = "n0: 9\n" + "".join(
        f"n{i}: ${{multiply:${{n{i - 1}}},${{n{i - 1}}}}}\n" for i in range(1, 20)
    )
    assert resolved(numbers)["n3"] == 9**8
    assert resolved("a: ${multiply:x,99999999999}\nb: ${div:1,0}\n") == {
        "a": "${multiply:x,99999999999}", "b": "${div:1,0}",
    }  # fmt: skip
    lists = "v0: [1, 2, 3]\n"
    for i in range(1, 8):
        lists += f"v{i}: [" + ", ".join([f"'${{v{i - 1}}}'"] * 50) + "]\n"
    with pytest.raises(UserError, match="lead to more than"):
        resolved(lists)
    assert resolved("a: ${oc.env:HOME_DIR}/x\nb: ${oc.env:SSH_KEY}\n", HOME_DIR="/h", SSH_KEY="k") == {
        "a": "/h/x", "b": "${oc.env:SSH_KEY}",
    }  # fmt: skip


def test_variables_that_nothing_fills_in():
    """They are no name of a folder, and data of such a name are said to be missing."""
    text = f"{RECIPE}output_dir: ${{oc.env:NOT_SET}}/run\nrun_name: ${{nowhere}}\n"
    found = migrate(text.replace("dataset_name: b", "dataset_name: ./${data}/x"), devices=8)
    assert "--workdir=runs/migrated" in found.launch and not found.refused()
    assert "--workdir sets it" in found.why("output_dir")
    assert "log.run_name" not in found.m.settings
    assert any(n.startswith("To be given: config.data.path: dataset_name=") for n in found.m.notes)


def test_hydra_in_a_circle(tmp_path):
    """Files that name each other, and files that name each other twice."""
    (tmp_path / "a.yaml").write_text("defaults: [b]\nx: 1\n")
    (tmp_path / "b.yaml").write_text("defaults: [a]\ny: 2\n")
    with pytest.raises(UserError, match=r"in a circle: a.yaml -> b.yaml -> a.yaml"):
        loading.load([str(tmp_path / "a.yaml")], [], {})
    for i in range(12):
        (tmp_path / f"n{i}.yaml").write_text(
            f"defaults: [n{i + 1}, n{i + 1}]\n" if i < 11 else "z: 1\n"
        )
    with pytest.raises(UserError, match="more than 200 files"):
        loading.load([str(tmp_path / "n0.yaml")], [], {})


def test_groups_of_groups(tmp_path):
    """A group's own list is read from its folder; a slash names the first one. Nothing of it is unknown."""
    (tmp_path / "train" / "optim").mkdir(parents=True)
    (tmp_path / "db").mkdir()
    (tmp_path / "r.yaml").write_text(
        f"defaults:\n  - train: small\n  - optional gone\n  - _self_\n{RECIPE}"
    )
    (tmp_path / "train" / "small.yaml").write_text(
        "defaults:\n  - optim: adam\n  - /db: here\nlr: 1\n"
    )
    (tmp_path / "train" / "optim" / "adam.yaml").write_text("eps: 1e-8\n")
    (tmp_path / "db" / "here.yaml").write_text("port: 1\n")
    (source,) = loading.load([str(tmp_path / "r.yaml")], [], {})
    found = {e.key: e.value for e in source.entries if not e.key.startswith("defaults")}
    assert found["train.lr"] == 1 and found["train.optim.eps"] == 1e-8
    assert found["train.db.port"] == 1 and found["max_length"] == 128
    text = f"defaults: []\nhydra: {{run: {{dir: x}}}}\n{RECIPE}"
    assert not migrate(text, devices=8).refused()


@pytest.mark.parametrize(
    "line",
    [
        "torchrun 'x",
        'torchrun --nproc_per_node=8 sft.py --a "b',
        "torchrun",
        "python",
        "",
        "\n",
        "; ; ;",
        "--learning_rate=1",
    ],
)
def test_command_lines(line):
    with pytest.raises(UserError, match="--command=") as error:
        command.parse(line)
    assert "\n" not in str(error.value)


def test_flags_that_are_no_values():
    line = "torchrun s.py --a \"'\" --b '\"' --c '? x' --d '- y' --e '&' --f '" + "[" * 5000 + "'"
    flags = command.parse(line).sources[-1]
    assert [flags.value(k) for k in "abcd"] == ["'", '"', "? x", "- y"]
    assert flags.value("f") == "[" * 5000


def test_a_script_that_multiplies():
    text = "A0=xxxxxxxxxx\n" + "".join(
        f'A{i}="$A{i - 1}$A{i - 1}$A{i - 1}$A{i - 1}"\n' for i in range(1, 40)
    )
    assert len(script.read(f"{text}python train.py --x $A39\n", "a.sh").command) < 1 << 18


def test_the_launch_command_is_no_other_command(tmp_path):
    """Names of files, models and data are words of a shell."""
    odd = "org/x; touch owned"
    text = RECIPE.replace(": a\n", f": '{odd}'\n").replace(": b\n", ": 'o/$(touch owned)'\n")
    found = migrate(f"{text}output_dir: 'out put`touch owned`'\n", devices=8)
    assert f"hf download '{odd}' --local-dir 'models/x; touch owned'" in found.launch
    assert "'o/$(touch owned)'" in found.launch.replace("\\\n  ", "")
    assert "--workdir='out put`touch owned`'" in found.launch


def test_patterns_of_layers():
    def pattern(value, layers=4):
        return megatron_handlers.layer_pattern(Entry("moe_layer_freq", value, "a:1"), layers)

    assert pattern("([0]*1+[1]*3)") == [0, 1, 1, 1]
    for value in (
        "[1]*9999*9999*9999",
        "[1]*10**9",
        "(" * 5000,
        "-" * 5000 + "1",
        "__import__('os')",
    ):
        with pytest.raises(UserError, match="pattern of layers"):
            pattern(value)
    with pytest.raises(UserError, match="num_layers"):
        pattern(1, 10**30)


@pytest.mark.parametrize("size, each, theirs, ours", [(2_000_000_014, 2, 1, 2), (360, 5, 2, 3)])
def test_micro_batches_of_any_number(size, each, theirs, ours):
    """The fewest that divide a device's rows, and hold no more than theirs."""
    m = Migration()
    m.default("per_device_batch", each)
    m.settle()
    rows = size // ours
    times = _micro_batches(m, size, Layout(theirs, ours, 1, 1))
    assert rows % times == 0 and rows // times <= each
    if rows < 1000:
        assert times == next(n for n in range(1, rows + 1) if rows % n == 0 and rows / n <= each)


@pytest.mark.parametrize(
    "recipe",
    [
        "model: a\ntuner_type: full\ndataset: b\nmax_length: 128\n",
        "trainer: {devices: 8}\nmodel: {encoder_seq_length: 128, optim: {sched: {warmup_steps: 5}}}\n",
    ],
)
def test_auto_beside_other_recipes(recipe):
    """DeepSpeed's auto is no number, whoever wrote the recipe."""
    auto = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    auto |= {
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    }
    try:
        migrate(recipe, json.dumps(auto), devices=8)
    except UserError as error:
        assert "\n" not in str(error)
