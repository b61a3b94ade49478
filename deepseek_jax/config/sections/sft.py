"""Fine-tuning on examples: how they are read, which tokens are scored, how they are packed, the loss."""

from dataclasses import dataclass

from deepseek_jax.config.option import Alias, option


@dataclass(frozen=True)
class SftConfig:
    """Fine-tuning (objective=sft) in words of TRL's SFTTrainer. A row has train.sequence_length tokens."""

    # ---- what an example is
    format: str = option(
        "auto",
        "Columns of the examples in data.path.",
        choices={
            "auto": "by the columns of the first example",
            "messages": "messages (role, content), tools, chat_template_kwargs",
            "prompt_completion": "prompt and completion, both texts or both messages",
            "instruction_output": "instruction and output",
            "conversations": "conversations (from, value)",
            "text": "text, all of it scored",
            "tokenized": "input_ids and labels",
        },
        on_resume="new pass",
    )
    chat_template: str = option(
        "",
        "Template of the messages: the path of a file, the name of one of the model's, or the template "
        "itself; empty: the model's.",
        path=True,
        or_text=True,
        on_resume="new pass",
        aliases=[
            Alias(
                hf=("chat_template_path", "chat_template"),
                note="of the template only; a tokenizer is `data.tokenizer`",
            )
        ],
    )
    chat_template_kwargs: str = option(
        "",
        "A JSON object of further variables for the template; an example's own chat_template_kwargs win.",
        on_resume="new pass",
    )
    system_prompt: str = option(
        "",
        "System message of examples that have none.",
        on_resume="new pass",
        aliases={"hf": "system_prompt"},
    )
    eos_token: str = option(
        "",
        "The token that ends an answer; empty: the tokenizer's eos_token.",
        on_resume="new pass",
        aliases={"hf": "eos_token"},
    )

    # ---- which of its tokens are scored
    assistant_only_loss: str = option(
        "auto",
        "Score the assistant's messages only.",
        choices={"auto": "true for messages and conversations", "true": "", "false": ""},
        any_case=True,
        on_resume="new pass",
        aliases=[Alias(hf="assistant_only_loss", note="there false unless set")],
    )
    completion_only_loss: str = option(
        "auto",
        "Score completions and not their prompts.",
        choices={"auto": "true where there is a prompt", "true": "", "false": ""},
        any_case=True,
        on_resume="new pass",
        aliases={"hf": "completion_only_loss"},
    )
    train_on_header: bool = option(
        False,
        "Score the header of an assistant's message too, which generation is given.",
        on_resume="new pass",
    )

    # ---- how examples become rows
    packing: str = option(
        "bfd",
        "How examples share rows of train.sequence_length tokens.",
        choices={
            "bfd": "whole examples, the longest first, each where it fits best",
            "bfd_split": "so too, and what is longer than a row is split",
            "wrapped": "one after the other, cut where a row ends",
            "none": "one example per row",
        },
        synonyms={"bfd-requeue": "bfd_split", "bfd_requeue": "bfd_split"},
        on_resume="new pass",
        aliases=[
            Alias(
                hf=("packing_strategy", "packing", "padding_free"),
                note="attention, positions and targets never cross examples",
            )
        ],
    )
    truncation: str = option(
        "keep_start",
        "What becomes of an example that is longer than a row.",
        choices={"keep_start": "its end is cut off", "drop": "it is left out"},
        on_resume="new pass",
        aliases={"hf": "truncation_mode"},
    )

    # ---- the loss
    loss_type: str = option(
        "nll",
        "Loss of a scored token of probability p.",
        choices={"nll": "-log p", "dft": "-log p, weighted by p (arXiv:2508.05629)"},
        synonyms={"chunked_nll": "nll"},
        on_resume="free",
        aliases={"hf": "loss_type"},
    )
    label_smoothing: float = option(
        0.0,
        "Share of the target that is spread over the whole vocabulary.",
        at_least=0,
        below=1,
        special={0: "off"},
        example=0.1,
        on_resume="free",
        aliases={"hf": "label_smoothing_factor"},
    )
    neftune_noise_alpha: float = option(
        0.0,
        "NEFTune (arXiv:2310.05914): uniform noise on the embeddings of training, of the same expected norm "
        "for every example.",
        at_least=0,
        special={0: "off"},
        example=5.0,
        on_resume="free",
        aliases={"hf": "neftune_noise_alpha"},
    )

    # ---- what is shown of the held-out examples
    eval_prompts: int = option(
        0,
        "Held-out prompts that are answered at each evaluation, into WORKDIR/answers/STEP.jsonl; on GPUs "
        "this needs the weights a second time for a while.",
        unit="prompts",
        at_least=0,
        special={0: "none"},
        on_resume="free",
    )
    eval_tokens: int = option(
        256, "Length of such an answer, at most.", unit="tokens", at_least=1, on_resume="free"
    )

    @property
    def assistant_only(self) -> bool | None:
        """assistant_only_loss; None for auto."""
        return _auto(self.assistant_only_loss)

    @property
    def completion_only(self) -> bool | None:
        """completion_only_loss; None for auto."""
        return _auto(self.completion_only_loss)

    @property
    def packing_strategy(self) -> str:
        """packing, by its first name."""
        return self.packing.replace("bfd-requeue", "bfd_split").replace("bfd_requeue", "bfd_split")


def _auto(value: str) -> bool | None:
    return {"true": True, "false": False}.get(value.lower())
