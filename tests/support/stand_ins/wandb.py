"""A stand-in for wandb: what deepseek_jax calls of it, with its signatures."""

import os

import stand_in


class Run:
    url = None

    def __init__(self, id, dir):
        self.id = id
        self.dir = os.path.join(dir, "wandb", "offline-run-1", "files")

    def define_metric(self, name, step_metric=None, step_sync=None):
        stand_in.call("wandb.define_metric", name=name, step_metric=step_metric)

    def log(self, data, step=None, commit=None):
        stand_in.call("wandb.log", data=data, step=step)

    def finish(self, exit_code=None):
        stand_in.call("wandb.finish", exit_code=exit_code)


def teardown(exit_code=None):
    stand_in.call("wandb.teardown")


def init(
    project=None,
    dir=None,
    id=None,
    name=None,
    config=None,
    allow_val_change=None,
    mode=None,
    resume=None,
    settings=None,
):
    given = {"project": project, "id": id, "name": name, "mode": mode, "resume": resume}
    stand_in.call("wandb.init", config=config, settings=settings, **given)
    return Run(id, dir)
