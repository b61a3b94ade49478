"""Writes the figures of the documentation from the results that the benchmarks have kept.

  python -m benchmarks figures [--check]

Every figure is made here from a JSON file of benchmarks/results/, which a benchmark has written with
--out. docs/speed.md has all of them in a table; what has no result is listed there without a figure.
Other pages show some in full, between marks that name them. --check: exit code 1 if a page is not
what would be written.
"""

import json
import pathlib
import re
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks import ROOT
from benchmarks.learning import fp8
from benchmarks.repository.blocks import BLOCKS, PICTURES
from benchmarks.speed import advise, predicted
from deepseek_jax.cli import texts
from deepseek_jax.plan import options

RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- figures: make docs -->", "<!-- end of figures -->"
PAGES = [
    ROOT / "docs" / f"{name}.md"
    for name in ("finetuning", "lora", "distillation", "gpu", "planning")
]
SHOWN = re.compile(r"(<!-- figure (\w+): make docs -->\n).*?(<!-- end of figure -->)", re.DOTALL)


class Figure(NamedTuple):
    """A row of the table: a result by the name of its file, the command that writes it, and its sentence."""

    name: str
    command: str
    sentence: Callable[[Any], str]


def main() -> int:
    parser = options.Parser(__doc__, json=False)
    parser.add_argument("--check", action="store_true", help="Write nothing; compare.")
    own = parser.parse_args()
    differ = 0
    for page, fill in ((DOCUMENT, filled), *((page, shown) for page in PAGES)):
        before = page.read_text(encoding="utf-8")
        after = fill(before)
        differ += before != after
        if not own.check:
            page.write_text(after, encoding="utf-8")
        elif before != after:
            name = page.relative_to(ROOT).as_posix()
            print(f"{name} is not what benchmarks/results has. Run: make docs", file=sys.stderr)
    if not own.check:
        for picture, text in pictures().items():
            picture.write_text(text, encoding="utf-8")
    return int(own.check and differ > 0)


def pictures() -> dict[pathlib.Path, str]:
    """The pictures of docs/ that are drawn from a result, with what they should hold."""
    kept = {name: RESULTS / f"{name}.json" for name in PICTURES}
    return {
        ROOT / "docs" / PICTURES[name][0]: PICTURES[name][1](json.loads(file.read_text())["result"])
        for name, file in kept.items()
        if file.exists()
    }


def shown(page: str) -> str:
    """The page with today's results between the marks that name them, or without where there is none."""

    def put(found: re.Match[str]) -> str:
        file = RESULTS / f"{found[2]}.json"
        if not file.exists():
            return f"{found[1]}(No result is kept yet.)\n{found[3]}"
        kept = json.loads(file.read_text(encoding="utf-8"))
        link = f"[{kept['machine']['cores']} cores, {kept['commit']}](../benchmarks/results/{file.name})"
        return f"{found[1]}{BLOCKS[found[2]](kept['result'], link)}\n{found[3]}"

    return SHOWN.sub(put, page)


def filled(document: str) -> str:
    """The document with the table of today's results between its marks."""
    head, _, rest = document.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


def table() -> str:
    """What has a result as rows, what has none as a list."""
    lines = ["| command | what it showed | result |", "|---|---|---|"]
    missing = []
    for figure in FIGURES:
        file = RESULTS / f"{figure.name}.json"
        if not file.exists():
            missing.append(f"`{figure.command}`")
            continue
        kept = json.loads(file.read_text(encoding="utf-8"))
        sentence = figure.sentence(kept["result"])
        machine = f"{kept['machine']['cores']} cores"
        if cpu := kept["machine"].get("cpu"):
            machine += f" of {cpu}"
        link = f"[{machine}, {kept['commit']}](../benchmarks/results/{file.name})"
        lines.append(f"| `python -m benchmarks {figure.command}` | {sentence} | {link} |")
    if missing:
        lines += ["", f"Without a kept result yet: {', '.join(missing)}."]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------- sentences


def step(r: dict[str, Any]) -> str:
    said = (
        f"{r['tokens_per_second']:,.0f} tokens/s, {r['share_of_matmul']:.0%} of the best matmul, "
        f"{texts.gb(r['peak_memory'])}"
    )
    if p := r.get("peer"):
        said += (
            f"; {p['ratio']:.2f} times {p['name']} ({p['ratio_by_cpu_seconds']:.2f} by CPU seconds), "
            f"which takes {texts.gb(p['peak_memory'])}"
        )
    return said


def floor(r: dict[str, Any]) -> str:
    return (
        f"{r['share_of_matmul']:.0%} of the best matmul; {r['share_at_floor']:.0%} if every instruction ran "
        f"at its floor, {r['share_matmuls_alone']:.0%} if there were matmuls only"
    )


