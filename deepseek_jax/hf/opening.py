"""Opens whatever holds a model: a Hugging Face checkpoint, a workdir that `import` made, or the workdir of a run."""

import dataclasses
import math
import os
import re
from collections.abc import Sequence

import jax
import numpy as np

from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config import Config, UserError, from_config_dict
from deepseek_jax.data.tokenizer import Tokenizer, load_tokenizer
from deepseek_jax.hf import configuration, names, start
from deepseek_jax.hf.chat import Chat
from deepseek_jax.hf.model import LoadedModel, config_for, load
from deepseek_jax.hf.source import read_config
from deepseek_jax.hf.start import Notes
from deepseek_jax.parallel.mesh import AXES
from deepseek_jax.train import workdir as workdirs
from deepseek_jax.train.state import from_tree, make_layout, to_tree


@dataclasses.dataclass
class Opened:
    """A model and what it came with."""

    model: LoadedModel
    run: Config | None  # the options of the run, where it is one
    trained: bool  # whether it is from a checkpoint of a run
    folder: str | None  # with tokenizer.json and chat template; None: the run's config.data.tokenizer is all there is

    def chat(self) -> Chat:
        """Tokenizer and chat template.

        Raises:
          UserError: it has none, or a file is damaged.
        """
        if self.folder is None:
            raise UserError(f"{self.model.source} has no chat template: it is a run with config.data.tokenizer={self.run.data.tokenizer}. "
                            f"Prompt it with a text.")
        return Chat(self.folder)

    def encoder(self) -> "Encoder":
        """Text to token ids.

        Raises:
          UserError: there is no tokenizer, or it has ids that the model has not.
        """
        out = Encoder(Chat(self.folder) if self.folder is not None else load_tokenizer(self.run.data.tokenizer))
        if out.vocab_size > self.model.model.vocab_size:
            raise UserError(f"the tokenizer of {self.model.source} has {out.vocab_size} ids, and the model {self.model.model.vocab_size}. "
                            f"Give it the tokenizer that it was trained with.")
        return out


class Encoder:
    """Text to token ids and back.

    Attributes:
      prefix: what the tokenizer puts before a text: bos, or nothing.
      start_id: what can stand before a text that nothing stands before: bos, else eos.
      stop_ids: tokens that end a text. vocab_size: ids run from 0 to vocab_size - 1.
    """

    def __init__(self, source: Chat | Tokenizer):
        self.prefix: list[int] = []
        if isinstance(source, Chat):
            self._inner = source.tokenizer
            encoding = self._inner.encode("a", add_special_tokens=True)
            special = encoding.special_tokens_mask
            self.prefix = encoding.ids[: special.index(0) if 0 in special else 0]
            self.stop_ids = source.stop_ids
            self.vocab_size = max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
            bos = self._inner.token_to_id(source.special.get("bos_token", ""))
            eos = self._inner.token_to_id(source.special.get("eos_token", ""))
            self.start_id = next((i for i in (*self.prefix, bos, eos, *sorted(self.stop_ids)) if i is not None), None)
        else:
            self._inner, self.vocab_size, self.start_id = source, source.vocab_size, source.eos_id
            self.stop_ids = frozenset([source.eos_id])

    def encode(self, text: str, prefix: bool = True) -> list[int]:
        """Ids of a text, after the prefix unless it should be left out or the text begins with it."""
        if isinstance(self._inner, Tokenizer):
            return self._inner.encode(text).tolist()
        ids = self._inner.encode(text, add_special_tokens=False).ids
        return ids if not prefix or ids[: len(self.prefix)] == self.prefix else [*self.prefix, *ids]

    def encode_batch(self, texts: Sequence[str]) -> list[tuple[np.ndarray, int]]:
        """(int32 ids without prefix, UTF-8 bytes of the first one) of each text."""
        if isinstance(self._inner, Tokenizer):
            known = self._inner.token_bytes
            size = lambda i: int(known[i]) if known is not None else len(self._inner.decode([i]).encode())
            return [(ids, size(ids[0]) if len(ids) else 0) for ids in self._inner.encode_batch(texts)]
        out = []
        for text, e in zip(texts, self._inner.encode_batch(list(texts), add_special_tokens=False), strict=True):
            first, last = e.offsets[0] if e.offsets else (0, 0)
            out.append((np.asarray(e.ids, np.int32), len(text[first:last].encode())))
        return out

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids, without special tokens."""
        return self._inner.decode([int(i) for i in ids])


def open_model(path: str, step: int | None = None, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None) -> Opened:
    """The model in a folder.

    Args:
      path: a Hugging Face checkpoint, or the folder of a run of train.py or of import. step: checkpoint of the run; None: its newest.
      dtype, mesh: as hf.load.

    Raises:
      UserError: there is no model, it cannot be read, or dtype or mesh do not fit.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise UserError(f"{path} holds no model: there is no {os.path.join(path, 'config.json')}. Name a folder of train.py or of "
                        f"python -m deepseek_jax.hf import, or a checkpoint with config.json and model.safetensors, as on the hub.")
    if not isinstance(read_config(path).get("model"), dict):
        if step is not None:
            raise UserError(f"--step={step}: {path} is a checkpoint itself, and not a run that has some. Leave it out.")
        model = load(path, dtype, mesh)
        return Opened(model, None, False, model.source)
    return _open_run(path, step, dtype, mesh)


