"""A stand-in for mlflow: what deepseek_jax calls of it, with its signatures. Its runs are in the file of
calls.
"""

import types

import stand_in


class MlflowException(Exception):
    error_code = "RESOURCE_DOES_NOT_EXIST"


_active = None


def get_tracking_uri():
    return "sqlite:///mlflow.db"


def set_experiment(experiment_name=None):
    stand_in.call("mlflow.set_experiment", experiment_name=experiment_name)


def active_run():
    return _active


def get_run(run_id):
    known = [c for c in stand_in.calls() if c["call"] == "mlflow.start_run" and c["id"] == run_id]
    if not known:
        raise MlflowException("Run with id=... not found")
    return _run(run_id)


def start_run(run_id=None, run_name=None):
    global _active
    id = run_id or f"run{sum(c['call'] == 'mlflow.start_run' for c in stand_in.calls())}"
    stand_in.call("mlflow.start_run", run_id=run_id, run_name=run_name, id=id)
    _active = _run(id)
    return _active


def log_params(params, synchronous=None):
    stand_in.call("mlflow.log_params", params=params)


def set_tags(tags, synchronous=None):
    stand_in.call("mlflow.set_tags", tags=tags)


def log_metrics(metrics, step=None, synchronous=None, run_id=None, timestamp=None):
    stand_in.call("mlflow.log_metrics", metrics=metrics, step=step, run_id=run_id)


def end_run(status="FINISHED"):
    global _active
    _active = None
    stand_in.call("mlflow.end_run", status=status)


def _run(id):
    params = {}
    for c in stand_in.calls():
        if c["call"] == "mlflow.log_params":
            params |= c["params"]
    info = types.SimpleNamespace(run_id=id, lifecycle_stage="active")
    return types.SimpleNamespace(info=info, data=types.SimpleNamespace(params=params))
