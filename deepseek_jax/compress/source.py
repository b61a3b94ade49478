"""The arrays of a model, read from its files part by part: of a Hugging Face folder, or of a run's workdir.

Arrays have our names and layout (hf/names.py): a layer's experts are gate_up [E, D, 2, F] and down [E, F, D],
whatever their files are called. No device holds them, and of the whole model no more is in memory than what
`layer` is asked for.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config.configdict import from_config_dict
from deepseek_jax.config.options import Config, ModelConfig
from deepseek_jax.data import hub_cache
from deepseek_jax.errors import UserError
from deepseek_jax.hf import (
    base,
    compression_map,
    configuration,
    names,
    provenance,
    reader,
    tokenizer_files,
)
from deepseek_jax.hf.compression_map import Document
from deepseek_jax.hf.names import Leaf
from deepseek_jax.hf.provenance import SourceNotes, notes_of
from deepseek_jax.hf.reader import Part
from deepseek_jax.hf.tensors import FP8, HfTensors, read_config
from deepseek_jax.hf.tokenizer_files import Companions
from deepseek_jax.inference.loaded import config_for
from deepseek_jax.model.layout import abstract_model
from deepseek_jax.tensorfile import regions
from deepseek_jax.train import workdir as workdirs

FLOAT32 = np.dtype(np.float32)

Read = Callable[[Leaf, regions.Index], np.ndarray]


class Source:
    """A model to compress.

    Attributes:
      folder: as the user gave it.
      model: its options.
      family: that it is saved as.
      leaves: its arrays, {path: Leaf}.
      companions: tokenizer, config.json and others that go with it.
      notes: how its tensors were stored; None: float32.
      document: what was done to it before, or the beginning of a compression.json.
    """

    def __init__(
        self,
        folder: str,
        model: ModelConfig,
        family: str,
        read: Read,
        companions: Companions,
        notes: SourceNotes | None,
    ):
        self.folder = folder
        self.model = model
        self.family = family
        self.leaves = {leaf.path: leaf for leaf in leaves_of(model, family)}
        self.companions = companions
        self.notes = notes
        self._read = read
        self.document = self._document()

    def part(self, path: str, index: regions.Index) -> np.ndarray:
        """A part of an array, a slice with start and stop for every axis, in the dtype of its file."""
        return self._read(self.leaves[path], index)

    def place(self, layer: int, rest: str) -> tuple[str, int | None]:
        """Where a layer has an array: its path, and its place on the first axis, None without such an axis.

        Args:
          layer: counted through, those of multi-token prediction after the last.
          rest: the path in the layer, as "mlp/experts/down_proj".
        """
        return place(self.model, layer, rest)

    def layer(self, layer: int, rest: str, index: regions.Index | None = None) -> np.ndarray:
        """An array of one layer, without an axis of layers: all of it, or a part.

        Args:
          layer, rest: as `place`.
          index: as `part`, of the layer's array.

        Raises:
          KeyError: the layer has no such array.
        """
        path, at = self.place(layer, rest)
        shape = self.leaves[path].shape
        if at is None:
            return self.part(path, index or regions.whole(shape))
        index = index or regions.whole(shape[1:])
        return self.part(path, (slice(at, at + 1), *index))[0]

    def identity(self) -> str:
        """What tells the model from others: a hash of names, shapes and first numbers of its arrays."""
        out = hashlib.sha256()
        for path, leaf in sorted(self.leaves.items()):
            out.update(f"{path} {list(leaf.shape)}".encode())
            corner = (*(1,) * (len(leaf.shape) - 1), min(base.SAMPLE, leaf.shape[-1]))
            values = self.part(path, regions.whole(corner)) if 0 not in leaf.shape else np.zeros(0)
            out.update(values.astype(np.float32).tobytes())
        return out.hexdigest()

    def _document(self) -> Document:
        files = self.companions.files_from
        before = os.path.join(files or self.folder, compression_map.FILE)
        if os.path.exists(before):
            document = compression_map.read_document(before)
            _check_fits(document, self.model, before)
            return document
        return Document(compression_map.unchanged(self.model), (), self.identity())


def _check_fits(document: Document, model: ModelConfig, path: str) -> None:
    layers, rows = len(document.map.layer_map), document.map.expert_map
    if layers == model.num_hidden_layers and len(rows) == len(compression_map.expert_rows(model)):
        if all(len(row) == model.n_routed_experts for row in rows):
            return
    raise UserError(
        f"{path} is of another model than the config.json beside it: it has {layers} layers and "
        f"{len(rows)} rows of experts. Remove it, or put the one of this model there."
    )


def place(model: ModelConfig, layer: int, rest: str) -> tuple[str, int | None]:
    """As Source.place, of any model."""
    dense, layers = model.first_k_dense_replace, model.num_hidden_layers
    if layer >= layers:
        own = rest.partition("/")[0] in ("enorm", "hnorm", "eh_proj", "norm")
        return f"mtp/{layer - layers}/{rest if own else f'layer/{rest}'}", None
    if layer < dense:
        return f"dense_layers/{rest}", layer
    return f"layers/{rest}", layer - dense


def layers_of(model: ModelConfig, leaf: Leaf) -> tuple[Sequence[int], str]:
    """The layers that an array is of, by number, and its path in them; none for what is in no layer."""
    first, _, rest = leaf.path.partition("/")
    if first == "mtp":
        depth, _, rest = rest.partition("/")
        return (model.num_hidden_layers + int(depth),), rest.removeprefix("layer/")
    if first in ("dense_layers", "layers"):
        begin = model.first_k_dense_replace if first == "layers" else 0
        return range(begin, begin + leaf.shape[0]), rest
    return (), leaf.path


def leaves_of(model: ModelConfig, family: str) -> list[Leaf]:
    """The arrays of a model, parameters and selection biases.

    Raises:
      UserError: this version has no such model.
    """
    run, mesh = config_for(model, None)
    with jax.set_mesh(mesh):
        _, params, bias = abstract_model(run)
    return [leaf for state in (params, bias) for leaf in names.leaves(state, family, model)]


def copied(source: Source, model: ModelConfig, leaf: Leaf, layers: Sequence[int]) -> Iterator[Part]:
    """An array of a new model as the source has it, a layer at a time.

    Args:
      source: it has the array in the same shape, but for the axis of layers.
      model: the options of the new model.
      leaf: of the new model.
      layers: the source's layer of each layer of the new one, multi-token prediction included.
    """
    here, rest = layers_of(model, leaf)
    if not here:
        yield source.part(leaf.path, regions.whole(leaf.shape)), regions.whole(leaf.shape)
    elif not leaf.stacked:
        yield source.layer(layers[here[0]], rest), regions.whole(leaf.shape)
    else:
        for i, number in enumerate(here):
            index = (slice(i, i + 1), *regions.whole(leaf.shape[1:]))
            yield source.layer(layers[number], rest)[None], index


def open_source(folder: str, step: int | None = None) -> Source:
    """Opens what holds a model, without reading its weights. What a LoRA run has trained is merged.

    Args:
      folder: a Hugging Face checkpoint, or a workdir of train.py or of import.
      step: checkpoint of the run; None: its newest.

    Raises:
      UserError: there is no model, or it cannot be read.
    """
    path = hub_cache.folder_of(folder)
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise UserError(f"{folder} holds no model: {hub_cache.no_config(path)}")
    if isinstance(read_config(path).get("model"), dict):
        return _open_run(path, step)
    if step is not None:
        raise UserError(
            f"--step={step}: {folder} is a checkpoint itself, and not a run that has some. Leave it out."
        )
    return _open_folder(path)


def _open_folder(folder: str) -> Source:
    tensors, model, family = reader.open_source(folder)
    leaves = leaves_of(model, family)
    reader.check(tensors, model, leaves)
    notes = notes_of(tensors, model, family)
    notes = dataclasses.replace(notes, dtypes=notes.dtypes | _hub_dtypes(leaves, tensors))
    return Source(folder, model, family, _reader(tensors), Companions(tensors.folder), notes)


def _reader(tensors: HfTensors) -> Read:
    def read(leaf: Leaf, index: regions.Index) -> np.ndarray:
        pieces = names.tensor_regions(leaf, index, tensors.tensors)
        stored = {tensors.stored_dtype(piece.name) for piece in pieces}
        same = len(stored) == 1 and FP8 not in stored
        return reader.read_part(tensors, leaf, index, stored.pop() if same else FLOAT32)

    return read


def _hub_dtypes(leaves: Sequence[Leaf], tensors: HfTensors) -> dict[str, str]:
    """What is stored under other names than an export has, all experts in one tensor, by the latter."""
    out = {}
    for leaf in leaves:
        for prefix in leaf.prefixes:
            there = names.names_of(leaf, prefix, tensors.tensors)
            if there != (written := names.names_of(leaf, prefix)):
                stored = tensors.stored_dtype(there[0].format(e=0))
                for name in written:
                    dtype = "bfloat16" if stored == FP8 else stored.name
                    out[provenance.pattern(name.format(e=0))] = dtype
    return out


def _open_run(workdir: str, step: int | None) -> Source:
    saved = from_config_dict(workdirs.read_config(workdir))
    folder = workdirs.checkpoints(workdir, saved)
    if step is None and provenance.is_untrained(workdir, folder, saved.checkpoint.local_dir):
        return _open_folder(os.path.join(workdir, provenance.FOLDER))
    notes = provenance.read_notes(workdir)
    family = notes.family if notes else configuration.find_family(saved.model)
    checkpoints = Checkpointer(folder, read_only=True, options=saved.checkpoint)
    trained = tokenizer_files.contents_of(checkpoints.read_extra(step))
    tokenizer = tokenizer_files.tokenizer_of(workdir, saved, trained)
    companions = tokenizer_files.of_run(saved, workdir, tokenizer)
    read = _run_reader(workdir, saved, checkpoints, step)
    return Source(workdir, saved.model, family, read, companions, notes)


def _run_reader(workdir: str, saved: Config, checkpoints: Checkpointer, step: int | None) -> Read:
    """Reads a run's checkpoint, which stays open; of a LoRA run its base with what it has trained."""
    if saved.lora.r:
        run = base.open_run(workdir, saved, checkpoints, step)
        return lambda leaf, index: reader.read_part(run.source, leaf, index, FLOAT32, run.adapter)
    stored = checkpoints.source(step)

    def read(leaf: Leaf, index: regions.Index) -> np.ndarray:
        is_bias = leaf.path.endswith("e_score_correction_bias")
        name = f"{'bias' if is_bias else 'params'}/{leaf.path}"
        found = stored.shapes.get(name)
        if found is None or found.shape != leaf.shape:
            raise UserError(
                f"the checkpoint of {workdir} is of another model than its config.json: {leaf.path} is "
                f"{found or 'absent'} and not {list(leaf.shape)}. Name the --step of one that it is of."
            )
        return np.asarray(stored.read(name, index))

    return read
