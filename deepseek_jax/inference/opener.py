"""Opens whatever holds a model: a Hugging Face checkpoint, or the workdir of a run or of `import`."""

import dataclasses
import math
import os
import re

import jax
import numpy as np

from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config.configdict import from_config_dict
from deepseek_jax.config.options import Config
from deepseek_jax.data import hub_cache, tokenizer_folder
from deepseek_jax.data.chat import Chat
from deepseek_jax.data.contents import Contents
from deepseek_jax.data.encoder import Encoder
from deepseek_jax.data.tokenizer import Tokenizer, load_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.hf import base, configuration, names, provenance, reader
from deepseek_jax.hf.provenance import SourceNotes
from deepseek_jax.hf.tensors import read_config
from deepseek_jax.hf.tokenizer_files import contents_of, ends_of, tokenizer_of
from deepseek_jax.inference.loaded import LoadedModel, Origin, config_for, load
from deepseek_jax.model.layout import place_model
from deepseek_jax.parallel.mesh import AXES
from deepseek_jax.train import workdir as workdirs
from deepseek_jax.train.state import from_tree, to_tree


@dataclasses.dataclass
class Opened:
    """A model and what it came with.

    Attributes:
      model: the model.
      run: the options of the run, where it is one.
      trained: whether it is from a checkpoint of a run.
      folder: with tokenizer and chat template. None: the run's tokenizer is all there is.
      tokenizer: of a trained run: bytes, or the path of the tokenizer.json that it was trained with.
      contents: of the data that it was trained on, as far as known.
    """

    model: LoadedModel
    run: Config | None
    trained: bool
    folder: str | None
    tokenizer: str = ""
    contents: Contents | None = None

    def encoder(self) -> Encoder:
        """Text to token ids.

        Raises:
          UserError: there is no tokenizer, or it has ids that the model has not.
        """
        vocab_size = self.model.config.vocab_size
        return encoder_of(self.folder, self.tokenizer, self.run, vocab_size, self.model.source)


def encoder_of(
    folder: str | None, tokenizer: str, run: Config | None, vocab_size: int, name: str
) -> Encoder:
    """The tokenizer of a folder, or without one a run's.

    What ended a trained run's documents ends its answers, as it does those of its export.

    Args:
      folder, tokenizer, run: as Opened.
      vocab_size: ids that the model has.
      name: what messages call the model.

    Raises:
      UserError: as Opened.encoder.
    """
    source: Chat | Tokenizer
    if folder is not None:
        source = Chat(folder, vocab_size)
    else:
        assert run is not None
        source = load_tokenizer(tokenizer, special_tokens=run.data.special_tokens)
    out = Encoder(source, name, ends_of(run, tokenizer) if run and tokenizer else ())
    if out.vocab_size > vocab_size:
        last = out.text_of(out.vocab_size - 1)
        raise UserError(
            f"the tokenizer of {name} has {out.vocab_size} ids, the last of them {last!r}, and "
            f"the model {vocab_size}. Give it the tokenizer that it was trained with, or leave "
            f"tokens that it never had out of tokenizer_config.json."
        )
    return out


def open_model(
    path: str,
    step: int | None = None,
    dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
    adapter: str | None = None,
) -> Opened:
    """The model in a folder. What a LoRA run has trained is merged into its base.

    Args:
      path: a Hugging Face checkpoint (or its folder in the hub's cache), or the folder of a run of train.py
        or of import.
      step: checkpoint of the run; None: its newest.
      dtype, mesh, adapter: as hf.load.

    Raises:
      UserError: there is no model, it cannot be read, or dtype, mesh or adapter do not fit.
    """
    given, path = path, hub_cache.folder_of(path)
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise UserError(f"{given} holds no model: {hub_cache.no_config(path)}")
    if not isinstance(read_config(path).get("model"), dict):
        if step is not None:
            raise UserError(
                f"--step={step}: {path} is a checkpoint itself, and not a run that has some. Leave it "
                f"out."
            )
        model = load(path, dtype, mesh, adapter or "")
        return Opened(model, None, False, model.source)
    return _open_run(path, step, dtype, mesh, adapter or "")


