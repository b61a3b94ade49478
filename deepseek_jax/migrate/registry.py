"""The tools whose files are known, in the order in which --help names them."""

from collections.abc import Mapping

from deepseek_jax.migrate.tool import Tool
from deepseek_jax.migrate.tools import launchers

TOOLS: Mapping[str, Tool] = {
    tool.name: tool
    for tool in (
        # a recipe: what is trained
        # beside a recipe
        launchers.TOOL,
    )
}
