"""What a teacher's folder holds: opened, and compared with the student, before anything is compiled."""

import filecmp
import os
from typing import NamedTuple

import tokenizers

from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config.configdict import from_config_dict
from deepseek_jax.config.options import Config, ModelConfig
from deepseek_jax.data import hub_cache, tokenizer_folder
from deepseek_jax.errors import UserError
from deepseek_jax.hf import base as adapted
from deepseek_jax.hf import provenance, reader
from deepseek_jax.hf.compression_map import CompressionMap
from deepseek_jax.hf.configuration import to_model
from deepseek_jax.hf.names import leaves
from deepseek_jax.hf.tensors import read_config
from deepseek_jax.hf.tokenizer_files import byte_tokenizer, contents_of, tokenizer_of
from deepseek_jax.model.layout import abstract_model
from deepseek_jax.train import workdir as workdirs

OPTION = "config.distill.teacher"


class Found(NamedTuple):
    """What a folder holds."""

    folder: str
    model: ModelConfig
    run: Config | None  # the options of the run, where it is the workdir of one that has trained
    map: CompressionMap | None = None  # of the student


def find(config: Config) -> Found:
    """What config.distill.teacher names; its weights are not looked at.

    Raises:
      UserError: it holds no model that this version has.
    """
    given = config.distill.teacher
    try:
        folder = hub_cache.folder_of(given)
        if not os.path.isfile(os.path.join(folder, "config.json")):
            raise UserError(f"{given} holds no model: {hub_cache.no_config(folder)}")
        written = read_config(folder)
        if not isinstance(written.get("model"), dict):
            return Found(folder, to_model(written), None)
        run = from_config_dict(workdirs.read_config(folder))
        checkpoints = workdirs.checkpoints(folder, run)
        if provenance.is_untrained(folder, checkpoints, run.checkpoint.local_dir):
            imported = os.path.join(folder, provenance.FOLDER)
            return Found(imported, to_model(read_config(imported)), None)
        return Found(folder, run.model, run)
    except UserError as e:
        raise UserError(f"{OPTION}: {e}") from e


class Weights(NamedTuple):
    """What a look at a teacher's files says."""

    identity: str  # tells them from others
    tokenizer: str | None  # bytes, a path, or None: not known
    step: int | None = None  # of a run's checkpoint


def check_weights(found: Found, given: str) -> Weights:
    """Looks at the names and shapes of its weights."""
    try:
        if found.run is None:
            source, model, family = reader.open_source(found.folder)
            _, params, bias = abstract_model(Config(model=model))
            every = [leaf for state in (params, bias) for leaf in leaves(state, family, model)]
            reader.check(source, model, every)
            identity = adapted.identity(source)
            source.close()
            return Weights(identity, tokenizer_folder.find(found.folder))
        checkpoints = Checkpointer(
            workdirs.checkpoints(found.folder, found.run),
            read_only=True,
            options=found.run.checkpoint,
        )
        try:
            step = checkpoints.newest_good()
            extra = checkpoints.read_extra(step)
        finally:
            checkpoints.close()
        tokenizer = tokenizer_of(found.folder, found.run, contents_of(extra))
        # A run may go on while it teaches: its checkpoint of now stays.
        return Weights(f"{extra.get(workdirs.RUN)} step {step}", tokenizer, step)
    except UserError as e:
        raise UserError(f"{OPTION}={given}: {e}") from e


def check_tokenizer(config: Config, found: Found, theirs: str | None) -> None:
    """Compares the ids that text can have."""
    given, ours = config.distill.teacher, config.data.tokenizer
    used = _vocabulary(ours)
    if max(used, default=0) >= found.model.vocab_size:
        raise UserError(
            f"{OPTION}={given} has vocab_size={found.model.vocab_size}, but config.data.tokenizer={ours} has "
            f"ids up to {max(used)}. Name a teacher with the student's tokenizer."
        )
    if theirs is None or theirs == ours or _same_file(ours, theirs):
        return
    known = _vocabulary(theirs)
    for i, text in sorted(used.items()):
        if known.get(i) != text:
            raise UserError(
                f"{OPTION}={given} has another tokenizer: the id {i} is {known.get(i)!r} there and "
                f"{text!r} in config.data.tokenizer={ours}. Name a teacher with the student's tokenizer."
            )


def _same_file(ours: str, theirs: str) -> bool:
    if "bytes" in (ours, theirs):
        return False
    return filecmp.cmp(tokenizer_folder.file_of(ours), theirs, shallow=False)


def _vocabulary(tokenizer: str) -> dict[int, str]:
    """{id: token} of `bytes` or of a tokenizer's file."""
    inner: tokenizers.Tokenizer
    if tokenizer == "bytes":
        inner = byte_tokenizer()
    else:
        path = tokenizer_folder.file_of(tokenizer)
        inner = tokenizer_folder.read(path, specials=False).tokenizer
    return {i: text for text, i in inner.get_vocab(with_added_tokens=True).items()}