def _open_run(
    workdir: str,
    step: int | None,
    dtype: str,
    mesh: jax.sharding.Mesh | None,
    adapter: str,
) -> Opened:
    saved = from_config_dict(workdirs.read_config(workdir))
    folder, files = workdirs.checkpoints(workdir, saved), os.path.join(workdir, provenance.FOLDER)
    local_dir = saved.checkpoint.local_dir
    if step is None and provenance.is_untrained(workdir, folder, local_dir):
        model = load(files, dtype, mesh, adapter)
        return Opened(model, saved, False, model.source)
    if adapter:
        raise UserError(
            f"--adapter={adapter} is of a Hugging Face checkpoint, and {workdir} is a run that has weights "
            f"of its own. Export it first, or leave --adapter out."
        )
    config, mesh = config_for(saved.model, mesh, dtype)
    config = dataclasses.replace(config, moe=saved.moe)
    with jax.set_mesh(mesh):
        layout = place_model(config, mesh)
        wanted = layout.abstract_sharded()
        checkpoints = Checkpointer(folder, read_only=True, options=saved.checkpoint)
        trained = contents_of(checkpoints.read_extra(step))
        tokenizer = tokenizer_of(workdir, saved, trained)
        if saved.lora.r:
            run = base.open_run(workdir, saved, checkpoints, step)
            args = run.source, config, run.family, layout, dtype, run.adapter
            params, bias = reader.state_of(*args)
            run.source.close()
        else:
            weights = from_tree(checkpoints.restore_params(to_tree(wanted), step), wanted)
            params, bias = _cast(weights.params, np.dtype(dtype)), weights.bias
        checkpoints.close()
    try:
        notes = provenance.read_notes(workdir) or SourceNotes(
            configuration.find_family(saved.model), saved.model, {}
        )
    except UserError:  # a model of our own: it runs, and only hf.save has to refuse it
        notes = SourceNotes("", saved.model, {})
    text = files if tokenizer and tokenizer == tokenizer_folder.find(files) else None

    def find_stop_ids() -> frozenset[int]:
        return encoder_of(text, tokenizer, saved, saved.model.vocab_size, workdir).stop_ids

    origin = Origin(workdir, notes, tokenizer, find_stop_ids)
    model = LoadedModel(config, mesh, layout, params, bias, origin)
    return Opened(model, saved, True, text, tokenizer, trained)


def _cast(params, dtype: np.dtype):
    """Matrices in another dtype, as hf.reader.read_state makes them, one array at a time."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    out = []
    while leaves:
        path, a = leaves.pop(0)
        name = names.path_of(path)
        follows = names.follows_dtype(name, a.ndim - name.startswith(("layers/", "dense_layers/")))
        out.append(jax.block_until_ready(a.astype(dtype)) if follows and a.dtype != dtype else a)
    return jax.tree.unflatten(tree, out)


def parse_mesh(text: str | None, option: str = "--mesh") -> jax.sharding.Mesh | None:
    """A mesh from "fsdp=2,expert=4", over as many of the devices.

    Args:
      text: one size may be -1: as many as are left. Nothing gives None.
      option: what messages call it.

    Raises:
      UserError: an axis is unknown or named twice, a size is no whole number, or there are fewer devices.
    """
    if not text:
        return None
    sizes: dict[str, int] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\w+)\s*=\s*(-1|[1-9]\d{0,5})\s*", part)
        if not found or found[1] not in AXES or found[1] in sizes:
            raise UserError(
                f"{option}={text}: {part!r} is not AXIS=SIZE. Name each of {', '.join(AXES)} once at most, "
                f"as in fsdp=2,expert=4."
            )
        sizes[found[1]] = int(found[2])
    devices = jax.devices()
    known = math.prod(n for n in sizes.values() if n > 0)
    free = [a for a, n in sizes.items() if n < 0]
    if free:
        sizes[free[0]] = len(devices) // known
    count = math.prod(sizes.values())
    if len(free) > 1 or not 0 < count <= len(devices):
        raise UserError(
            f"{option}={text} does not fit {len(devices)} devices. Make it smaller; JAX_NUM_CPU_DEVICES=8 "
            f"makes 8 of a CPU."
        )
    return jax.sharding.Mesh(np.array(devices[:count]).reshape(list(sizes.values())), tuple(sizes))
