"""torchrun, deepspeed and other programs that start a script: what stands before it on a command line."""

from collections.abc import Mapping

from deepseek_jax.launch.template.variables import meaning
from deepseek_jax.migrate.handlers import as_int, fact, no_effect
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.script import gpus_of
from deepseek_jax.migrate.source import Entry, Source
from deepseek_jax.migrate.tool import Handler, Tool

ADDRESS = "processes find each other, or train.py's --coordinator_address says where"


def recognise(source: Source) -> int:
    """What stands before the script's name, and what a scheduler reads."""
    return 100 if source.form == "launcher" else 0


def processes(m: Migration, entry: Entry) -> None:
    """--nproc_per_node: a number, or gpu, auto, cpu for what there is."""
    if str(entry.value).isdecimal():
        m.tell(entry, "gpus_per_node", as_int(entry))
    else:
        m.no_effect(entry, "a run takes all GPUs that it sees")


def nodes(m: Migration, entry: Entry) -> None:
    """--nnodes: a number, or MIN:MAX."""
    text = str(entry.value)
    if ":" in text:
        m.note(
            f"{entry.label}: several hosts are needed all; start again on fewer, and it resumes."
        )
        text = text.rpartition(":")[2]
    m.tell(entry, "nodes", as_int(Entry(entry.key, text, entry.where)))


def gpus(m: Migration, entry: Entry) -> None:
    """GPUs of a host, of the scheduler; a launcher's number wins."""
    if number := gpus_of(str(entry.value)):
        m.tell(entry, "gpus_per_node", int(number))
    else:
        m.no_effect(entry, "it names no number of GPUs")


def visible(m: Migration, entry: Entry) -> None:
    """So many GPUs of a host, where no launcher says so."""
    named = [v for v in str(entry.value).split(",") if v.strip()]
    launched = any(
        e.key in ("nproc_per_node", "num_gpus") for r in m.readings for e in r.source.entries
    )
    if launched or not named:
        m.no_effect(entry, "it keeps its meaning. Export it as well")
    else:
        m.tell(entry, "gpus_per_node", len(named))


def variable(m: Migration, entry: Entry) -> None:
    """One of the environment: what launch/template says of it."""
    found = meaning(entry.key.partition(".")[2])
    if found is None:
        m.no_effect(entry, "nothing here reads it")
    elif found.kept:
        m.no_effect(entry, f"{found.text}. Export it as well")
    else:
        m.no_effect(entry, found.text)


TABLE: Mapping[str, Handler] = {
    # torchrun
    "nproc_per_node": processes,
    "nnodes": nodes,
    "node_rank": no_effect(ADDRESS),
    "master_addr": no_effect(ADDRESS),
    "master_port": no_effect(ADDRESS),
    "rdzv_*": no_effect(ADDRESS),
    "local_addr": no_effect(ADDRESS),
    "standalone": no_effect("one process for all GPUs of a host needs no launcher"),
    "max_restarts": no_effect("python -m deepseek_jax.launch --max_restarts starts a run again"),
    "monitor_interval": no_effect("a lost process is noticed at once"),
    "log_dir": no_effect("process 0 prints"),
    "redirects": no_effect("process 0 prints"),
    "tee": no_effect("process 0 prints"),
    "role": no_effect(ADDRESS),
    "start_method": no_effect(ADDRESS),
    "no_python": no_effect("train.py is what runs"),
    "module": no_effect("train.py is what runs"),
    # deepspeed
    "num_gpus": fact("gpus_per_node", as_int),
    "num_nodes": fact("nodes", as_int),
    "hostfile": no_effect(ADDRESS),
    "H": no_effect(ADDRESS),
    "include": no_effect("CUDA_VISIBLE_DEVICES chooses GPUs"),
    "i": no_effect("CUDA_VISIBLE_DEVICES chooses GPUs"),
    "exclude": no_effect("CUDA_VISIBLE_DEVICES chooses GPUs"),
    "e": no_effect("CUDA_VISIBLE_DEVICES chooses GPUs"),
    "launcher": no_effect(ADDRESS),
    "launcher_args": no_effect(ADDRESS),
    "no_local_rank": no_effect(ADDRESS),
    "bind_cores_to_rank": no_effect("the system places threads"),
    # SLURM
    "sbatch.nodes": nodes,
    "sbatch.gres": gpus,
    "sbatch.gpus_per_node": gpus,
    "sbatch.*": no_effect("the scheduler reads it: --template=slurm writes it down again"),
    # the environment
    "env.CUDA_VISIBLE_DEVICES": visible,
    "env.NPROC_PER_NODE": fact("gpus_per_node", as_int),
    "env.NNODES": fact("nodes", as_int),
    "env.*": variable,
}

TOOL = Tool(
    name="launcher",
    title="the launcher",
    recognise=recognise,
    companion=True,
    table=TABLE,
)