def _open_run(workdir: str, step: int | None, dtype: str, mesh: jax.sharding.Mesh | None) -> Opened:
    saved = from_config_dict(workdirs.read_config(workdir))
    folder, files = workdirs.checkpoints(workdir, saved), os.path.join(workdir, start.FOLDER)
    untrained = step is None and start.is_untrained(workdir, folder)
    if untrained:
        model = load(files, dtype, mesh)
        return Opened(model, saved, False, model.source)
    config, mesh = config_for(saved.model, mesh, dtype)
    config = dataclasses.replace(config, moe=saved.moe)
    with jax.set_mesh(mesh):
        layout = make_layout(config, mesh)
        nothing = {name: None for name in layout.abstract._fields if name not in ("params", "bias")}
        wanted = layout.abstract_sharded()._replace(**nothing)
        checkpoints = Checkpointer(folder, read_only=True)
        state = from_tree(checkpoints.restore_params(to_tree(wanted), step), wanted)
        checkpoints.close()
        params = _cast(state.params, np.dtype(dtype))
    try:
        notes = start.read_notes(workdir) or Notes(configuration.find_family(saved.model), saved.model, {})
    except UserError:  # a model of our own: it runs, and only hf.save has to refuse it
        notes = Notes("", saved.model, {})
    model = LoadedModel(config, mesh, layout, params, state.bias, notes, workdir)
    return Opened(model, saved, True, files if _same_tokenizer(saved, files) else None)


def _cast(params, dtype: np.dtype):
    """Matrices in another dtype, as reading.read_state makes them, one array at a time."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    out = []
    while leaves:
        path, a = leaves.pop(0)
        name = names.path_of(path)
        matrix = a.ndim - name.startswith(("layers/", "dense_layers/")) > 1 and not name.endswith("/gate/kernel")
        out.append(jax.block_until_ready(a.astype(dtype)) if matrix and a.dtype != dtype else a)
    return jax.tree.unflatten(tree, out)


def _same_tokenizer(config: Config, folder: str) -> bool:
    """Whether a run was trained with the tokenizer.json in a folder."""
    try:
        with open(os.path.join(folder, "tokenizer.json"), "rb") as a, open(os.path.expanduser(config.data.tokenizer), "rb") as b:
            return a.read() == b.read()
    except OSError:
        return False


def parse_mesh(text: str | None, option: str = "--mesh") -> jax.sharding.Mesh | None:
    """A mesh from "fsdp=2,expert=4", over as many of the devices; one size may be -1: as many as are left. None for None.

    Raises:
      UserError: an axis is unknown or named twice, a size is no whole number, or there are fewer devices.
    """
    if not text:
        return None
    sizes: dict[str, int] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\w+)\s*=\s*(-1|[1-9]\d{0,5})\s*", part)
        if not found or found[1] not in AXES or found[1] in sizes:
            raise UserError(f"{option}={text}: {part!r} is not AXIS=SIZE. Name each of {', '.join(AXES)} once at most, as in fsdp=2,expert=4.")
        sizes[found[1]] = int(found[2])
    devices = jax.devices()
    known = math.prod(n for n in sizes.values() if n > 0)
    free = [a for a, n in sizes.items() if n < 0]
    if free:
        sizes[free[0]] = len(devices) // known
    count = math.prod(sizes.values())
    if len(free) > 1 or not 0 < count <= len(devices):
        raise UserError(f"{option}={text} does not fit {len(devices)} devices. Make it smaller; JAX_NUM_CPU_DEVICES=8 makes 8 of a CPU.")
    return jax.sharding.Mesh(np.array(devices[:count]).reshape(list(sizes.values())), tuple(sizes))
