"""What `python -m deepseek_jax.plan` says: a dict of plain values for --json, and its text."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import jax

from deepseek_jax.cli.texts import gb, human, plural, table
from deepseek_jax.cluster.gpus import FRACTION, memory_fraction
from deepseek_jax.config.options import Config
from deepseek_jax.model.count import count
from deepseek_jax.parallel.pipeline import make_schedule
from deepseek_jax.plan import asked, exchange, topology
from deepseek_jax.train.state import Layout
from deepseek_jax.xla import program

PHASES = ("forward", "recompute", "backward", "optimizer", "other")


def of_layout(
    config: Config,
    mesh: jax.sharding.Mesh,
    layout: Layout,
    hardware: topology.Hardware,
    gpus_per_host: int,
) -> dict[str, Any]:
    """What is known without compiling."""
    m, t = config.model, config.train
    sizes = count(m, layout.model.abstract.params, t.sequence_length)
    stages = mesh.shape["stage"]
    schedule = make_schedule(config, stages) if stages > 1 else None
    buffers = exchange.buffers(config, mesh.shape)
    return {
        "model": sizes._asdict()
        | {
            "layers": m.num_hidden_layers,
            "dense_layers": m.first_k_dense_replace,
            "mtp_layers": m.num_nextn_predict_layers,
            "hidden_size": m.hidden_size,
            "experts": m.n_routed_experts,
            "experts_a_token": m.num_experts_per_tok,
            "shared_experts": m.n_shared_experts,
        },
        "devices": {
            "count": mesh.size,
            "kind": hardware.name,
            "memory": hardware.memory,
            "hosts": topology.hosts_of(mesh.size, gpus_per_host),
            "a_host": min(mesh.size, gpus_per_host),
        },
        "mesh": dict(mesh.shape),
        "share_a_host": topology.devices_per_host(mesh, gpus_per_host),
        "strategy": config.sharding.canonical,
        "dispatch": config.moe.dispatch,
        "dtype": t.dtype,
        "fp8": t.fp8,
        "remat": t.remat,
        "batch": {
            "sequences": t.batch_size,
            "sequence_length": t.sequence_length,
            "accumulation": t.accumulation,
        },
        "learning": layout.multipliers.table(),
        "layout_bytes": layout.bytes_per_device(mesh),
        "exchange": buffers._asdict() if buffers else None,
        "pipeline": {
            "stages": stages,
            "pieces_a_stage": schedule.virtual_stages,
            "bubble_share": schedule.bubble_share,
        }
        if schedule
        else None,
    }


def of_program(
    step: topology.PlannedStep,
    mesh: jax.sharding.Mesh,
    hardware: topology.Hardware,
    teacher: asked.Asked | None = None,
) -> dict[str, Any]:
    """What the compiled program says, and that of a teacher that is asked between the steps."""
    memory = program.memory(step.compiled)
    needs: dict[str, Any] = memory._asdict() | {"total": memory.total}
    if teacher is not None:
        needs |= asked.beside(memory, teacher.bytes, teacher.memory())
    found = program.collectives(step.compiled.as_text(), mesh.shape)
    once, further = [c for c in found if not c.further], [c for c in found if c.further]
    total = sum(c.bytes_per_step for c in once)
    return {
        "memory": needs
        | {
            "available": hardware.memory,
            "fits": hardware.memory is None or needs["total"] <= hardware.memory,
        },
        "collectives": by_kind(once),
        "further_round": by_kind(further),
        "by_origin": [
            {"phase": p, "part": q, "bytes": n} for (p, q), n in program.by_origin(once).items()
        ],
        "bytes": total,
        "overlapped_bytes": sum(c.bytes_per_step for c in once if c.overlapped),
        "compile": {
            "lower_seconds": step.lower_seconds,
            "compile_seconds": step.compile_seconds,
            "peak_bytes": step.peak_bytes,
        },
    }


def by_kind(found: Iterable[program.Collective]) -> list[dict[str, Any]]:
    """One row for every kind and set of mesh axes: how often it runs per step and the bytes that a
    device receives, most first."""
    rows: dict[Any, list[int]] = defaultdict(lambda: [0, 0])
    for c in found:
        rows[c.kind, c.axes][0] += c.times
        rows[c.kind, c.axes][1] += c.bytes_per_step
    out = [
        {"kind": kind, "axes": list(axes), "times": n, "bytes": b}
        for (kind, axes), (n, b) in rows.items()
    ]
    return sorted(out, key=lambda row: -row["bytes"])


def of_memory(available: int | None) -> str:
    """' of 141 GB', and nothing if it is not known."""
    return f" of {gb(available)}" if available else ""


def text(r: dict[str, Any]) -> str:
    """The report for a person."""
    remat = [("", r["remat_choice"])] if r.get("remat_choice") else []
    lines = [*_model(r), *remat, *_stages(r), *_mesh(r), *_memory_of_layout(r)]
    if e := r["exchange"]:
        rows = f"{e['exchanged_rows']} exchanged and {e['expert_rows']} computed rows"
        lines += [
            ("dispatch", f"{gb(e['bytes'])} per layer for {rows} per round, whatever the routing;"),
            (
                "",
                f"a ragged exchange must be ready for {e['ragged_rows']} rows = {gb(e['ragged_bytes'])}",
            ),
        ]
    if p := r["pipeline"]:
        virtual = plural(p["pieces_a_stage"], "virtual stage")
        lines.append(
            (
                "pipeline",
                f"{p['stages']} stages of {virtual} each, idle {p['bubble_share']:.1%} of the time",
            )
        )
    if "missing" in r:
        lines.append(("program", r["missing"]))
    if "program" not in r:
        return _lines(lines)
    q = r["program"]
    c = q["compile"]
    compiled = (
        f"traced in {c['lower_seconds']:.0f} s, compiled in {c['compile_seconds']:.0f} s, "
        f"{gb(c['peak_bytes'])} of memory"
    )
    lines += [
        *_memory_of_program(q["memory"], math.prod(r["mesh"].values()) > 1),
        *_communication(q),
    ]
    return "\n".join([_lines(lines), _kinds(q), "", _parts(q), _lines([("compiled", compiled)])])


def _lines(pairs: list[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<15}{said}" for name, said in pairs)


def _model(r: dict[str, Any]) -> list[tuple[str, str]]:
    m, b = r["model"], r["batch"]
    mtp = f", and {human(m['mtp'])} in {plural(m['mtp_layers'], 'MTP layer')}" if m["mtp"] else ""
    return [
        ("model", f"{human(m['total'])} parameters, {human(m['active'])} active per token{mtp}"),
        (
            "",
            f"{m['layers']} layers ({m['dense_layers']} dense), hidden {m['hidden_size']}, "
            f"{m['experts']} experts, {m['experts_a_token']} per token, {m['shared_experts']} shared",
        ),
        *[("", said) for said in r["learning"][-1:]],
        (
            "step",
            f"{b['sequences']} x {b['sequence_length']} tokens in "
            f"{plural(b['accumulation'], 'micro-batch')}, {r['strategy']}, dispatch "
            f"{r['dispatch']}, {r['dtype']}{_fp8(r['fp8'])}, remat {r['remat']}",
        ),
    ]


def _fp8(fp8: str) -> str:
    return "" if fp8 == "none" else f" with experts in FP8 ({fp8})"


def _stages(r: dict[str, Any]) -> list[tuple[str, str]]:
    """What each stage stores, and of which one all the rest is."""
    out: list[tuple[str, str]] = []
    for s in r.get("stages", []):
        learn = f"{human(s['parameters_that_learn'])} of {human(s['parameters'])} parameters learn"
        most = "; needs most: the rest of this report is of it" if s["needs_most"] else ""
        said = (
            f"{s['number']} {s['name']}, {s['length']}: {learn}, {gb(s['bytes'])} on a device{most}"
        )
        out.append(("" if out else "stages", said))
    return out


def _mesh(r: dict[str, Any]) -> list[tuple[str, str]]:
    d = r["devices"]

    def place(axis: str, share: int) -> str:
        size = r["mesh"][axis]
        if share == size:
            return f"{axis}: inside a host"
        if share == 1:
            return f"{axis}: between hosts"
        return f"{axis}: {share} of {size} on a host, the rest between hosts"

    return [
        ("devices", f"{d['count']} x {d['kind']}, {plural(d['hosts'], 'host')} of {d['a_host']}"),
        ("mesh", " x ".join(f"{a} {n}" for a, n in r["mesh"].items() if n > 1) or "1 device"),
        *(("", place(axis, share)) for axis, share in r["share_a_host"].items()),
    ]


def _memory_of_layout(r: dict[str, Any]) -> list[tuple[str, str]]:
    stored, available = r["layout_bytes"], r["devices"]["memory"]
    state = sum(stored.values()) - stored["gradients"]
    residual = f" + {gb(stored['residual'])} of residuals" if "residual" in stored else ""
    frozen = f" + {gb(stored['frozen'])} of a frozen model" if "frozen" in stored else ""
    if "frozen_parameters" in stored:
        frozen = f" + {gb(stored['frozen_parameters'])} of frozen parameters{frozen}"
    out = [
        (
            "layout",
            f"a device stores {gb(stored['parameters'])} of parameters + "
            f"{gb(stored['optimizer'])} of optimizer state{residual}{frozen}",
        ),
        (
            "",
            f"and sums {gb(stored['gradients'])} of gradients: "
            f"{gb(state + stored['gradients'])}{of_memory(available)}",
        ),
    ]
    if host := stored.get("host"):
        out.append(("", f"its host holds {gb(host)} of them for it"))
    if available and state > available:
        out.append(
            ("", f"does not fit: the state alone needs {gb(state)}. Divide it over more devices.")
        )
    return out


def _memory_of_program(m: dict[str, Any], several: bool) -> list[tuple[str, str]]:
    available = m["available"]
    too_much = m["total"] - available if available else 0
    verdict = ": fits" if available else ""
    if too_much > 0:
        verdict = f": does not fit, {gb(too_much)} too much"
    teacher = " ="
    if "teacher" in m:  # the total is then the larger of two sums (asked.py)
        teacher = f", {gb(m['teacher'])} of the teacher's weights beside; with its own program"
    out = [
        (
            "memory",
            f"{gb(m['arguments'])} of arguments + {gb(m['temporaries'])} of temporaries + "
            f"{gb(m['results'] + m['code'])} other{teacher} {gb(m['total'])}{of_memory(available)}{verdict}",
        )
    ]
    share = memory_fraction(several)
    if available and m["fits"] and m["total"] > share * available:
        out.append(
            ("", f"more than the {share:.0%} that train.py lets JAX take: export {FRACTION}=0.98")
        )
    return out


def _communication(q: dict[str, Any]) -> list[tuple[str, str]]:
    beside = q["overlapped_bytes"] / (q["bytes"] or 1)
    return [
        (
            "communication",
            f"a device receives {gb(q['bytes'])} per step, {beside:.0%} of it overlapped with computation",
        )
    ]


def _kinds(q: dict[str, Any]) -> str:
    """Bytes per step by kind and axes, and of a further dispatch round of every layer."""
    further = {(row["kind"], *row["axes"]): gb(row["bytes"]) for row in q["further_round"]}
    rows = [["kind", "axes", "times", "bytes", "a further round"]]
    for row in q["collectives"]:
        again = further.pop((row["kind"], *row["axes"]), "")
        rows.append(
            [row["kind"], " x ".join(row["axes"]), str(row["times"]), gb(row["bytes"]), again]
        )
    rows += [[kind, " x ".join(axes), "0", "", again] for (kind, *axes), again in further.items()]
    return table(rows, "  ")


def _parts(q: dict[str, Any]) -> str:
    """Bytes per step by part of the model and pass over it."""
    parts: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(PHASES, 0))
    for row in q["by_origin"]:
        parts[row["part"]][row["phase"]] += row["bytes"]
    order = sorted(parts, key=lambda part: -sum(parts[part].values()))
    cells = [
        [part, *(gb(n) if (n := parts[part][phase]) else "" for phase in PHASES)] for part in order
    ]
    return table([["part", *PHASES], *cells], "  ")
