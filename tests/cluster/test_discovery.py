"""Names of other launchers' environments, which of them counts, and GPUs of several tasks on a host."""

import itertools

import pytest

from deepseek_jax.cluster import discovery
from deepseek_jax.cluster.discovery import Membership, find
from deepseek_jax.cluster.gpus import Claim, divide
from deepseek_jax.errors import UserError

# As scripts for MaxText export them for GPUs, and XPK for CPUs.
MAXTEXT = {
    "JAX_COORDINATOR_IP": "10.0.0.7",
    "JAX_COORDINATOR_PORT": "12345",
    "NNODES": "4",
    "NODE_RANK": "2",
}
XPK = {
    "JAX_COORDINATOR_ADDRESS": "run-slice-job-0-0.run",
    "JAX_PROCESS_COUNT": "6",
    "JOB_INDEX": "1",
    "JOB_COMPLETION_INDEX": "2",
    "PROCESSES_IN_JOB": "3",
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
}
JAX = {"JAX_COORDINATOR_ADDRESS": "host0:8476", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
TORCHRUN = {"MASTER_ADDR": "host1", "MASTER_PORT": "29500", "WORLD_SIZE": "2", "RANK": "1"}
# Of a step of two nodes with four tasks each, as srun sets it.
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[003-004]",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NNODES": "2",
}
OMPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
# In the order in which they count.
PLACES = [
    (JAX, Membership("host0", 8476, 4, 3)),
    (MAXTEXT, Membership("10.0.0.7", 12345, 4, 2, job="MaxText's launcher")),
    (XPK, Membership("run-slice-job-0-0.run", 1234, 6, 5, job="XPK")),
    (TORCHRUN, Membership("host1", 29500, 2, 1, True, "torchrun")),
    (SLURM, Membership("node003", 61440 + 77, 8, 5, True, "SLURM 77 0")),
]


@pytest.fixture
def environment(monkeypatch):
    """Sets variables, as JAX reads SLURM's itself."""

    def set_all(env):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        return env

    return set_all


@pytest.mark.parametrize(
    "env, place", PLACES, ids=lambda v: v.job if isinstance(v, Membership) else ""
)
def test_names_of_other_launchers(env, place, environment):
    assert find(None, None, None, 1, environment(env)) == place


@pytest.mark.parametrize("first, then", [*itertools.combinations(range(len(PLACES)), 2)])
def test_which_counts(first, then, environment):
    """Flags, JAX_*, MaxText's, XPK's, torchrun's, SLURM's, Open MPI's."""
    (env, place), (other, _) = PLACES[first], PLACES[then]
    env = environment(other | OMPI | env)
    assert find(None, None, None, 1, env) == place
    assert find("host9:9", 2, 0, 1, env) == Membership("host9", 9, 2, 0)
    assert find(None, 1, None, 1, env) is None


def test_parts_and_leftovers():
    """A flag replaces a part. What is empty, incomplete or of one process alone is no cluster."""
    moved = Membership("host9", 9, 4, 2, job="MaxText's launcher")
    assert find("host9:9", None, None, 1, MAXTEXT) == moved
    assert find(None, None, None, 1, MAXTEXT | {"NNODES": "1", "NODE_RANK": "0"}) is None
    assert find(None, None, None, 1, MAXTEXT | {"JAX_COORDINATOR_IP": ""}) is None
    assert find(None, None, None, 1, {"NNODES": "4", "NODE_RANK": "2"}) is None
    one_job = {k: v for k, v in XPK.items() if k not in ("JOB_INDEX", "PROCESSES_IN_JOB")}
    assert find(None, None, None, 1, one_job).process_id == 2
    with_port = XPK | {"JAX_COORDINATOR_ADDRESS": "a:99"}
    assert find(None, None, None, 1, with_port) == Membership("a", 99, 6, 5, job="XPK")
    for env, text in [
        (MAXTEXT | {"NODE_RANK": "4"}, "--process_id=4 is not below --num_processes=4"),
        (MAXTEXT | {"NNODES": "four"}, "NNODES=four is not a number"),
        (MAXTEXT | {"JAX_COORDINATOR_PORT": "x"}, "10.0.0.7:x is not HOST:PORT"),
    ]:
        with pytest.raises(UserError, match=text):
            find(None, None, None, 1, env)


def test_the_shell_of_salloc_is_alone(monkeypatch):
    """Its shell has the allocation's variables and no task; with an interactive step, a task of one."""
    monkeypatch.setattr(discovery, "_ask_jax", lambda *_: pytest.fail("JAX was asked"))
    shell = {
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[003-004]",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS": "8",
        "SLURM_NPROCS": "8",
        "SLURM_TASKS_PER_NODE": "4(x2)",
    }
    assert find(None, None, None, 1, shell) is None
    interactive = {
        "SLURM_STEP_ID": "4294967290",
        "SLURM_STEP_NODELIST": "node003",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }
    assert find(None, None, None, 1, shell | interactive) is None


@pytest.mark.parametrize("hidden", [False, True], ids=["all visible", "--gpus-per-task"])
def test_two_gpus_for_each_of_four_tasks(hidden, environment, monkeypatch):
    """SLURM shows each task all eight GPUs of its node, or, by --gpus-per-task, its own two: each process
    uses two, and no two the same. JAX by itself would take one GPU per task."""
    claims, places = [], []
    for task in range(8):
        node, local = divmod(task, 4)
        env = environment(SLURM | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(local)})
        places.append(find(None, None, None, 1, env))
        gpus = [f"GPU-{node}-{i}" for i in range(8)]
        mine = gpus[2 * local : 2 * local + 2] if hidden else gpus
        claims.append(Claim(f"node00{3 + node}", mine, places[-1].may_share))
    assert [p.process_id for p in places] == list(range(8))
    used = [
        {claim.gpus[i] for i in (range(len(claim.gpus)) if part is None else part)}
        for claim, part in zip(claims, divide(claims), strict=True)
    ]
    assert all(len(u) == 2 for u in used) and len(set().union(*used)) == 16
