"""The data of a run: documents for pretraining, examples for fine-tuning."""

import os

from deepseek_jax.config.options import Config
from deepseek_jax.data import tokenizer_folder
from deepseek_jax.data.chat import Chat
from deepseek_jax.data.example_loader import ExampleLoader
from deepseek_jax.data.fields import EXAMPLES, TEXT, Fields
from deepseek_jax.data.loader import Loader
from deepseek_jax.data.scoring import ExampleEncoder
from deepseek_jax.data.tokenizer import Tokenizer

FOLDER = "examples"  # of the workdir, where tokenised examples are kept


def open_data(
    config: Config,
    tokenizer: Tokenizer,
    fields: Fields | None = None,
    workdir: str | None = None,
    progress: bool = False,
) -> Loader | ExampleLoader:
    """Opens, checks and splits the data that `config.objective` learns from.

    Args:
      tokenizer: of `config.data.tokenizer`.
      fields: what batches have; None: all that the data give.
      workdir: of the run; tokenised examples are kept there for its later starts. None: nowhere.
      progress: show bars on stderr of what takes long.

    Raises:
      UserError: as `Loader` and `ExampleLoader`, or the tokenizer has no chat template that examples need.
    """
    if config.objective == "pretrain":
        return Loader(config, tokenizer, progress, TEXT if fields is None else fields)
    size = config.model.vocab_size
    folder, name = os.path.split(tokenizer_folder.file_of(config.data.tokenizer))
    # one by itself, under another name, has no template beside it
    of_folder = name in (tokenizer_folder.JSON, tokenizer_folder.RANKS)
    encoder = ExampleEncoder(config.sft, Chat(folder, size) if of_folder else tokenizer, size)
    kept = None if workdir is None else os.path.join(workdir, FOLDER)
    fields = EXAMPLES if fields is None else fields
    return ExampleLoader(config, tokenizer, encoder, kept, progress, fields)
