"""A run's folder from a checkpoint: WORKDIR/hf becomes a copy of it, checked and without FP8, which train.py and generate begin with.

Tensors are copied in blocks of rows, so that memory does not grow with the model. A checkpoint in our own format would be float32, twice or
four times the bytes; each process reads its shards from this one as quickly.
"""

import os
import shutil

import numpy as np

from deepseek_jax import paths
from deepseek_jax.checkpoint.arrays import Shape
from deepseek_jax.config import Config, Data, Model, Train, UserError
from deepseek_jax.data import tokenizer_folder
from deepseek_jax.hf import exporting, names, reading, start, writing
from deepseek_jax.hf.model import config_for
from deepseek_jax.hf.source import FP8, Source, dump
from deepseek_jax.train import workdir as workdirs
from deepseek_jax.train.state import abstract_model


def import_(source_folder: str, workdir: str) -> tuple[int, str]:
    """Makes WORKDIR from a checkpoint.

    Returns:
      The bytes written and the family.

    Raises:
      UserError: the checkpoint cannot be read or does not fit its config.json, or the folder holds a run already.
    """
    folder = os.path.join(workdir, start.FOLDER)
    temporary = paths.scratch(folder)
    checkpoints = os.path.join(workdir, "checkpoints")
    runs = os.path.isdir(checkpoints) and any(n.isdigit() for n in os.listdir(checkpoints))
    if runs or os.path.exists(folder) or os.path.exists(os.path.join(workdir, "config.json")):
        raise UserError(f"{workdir} holds a run already. Name a new folder.")
    source, model, family = reading.open_source(source_folder)
    wanted = tensors_of(source, model, family)
    new = not os.path.exists(workdir)
    run, _ = config_for(model, None)
    workdirs.prepare(workdir, run)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
        start.write_notes(source, model, family, temporary)
        _write_config(source, model, temporary)
        writing.copy_tensors(source, exporting.lay_out(temporary, wanted, exporting.FILE_BYTES, writer=True), temporary)
        os.rename(temporary, folder)
        tokenizer = tokenizer_folder.find(os.path.abspath(folder))
        train = Train(sequence_length=min(Train().sequence_length, model.max_position_embeddings))
        data = Data(tokenizer=tokenizer) if tokenizer else Data()
        workdirs.write_config(workdir, Config(model=model, train=train, data=data))
    except OSError as e:
        raise UserError(f"{workdir} cannot be written ({e.strerror or e}). Name a folder that you may write to, with room for the model.") from e
    finally:
        source.close()
        shutil.rmtree(temporary, ignore_errors=True)
        if new and not os.listdir(workdir):
            os.rmdir(workdir)
    return sum(what.nbytes for what in wanted.values()), family


def tensors_of(source: Source, model: Model, family: str) -> dict[str, Shape]:
    """{name: shape and dtype} of what a model needs, in the order of a checkpoint; FP8 becomes bfloat16.

    Raises:
      UserError: as reading.check.
    """
    run, _ = config_for(model, None)
    _, params, bias = abstract_model(run)
    leaves = [*names.leaves(params, family, model), *names.leaves(bias, family, model)]
    reading.check(source, model, family, leaves)
    held = {name: shape for leaf in leaves for name, shape in names.tensors(leaf, source.tensors).items()}
    of = lambda name: np.dtype("bfloat16") if source.stored_dtype(name) == FP8 else source.stored_dtype(name)
    return {name: Shape(held[name], of(name)) for name in sorted(held, key=exporting.order)}


def _write_config(source: Source, model: Model, folder: str) -> None:
    """The config.json of the copy: without quantisation, and without multi-token prediction layers that are not there."""
    config = dict(source.config)
    if config.pop("quantization_config", None):
        config["torch_dtype"] = config["dtype"] = "bfloat16"
    for key in ("num_nextn_predict_layers", "num_mtp_layers"):
        if key in config:
            config[key] = model.num_nextn_predict_layers
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:
        f.write(dump(config))
