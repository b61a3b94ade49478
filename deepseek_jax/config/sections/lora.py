"""Low-rank adaptation: config.lora."""

import math
from dataclasses import dataclass

from deepseek_jax.config.option import Alias, option

ALL_LINEAR = "all-linear"
BASE_DTYPES = {
    "bfloat16": "",
    "float32": "",
    "int8": "symmetric, one scale for each output channel; embedding and head: bfloat16",
    "nf4": "4 bits, blocks of 64 with scales of 8 bits; embedding and head: bfloat16",
}


@dataclass(frozen=True)
class LoraConfig:
    """A pair of narrow matrices learns beside each weight that stays as it is (arXiv:2106.09685)."""

    r: int = option(
        0,
        "Rank of the update of each weight; only it and modules_to_save are trained.",
        at_least=0,
        special={0: "no LoRA: all weights are trained"},
        on_resume="refused",
        aliases={"hf": ("lora_r", "r"), "nemo": "peft.lora_tuning.adapter_dim"},
    )
    alpha: float = option(
        32.0,
        "The update is multiplied by alpha / r.",
        above=0,
        example=32.0,
        on_resume="refused",
        aliases={"hf": "lora_alpha", "nemo": "peft.lora_tuning.alpha"},
    )
    dropout: float = option(
        0.0,
        "Share of the update's inputs that is dropped in training. Routed experts have none.",
        at_least=0,
        below=1,
        on_resume="free",
        aliases={"hf": "lora_dropout", "nemo": "peft.lora_tuning.adapter_dropout"},
    )
    use_rslora: bool = option(
        False,
        "Multiply by alpha / sqrt(r) in place of alpha / r (arXiv:2312.03732).",
        on_resume="refused",
        aliases={"hf": "use_rslora"},
    )
    target_modules: str = option(
        ALL_LINEAR,
        "Which weights: all-linear (attention, MLPs, shared and routed experts), or names separated by "
        "commas, as q_proj,kv_b_proj,shared_experts.down_proj,experts. A name is the end of a module's path.",
        on_resume="refused",
        aliases={"hf": ("lora_target_modules", "target_modules")},
    )
    modules_to_save: str = option(
        "",
        "What is trained whole besides: embed_tokens, lm_head or both, separated by a comma.",
        on_resume="refused",
        aliases={"hf": ("lora_modules_to_save", "modules_to_save")},
    )
    base_dtype: str = option(
        "bfloat16",
        "What the weights that stay as they are are held in. Norms, router and biases: float32.",
        choices=BASE_DTYPES,
        on_resume="refused",
        aliases=[
            Alias("int8", hf="load_in_8bit", note="one scale per channel, and no outlier columns"),
            Alias("nf4", hf=("load_in_4bit", "bnb_4bit_quant_type: nf4")),
        ],
    )
    adapter: str = option(
        "",
        "Folder of an adapter as PEFT writes it, to begin with; it sets r, alpha, use_rslora, "
        "target_modules and modules_to_save.",
        path=True,
        on_resume="free",
        aliases={"hf": "PeftModel.from_pretrained(model, DIR)"},
    )

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def saved(self) -> tuple[str, ...]:
        """The names in `modules_to_save`."""
        return names(self.modules_to_save)


def names(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
