"""A run's folder from a checkpoint: WORKDIR/hf becomes a copy of it, checked and without FP8.

train.py and generate begin with it. Tensors are copied in blocks of rows, so that memory does not grow with
the model. A checkpoint in our own format would be float32, twice or four times the bytes; each process reads
its shards from this one as quickly.
"""

import os
import shutil

import numpy as np

from deepseek_jax.checkpoint.finder import has_steps
from deepseek_jax.config import paths
from deepseek_jax.config.options import Config, DataConfig, ModelConfig, TrainConfig
from deepseek_jax.data import tokenizer_folder
from deepseek_jax.errors import UserError
from deepseek_jax.hf import names, provenance, reader, writer
from deepseek_jax.hf.tensors import FP8, HfTensors, dump
from deepseek_jax.inference.loaded import config_for
from deepseek_jax.model.layout import abstract_model
from deepseek_jax.tensorfile.arrays import TensorSpec
from deepseek_jax.tensorfile.files import FILE_BYTES
from deepseek_jax.train import workdir as workdirs


def import_(source_folder: str, workdir: str) -> tuple[int, str]:
    """Makes WORKDIR from a checkpoint.

    Args:
      source_folder: with config.json and safetensors files.
      workdir: a folder without a run.

    Returns:
      The bytes written and the family.

    Raises:
      UserError: the checkpoint cannot be read or does not fit its config.json, or the folder holds a run
        already.
    """
    folder = os.path.join(workdir, provenance.FOLDER)
    temporary = paths.scratch(folder)
    has_run = has_steps(os.path.join(workdir, "checkpoints"))
    if has_run or os.path.exists(folder) or os.path.exists(os.path.join(workdir, "config.json")):
        raise UserError(f"{workdir} holds a run already. Name a new folder.")
    source, model, family = reader.open_source(source_folder)
    tensors = tensors_of(source, model, family)
    new = not os.path.exists(workdir)
    run, _ = config_for(model, None)
    workdirs.prepare(workdir, run)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
        provenance.write_notes(source, model, family, temporary)
        _write_config(source, model, temporary)
        places = writer.lay_out(temporary, tensors, FILE_BYTES)
        writer.copy_tensors(source, places, temporary)
        os.rename(temporary, folder)
        tokenizer = tokenizer_folder.find(os.path.abspath(folder))
        length = min(TrainConfig().sequence_length, model.max_position_embeddings)
        train = TrainConfig(sequence_length=length)
        data = DataConfig(tokenizer=tokenizer) if tokenizer else DataConfig()
        workdirs.write_config(workdir, Config(model=model, train=train, data=data))
    except OSError as e:
        raise UserError(
            f"{workdir} cannot be written ({e.strerror or e}). Name a folder that you may write to, with "
            f"room for the model."
        ) from e
    finally:
        source.close()
        shutil.rmtree(temporary, ignore_errors=True)
        if new and not os.listdir(workdir):
            os.rmdir(workdir)
    return sum(spec.nbytes for spec in tensors.values()), family


def tensors_of(source: HfTensors, model: ModelConfig, family: str) -> dict[str, TensorSpec]:
    """The tensors that a model needs, in the order of a checkpoint; FP8 becomes bfloat16.

    Raises:
      UserError: as hf.reader.check.
    """
    run, _ = config_for(model, None)
    _, params, bias = abstract_model(run)
    leaves = [*names.leaves(params, family, model), *names.leaves(bias, family, model)]
    reader.check(source, model, leaves)
    out = {}
    for leaf in leaves:
        for name, shape in names.tensors(leaf, source.tensors).items():
            stored = source.stored_dtype(name)
            out[name] = TensorSpec(shape, np.dtype("bfloat16") if stored == FP8 else stored)
    return {name: out[name] for name in sorted(out, key=names.order)}


def _write_config(source: HfTensors, model: ModelConfig, folder: str) -> None:
    """Writes the config.json of the copy, which says nothing of what the copy has not.

    That is quantisation, and layers of multi-token prediction that the checkpoint left out.
    """
    config = dict(source.config)
    if config.pop("quantization_config", None):
        config["torch_dtype"] = config["dtype"] = "bfloat16"
    for key in ("num_nextn_predict_layers", "num_mtp_layers"):
        if key in config:
            config[key] = model.num_nextn_predict_layers
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:
        f.write(dump(config))
