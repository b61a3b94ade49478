"""What is read, and what is held out and evaluated."""

from dataclasses import dataclass

from deepseek_jax.config.option import Alias, option


@dataclass(frozen=True)
class DataConfig:
    """Texts or token files, their tokenizer, and the share that is held out."""

    path: str = option(
        "stdlib",
        "File, folder or glob; several separated by commas.",
        choices={"stdlib": "Python's own sources"},
        path=True,
        several=True,
        on_resume="new pass",
        aliases={"nemo": "data_prefix", "hf": "train_file"},
    )
    weights: str = option(
        "",
        'Mixture weights of the comma-separated paths, as "0.7,0.3"; empty: by their size in tokens.',
        on_resume="new pass",
    )
    tokenizer: str = option(
        "auto",
        "Path of a tokenizer.json or tiktoken.model, or of the folder with it.",
        choices={
            "auto": "the run's, else that of init_from or of the import, else bytes",
            "bytes": "UTF-8 bytes",
        },
        path=True,
        on_resume="refused",
        aliases={"hf": "tokenizer_name"},
    )
    special_tokens: bool = option(
        False,
        "<|im_start|> and the like in the text are the tokenizer's special tokens, eos ends a document; "
        "False: text.",
        on_resume="refused",
    )
    document_mask: bool = option(
        True,
        "Attention and positions do not cross documents packed into one sequence.",
        on_resume="free",
        aliases={"nemo": "reset_attention_mask"},
    )
    eval_fraction: float = option(
        0.01,
        "Share of the documents held out for evaluation, chosen by document.",
        at_least=0,
        below=1,
        special={0: "no evaluation"},
        on_resume="new pass",
    )
    split: str = option(
        "",
        'Shares of documents in their order, "969,30,1", in place of eval_fraction: those that train, those '
        "held out, and those that nothing reads; of each source.",
        on_resume="new pass",
        example="969,30,1",
        aliases=[
            Alias(
                nemo=("data.splits_string", "split"),
                note="the same documents as Megatron's; empty: `data.eval_fraction`, spread over the data",
            )
        ],
    )
    bin_dtype: str = option(
        "uint16",
        "Dtype of raw .bin token files without a sidecar.",
        choices={"uint16": "", "uint32": ""},
    )
    eos_token_id: int = option(
        -1,
        "Document separator in token files without a sidecar.",
        special={-1: "the tokenizer's"},
    )
    on_change: str = option(
        "refuse",
        "Resuming with other data, seed, sequence_length, eval_fraction or mixture.",
        choices={"refuse": "an error", "new_pass": "begins a pass over them"},
        on_resume="free",
    )


@dataclass(frozen=True)
class EvalConfig:
    """The measure on held-out documents, and the sample at the end."""

    every_steps: int = option(
        250,
        "Steps between evaluations.",
        unit="steps",
        at_least=0,
        special={0: "only at the end"},
        on_resume="free",
        aliases={"nemo": "val_check_interval", "hf": "eval_steps"},
    )
    every_epochs: float = option(
        0.0,
        "Also at the first step after each so many passes over the training data.",
        unit="passes",
        at_least=0,
        special={0: "only by steps"},
        example=1.0,
        on_resume="free",
        aliases=[
            Alias(
                1.0,
                hf=("eval_strategy: epoch", "evaluation_strategy: epoch"),
                also={"eval.every_steps": 0},
                note="of axolotl's `evals_per_epoch` the inverse",
            )
        ],
    )
    batches: int = option(
        16,
        "Held-out batches per evaluation, at most.",
        unit="batches",
        at_least=0,
        on_resume="free",
        aliases=[Alias(nemo="limit_val_batches")],
    )
    sample_prompt: str = option(
        "def ",
        "Prompt of the sample shown at the end of training; empty: no sample.",
        on_resume="free",
    )
    sample_tokens: int = option(
        160,
        "Length of the sample.",
        unit="tokens",
        at_least=0,
        special={0: "no sample"},
        on_resume="free",
    )
