"""Where a run lies and where its time goes: the mesh as a picture, processes, bytes, parts of a step."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from deepseek_jax.cli.texts import gb, plural
from deepseek_jax.report.markup import Child, Markup, joined, table, tag
from deepseek_jax.report.run_data import RunData
from deepseek_jax.report.series import number
from deepseek_jax.train import starts

DRAWN = 512  # devices at most; of a larger mesh one index of the outer axes is drawn
HUES = 8  # of report.css: .hue0 ... .hue7
WIDTH = 720.0  # of pictures, in their own units
PHASES = ("forward", "recompute", "backward", "optimizer")  # of a step, in order; others follow
_GAP = 10.0  # between blocks of devices
_CELL = (14.0, 84.0, 40.0)  # the smallest and largest width of a device, and the largest height
_WITH_TEXT = 34.0  # the width from which a device has its process written in it

LIES = {  # axis -> what is divided over it
    "data": "sequences of the batch",
    "stage": "blocks of layers, one after the other",
    "fsdp": "sequences of the batch, and pieces of every weight",
    "expert": "experts and the sequences of the batch; dense weights in pieces",
    "context": "parts of a sequence",
    "tensor": "heads of attention and hidden units",
}


class Axis(NamedTuple):
    name: str
    size: int


def mesh(run: RunData) -> Markup:
    """The devices as a grid by the axes of the mesh; "" where the run has not said."""
    axes, processes = _axes(run.start), starts.processes(run.start)
    if not axes or math.prod(a.size for a in axes) != len(processes):
        return Markup("")
    count = len(set(processes))
    kind = run.start.get("device_kind", "")
    said = f"{plural(len(processes), 'device')} ({kind}), {count} process{'es' * (count > 1)}"
    across = run.start.get("across") or []
    if isinstance(across, list) and across:
        said += f"; neighbours along {', '.join(map(str, across))} are in different processes"
    inner, left_out = axes, []
    while math.prod(a.size for a in inner) > DRAWN and len(inner) > 1:
        left_out.append(inner[0])
        inner = inner[1:]
    if left_out:
        names = " x ".join(f"{a.name} {a.size}" for a in left_out)
        said += f". Drawn is the first index of {names}"
    experts = run.look.config.get("model", {}).get("n_routed_experts") or 0
    rows: list[list[Child]] = [
        [a.name, f"{a.size}", LIES.get(a.name, ""), _each(a, experts)] for a in axes
    ]
    strategy = f"Strategy {run.start.get('strategy', '')}"
    if run.start.get("dispatch"):
        strategy += f", dispatch {run.start['dispatch']}"
    if len(processes) == 1:
        return tag("p", f"{said}. {strategy}.")
    return joined(
        tag("p", said + "."),
        _picture(inner, processes, experts, said),
        table(("axis", "size", "divided over it", "each index has"), rows, f"Mesh. {strategy}")
        if rows
        else None,
    )


def _axes(start: Mapping[str, Any]) -> list[Axis]:
    """Those of more than one device; one axis of 1 on one device."""
    found = start.get("mesh")
    if not isinstance(found, list):
        return []
    axes = [
        Axis(str(a[0]), a[1])
        for a in found
        if isinstance(a, list) and len(a) == 2 and isinstance(a[1], int) and a[1] > 0
    ]
    return [a for a in axes if a.size > 1] or axes[:1]


def _each(axis: Axis, experts: int) -> str:
    if axis.name == "expert" and experts and experts % axis.size == 0:
        return plural(experts // axis.size, "expert") + " of each layer"
    return ""


def _picture(axes: list[Axis], processes: Sequence[int], experts: int, said: str) -> Markup:
    columns = math.prod(a.size for a in axes[::-2])  # the innermost axis runs to the right
    gaps = (math.prod(a.size for a in axes[-3::-2]) - 1) * _GAP if len(axes) > 2 else 0
    width = min(max((WIDTH - gaps) / columns, _CELL[0]), _CELL[1])
    height = min(width, _CELL[2])
    cells: list[Markup] = []
    for index in range(math.prod(a.size for a in axes)):
        place: list[int] = []
        rest = index
        for a in reversed(axes):
            place.insert(0, rest % a.size)
            rest //= a.size
        x, y = _corner(axes, place, width, height)
        where = ", ".join(f"{a.name} {i}" for a, i in zip(axes, place, strict=True))
        text = f"device {index}: {where}; process {processes[index]}"
        at = dict(zip((a.name for a in axes), place, strict=True))
        size = dict(axes).get("expert", 1)
        if experts and experts % size == 0:
            each = experts // size
            first = at.get("expert", 0) * each
            text += f"; experts {first} to {first + each - 1}"
        hue = processes[index] % HUES
        shape = {
            "x": f"{x:.1f}",
            "y": f"{y:.1f}",
            "width": f"{width - 2:.1f}",
            "height": f"{height - 2:.1f}",
        }
        label = None
        if width >= _WITH_TEXT:
            middle = {"x": f"{x + width / 2 - 1:.1f}", "y": f"{y + height / 2 + 3:.1f}"}
            label = tag("text", f"p{processes[index]}", **middle)
        cells.append(
            tag("g", tag("title", text), tag("rect", rx="3", class_=f"hue{hue}", **shape), label)
        )
    last = [a.size - 1 for a in axes]
    right, bottom = _corner(axes, last, width, height)
    box = f"0 0 {max(right + width, 1):.0f} {bottom + height:.0f}"
    order = " and ".join(
        f"{direction}: {names}"
        for direction, names in (
            ("to the right", ", then ".join(a.name for a in axes[::-2])),
            ("downwards", ", then ".join(a.name for a in axes[-2::-2])),
        )
        if names
    )
    svg = tag(
        "svg",
        cells,
        viewBox=box,
        width=f"{right + width:.0f}",
        role="img",
        aria_label=said,
        class_="mesh",
    )
    return tag("figure", svg, tag("figcaption", f"{order}. p0: in process 0"))


def _corner(axes: list[Axis], place: list[int], width: float, height: float) -> tuple[float, float]:
    """Axes from the innermost run to the right and downwards by turns; from the third on with gaps."""
    corner, sizes = [0.0, 0.0], [width, height]
    for turn, (axis, i) in enumerate(zip(reversed(axes), reversed(place), strict=True)):
        way = turn % 2
        gap = _GAP if turn >= 2 else 0.0
        corner[way] += i * (sizes[way] + gap)
        sizes[way] = axis.size * (sizes[way] + gap) - gap
    return corner[0], corner[1]


def processes(run: RunData) -> Markup:
    """What each said last; ages are counted from the newest of them."""
    found = run.look.processes
    if not found:
        return Markup("")
    newest = max(p["time"] for p in found)
    rows: list[list[Child]] = [
        [
            str(p.get("process", "")),
            p["host"],
            str(p.get("pid", "")),
            p["state"],
            f"{p['step']:,}",
            f"{p['memory_gb']:.3f}",
            f"{newest - p['time']:.1f}",
        ]
        for p in found
    ]
    heads = ("process", "host", "pid", "state", "step", "peak memory, GB", "s before the newest")
    return table(heads, rows, "Processes")


def memory(run: RunData) -> Markup:
    """Bytes per device by kind, as the layout has them."""
    found = run.start.get("bytes_per_device")
    if not isinstance(found, dict):
        return Markup("")
    parts = {str(k).replace("_", " "): number(v) for k, v in found.items()}
    host = parts.pop("host", 0.0)
    rows = [(name, value, gb(value)) for name, value in parts.items() if value > 0]
    title = f"State per device: {gb(sum(v for _, v, _ in rows))}"
    if host:
        title += f", and {gb(host)} in the memory of its host"
    return _bar(title, rows, "bytes per device") if rows else Markup("")


def profile(run: RunData) -> Markup:
    """Where the time of a traced step went."""
    if run.profile is None:
        return Markup("")
    parts = {
        str(name): {str(k): number(v) for k, v in phases.items()}
        for name, phases in run.profile["parts"].items()
        if isinstance(phases, dict)
    }
    sums = {name: sum(v for v in p.values() if v == v) for name, p in parts.items()}
    total = sum(sums.values())
    if not total > 0:
        return Markup("")
    phases = list(dict.fromkeys([*PHASES, *(k for p in parts.values() for k in p)]))
    phases = [k for k in phases if any(p.get(k) for p in parts.values())]
    rows: list[list[Child]] = [
        [
            name,
            f"{sums[name] * 1e3:.2f}",
            f"{sums[name] / total:.1%}",
            *(f"{p.get(k, 0.0) * 1e3:.2f}" for k in phases),
        ]
        for name, p in parts.items()
    ]
    bars = [(name, s, f"{s * 1e3:.2f} ms") for name, s in sums.items() if s > 0]
    title = f"A step of {total * 1e3:.1f} ms, per device; steps {run.profile.get('steps', '')}"
    heads = ("part", "ms", "share", *(f"{k}, ms" for k in phases))
    return joined(_bar(title, bars, "time by part"), table(heads, rows, "Time of a step by part"))


def _bar(title: str, parts: Sequence[tuple[str, float, str]], label: str) -> Markup:
    """Shares of a whole side by side, with a legend that has the numbers."""
    total, x, drawn, legend = sum(v for _, v, _ in parts), 0.0, [], []
    for i, (name, value, text) in enumerate(parts):
        width = WIDTH * value / total
        shape = {"x": f"{x:.1f}", "y": "0", "width": f"{max(width - 1, 0.5):.1f}", "height": "28"}
        hue = f"hue{i % HUES}"
        said = f"{name}: {text}, {value / total:.1%}"
        caption = (
            tag("text", name, x=f"{x + 6:.1f}", y="18") if width > 8 * len(name) + 12 else None
        )
        drawn.append(tag("g", tag("title", said), tag("rect", class_=hue, **shape), caption))
        key = tag(
            "svg",
            tag("rect", width="12", height="12", class_=hue),
            width="12",
            height="12",
            aria_hidden="true",
        )
        legend.append(tag("li", key, f" {said}"))
        x += width
    svg = tag(
        "svg",
        drawn,
        viewBox=f"0 0 {WIDTH:.0f} 28",
        role="img",
        aria_label=f"{label}: {title}",
        class_="bar",
    )
    return tag("figure", tag("figcaption", title), svg, tag("ul", legend, class_="legend"))
