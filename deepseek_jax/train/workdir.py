"""The run's folder: is it usable, does it hold another model, what are its options."""

import contextlib
import dataclasses
import json
import os
import secrets
from typing import Any

import jax

from deepseek_jax.checkpoint import integrity
from deepseek_jax.checkpoint.finder import has_steps
from deepseek_jax.checkpoint.folder import Folder, steps_in
from deepseek_jax.cluster.exchange import from_first
from deepseek_jax.config.options import (
    OPTIONS,
    Config,
    ModelConfig,
    changes_shapes,
    value_of,
)
from deepseek_jax.errors import UserError
from deepseek_jax.tensorfile.bounded_json import BadFile
from deepseek_jax.train import history

RUN, HISTORY = "run", "data_history"  # in config.json: the name of the run, and what its steps read
# in config.json: config.train.steps, or what config.train.epochs or the stages came to
LAST_STEP = "last_step"
# in config.json: what followed from the options, and what is known of the run
_NOT_OPTIONS = ("xla_options", RUN, HISTORY, LAST_STEP)


def prepare(workdir: str, config: Config, tokenizer: str | None = None) -> list[str]:
    """Creates the folder and compares the run that it holds with this run's options.

    Args:
      tokenizer: the name of this run's tokenizer, to be compared before the data are read.

    Returns:
      A line for each option that differs from the run that the folder holds, none of which changes a shape.

    Raises:
      UserError: the folder cannot be written; it holds a checkpoint of a model with other shapes or of
        another tokenizer; the checkpoints are another run's, or elsewhere; or files in it are not of a run.
    """
    _check_ours(workdir)
    try:
        os.makedirs(workdir, exist_ok=True)
        probe = os.path.join(workdir, f".writable.{os.getpid()}")
        with open(probe, "w"):
            pass
        os.remove(probe)
    except OSError as e:
        raise UserError(
            f"--workdir={workdir} cannot be written ({e.strerror}). Name a folder that you may write to."
        ) from e
    path, folder = os.path.join(workdir, "config.json"), checkpoints(workdir, config)
    before = _with_defaults(_read(path), Config().to_json()) if os.path.exists(path) else None
    if not has_checkpoints(workdir, config):
        _check_moved(workdir, folder, before)
        return []
    extra = newest_extra(folder)
    if extra:  # of kind local it is read later
        check_owner(workdir, config, extra)
    check_model(workdir, config, extra)
    if extra.get("data"):
        history.check_tokenizer(extra["data"][-1]["contents"], tokenizer, config.data.tokenizer)
    if before is None:
        model = dataclasses.asdict(config.model)
        return _differences(extra.get("model", model), model, "config.model")
    check_model(workdir, config, before)
    if before["objective"] != config.objective:
        raise UserError(
            f"config.objective={config.objective} differs from {before['objective']} of the run of "
            f"--workdir={workdir}. Name another --workdir, and give it this run's model by config.init_from."
        )
    for o in OPTIONS.values():
        if o.name.startswith("lora.") and o.on_resume == "refused":
            was, now = before["lora"][o.name.removeprefix("lora.")], value_of(config, o.name)
            if was != now:
                raise UserError(
                    f"{o.full_name}={now!r} differs from {was!r} of the run of --workdir={workdir}: its "
                    f"checkpoints mean another model with it. Set {o.full_name}={was!r}, or name another "
                    f"--workdir."
                )
    return _differences(before, config.to_json(), "config")


def _check_ours(workdir: str) -> None:
    """Whether what a run would replace in the folder is of a run: nobody's config.json or metrics.jsonl is
    overwritten."""
    config, rows = os.path.join(workdir, "config.json"), os.path.join(workdir, "metrics.jsonl")
    if os.path.lexists(config):
        _read(config)
    elif os.path.lexists(rows):
        raise UserError(
            f"--workdir={workdir} holds {rows} and no config.json of a run that wrote it. Name "
            f"another --workdir, or move that file away."
        )