def moe(r: dict[str, Any]) -> str:
    """Times of the dense bound, for each shape and load."""

    def times(row: dict[str, Any], method: str) -> float:
        return row["times_of_dense"][method]

    said = [f"{row['shape']} {row['load']}: {times(row, 'ours'):.1f}" for row in r["rows"]]
    ragged = [times(row, "ragged") for row in r["rows"] if "ragged" in row["times_of_dense"]]
    more = f"; ragged_dot up to {max(ragged):.0f}" if ragged else ""
    return f"times of a dense SwiGLU of as many rows: {', '.join(said)}{more}"


def attention(r: dict[str, Any]) -> str:
    said = [
        f"{row['length']}: {row['times_of_plain']:.2f}"
        for row in r["rows"]
        if row["times_of_plain"] is not None
    ]
    last = r["rows"][-1]
    memory = texts.gb(last["temporaries_of_one"]["ours"])
    return (
        f"time against plain softmax by length: {', '.join(said)}; "
        f"temporaries at {last['length']}: {memory}"
    )


def vocabulary(r: dict[str, Any]) -> str:
    ratios = [row["times_of_plain"] for row in r["rows"]]
    last = r["rows"][-1]
    ours, plain = (texts.gb(last["temporaries"][name]) for name in ("ours", "plain"))
    return (
        f"{min(ratios):.2f} to {max(ratios):.2f} of the time of whole logits; temporaries {ours} "
        f"against {plain} at "
        f"{last['tokens']:,} tokens and {last['vocab']:,} words"
    )


def compile_time(r: dict[str, Any]) -> str:
    said = [f"{row['ratio']:.2f} on {row['devices']} device(s)" for row in r["rows"]]
    return f"{r['layers']} layers compile in {', '.join(said)} of the time of {r['against']}"


def overhead(r: dict[str, Any]) -> str:
    return (
        f"the device idles {r['idle_share']:.2%} of a step; with Python's threads at most "
        f"{r['overhead']:.2%} is lost"
    )


def hf_copy(r: dict[str, Any]) -> str:
    parts = [
        f"{name} {r[name]['ratio']:.2f} in {texts.gb(r[name]['peak_bytes'])}"
        for name in ("import", "export", "cast")
    ]
    return f"{texts.gb(r['bytes'])}: times of a plain copy, and memory: {', '.join(parts)}"


def pack(r: dict[str, Any]) -> str:
    ours, trl = r["ours"], r["trl"]
    times = [f"{p['pack_s']:.1f} s and {texts.gb(p['pack_bytes'])} of memory" for p in (ours, trl)]
    return (
        f"{r['examples']:,} tokenised chats, {texts.human(r['tokens'])} tokens, packed in {times[0]}; "
        f"trl.pack_dataset makes the same rows in {times[1]}"
    )


def generate(r: dict[str, Any]) -> str:
    said = [
        f"{row['texts']} text(s): decodes {row['decode']['ratio']:.1f}, prefill {row['prefill']['ratio']:.1f}"
        for row in r["rows"]
    ]
    same = statistics.mean(row["same"] for row in r["rows"])
    return f"times the speed of transformers: {'; '.join(said)}; {same:.0%} of the tokens the same"


def checkpoint(r: dict[str, Any]) -> str:
    return (
        f"a save every {r['every']} steps costs {r['overhead']:+.1%}; a save alone "
        f"{r['save_alone_s']:.1f} s for "
        f"{texts.gb(r['written_bytes'])}; a restore {r['restore_s']:.1f} s, "
        f"{r['restore_memory']:.2f} times the state in memory"
    )


def compression(r: list[dict[str, Any]]) -> str:
    whole = r[0]["gradient_bytes_over_data"]
    said = [
        f"{row['gradient_compression']} {row['gradient_bytes_over_data'] / whole:.3f}"
        for row in r[1:]
    ]
    return f"bytes of gradients between replicas, of a float32 sum: {', '.join(said)}"


def collectives(r: list[dict[str, Any]]) -> str:
    """Bytes of full_shard beside the least, over weights and gradients."""
    rows = [row["groups"] for row in r if row["strategy"] == "full_shard"]
    groups = ("weights, forward", "weights, backward", "gradients")
    ratios = [
        g[name]["bytes"] / g[name]["least"] for g in rows for name in groups if g[name]["least"]
    ]
    return (
        f"full_shard: weights and gradients move {min(ratios):.2f} to {max(ratios):.2f} times the "
        "least bytes"
    )


