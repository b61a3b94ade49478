"""Predicted speed of DeepSeek-V2-Lite on GPUs that are not here: what `plan --roofline` says of the program
that XLA's compiler makes for them.

  .venv-gpu-aot/bin/python -m benchmarks gpu_roofline [--only=NAME] [--again] [--json] [--out=FILE]

Packed documents as users train on, Zipf's law, bfloat16, remat=auto: 8 of the 27 layers on one H200 as
gpu_bench measures them, 6 on an H100, and all 27 on 8 H200s, weights divided (full_shard) or experts, with 8
sequences of a GPU; Moonlight-16B; a dense and two MoE layers of V3, with 2.
Each row is one `python -m deepseek_jax.plan`, which takes minutes; a row that --out=FILE has already is not
compiled again without --again, and says of which commit it is. One that is stays there, as what was before.
Needs JAX's GPU compiler (make plan installs it).
"""

import json
import pathlib
import subprocess
import sys
from typing import Any

from benchmarks import ROOT
from benchmarks.support.report import Parser, report
from deepseek_jax.cli.texts import gb, table
from deepseek_jax.errors import UserError
from deepseek_jax.plan.roofline_text import PHASES

COMMON = (
    "--config.mesh.data=1",
    "--config.train.accumulation=1",
    "--config.train.sequence_length=4096",
    "--config.data.document_mask=True",
)
V2_LITE = ("--config=configs/v2_lite.py", *COMMON)
# What a micro-batch grows by is of no step of one micro-batch.
NO_RAMP = ("--config.train.batch_ramp_start=0", "--config.train.batch_ramp_steps=0")
MOONLIGHT = ("--config=configs/moonlight.py", *COMMON, *NO_RAMP)
V3 = (
    "--config=configs/v3.py",
    *COMMON,
    *NO_RAMP,
    "--config.model.num_hidden_layers=3",
    "--config.model.first_k_dense_replace=1",
    "--config.model.num_nextn_predict_layers=0",
)
BATCH, LAYERS = "--config.train.batch_size=", "--config.model.num_hidden_layers="
ALONE = ("--devices=1", "--config.mesh.expert=1", "--config.sharding.strategy=no_shard")
EIGHT = ("--devices=8", "--config.sharding.strategy=full_shard")
FSDP = (*EIGHT, "--config.mesh.fsdp=8", "--config.mesh.expert=1")
EXPERT = (*EIGHT, "--config.mesh.fsdp=1", "--config.mesh.expert=8")
FUSED = "--config.train.attention=mosaic"  # not the default, as no card has run it
# Name -> options of plan.
ROWS = {
    "1 H200, 8 layers, 8 sequences": (*V2_LITE, *ALONE, f"{BATCH}8", f"{LAYERS}8"),
    "1 H200, 8 layers, 8 sequences, fused attention": (
        *V2_LITE,
        *ALONE,
        f"{BATCH}8",
        f"{LAYERS}8",
        FUSED,
    ),
    "1 H200, 8 layers": (*V2_LITE, *ALONE, f"{BATCH}4", f"{LAYERS}8"),
    "1 H100, 6 layers": (*V2_LITE, *ALONE, f"{BATCH}4", f"{LAYERS}6", "--hardware=h100"),
    "8 H200s, fsdp 8": (*V2_LITE, *FSDP, f"{BATCH}64"),
    "8 H200s, expert 8": (*V2_LITE, *EXPERT, f"{BATCH}64"),
    "8 H200s, fsdp 8, fused attention": (*V2_LITE, *FSDP, f"{BATCH}64", FUSED),
    "8 H200s, expert 8, fused attention": (*V2_LITE, *EXPERT, f"{BATCH}64", FUSED),
    "Moonlight, 8 H200s, fsdp 8": (*MOONLIGHT, *FSDP, f"{BATCH}64"),
    "V3, 3 layers, 8 H200s, expert 8": (*V3, *EXPERT, f"{BATCH}16"),
}
# What is the same for every row of a kind of hardware, or long and of no further use.
ONCE = ("assumed", "sources", "rates")


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--only", choices=list(ROWS), help="Compile this row, the others not.")
    parser.add_argument("--again", action="store_true", help="Compile rows that are there as well.")
    own = parser.parse_args()
    result: dict[str, Any] = {"assumed": [], "rows": {}}
    if own.out and pathlib.Path(own.out).exists():
        result = json.loads(pathlib.Path(own.out).read_text(encoding="utf-8"))["result"]
    rows, before = result["rows"], result.setdefault("before", {})
    for name in [own.only] if own.only else [n for n in ROWS if own.again or n not in rows]:
        print(f"{name}: compiling ...", file=sys.stderr, flush=True)
        planned = plan(list(ROWS[name]))
        prediction = planned["roofline"]
        said = {key: prediction.pop(key) for key in ONCE}
        if name in rows and rows[name]["commit"] != own.commit:
            before[name] = trimmed(rows[name])
        rows[name] = {
            "command": " ".join(["python -m deepseek_jax.plan --roofline", *ROWS[name]]),
            "commit": own.commit,
            "remat": planned["remat_choice"],
            "memory": planned["program"]["memory"],
            "roofline": prediction,
            "rates": said["rates"],
        }
        result["assumed"] = said["assumed"]
    result["rows"] = {name: rows[name] for name in ROWS if name in rows}
    report(own, result, text)
    return 0


