"""Which charts there are, and what of a run they show: data for report.js."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from deepseek_jax.report.series import Packed, Rows, points


class Described(Protocol):
    """What a metric is: run/metric.py."""

    @property
    def unit(self) -> str: ...

    @property
    def help(self) -> str: ...


class Chart(NamedTuple):
    """One pair of axes.

    Attributes:
      metrics: names in metrics.jsonl, of one unit.
      title: of the chart.
      section: id of the part of the page that it stands in.
      log: whether a logarithmic axis is offered.
      smooth: whether a smoothed curve is offered.
    """

    metrics: tuple[str, ...]
    title: str
    section: str
    log: bool = False
    smooth: bool = False


CHARTS = (
    Chart(("loss", "eval_loss"), "Loss", "learning", log=True, smooth=True),
    Chart(("eval_bits_per_byte",), "Held-out bits per byte", "learning", log=True),
    Chart(("token_accuracy", "eval_token_accuracy"), "Accuracy", "learning", smooth=True),
    Chart(("kl", "eval_kl"), "Divergence from the teacher", "learning", log=True, smooth=True),
    Chart(("teacher_loss", "eval_teacher_loss"), "The teacher's loss", "learning", smooth=True),
    Chart(("lr",), "Learning rate", "learning"),
    Chart(("grad_norm",), "Gradient norm", "learning", log=True, smooth=True),
    Chart(("tokens_per_sec",), "Throughput", "speed", smooth=True),
    Chart(("utilisation",), "Share of peak", "speed", smooth=True),
    Chart(("step_time_s",), "Step time", "speed", log=True, smooth=True),
    Chart(("memory_gb",), "Peak memory", "speed"),
    Chart(("max_violation",), "Max violation", "experts", log=True, smooth=True),
    Chart(("routing_entropy",), "Routing entropy", "experts"),
    Chart(("dispatch_rounds",), "Dispatch rounds", "experts"),
    Chart(("dropped_tokens",), "Dropped assignments", "experts"),
    Chart(("device_imbalance",), "Imbalance of devices", "experts", smooth=True),
    Chart(("left_device_share",), "Assignments that leave their device", "experts"),
    Chart(("balance_loss",), "Balance loss", "experts", smooth=True),
    Chart(("lm_loss", "mtp_loss"), "Cross-entropy", "further", log=True, smooth=True),
)
QUIET = (  # whose chart says nothing where they are the same all the time
    "dispatch_rounds",
    "dropped_tokens",
    "device_imbalance",
    "left_device_share",
    "teacher_loss",
    "loss_scale",
)
OTHERS = 12  # further charts at most, of metrics that no chart names
# Counters, settings and text; what is an event; what stands in another chart or says the same.
_NO_CHART = {
    "step",
    "stage",
    "tokens_seen",
    "skipped_steps",
    "eval_tokens",
    "samples_per_sec",
    "model_tflops_per_device",
}
_LABELS = {
    "loss": "training",
    "eval_loss": "held-out",
    "lm_loss": "next token",
    "mtp_loss": "tokens further ahead",
    "token_accuracy": "training",
    "eval_token_accuracy": "held-out",
    "kl": "training",
    "eval_kl": "held-out",
    "teacher_loss": "training",
    "eval_teacher_loss": "held-out",
}


def packed(rows: Rows, most: int) -> Packed:
    """Every series of a run that has a number.

    Args:
      most: points of each.
    """
    out = Packed(most)
    shapes = dict.fromkeys(map(tuple, (*rows.steps, *rows.evaluations)))
    for name in dict.fromkeys(name for names in shapes for name in names):
        if name not in _NO_CHART and isinstance(name, str):
            own = rows.evaluations if name.startswith("eval_") else rows.steps
            out.add(name, *points(own, name))
    return out


def constant(runs: Sequence[Packed]) -> dict[str, float]:
    """{name: value} of the metrics of QUIET that have one value in all runs, everywhere."""
    out = {}
    for name in QUIET:
        values = {v for run in runs if name in run.series for v in run.series[name][1]}
        if len(values) == 1 and None not in values:
            out[name] = values.pop()
    return out


def charts(names: Sequence[str], described: Mapping[str, Described]) -> list[dict[str, Any]]:
    """The charts of a page, in its order, as report.js reads them.

    Args:
      names: of the series that they show.
      described: what is known of them.
    """
    known = {m for chart in CHARTS for m in chart.metrics}
    others = [n for n in names if n not in known][:OTHERS]
    out: list[dict[str, Any]] = []
    further = (Chart((n,), n, "further", log=True, smooth=True) for n in others)
    for chart in (*CHARTS, *further):
        there = [m for m in chart.metrics if m in names]
        if not there:
            continue
        first = described.get(there[0])
        out.append(
            {
                "id": f"chart-{len(out)}",
                "title": chart.title,
                "section": chart.section,
                "unit": first.unit if first else "",
                "help": "; ".join(described[m].help for m in there if m in described),
                "log": chart.log,
                "smooth": chart.smooth,
                "series": [{"name": m, "label": _LABELS.get(m, m)} for m in there],
            }
        )
    return out
