"""torchrun, deepspeed and other programs that start a script: what stands before it on a command line."""

from deepseek_jax.migrate.handlers import as_int, fact, no_effect
from deepseek_jax.migrate.source import Source
from deepseek_jax.migrate.tool import Tool

ADDRESS = "processes find each other, or train.py's --coordinator_address says where"


def recognise(source: Source) -> int:
    """The flags before the script's name."""
    return 100 if source.form == "launcher" else 0


TOOL = Tool(
    name="launcher",
    title="the launcher",
    recognise=recognise,
    companion=True,
    table={
        "nproc_per_node": fact("gpus_per_node", as_int),
        "nnodes": fact("nodes", as_int),
        "node_rank": no_effect(ADDRESS),
        "master_addr": no_effect(ADDRESS),
        "master_port": no_effect(ADDRESS),
    },
)