def strategies(r: list[dict[str, Any]]) -> str:
    def bytes_of(row: dict[str, Any]) -> int:
        return row["parameters"] + row["gradients"] + row["optimizer"]

    return "bytes per device of the state: " + ", ".join(
        f"{row['strategy']} {texts.gb(bytes_of(row))}" for row in r
    )


def levers(r: list[dict[str, Any]]) -> str:
    first = r[0]["total"]
    saved = sorted((row["total"] / first, row["lever"]) for row in r[1:] if "total" in row)
    return "bytes of the step, of float32 with remat=full: " + ", ".join(
        f"{lever} {share:.2f}" for share, lever in saved[:4]
    )


def sft_demo(r: dict[str, Any]) -> str:
    said = [f"{row['accuracy']:.0%} {row['model']}" for row in r["rows"]]
    return (
        f"{r['model']} on sums: right are {', '.join(said)}, of {r['held_out']} held-out problems; "
        f"{r['tokens']:,} tokens each, {r['minutes']:.0f} minutes in all"
    )


def sft(r: dict[str, Any]) -> str:
    said = f"{r['ours']['scored_per_cpu_second']:,.0f} scored tokens per CPU second"
    if p := r.get("peer"):
        ratio = r["ratio"]
        said += (
            f"; {ratio['scored_per_cpu_second']:.1f} times {p['name']}, which pads "
            f"({ratio['computed_per_cpu_second']:.1f} per computed token)"
        )
    return said


def distil_demo(r: dict[str, Any]) -> str:
    said = [f"{way} {s['loss']:.3f}" for way, s in r["ways"].items()]
    best = max(s["gain"] for s in r["ways"].values())
    return (
        f"held-out nats per token: teacher {r['teacher']:.3f}, half of its experts pruned {r['pruned']:.3f}, "
        f"after {r['tokens']:,} tokens {', '.join(said)}; distillation wins by {best:.3f}"
    )


def distill(r: dict[str, Any]) -> str:
    said = [f"{name} {row['times']:.2f}" for name, row in r["rows"].items()]
    return (
        f"times of the student's step and the teacher's forward pass: {', '.join(said)}; a step from the "
        f"cache takes {r['cache']['times']:.2f} times one of cross-entropy"
    )


def fits(r: dict[str, Any]) -> str:
    said = [f"{name} {texts.gb(row['total'])}" for name, row in r["rows"].items()]
    return f"{r['about']}: bytes per GPU by XLA's compiler for H200s: {', '.join(said)}"


def gpu_roofline(r: dict[str, Any]) -> str:
    said = [
        f"{name} {row['roofline']['derated']['mfu']:.1%}"
        + (
            f" ({one['derated']['mfu']:.1%} at one round)"
            if (one := row["roofline"]["at_one_round"])
            else ""
        )
        for name, row in r["rows"].items()
    ]
    return f"DeepSeek-V2-Lite if not named, bfloat16, predicted share of peak: {', '.join(said)}"


FIGURES = [
    Figure("step_mid", "step --shape=mid --peer=benchmarks/speed/hf_torch.py", step),
    Figure("step_fine", "step --shape=fine --peer=benchmarks/speed/hf_torch.py", step),
    Figure("advise_cpu", "advise", advise.sentence),
    Figure("predicted_cpu", "predicted", predicted.sentence),
    Figure("fp8", "fp8", fp8.sentence),
    Figure("floor_mid", "floor --shape=mid", floor),
    Figure("floor_fine", "floor --shape=fine", floor),
    Figure("moe", "moe", moe),
    Figure("attention", "attention", attention),
    Figure("vocabulary", "vocabulary", vocabulary),
    Figure("compile", "compile", compile_time),
    Figure("overhead", "overhead", overhead),
    Figure("pack", "pack", pack),
    Figure("hf_copy", "hf_copy", hf_copy),
    Figure("generate", "generate", generate),
    Figure("checkpoint", "checkpoint", checkpoint),
    Figure("compression", "compression", compression),
    Figure("collectives", "collectives", collectives),
    Figure("strategies", "strategies --no-time", strategies),
    Figure("levers", "levers --steps=0", levers),
    Figure("sft_small", "sft --shape=small --peer=benchmarks/speed/trl_sft.py", sft),
    Figure("sft_mid", "sft --shape=mid --peer=benchmarks/speed/trl_sft.py", sft),
    Figure("sft_demo", "sft_demo", sft_demo),
    Figure("distil_demo", "distil_demo", distil_demo),
    Figure("distill", "distill", distill),
    Figure("lora_v2_lite", "fits lora_v2_lite", fits),
    Figure("distil_qwen3_30b", "fits distil_qwen3_30b", fits),
    Figure("roofline_v2_lite", "gpu_roofline", gpu_roofline),
]