def trimmed(row: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a row that is compiled again: what a line of the table says."""
    r = row["roofline"]
    numbers = ("step_s", "mfu", "tokens_per_s_per_device", "communication", "rounds")

    def at(found: dict[str, Any]) -> dict[str, Any]:
        return {kind: {n: found[kind][n] for n in numbers} for kind in ("ideal", "derated")}

    one = r["at_one_round"]
    kept = {"jax": r["jax"], **at(r), "at_one_round": one and at(one)}
    return {key: row[key] for key in ("command", "commit", "memory")} | {"roofline": kept}


def plan(options: list[str]) -> dict[str, Any]:
    """What `python -m deepseek_jax.plan --roofline --json` prints.

    Raises:
      UserError: it fails; in its own words.
    """
    command = [sys.executable, "-m", "deepseek_jax.plan", "--roofline", "--json", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError((done.stderr.strip().splitlines() or ["plan failed"])[-1])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def cells(name: str, row: dict[str, Any]) -> list[list[str]]:
    """Of a table: name, memory, rounds, ideal, derated, tokens per second and GPU, exposed communication."""
    r = row["roofline"]
    out: list[list[str]] = []
    for at in filter(None, (r["at_one_round"], r)):
        ideal, derated = (
            f"{at[k]['step_s'] * 1e3:,.0f} ms, {at[k]['mfu']:.1%}" for k in ("ideal", "derated")
        )
        c = at["derated"]["communication"]
        exposed = (
            f"{c['exposed_s'] * 1e3:,.0f} of {c['busy_s'] * 1e3:,.0f} ms" if c["busy_s"] else ""
        )
        speed = f"{at['derated']['tokens_per_s_per_device']:,.0f}"
        first = [name, gb(row["memory"]["total"])] if not out else ["", ""]
        out.append([*first, str(at["derated"]["rounds"]), ideal, derated, speed, exposed])
    return out


HEAD = ["", "memory", "rounds", "ideal", "derated", "tokens/s a GPU", "exposed communication"]


def text(r: dict[str, Any]) -> str:
    """The table for a person."""
    return table([HEAD, *lines(r["rows"]), *lines(r.get("before", {}), "before: ")])


def lines(rows: dict[str, Any], prefix: str = "") -> list[list[str]]:
    """Of the table, for several rows of the result."""
    return [line for name, row in rows.items() for line in cells(f"{prefix}{name}", row)]


def markdown(r: dict[str, Any], link: str) -> str:
    """For docs/: predicted steps; of the first row the time of parts and the largest costs."""
    of = {(row["commit"], row["roofline"]["jax"]) for row in r["rows"].values()}
    commits = ", ".join(f"{commit} (jax {jax})" for commit, jax in sorted(of))
    name, first = next(iter(r["rows"].items()))
    p = first["roofline"]
    one = p["at_one_round"] or p
    costs = [["ms derated", "part, pass", "what", "line"]]
    for c in p["largest"]:
        what = f"{c['what']} {c['shape']}"
        costs.append([_ms(c["seconds"]), f"{c['part']}, {c['phase']}", what, c["source"]])
    return "\n".join(
        [
            f"`python -m benchmarks gpu_roofline`, programs of {commits} ({link}). "
            f"`--skew={p['rounds']['skew']}`:",
            f"the most loaded expert has {1 + p['rounds']['violation']:.2f} times the mean.",
            "",
            *_table([HEAD, *lines(r["rows"])]),
            "",
            *_before(r.get("before", {})),
            f"{name}, one round, ms derated by part and pass:",
            "",
            *_table(_parts(one)),
            "",
            f"Its ten largest costs at {p['derated']['rounds']} rounds:",
            "",
            *_table(costs),
        ]
    )


def _before(rows: dict[str, Any]) -> list[str]:
    """The same table of what was compiled before."""
    if not rows:
        return []
    of = sorted({(row["commit"], row["roofline"]["jax"]) for row in rows.values()})
    commits = ", ".join(f"{commit} (jax {jax})" for commit, jax in of)
    said = f"Before, at {commits}, of four sequences of a GPU and remat=full:"
    return [said, "", *_table([HEAD, *lines(rows)]), ""]


def _parts(r: dict[str, Any]) -> list[list[str]]:
    """Milliseconds of a part in each pass."""
    derated, ideal = r["derated"]["parts"], r["ideal"]["parts"]
    rows = [["part", *PHASES, "all", "ideal"]]
    for part in sorted(derated, key=lambda part: -sum(derated[part].values())):
        seconds = derated[part]
        passes = (_ms(seconds[phase]) if seconds.get(phase) else "" for phase in PHASES)
        sums = (sum(seconds.values()), sum(ideal.get(part, {}).values()))
        rows.append([part, *passes, *map(_ms, sums)])
    return rows


def _table(rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}"
