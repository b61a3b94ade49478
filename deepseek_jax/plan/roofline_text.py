"""A prediction (roofline.py) for a person."""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.cli.texts import gb, human, table

PHASES = ("forward", "recompute", "backward", "optimizer", "other")


def text(r: Mapping[str, Any], name: str) -> str:
    """All of it.

    Args:
      r: of roofline.predict.
      name: of the hardware.
    """
    return "\n".join(
        [
            *_lines(r, name),
            "",
            _parts(r),
            *_collectives(r),
            "",
            "largest costs, derated:",
            _largest(r),
            "",
            *_not_known(r),
            "assumed: " + ";\n         ".join(r["assumed"]) + ".",
            f"rates of {name}:",
            _rates(r),
        ]
    )


def ms(seconds: float) -> str:
    """Milliseconds."""
    return f"{seconds * 1e3:,.1f}"


def _lines(r: Mapping[str, Any], name: str) -> list[str]:
    ideal, derated, rounds = r["ideal"], r["derated"], r["rounds"]
    c = derated["communication"]
    said = [
        f"a step of {r['tokens_per_device']:,.0f} tokens on each {name} takes {ms(derated['step_s'])} ms "
        f"derated ({derated['mfu']:.1%} of peak, {derated['tokens_per_s_per_device']:,.0f} tokens/s), "
        f"{ms(ideal['step_s'])} ms ideal ({ideal['mfu']:.1%})"
    ]
    load = f"--skew={rounds['skew']}: largest load {1 + rounds['violation']:.2f} x the mean"
    if not rounds["in_the_program"]:
        said.append(f"no rounds of the dispatch in this program, whatever the routing ({load})")
    else:
        several = "rounds" if derated["rounds"] > 1 else "round"
        said.append(f"{derated['rounds']} {several} of the dispatch at {load}; {rounds['said']}")
    if one := r["at_one_round"]:
        said.append(
            f"with one round {ms(one['derated']['step_s'])} ms derated ({one['derated']['mfu']:.1%}), "
            f"{ms(one['ideal']['step_s'])} ms ideal ({one['ideal']['mfu']:.1%})"
        )
    if c["busy_s"]:
        said.append(
            f"communication takes {ms(c['busy_s'])} ms of the links, {ms(c['exposed_s'])} exposed, "
            f"{ms(c['hidden_s'])} hidden behind kernels"
        )
    bound = sorted(derated["bound_by"].items(), key=lambda item: -item[1])
    times = ", ".join(f"{ms(seconds)} ms by {what}" for what, seconds in bound)
    said.append(f"{derated['kernels']:,.0f} kernels, bound: {times}")
    flops = ", ".join(f"{human(n)} {kind}" for kind, n in r["flops"].items())
    said.append(
        f"FLOPs of a device: {flops}; the model's own {human(r['model_flops_per_device'])}; "
        f"{gb(r['memory_bytes_moved'])} of memory read and written"
    )
    other = r["with_the_cheapest_branches"]
    if other < 0.999 * derated["step_s"]:
        said.append(
            f"of every conditional the dearest branch is counted; the cheapest: {ms(other)} ms"
        )
    return [f"{'roofline' if not i else '':<15}{line}" for i, line in enumerate(said)]


def _parts(r: Mapping[str, Any]) -> str:
    """Milliseconds by part of the model and pass over it."""
    derated, ideal = r["derated"]["parts"], r["ideal"]["parts"]
    order = sorted(derated, key=lambda part: -sum(derated[part].values()))
    rows = [["part, ms derated", *PHASES, "all", "share", "ideal"]]
    for part in order:
        seconds = derated[part]
        every = sum(seconds.values())
        rows.append(
            [
                part if part != "collectives" else "collectives, exposed",
                *(ms(seconds[p]) if seconds.get(p) else "" for p in PHASES),
                ms(every),
                f"{every / r['derated']['step_s']:.1%}",
                ms(sum(ideal.get(part, {}).values())),
            ]
        )
    sums = [sum(s.get(phase, 0.0) for s in derated.values()) for phase in PHASES]
    rows.append(["all", *map(ms, sums), ms(r["derated"]["step_s"]), "", ms(r["ideal"]["step_s"])])
    return table(rows, "  ")


def _collectives(r: Mapping[str, Any]) -> list[str]:
    rows = [["collectives, ms derated", "pass", "of", "busy", "exposed"]]
    for c in r["derated"]["collectives"][:10]:
        rows.append([c["kind"], c["phase"], c["part"], ms(c["busy_s"]), ms(c["exposed_s"])])
    return ["", table(rows, "  ")] if len(rows) > 1 else []


def _largest(r: Mapping[str, Any]) -> str:
    rows = [["ms", "share", "times", "part, pass", "what", "bound by", "line", "operation"]]
    for c in r["largest"]:
        rows.append(
            [
                ms(c["seconds"]),
                f"{c['share']:.1%}",
                f"{c['times']:,.0f}",
                f"{c['part']}, {c['phase']}",
                f"{c['what']} {c['shape']}",
                c["bound_by"],
                c["source"],
                c["operation"],
            ]
        )
    return table(rows, "  ", right=False)


def _not_known(r: Mapping[str, Any]) -> list[str]:
    """What the prediction leaves out."""
    out = []
    if kernels := r["not_known"]["kernels"]:
        said = ", ".join(f"{n} x {name}" for name, n in kernels.items())
        out.append(f"FLOPs of these kernels are not known, only their bytes are counted: {said}")
    if loops := r["not_known"]["loops_counted_once"]:
        out.append(f"loops whose length depends on data, counted once: {', '.join(loops)}")
    return out


def _rates(r: Mapping[str, Any]) -> str:
    rows = [["rate", "ideal", "derated", "ideal from", "derated"]]
    for name, value in r["rates"]["ideal"].items():
        if name not in r["sources"]["derated"]:
            continue  # of a CPU, and not measured
        derated = r["rates"]["derated"][name]
        sources = (r["sources"][kind].get(name, "none") for kind in ("ideal", "derated"))
        rows.append([name, f"{value:.4g}", f"{derated:.4g}", *sources])
    return table(rows, "  ", right=False)
