"""Results that a page of the documentation shows in full, as Markdown."""

from collections.abc import Callable
from typing import Any

from benchmarks.gpu import roofline
from benchmarks.learning import distil_figures
from benchmarks.speed import predicted
from deepseek_jax.cli import texts


def distil_demo_table(r: dict[str, Any], link: str) -> str:
    """Held-out losses of teacher, pruned and each way to win it back."""
    before, kept = r["experts"]
    lines = [
        f"{kept} of {before} experts are kept; then {r['tokens']:,} tokens in {r['steps']} steps, mean of "
        f"{len(r['seeds'])} seeds and, of what is won on the same text, deviation between them ({link}):",
        "",
    ]
    rows = distil_figures.rows_of(r)
    for n, row in enumerate(rows):
        lines.append(f"| {' | '.join(row)} |")
        if not n:
            lines.append("|---" * len(row) + "|")
    return "\n".join([*lines, "", f"![Held-out loss after pruning]({PICTURES['distil_demo'][0]})"])


def fits_table(r: dict[str, Any], link: str) -> str:
    """Bytes of a GPU, by row."""
    gpus = texts.plural(r["devices"], "GPU")
    lines = [
        f"{r['about']}; {gpus} of {texts.gb(r['memory'])} ({link}):",
        "",
        "| | stored | temporaries | in all | |",
        "|---|---|---|---|---|",
    ]
    for name, row in r["rows"].items():
        sizes = [texts.gb(row[key]) for key in ("arguments", "temporaries", "total")]
        lines.append(f"| {' | '.join([name, *sizes, 'fits' if row['fits'] else 'does not fit'])} |")
    return "\n".join(lines)


def sft_demo_table(r: dict[str, Any], link: str) -> str:
    """Marks before and after, and what the models say to one held-out question."""
    lines = [
        f"{r['model']}, {r['chats']:,} chats of {r['tokens']:,} tokens in all, {r['held_out']} held-out "
        f"problems, {r['minutes']:.0f} minutes ({link}):",
        "",
        "| | right | last number right | ended by itself | learns | training |",
        "|---|---|---|---|---|---|",
    ]
    for row in r["rows"]:
        shares = [f"{row[key]:.0%}" for key in ("accuracy", "last_number_right", "stopped")]
        took = f"{row['seconds'] / 60:.1f} min" if row["seconds"] else ""
        lines.append(f"| {' | '.join([row['model'], *shares, row['learns'], took])} |")
    lines += ["", f"    > {r['chat']['question']}"]
    for name, answer in r["chat"]["answers"].items():
        lines += [
            f"    {name}:",
            *(f"        {line}" for line in answer.splitlines() if line.strip()),
        ]
    return "\n".join(lines)


# By the name of the result: (result, link to its file) -> text.
BLOCKS: dict[str, Callable[[Any, str], str]] = {
    "sft_demo": sft_demo_table,
    "distil_demo": distil_demo_table,
    "lora_v2_lite": fits_table,
    "distil_qwen3_30b": fits_table,
    "roofline_v2_lite": roofline.markdown,
    "predicted_cpu": predicted.markdown,
}

# Pictures in docs/: by the name of the result, the file and what draws it.
PICTURES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "distil_demo": ("distil.svg", distil_figures.drawn),
}
