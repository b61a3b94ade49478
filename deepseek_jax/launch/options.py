"""The launcher's options, and the environment that it gives to each process."""

import argparse
import os
from collections.abc import Mapping
from typing import Any

from deepseek_jax.cli import arguments
from deepseek_jax.cluster.gpus import shares, visible_gpus
from deepseek_jax.cluster.ports import free_port
from deepseek_jax.cluster.wire import TOKEN, new_token
from deepseek_jax.errors import UserError


def parse(argv: list[str], about: str = "") -> argparse.Namespace:
    """The options, and the program with its arguments.

    Args:
      argv: without the launcher's name.
      about: for --help.

    Raises:
      UserError: a wrong or missing one.
    """
    p = arguments.Parser(prog="python -m deepseek_jax.launch", description=about)

    def add(name: str, default: Any, help: str, kind: type = int) -> None:
        p.add_argument(
            *dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")),
            default=default,
            help=help,
            type=kind,
        )

    add(
        "nproc_per_node",
        "1",
        "processes on this host; gpu: one for each visible GPU (default: 1)",
        str,
    )
    add("nnodes", 1, "hosts (default: 1)")
    add("node_rank", 0, "this host's number, from 0 (default: 0)")
    add("master_addr", None, "name or address of host 0, if there are several", str)
    add("master_port", None, "free port there (default: 29500; on one host the launcher finds one)")
    add(
        "devices_per_process",
        None,
        "GPUs of each process (default: all, divided), or CPU devices if there are no GPUs",
    )
    add(
        "grace",
        30.0,
        "seconds from SIGTERM to SIGKILL once one process has ended by failure or signal (default: 30)",
        float,
    )
    add("max_restarts", 0, "how often to start all processes again after one failed (default: 0)")
    add(
        "min_processes",
        None,
        "go on with fewer processes, down to this number, without one that keeps failing (default: "
        "all are needed)",
    )
    p.add_argument(
        "-m", "--module", action="store_true", help="the program is a module, as for python -m"
    )
    p.add_argument("program", type=arguments.path, help="a Python file, or with -m a module")
    p.add_argument("arguments", nargs=argparse.REMAINDER, help="its own")
    a = p.parse_args(argv)
    if a.nproc_per_node == "gpu":
        a.nproc_per_node = str(len(visible_gpus()))
        if a.nproc_per_node == "0":
            raise UserError("--nproc_per_node=gpu, but no GPU is visible. Give a number.")
    if not a.nproc_per_node.isdecimal():
        raise UserError(f"--nproc_per_node={a.nproc_per_node} is not a number. Give one, or gpu.")
    a.nproc_per_node = int(a.nproc_per_node)
    ranges = {
        "nproc_per_node": (1, 4096),
        "nnodes": (1, 1 << 20),
        "node_rank": (0, a.nnodes - 1),
        "master_port": (1, 65535),
        "devices_per_process": (1, 4096),
        "grace": (0, 1e6),
        "max_restarts": (0, 1 << 20),
        "min_processes": (1, a.nproc_per_node),
    }
    for name, (low, high) in ranges.items():
        value = getattr(a, name)
        if value is not None and not low <= value <= high:
            raise UserError(
                f"--{name}={value} is not between {low} and {high}. Give a number in that range."
            )
    if a.nnodes > 1 and not a.master_addr:
        raise UserError(
            f"--nnodes={a.nnodes} needs --master_addr, the name of host 0. Give it on every host."
        )
    if a.min_processes is not None and not a.max_restarts:
        raise UserError(
            f"--min_processes={a.min_processes} has no effect without restarts. Give --max_restarts as well."
        )
    if a.min_processes is not None and a.nnodes > 1:
        raise UserError(
            f"--min_processes={a.min_processes} with --nnodes={a.nnodes}: the launchers of several "
            "hosts do not agree on fewer processes. "
            f"Leave it out, and start all again with another --nnodes when a host is lost."
        )
    if not a.module and not os.path.isfile(a.program):
        raise UserError(f"{a.program} is not a file. Name a Python program, or a module after -m.")
    return a


def environments(
    a: argparse.Namespace, env: Mapping[str, str], places: list[int] | None = None
) -> list[dict[str, str]]:
    """What each process has in its environment besides the launcher's own.

    Args:
      a: the options.
      env: the launcher's environment.
      places: those in use, of --nproc_per_node, each with its GPUs; None: all.

    Raises:
      UserError: the visible GPUs do not divide.
    """
    places = list(range(a.nproc_per_node)) if places is None else places
    host, port = a.master_addr or "127.0.0.1", a.master_port
    if port is None and a.nnodes == 1:
        port = free_port()
    address = f"{host}:{port or 29500}"
    common = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(a.nnodes * len(places))}
    if a.nnodes == 1:  # launchers of several hosts would each make another one
        common[TOKEN] = env.get(TOKEN, "").strip() or new_token()
    if host == "127.0.0.1":
        # JAX would listen on all interfaces.
        common["JAX_COORDINATOR_BIND_ADDRESS"] = address
    gpus = visible_gpus()
    named = [
        name.strip() for name in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()
    ]
    visible = (named or [str(i) for i in range(len(gpus))])[: len(gpus)]
    parts = shares(visible, a.nproc_per_node, a.devices_per_process) if gpus else None
    if a.devices_per_process and not gpus:
        common["JAX_NUM_CPU_DEVICES"] = str(a.devices_per_process)
    return [
        common
        | {"JAX_PROCESS_ID": str(a.node_rank * a.nproc_per_node + i)}
        | ({"CUDA_VISIBLE_DEVICES": parts[place]} if parts else {})
        for i, place in enumerate(places)
    ]
