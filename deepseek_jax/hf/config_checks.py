"""What a config.json must not say: keys and values that would make the model compute something else.

Every key is one of: an option of the model, a key that must have the value which this version computes, or a
key that changes nothing that a model computes (families/). Any other key is refused by name, as it may change
the mathematics.
"""

from typing import Any

from deepseek_jax.errors import UserError
from deepseek_jax.hf.families import Family
from deepseek_jax.hf.families.keys import HARMLESS, ONLY
from deepseek_jax.hf.shared_core import KEY


def check_keys(given: dict[str, Any], family: Family) -> None:
    """Refuses unknown keys and values that this version does not compute.

    Args:
      given: the keys of config.json that are not null.
      family: of its model_type.

    Raises:
      UserError: names the key.
    """
    only = {
        key: values
        for key, values in (ONLY | family.only).items()
        if key not in family.options and key not in family.harmless
    }
    known = (
        {KEY}
        | HARMLESS
        | set(family.options)
        | set(family.renamed)
        | set(only)
        | set(family.harmless)
    )
    for key, value in given.items():
        if key not in known and not key.startswith("_") and not key.endswith("_token_id"):
            raise UserError(
                f"config.json: {key}={value!r} is not a key of {family.model_type} that this "
                f"version knows, and it may change what the model computes. Remove it if it does not."
            )
    for key, values in only.items():
        if key in given and given[key] not in values:
            raise UserError(
                f"config.json: {key}={given[key]!r} is not in this version, which computes "
                f"{family.model_type} with {key}={', '.join(map(repr, values)) or None} only."
            )


def check_quantisation(given: dict[str, Any]) -> None:
    """Refuses weights in other formats than FP8 with scales of blocks.

    Raises:
      UserError: names the method.
    """
    quantised = given.get("quantization_config", {})
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
    if quantised and method != "fp8":
        raise UserError(
            f"config.json: quantization_config.quant_method={method!r} is not in this version, which reads "
            f"fp8 with scales of blocks. Take the checkpoint in bfloat16."
        )


def check_window(config: dict[str, Any], family: Family, options: dict[str, Any]) -> None:
    """Refuses a sliding window that a layer has and that a sequence can be longer than.

    Args:
      config: the whole config.json.
      family: of its model_type.
      options: of the model, as far as config.json and the defaults state them.

    Raises:
      UserError: says which window.
    """
    types, layers = config.get("layer_types"), options.get("num_hidden_layers", 0)
    longest = options["max_position_embeddings"]
    if types is not None and (
        not isinstance(types, list) or any(t != "full_attention" for t in types)
    ):
        raise UserError(
            f"config.json: layer_types={str(types)[:200]} has layers of other than full "
            f"attention, which are not in this version."
        )
    window = family.window
    size, first = config.get("sliding_window", window and window.size), 0
    enabled = True
    # Only some families have this switch in transformers. Where one has no windows, a file may still mean it.
    if window is None or window.switched:
        enabled = config.get("use_sliding_window", window is None)
    if window is not None and window.first is not None:
        first = config.get("max_window_layers", window.first) if types is None else layers
    if size is None or not enabled:
        return
    for key, value in (("sliding_window", size), ("max_window_layers", first)):
        if type(value) is not int:
            raise UserError(
                f"config.json: {key}={value!r} has the type {type(value).__name__}. Correct it."
            )
    if first < layers and size < longest:
        absent = f" (what {family.model_type} has where it is missing)"
        raise UserError(
            f"config.json: sliding_window={size}{'' if 'sliding_window' in config else absent} is not in "
            f"this version, and max_position_embeddings={longest} is above it. "
            f"Set sliding_window to null, if attention to all positions is wanted."
        )
