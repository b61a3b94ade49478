"""The results of gpu_bench as Markdown."""

from typing import Any


def text(rows: list[dict[str, Any]], bars: dict[str, Any]) -> str:
    def of(part: str) -> list[dict[str, Any]]:
        return [r for r in rows if r["part"] == part]

    versions: dict[str, Any] = next((r for r in of("versions") if "device" in r), {})
    lines = [f"# One {versions.get('device', 'GPU')}", ""]
    if versions:
        lines += [
            ", ".join(f"{k} {v}" for k, v in versions.items() if k not in ("part", "device")),
            "",
        ]
    for row in of("tiny"):
        if "losses" in row:
            losses = " ".join(f"{x:.4f}" for x in row["losses"])
            other = row["differs_again"]
            again = (
                f"{len(other)} arrays differ, {other[0]} first"
                if other
                else "the same, bit for bit"
            )
            lines += [
                f"tiny on {row['platform']}: losses {losses}, compiled in {row['compile_s']:.1f} s; "
                f"once more from the start: {again}",
                "",
            ]
    lines += _table(
        of("train"),
        [
            "tokens",
            "routing",
            "attention",
            "layers",
            "tokens/s",
            "of 989 TFLOP/s",
            "ms per step",
            "predicted, derated",
            "whole model's tokens/s",
            "bytes",
            "rounds",
        ],
        "tokens_per_s",
        lambda r: [
            r["tokens"],
            r["routing"],
            r["attention"],
            str(r["layers"]),
            f"{r['tokens_per_s']:,.0f}",
            f"{r['share_of_peak']:.1%}",
            f"{r['step_s'] * 1e3:,.1f}",
            f"{r['predicted_derated_s'] * 1e3:,.1f}" if "predicted_derated_s" in r else "",
            f"{r['tokens_per_s_of_the_whole_model']:,.0f}",
            f"{r['bytes'] / 1e9:,.1f} GB",
            str(r["dispatch_rounds"]),
        ],
    )
    for row in of("train"):
        lines += [
            f"Cost: {c['share']:.1%}, {c['ms']:.2f} ms per step, {c['part']}, {c['phase']}: "
            f"{c['instruction']} ({c['from']})\n"
            for c in row.get("largest_costs", [])
        ]
    for row in of("peer"):
        why = row.get("not_measured") or row.get("failed")
        said = (
            f"not measured: {why}"
            if why
            else f"{row['tokens_per_s']:,.0f} tokens/s ({row['experts']})"
        )
        lines += [f"transformers in PyTorch: {said}", ""]

    def rate(x):
        return "" if x is None else f"{x:,.3g}"

    lines += _table(
        of("experts"),
        ["grouped product", "method", "forward, TFLOP/s", "both gradients, TFLOP/s"],
        "forward_tflops",
        lambda r: [r["shape"], r["method"], rate(r["forward_tflops"]), rate(r.get("both_tflops"))],
    )

    def ms(s):
        return "" if s is None else f"{s * 1e3:,.3g} ms"

    lines += _table(
        of("attention"),
        ["attention, length, documents", "method", "forward", "forward + backward", "TFLOP/s"],
        "forward_s",
        lambda r: [
            f"{r['length']:,}, {r.get('documents', 1)}",
            r["method"],
            ms(r["forward_s"]),
            ms(r.get("both_s")),
            " and ".join(rate(r[k]) for k in ("forward_tflops", "both_tflops") if k in r),
        ],
    )
    for row in rows:
        if "failed" in row:
            what = ", ".join(
                str(row[k])
                for k in ("shape", "length", "tokens", "method", "attention")
                if k in row
            )
            lines.append(f"failed: {row['part']}{', ' * bool(what)}{what}: {row['failed']}")
    lines += [
        f"{'met' if b['met'] else 'MISSED'}: {name} {b['reached']:,.1f}, bar {b['bar']:,}"
        for name, b in bars.items()
    ]
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]], head: list[str], measured: str, cells: Any) -> list[str]:
    """A table of the rows that have the figure `measured`; nothing without any."""
    there = [f"| {' | '.join(cells(r))} |" for r in rows if measured in r]
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *there, ""] if there else []
