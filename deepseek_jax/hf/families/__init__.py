"""What each `model_type` of Hugging Face means: one record a family, in a file a vendor.

In: nothing. Out: `FAMILIES`, which configuration.py reads config.json by and names.py finds tensors by. Read
deepseek.py first, then family.py, which says what the parts of a record are. A new family is a record in one
file and its line below.
"""

from deepseek_jax.hf.families import (
    deepseek,
    dots,
    glm,
    llama,
    mistral,
    qwen,
    seed,
    solar,
    youtu,
)
from deepseek_jax.hf.families.family import Family

# The order decides which of several families that compute the same a model is exported as: the first
# (configuration.find_family).
_RECORDS = (
    deepseek.V2,
    deepseek.V3,
    glm.MOE_LITE,
    glm.MOE,
    qwen.QWEN3_MOE,
    mistral.MIXTRAL,
    qwen.QWEN2,
    qwen.QWEN3,
    llama.LLAMA,
    mistral.MISTRAL,
    seed.SEED_OSS,
    youtu.YOUTU,
    solar.SOLAR_OPEN,
    dots.DOTS1,
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _RECORDS}
ALIASES = {alias: family.model_type for family in _RECORDS for alias in family.aliases}
