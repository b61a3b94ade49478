"""The run's folder: is it usable, does it hold another model, what are its options."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import jax

from deepseek_jax.config import Config, Model, UserError

# Options that change no array's shape: a run may go on with other values of these.
FREE_MODEL_OPTIONS = {"n_group", "topk_group", "num_experts_per_tok", "scoring_func", "norm_topk_prob", "routed_scaling_factor",
                       "aux_loss_alpha", "seq_aux", "rms_norm_eps", "rope_theta", "rope_interleave", "rope_scaling",
                       "partial_rotary_factor", "max_position_embeddings", "initializer_range"}


_NOT_AN_OPTION = "xla_options"  # in config.json: what followed from the options


def prepare(workdir: str, config: Config) -> list[str]:
    """Creates the folder and compares its config.json with this run's options.

    Returns:
      A line for each option that differs from the run that the folder holds, none of which changes a shape.

    Raises:
      UserError: the folder cannot be written, holds a checkpoint of a model with other shapes, or files that
        are not of a run.
    """
    _check_ours(workdir)
    try:
        os.makedirs(workdir, exist_ok=True)
        probe = os.path.join(workdir, f".writable.{os.getpid()}")
        with open(probe, "w"):
            pass
        os.remove(probe)
    except OSError as e:
        raise UserError(f"--workdir={workdir} cannot be written ({e.strerror}). Name a folder that you may write to.") from e
    path = os.path.join(workdir, "config.json")
    checkpoints = os.path.join(workdir, "checkpoints")
    if not os.path.exists(path) or not os.path.isdir(checkpoints) or not any(n.isdigit() for n in os.listdir(checkpoints)):
        return []
    before, now = _with_defaults(_read(path), Config().to_json()), config.to_json()
    for name in (f.name for f in dataclasses.fields(Model)):
        was, is_now = before["model"].get(name), now["model"][name]
        if was != is_now and name not in FREE_MODEL_OPTIONS:
            raise UserError(f"config.model.{name}={is_now} differs from {was} of the checkpoint in {workdir}. "
                            f"Set config.model.{name}={was} to go on with it, or name another --workdir.")
    return _differences(before, now, "config")


def _check_ours(workdir: str) -> None:
    """Whether what a run would replace in the folder is of a run: nobody's config.json or metrics.jsonl is
    overwritten."""
    config, rows = os.path.join(workdir, "config.json"), os.path.join(workdir, "metrics.jsonl")
    if os.path.lexists(config):
        _read(config)
    elif os.path.lexists(rows):
        raise UserError(f"--workdir={workdir} holds {rows} and no config.json of a run that wrote it. Name "
                        f"another --workdir, or move that file away.")


@contextlib.contextmanager
def locked(workdir: str, wait: float = 5.0) -> Iterator[None]:
    """Keeps a second run out of the folder, which must exist; process 0 of a run takes it. Readers need no lock.

    The lock is flock's on WORKDIR/lock, which the kernel gives up when this process ends, however that comes; what the file says is for
    people. On NFS since Linux 2.6.12 it holds between hosts; on mounts where it is of one host only (Lustre's `localflock`, NFS's
    `local_lock`), or on other remote file systems, a run on another host is not noticed. Where there is no flock at all nothing is locked.

    Args:
      wait: seconds in which a killed process may still be on its way out.

    Raises:
      UserError: another run has it.
    """
    path = os.path.join(workdir, "lock")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as e:
        raise UserError(f"{path} cannot be opened ({e.strerror}). Make it writable, or name another --workdir.") from e
    try:
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as e:
                if e.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    break  # no locks here
                if time.monotonic() > deadline:
                    raise UserError(f"--workdir={workdir} is in use by another run ({_holder(fd)}). Wait for it, stop it, or name another --workdir.") from e
            time.sleep(0.1)
        with contextlib.suppress(OSError):  # a full disk
            if (before := os.pread(fd, 5, 0)) and before != b"host ":
                raise UserError(f"{path} is not the lock of a run. Name another --workdir, or move that file "
                                f"away.")
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"host {socket.gethostname()}, process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


def _holder(fd: int) -> str:
    text = os.pread(fd, 200, 0).decode(errors="replace").split("\n")[0]
    return "".join(c for c in text if c.isprintable()) or "its process is not known"


def checkpoints(workdir: str, config: Config) -> str:
    """The folder of a run's checkpoints."""
    return config.checkpoint.dir or os.path.join(workdir, "checkpoints")


def write_config(workdir: str, config: Config, xla_options: dict[str, Any] | None = None) -> None:
    """Writes WORKDIR/config.json, the resolved options and what was asked of XLA's compiler, whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    if jax.process_index() == 0:
        path = os.path.join(workdir, "config.json")
        try:
            with open(path + ".tmp", "w", encoding="utf-8") as f:
                json.dump(config.to_json() | {_NOT_AN_OPTION: xla_options or {}}, f, indent=2)
            os.replace(path + ".tmp", path)
        except OSError as e:
            raise UserError(f"{path} cannot be written ({e.strerror}). Make room, or name another --workdir.") from e


def read_config(workdir: str) -> dict[str, Any]:
    """The options of the run in a folder, as nested dicts.

    Raises:
      UserError: there is no run, or its config.json is damaged.
    """
    path = os.path.join(workdir, "config.json")
    if not os.path.exists(path):
        raise UserError(f"--workdir={workdir} holds no run: there is no {path}. Name a folder that train.py wrote.")
    return _read(path)


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as f:
            out = json.load(f)
        if not isinstance(out, dict) or not isinstance(out.get("model"), dict):
            raise ValueError("it has no section model")
        out.pop(_NOT_AN_OPTION, None)
        return out
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read as the config of a run ({e}). Restore it, or name another "
                        f"--workdir.") from e


def _with_defaults(before: Any, defaults: Any) -> Any:
    """A run of an earlier version had the options that it did not know at their defaults."""
    if not isinstance(defaults, dict) or not isinstance(before, dict):
        return before
    return before | {k: _with_defaults(before.get(k, v), v) for k, v in defaults.items()}


def _differences(before: Any, now: Any, where: str) -> list[str]:
    if isinstance(now, dict):
        return [line for k, v in now.items() for line in _differences(before.get(k) if isinstance(before, dict) else None, v, f"{where}.{k}")]
    return [] if before == now else [f"{where}: {before} -> {now}"]

