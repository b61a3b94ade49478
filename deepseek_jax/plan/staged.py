"""A run with stages, planned: what each of them stores, and which needs most."""

from typing import Any, NamedTuple

import jax

from deepseek_jax.config.options import Config
from deepseek_jax.plan import topology
from deepseek_jax.run import stages
from deepseek_jax.train.state import Layout


class Planned(NamedTuple):
    """What is planned for: the run, or the stage of it that needs most."""

    config: Config
    mesh: jax.sharding.Mesh
    layout: Layout
    stages: list[dict[str, Any]]  # of the report; [] for a run without


def lay_out(config: Config, devices: list[Any]) -> Planned:
    """The mesh over given devices, and the layout of the stage that stores most on one of them.

    Temporaries follow the weights that learn, as what is stored does: gradients and moments are of them.

    Raises:
      UserError: the mesh does not fit, or a stage names weights that are not there.
    """
    if not config.distill.stages:
        return Planned(config, *topology.lay_out(config, devices), [])
    rows: list[dict[str, Any]] = []
    found = []
    for stage in stages.planned(config):
        with stage.naming():
            mesh, layout = topology.lay_out(stage.options, devices)
        params = layout.model.abstract.params
        learn, total = stages.learning(layout.multipliers, params)
        stored = layout.bytes_per_device(mesh)
        found.append(Planned(stage.options, mesh, layout, rows))
        rows.append(
            {
                "number": stage.number,
                "name": stage.name,
                "length": stage.given.length,
                "parameters": total,
                "parameters_that_learn": learn,
                "bytes": sum(n for kind, n in stored.items() if kind != "host"),
            }
        )
    sizes = [row["bytes"] for row in rows]
    most = sizes.index(max(sizes))
    for i, row in enumerate(rows):
        row["needs_most"] = i == most
    return found[most]
