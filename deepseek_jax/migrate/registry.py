"""The tools whose files are known, in the order in which --help names them."""

from collections.abc import Mapping

from deepseek_jax.migrate.tool import Tool
from deepseek_jax.migrate.tools import accelerate, deepspeed, hf, launchers

TOOLS: Mapping[str, Tool] = {
    tool.name: tool
    for tool in (
        # a recipe: what is trained
        hf.HF5,
        hf.HF4,
        hf.TRL,
        hf.OPEN_R1,
        # beside a recipe
        accelerate.TOOL,
        deepspeed.TOOL,
        launchers.TOOL,
    )
}
