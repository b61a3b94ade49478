"""Where a step's time goes, by JAX's profiler: for programs that have little more than jax."""

import collections
import gzip
import json
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from deepseek_jax.plan import rates, timeline
from deepseek_jax.xla import hlo, origin


def predicted(
    text: str, mesh_shape: dict[str, int], device_kind: str, assignments: float, rounds: int
) -> dict[str, Any]:
    """Seconds that plan --roofline predicts for a program on this device, at the rounds that it took: to
    stand beside what was measured. {} where the device's rates are not known.

    Args:
      assignments: of a micro-batch on one device, as work.Reader has them.
    """
    speed = rates.of_device(device_kind)
    if speed is None:
        return {}
    try:
        compiled = timeline.Program(text, mesh_shape, mesh_shape, assignments=assignments)
        return {
            f"predicted_{kind}_s": timeline.Timeline(compiled, rate, rounds).run().seconds
            for kind, rate in (("ideal", speed.ideal), ("derated", speed.derated))
        }
    except Exception as e:  # what cannot be predicted has been measured all the same
        return {"not_predicted": f"{type(e).__name__}: {e}"[:250]}


def costs(run: Callable[[], Any], text: str, most: int = 3) -> list[dict[str, Any]]:
    """The instructions that take most of one run, by JAX's profiler: where they come from and their share of
    all device time. Parts and phases are those of plan --roofline and of config.profile (xla/origin.py).

    Args:
      text: of the program that runs, `compiled.as_text()`.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        files = list(pathlib.Path(folder).rglob("*.trace.json.gz"))
        events = json.loads(gzip.decompress(files[0].read_bytes()))["traceEvents"] if files else []
    total: collections.Counter = collections.Counter()
    streams = set()
    if not any(
        "hlo_op" in e.get("args", {}) for e in events
    ):  # kernels inside a CUDA graph have names of their own only
        streams = {
            (e["pid"], e["tid"])
            for e in events
            if e.get("name") == "thread_name" and e["args"]["name"].startswith("Stream")
        }
    for e in events:
        name = e.get("args", {}).get("hlo_op") or (
            e["name"] if (e.get("pid"), e.get("tid")) in streams else None
        )
        # A loop's own event holds those of its body.
        if e.get("ph") == "X" and name and not name.startswith(("while", "call", "conditional")):
            total[name] += e["dur"]
    module = hlo.Module(text)
    places = origin.by_name(module)
    source = {i.name: i.op_name for body in module.computations.values() for i in body.values()}
    whole = sum(total.values())
    out = []
    for name, us in total.most_common(most):
        part, phase, _ = places.get(name, ("other", "other", ""))
        row = {"instruction": name, "from": source.get(name, ""), "part": part, "phase": phase}
        out.append(row | {"ms": us / 1e3, "share": us / whole})
    return out