def check_model(workdir: str, config: Config, before: dict[str, Any]) -> None:
    """Compares the shapes of the model with what a checkpoint, or config.json, says of its own, if it does.

    Raises:
      UserError: they differ.
    """
    now = dataclasses.asdict(config.model)
    for name, was in _with_defaults(
        before.get("model", now), dataclasses.asdict(ModelConfig())
    ).items():
        if name in now and was != now[name] and changes_shapes(f"model.{name}"):
            raise UserError(
                f"config.model.{name}={now[name]} differs from {was} of the checkpoint in "
                f"{checkpoints(workdir, config)}. Set config.model.{name}={was} to go on with it, or name "
                "another --workdir."
            )


def newest_extra(folder: str) -> dict[str, Any]:
    """What the newest checkpoint of a folder that can be read says besides the state; nothing is checked. {}
    without one.
    """
    return newest(folder)[1]


def newest(folder: str) -> tuple[int, dict[str, Any]]:
    """(its step, the same); (0, {}) without one."""
    for step in reversed(steps_in(folder)):
        with contextlib.suppress(BadFile, OSError):
            return step, integrity.read_extra(Folder(folder, read_only=True).at(step))
    return 0, {}


def check_owner(workdir: str, config: Config, extra: dict[str, Any]) -> None:
    """Refuses checkpoints in config.checkpoint.dir that the run of another workdir wrote.

    Args:
      extra: of the newest.

    Raises:
      UserError: they are another run's, and config.checkpoint.take_over does not ask for them.
    """
    folder, own = checkpoints(workdir, config), os.path.join(workdir, "checkpoints")
    if config.checkpoint.take_over or os.path.realpath(folder) == os.path.realpath(own):
        return
    path = os.path.join(workdir, "config.json")
    before = _read(path, everything=True) if os.path.exists(path) else {}
    theirs, ours = extra.get(RUN) or None, before.get(RUN)
    if (
        theirs is None and before
    ):  # of an earlier version, which wrote down where its checkpoints are
        same = before.get("checkpoint", {}).get("dir") == config.checkpoint.dir
    else:
        same = theirs is not None and theirs == ours
    if not same:
        raise UserError(
            f"config.checkpoint.dir={config.checkpoint.dir} holds checkpoints of another run "
            f"than --workdir={workdir}. Name the workdir of that run or an empty folder, or set "
            f"config.checkpoint.take_over=True to go on from them here."
        )


def identity(workdir: str, config: Config, extra: dict[str, Any]) -> str:
    """The name of the run that goes on in a folder, for its checkpoints and its config.json. All processes
    call it.

    It is that of the checkpoint that it goes on from, if that is its own; a run that took over another's gets
    a new name, so that the other one is refused from then on.
    """
    path = os.path.join(workdir, "config.json")
    ours = _read(path, everything=True).get(RUN) if os.path.exists(path) else None
    theirs = extra.get(RUN)
    kept = ours if config.checkpoint.take_over and theirs != ours else theirs or ours
    return from_first("run", kept if isinstance(kept, str) and kept else secrets.token_hex(8))


def _check_moved(workdir: str, folder: str, before: dict[str, Any] | None) -> None:
    """A run whose checkpoints are elsewhere would begin anew."""
    if before is None:
        return
    there = before["checkpoint"]["dir"] or os.path.join(workdir, "checkpoints")
    if steps := steps_in(there):
        raise UserError(
            f"{folder} holds no checkpoint, but the run of --workdir={workdir} has them, up to "
            f"step {steps[-1]}, in {there}. Set "
            f"config.checkpoint.dir={before['checkpoint']['dir']!r} to go on with it, or name "
            "another --workdir."
        )


def checkpoints(workdir: str, config: Config) -> str:
    """The folder of a run's checkpoints."""
    return config.checkpoint.dir or os.path.join(workdir, "checkpoints")


