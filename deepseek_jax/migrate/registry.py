"""The tools whose files are known, in the order in which --help names them."""

from collections.abc import Mapping

from deepseek_jax.migrate.tool import Tool
from deepseek_jax.migrate.tools import (
    accelerate,
    automodel,
    axolotl,
    deepspeed,
    gpt_neox,
    hf,
    launchers,
    llama_factory,
    llama_factory_v1,
    megatron_bridge,
    megatron_lm,
    megatron_swift,
    ms_swift,
    nemo,
    nemo2,
    nemo_guide,
    open_instruct,
)

TOOLS: Mapping[str, Tool] = {
    tool.name: tool
    for tool in (
        # a recipe: what is trained
        hf.HF5,
        hf.HF4,
        hf.TRL,
        hf.OPEN_R1,
        axolotl.TOOL,
        llama_factory.TOOL,
        llama_factory_v1.TOOL,
        ms_swift.TOOL,
        megatron_swift.TOOL,
        open_instruct.TOOL,
        nemo.TOOL,
        nemo2.TOOL,
        nemo_guide.TOOL,
        automodel.TOOL,
        megatron_bridge.TOOL,
        megatron_lm.TOOL,
        gpt_neox.TOOL,
        # beside a recipe
        accelerate.TOOL,
        deepspeed.TOOL,
        launchers.TOOL,
    )
}
