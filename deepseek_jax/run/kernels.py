"""Which kernels compute on the devices of a run."""

from deepseek_jax.config.options import Config
from deepseek_jax.experts import implementations as experts
from deepseek_jax.model.attention import implementations as attention
from deepseek_jax.run.processes import Processes


def agree(config: Config, processes: Processes) -> None:
    """Finds out before anything is read which kernels work here, and that they are those of all processes: a
    program with others would be another one, and all would wait in its first exchange.

    Raises:
      UserError: kernels that were asked for do not run here, or other processes came to something else.
    """
    m, dtype = config.model, config.train.dtype
    asked = config.train.attention
    found: dict[str, object] = {}
    found[attention.OPTION] = attention.kernels(asked, dtype, m.qk_head_dim, m.value_head_dim)
    if m.has_experts:
        asked = config.moe.experts_implementation
        found[experts.OPTION] = experts.choose(asked, dtype, config.train.fp8)
    processes.agree("kernels", {option: str(chosen) for option, chosen in found.items()})
