"""Rotary position embedding beyond the length that a model was trained on."""

from dataclasses import dataclass

from deepseek_jax.config.option import option


@dataclass(frozen=True)
class RopeScaling:
    """Hugging Face `rope_scaling`. YaRN: Peng et al. 2023, arXiv:2309.00071."""

    type: str = option(
        "default",
        "How rotary positions are extended.",
        choices={
            "default": "not at all",
            "linear": "positions are divided by factor",
            "yarn": "by frequency",
            "llama3": "by wavelength (Llama 3.1)",
        },
        changes_shapes=False,
    )
    factor: float = option(
        1.0,
        "Context extension: target length / original_max_position_embeddings.",
        at_least=1,
        changes_shapes=False,
        aliases={"nemo": "rotary_scaling_factor"},
    )
    original_max_position_embeddings: int = option(
        4096,
        "Context length before the extension.",
        unit="tokens",
        at_least=1,
        changes_shapes=False,
    )
    beta_fast: float = option(
        32.0, "yarn: rotations above which a frequency is kept as it is.", changes_shapes=False
    )
    beta_slow: float = option(
        1.0, "yarn: rotations below which a frequency is divided by factor.", changes_shapes=False
    )
    mscale: float = option(
        0.0,
        "yarn: cos and sin are scaled by m(mscale) / m(mscale_all_dim).",
        at_least=0,
        special={0: "not given"},
        changes_shapes=False,
    )
    mscale_all_dim: float = option(
        0.0,
        "yarn: the softmax scale of MLA is multiplied by m(mscale_all_dim)^2.",
        at_least=0,
        special={0: "not given"},
        changes_shapes=False,
    )
    attention_factor: float = option(
        0.0,
        "yarn: cos and sin are scaled by this.",
        at_least=0,
        special={0: "by what mscale and mscale_all_dim give"},
        changes_shapes=False,
    )
    low_freq_factor: float = option(
        1.0,
        "llama3: wavelengths above original_max_position_embeddings / this are divided by factor.",
        changes_shapes=False,
    )
    high_freq_factor: float = option(
        4.0,
        "llama3: wavelengths below original_max_position_embeddings / this stay; between, both are mixed.",
        changes_shapes=False,
    )
