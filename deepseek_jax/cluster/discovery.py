"""Which processes train together, and which of them this one is: from flags, JAX_* variables, those
of MaxText's launchers, torchrun, SLURM, Open MPI or Kubernetes; the first that says it counts."""

import warnings
from collections.abc import Mapping
from typing import NamedTuple

from deepseek_jax.errors import UserError
from deepseek_jax.runtime import jax_private

FLAGS = ("--coordinator_address", "--num_processes", "--process_id")
# What scripts for MaxText export, for GPUs and, as XPK does, for CPUs (src/maxtext, max_utils.py).
_MAXTEXT = ("JAX_COORDINATOR_IP", "JAX_COORDINATOR_PORT", "NNODES", "NODE_RANK")
_XPK = ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_COUNT", "JOB_COMPLETION_INDEX")
_XPK_PORT = 1234
_TORCHRUN = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")
# What names a job in all its processes alike. Kubernetes gives no such name to them.
_JOB_NAMES = {
    "torchrun": ("TORCHELASTIC_RUN_ID",),
    "SLURM": ("SLURM_JOB_ID", "SLURM_STEP_ID"),
    "Open MPI": ("OMPI_MCA_ess_base_jobid", "PMIX_NAMESPACE", "OMPI_MCA_orte_hnp_uri"),
}
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


class Membership(NamedTuple):
    """A process's place in its cluster."""

    host: str  # of process 0
    port: int
    num_processes: int
    process_id: int  # of this one
    # Whoever started the processes put several on a host and gave each all of its GPUs.
    may_share: bool = False
    job: str = ""  # the scheduler's name of the job; "" where it has none


def find(
    address: str | None, count: int | None, index: int | None, timeout: int, env: Mapping[str, str]
) -> Membership | None:
    """The cluster that the flags name, else JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, else MaxText's variables, torchrun, SLURM, Open MPI or Kubernetes; each may leave a
    part to the next.

    Args:
      address: --coordinator_address, HOST:PORT of process 0.
      count: --num_processes.
      index: --process_id.
      timeout: seconds that Kubernetes' name service may take.
      env: the environment.

    Returns:
      None for one process, which needs no cluster.

    Raises:
      UserError: a part is missing or makes no sense.
    """
    if count == 1:
        return None
    variables = (
        _with_port(env),
        _number(env, "JAX_NUM_PROCESSES"),
        _number(env, "JAX_PROCESS_ID"),
    )
    address, count, index = _filled((address, count, index), variables)
    nobody_asked, by = (address, count, index) == (None, None, None), ""
    if None in (address, count, index):
        by = _starter(env)
        address, count, index = _filled((address, count, index), _numbers(by, env))
        if nobody_asked and (not by or count == 1):
            return None
        if by and None in (address, count, index):
            address, count, index = _filled(
                (address, count, index), _ask_jax(address, count, index, timeout, by)
            )
    if count == 1:
        return None
    if index is not None and count is None:
        raise UserError(
            f"--process_id={index} needs --num_processes and --coordinator_address. Give all three "
            "to every process."
        )
    if None not in (count, index) and index >= count:
        raise UserError(
            f"--process_id={index} is not below --num_processes={count}. Number processes from 0."
        )
    missing = [
        name for name, value in zip(FLAGS, (address, count, index), strict=True) if value is None
    ]
    if missing:
        alone = f" {by} started this process; --num_processes=1 trains alone." if by else ""
        more = " pip install 'jax[k8s]' lets JAX ask Kubernetes." if by == "Kubernetes" else ""
        raise UserError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing, and JAX "
            "cannot find out. Give "
            f"{', '.join(FLAGS)} to every process, or start them by python -m "
            f"deepseek_jax.launch.{alone}{more}"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            f"--coordinator_address={address} is not HOST:PORT. Name the host of process 0 and a "
            "free port there, "
            f"for instance host0:8476."
        )
    job = " ".join([by, *(env.get(name, "") for name in _JOB_NAMES.get(by, ()))]).strip()
    may_share = by in ("torchrun", "SLURM", "Open MPI")
    return Membership(host.strip("[]"), int(port), count, index, may_share, job)