def write_config(
    workdir: str,
    config: Config,
    xla_options: dict[str, Any] | None = None,
    run: str | None = None,
    data: list[dict[str, Any]] | None = None,
    last_step: int | None = None,
) -> None:
    """Writes WORKDIR/config.json, the resolved options and what was asked of XLA's compiler, whole or not at
    all.

    Args:
      run: as `identity`. data: History.to_json, for readers of the run.
      last_step: of the run; None: config.train.steps.

    Raises:
      UserError: it cannot be written.
    """
    if jax.process_index() == 0:
        path = os.path.join(workdir, "config.json")
        try:
            with open(path + ".tmp", "w", encoding="utf-8") as f:
                more = {
                    "xla_options": xla_options or {},
                    RUN: run,
                    HISTORY: data or [],
                    LAST_STEP: config.train.steps if last_step is None else last_step,
                }
                json.dump(config.to_json() | more, f, indent=2)
            os.replace(path + ".tmp", path)
        except OSError as e:
            raise UserError(
                f"{path} cannot be written ({e.strerror}). Make room, or name another --workdir."
            ) from e


def options(workdir: str) -> dict[str, Any]:
    """Of the run in a folder, as nested dicts; {} where there is none.

    Raises:
      UserError: its config.json is damaged.
    """
    return read_config(workdir) if os.path.exists(os.path.join(workdir, "config.json")) else {}


def has_checkpoints(workdir: str, config: Config) -> bool:
    """Whether the run in a folder has saved one, as far as this host sees."""
    return has_steps(checkpoints(workdir, config), config.checkpoint.local_dir)


def read_config(workdir: str) -> dict[str, Any]:
    """The options of the run in a folder, as nested dicts; train.steps is what config.train.epochs, or the
    stages, came to.

    Raises:
      UserError: there is no run, or its config.json is damaged.
    """
    path = os.path.join(workdir, "config.json")
    if not os.path.exists(path):
        raise UserError(
            f"--workdir={workdir} holds no run: there is no {path}. Name a folder that train.py wrote."
        )
    out = _read(path, everything=True)
    last_step, train = out.get(LAST_STEP), out.get("train")
    if isinstance(train, dict) and last_step:
        out["train"] = train | {"steps": last_step}
    return {k: v for k, v in out.items() if k not in _NOT_OPTIONS}


def read_history(workdir: str) -> tuple[history.History, bool]:
    """The list that `write_config` wrote, and True; of a run of an earlier version that of its last options,
    and False.

    Raises:
      UserError: there is no run, or its config.json is damaged.
    """
    options, path = read_config(workdir), os.path.join(workdir, "config.json")
    try:
        if written := _read(path, everything=True).get(HISTORY):
            return history.History.of_json(written), True
        return history.History.of_options(options), False
    except (KeyError, TypeError) as e:
        raise UserError(
            f"{path} cannot be read ({HISTORY} is damaged). Restore it, or name another --workdir."
        ) from e


def _read(path: str, everything: bool = False) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as f:
            out = json.load(f)
        if not isinstance(out, dict) or not isinstance(out.get("model"), dict):
            raise ValueError("it has no section model")
        out = _renamed(out)
        return out if everything else {k: v for k, v in out.items() if k not in _NOT_OPTIONS}
    except (OSError, ValueError) as e:
        raise UserError(
            f"{path} cannot be read as the config of a run ({e}). Restore it, or name another "
            f"--workdir."
        ) from e


def _renamed(written: dict[str, Any]) -> dict[str, Any]:
    """With the options of an earlier version under their names of today."""
    log = written.get("log")
    if not isinstance(log, dict) or "tensorboard" not in log:
        return written
    log = dict(log)
    trackers = "tensorboard" if log.pop("tensorboard") else ""
    return written | {"log": {"trackers": trackers, **log}}


def _with_defaults(before: Any, defaults: Any) -> Any:
    """A run of an earlier version had the options that it did not know at their defaults."""
    if not isinstance(defaults, dict) or not isinstance(before, dict):
        return before
    return before | {k: _with_defaults(before.get(k, v), v) for k, v in defaults.items()}


def _differences(before: Any, now: Any, where: str) -> list[str]:
    if isinstance(now, dict):
        return [
            line
            for k, v in now.items()
            for line in _differences(
                before.get(k) if isinstance(before, dict) else None, v, f"{where}.{k}"
            )
        ]
    return [] if before == now else [f"{where}: {before} -> {now}"]
