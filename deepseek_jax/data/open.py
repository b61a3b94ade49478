"""The data of a run: documents for pretraining, examples for fine-tuning."""

import os

from deepseek_jax.config.options import Config, replaced
from deepseek_jax.config.validation import validate
from deepseek_jax.data import tokenizer_folder
from deepseek_jax.data.chat import Chat
from deepseek_jax.data.conversations import find_format
from deepseek_jax.data.documents import find_files, split_paths
from deepseek_jax.data.example_loader import ExampleLoader
from deepseek_jax.data.fields import EXAMPLES, OF_TEACHER, RECORD, TEXT, Fields
from deepseek_jax.data.loader import Loader
from deepseek_jax.data.records import read_records
from deepseek_jax.data.scoring import ExampleEncoder
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import UserError

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
      fields: what batches have, of which a teacher's are made elsewhere; None: all that the data give.
      workdir: of the run; tokenised examples are kept there for its later starts. None: nowhere.
      progress: show bars on stderr of what takes long.

    Raises:
      UserError: as `Loader` and `ExampleLoader`, or the tokenizer has no chat template that examples need.
    """
    config = settled(config)
    if fields is not None:
        given = {name: field for name, field in fields.items() if name not in OF_TEACHER}
        # A cached teacher says what it does by the number of a row.
        cached = config.objective == "distill" and config.distill.cache and given != fields
        fields = given | (RECORD if cached else {})
    if not config.reads_examples:
        return Loader(config, tokenizer, progress, TEXT if fields is None else fields)
    size = config.model.vocab_size
    folder, name = os.path.split(tokenizer_folder.file_of(config.data.tokenizer))
    # one by itself, under another name, has no template beside it
    of_folder = name in (tokenizer_folder.JSON, tokenizer_folder.RANKS)
    encoder = ExampleEncoder(config.sft, Chat(folder, size) if of_folder else tokenizer, size)
    kept = None if workdir is None else os.path.join(workdir, FOLDER)
    fields = EXAMPLES if fields is None else fields
    return ExampleLoader(config, tokenizer, encoder, kept, progress, fields)


def settled(config: Config) -> Config:
    """The options with what distill.data=auto stands for: text or examples, by the first row of the data.

    Raises:
      UserError: there are no such files, a row has no format that is known, or options do not go with it.
    """
    if config.objective != "distill" or config.distill.data != "auto":
        return config
    path = config.data.path
    kind = "pretrain" if path == "stdlib" else objective_of(path, "config.data.path")
    out = replaced(config, "distill.data", {"pretrain": "text", "sft": "examples"}[kind])
    validate(out)
    return out


def objective_of(path: str, option: str) -> str:
    """What data are for, by their first row: `pretrain` for texts and token files, `sft` for examples.

    Args:
      path: as config.data.path.
      option: what messages call it.

    Raises:
      UserError: there are no such files, or a row has no format that is known.
    """
    spec = split_paths(path, option)[0]
    file = find_files(spec, option)[0]
    if file.kind not in ("lines", "json", "parquet", "arrow"):
        return "pretrain"
    for record in read_records(file, spec, option):
        return "pretrain" if find_format(record.row, record.place) == "text" else "sft"
    raise UserError(f"{option}={path}: {file.path} has no rows. Name a file that has.")