def _with_port(env: Mapping[str, str]) -> str | None:
    """JAX_COORDINATOR_ADDRESS, unless it is XPK's, a host alone."""
    address = env.get("JAX_COORDINATOR_ADDRESS")
    host_alone = address and ":" not in address and all(env.get(name) for name in _XPK)
    return None if host_alone else address


def _number(env: Mapping[str, str], name: str) -> int | None:
    value = env.get(name)
    if value is not None and not value.isdecimal():
        raise UserError(f"{name}={value} is not a number. Set it to one, or unset it.")
    return None if value is None else int(value)


def _filled(first: tuple, then: tuple) -> tuple:
    return tuple(b if a is None else a for a, b in zip(first, then, strict=True))


def _starter(env: Mapping[str, str]) -> str:
    """The scheduler that started this process, perhaps beside others; empty if none did."""
    if all(env.get(name) for name in _MAXTEXT):  # set but empty: unset
        return "MaxText's launcher"
    if all(env.get(name) for name in _XPK):
        return "XPK"
    if all(name in env for name in _TORCHRUN):
        return "torchrun"
    if all(name in env for name in _SLURM):
        return "SLURM"
    if "OMPI_COMM_WORLD_SIZE" in env:
        return "Open MPI"
    # A pod that is no part of an indexed job, a notebook for instance, is alone.
    return (
        "Kubernetes" if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env else ""
    )


def _numbers(by: str, env: Mapping[str, str]) -> tuple[str | None, int | None, int | None]:
    """Address, count and index, as far as the scheduler has variables for them."""
    if by == "MaxText's launcher":
        address = f"{env['JAX_COORDINATOR_IP']}:{env['JAX_COORDINATOR_PORT']}"
        return address, _number(env, "NNODES"), _number(env, "NODE_RANK")
    if by == "XPK":  # its address has no port; several jobs of a JobSet count on
        job, each = _number(env, "JOB_INDEX") or 0, _number(env, "PROCESSES_IN_JOB") or 0
        index = _number(env, "JOB_COMPLETION_INDEX")
        assert index is not None  # `_starter` has found it
        address = f"{env['JAX_COORDINATOR_ADDRESS']}:{_XPK_PORT}"
        return address, _number(env, "JAX_PROCESS_COUNT"), job * each + index
    if by == "torchrun":
        # Its agent may listen at MASTER_PORT itself.
        port = _number(env, "MASTER_PORT")
        assert port is not None  # `_starter` has found it
        port += env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return f"{env['MASTER_ADDR']}:{port}", _number(env, "WORLD_SIZE"), _number(env, "RANK")
    if by == "SLURM":  # in an interactive step SLURM_NTASKS counts what the allocation could hold
        count = _number(env, "SLURM_STEP_NUM_TASKS")
        return (
            None,
            _number(env, "SLURM_NTASKS") if count is None else count,
            _number(env, "SLURM_PROCID"),
        )
    if by == "Open MPI":
        return None, _number(env, "OMPI_COMM_WORLD_SIZE"), _number(env, "OMPI_COMM_WORLD_RANK")
    return None, None, None


def _ask_jax(
    address: str | None, count: int | None, index: int | None, timeout: int, by: str
) -> tuple:
    """What JAX finds out about the rest; None for what it cannot. Its public initialize() would
    join at once, before the processes have agreed."""

    def detect(address: str | None) -> tuple:
        return jax_private.detect_cluster(address, count, index, timeout)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = detect(address or "later")  # a Kubernetes job of one pod may have no address
            return (address, *found[1:]) if address or found[1] == 1 else detect(None)
    except Exception as e:  # whatever a scheduler's interface raises
        text = (str(e).splitlines() or [""])[0]
        raise UserError(
            f"{by} started this process, but JAX cannot find the cluster ({type(e).__name__}: {text}). "
            f"Give {', '.join(FLAGS)} to every process, or --num_processes=1 to train alone."
        ) from e
