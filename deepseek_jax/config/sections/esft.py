"""Expert-specialised fine-tuning: training the experts alone that a task uses."""

from dataclasses import dataclass

from deepseek_jax.config.option import option


@dataclass(frozen=True)
class EsftConfig:
    """Which routed experts learn, layer by layer (ESFT, arXiv:2407.01906)."""

    experts: str = option(
        "",
        "Path of a JSON file with the routed experts that learn, as ESFT's expert_cfg.json; `python -m "
        "deepseek_jax.esft score` makes one. Empty: lr_multipliers alone say what learns.",
        path=True,
        on_resume="free",
        aliases={"hf": ("expert_config", "expert_cfg.json")},
    )
