"""Rules between the options of fine-tuning."""

import json

from deepseek_jax.config.options import OPTIONS, Config, ModelConfig
from deepseek_jax.config.rules.common import without_effect
from deepseek_jax.errors import UserError

# Not of examples, which are encoded by their template and kept apart in their rows.
OF_DOCUMENTS = ("data.special_tokens", "data.bin_dtype", "data.eos_token_id")
WITHOUT_MESSAGES = ("text", "tokenized", "instruction_output")
WITHOUT_PROMPT = ("messages", "conversations", "text", "tokenized")
OF_TEMPLATES = (
    "sft.chat_template",
    "sft.chat_template_kwargs",
    "sft.system_prompt",
    "sft.train_on_header",
)


def check(config: Config) -> None:
    """Raises UserError: the first options that do not go together."""
    if config.objective == "distill":
        if config.distill.data == "text":
            _refuse_all(config, "with config.distill.data=text", "config.distill.data=examples")
    elif config.objective != "sft":
        _refuse_all(config, f"with config.objective={config.objective}", "config.objective=sft")
    else:
        _check_model(config)
        _check_loss(config)
    if config.reads_examples:
        _check_data(config)
        _check_scored(config)
        _check_answers(config)


def _refuse_all(config: Config, why: str, repair: str) -> None:
    without_effect(config, [name for name in OPTIONS if name.startswith("sft.")], why, repair)


def _check_model(config: Config) -> None:
    if not config.init_from and config.model == ModelConfig():
        raise UserError(
            "config.objective=sft and config.init_from='': there is no model to fine-tune. Set "
            "config.init_from to the folder of a Hugging Face checkpoint."
        )


def _check_data(config: Config) -> None:
    s, d = config.sft, config.data
    asked, text = "config.objective=sft", "config.objective=pretrain"
    if config.objective == "distill":
        asked, text = "config.distill.data=examples", "config.distill.data=text"
    if d.path == "stdlib":
        raise UserError(
            f"{asked} and config.data.path=stdlib, which are programs and not examples. Set "
            "config.data.path to a .jsonl or .parquet file of examples."
        )
    without_effect(
        config, OF_DOCUMENTS, f"with {asked}: examples are encoded by their template", text
    )
    if not d.document_mask:
        raise UserError(
            f"config.data.document_mask=False and {asked}: an example would see the others of "
            "its row. Set config.data.document_mask=True."
        )
    if s.packing_strategy in ("bfd_split", "wrapped"):
        without_effect(
            config,
            ["sft.truncation"],
            f"with config.sft.packing={s.packing}, which cuts examples and leaves nothing out",
            "config.sft.packing=bfd",
        )
    if s.chat_template_kwargs:
        try:
            kwargs = json.loads(s.chat_template_kwargs)
        except ValueError as e:
            kwargs = e
        if not isinstance(kwargs, dict):
            why = f" ({kwargs})" if isinstance(kwargs, ValueError) else ""
            raise UserError(
                f"config.sft.chat_template_kwargs={s.chat_template_kwargs!r} is no JSON object{why}. Set it "
                """to, for instance, '{"enable_thinking": false}'."""
            )


def _check_scored(config: Config) -> None:
    """Options whose format is named, and has nothing that they could act on. Of format=auto the data tell."""
    s = config.sft
    if s.format in WITHOUT_MESSAGES:
        if s.assistant_only:
            raise UserError(
                f"config.sft.assistant_only_loss={s.assistant_only_loss} and config.sft.format={s.format}, "
                "which has no messages. Set config.sft.assistant_only_loss=auto."
            )
        without_effect(
            config,
            ["sft.train_on_header"] if s.format == "instruction_output" else OF_TEMPLATES,
            f"with config.sft.format={s.format}, which has no messages",
            "config.sft.format=messages",
        )
    if s.completion_only and s.format in WITHOUT_PROMPT:
        raise UserError(
            f"config.sft.completion_only_loss={s.completion_only_loss} and config.sft.format={s.format}, "
            "which has no prompt beside a completion. Set config.sft.completion_only_loss=auto."
        )


def _check_loss(config: Config) -> None:
    s = config.sft
    if s.loss_type == "dft" and s.label_smoothing:
        raise UserError(
            f"config.sft.label_smoothing={s.label_smoothing} and config.sft.loss_type=dft, which weights by "
            "the probability of the one target. Set config.sft.label_smoothing=0, or loss_type=nll."
        )


def _check_answers(config: Config) -> None:
    s, name = config.sft, "config.sft.eval_prompts"
    if not s.eval_prompts:
        without_effect(
            config,
            ["sft.eval_tokens"],
            f"with {name}=0",
            f"{name} to how many prompts are answered",
        )
        return
    if s.format in ("text", "tokenized"):
        raise UserError(
            f"{name}={s.eval_prompts} and config.sft.format={s.format}, which has no prompts. Set {name}=0."
        )
    if not config.data.eval_fraction:
        raise UserError(
            f"{name}={s.eval_prompts} are held-out prompts, but config.data.eval_fraction=0.0. Set it above "
            f"0, or {name}=0."
        )
