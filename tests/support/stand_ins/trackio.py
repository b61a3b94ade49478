"""A stand-in for trackio: what deepseek_jax calls of it, with its signatures."""

import stand_in


def init(project, name=None, config=None, resume="never", embed=True):
    stand_in.call("trackio.init", project=project, name=name, config=config, resume=resume)


def log(metrics, step=None):
    stand_in.call("trackio.log", metrics=metrics, step=step)


def finish():
    stand_in.call("trackio.finish")
