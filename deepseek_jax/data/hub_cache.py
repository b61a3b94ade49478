"""Where a checkpoint is: a folder, or the hub's cache of a repository. If there is none, the error says
what was found instead and how to repair it.
"""

import itertools
import json
import os
import re

from deepseek_jax.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
_POINTER = "version https://git-lfs"
FINISH = "Finish the download, which hf download does without repeating what is there"


def folder_of(path: str) -> str:
    """The folder that a path means: of the hub's cache of a repository the snapshot in it.

    Raises:
      UserError: it is not a folder, or a cache with no snapshot or several.
    """
    given, path = path, os.path.abspath(os.path.expanduser(path))
    if os.path.isfile(path):
        raise UserError(
            f"{given} is not a folder but a file. Name the folder that it is in, "
            f"{os.path.dirname(path)}."
        )
    if not os.path.isdir(path):
        raise UserError(f"{given} is not a folder. {_elsewhere(given)}")
    snapshots = os.path.join(path, "snapshots")
    if os.path.exists(os.path.join(path, "config.json")) or not os.path.isdir(snapshots):
        return path
    there = sorted(n for n in os.listdir(snapshots) if os.path.isdir(os.path.join(snapshots, n)))
    main = _text(os.path.join(path, "refs", "main")).strip()
    if len(there) != 1 and main not in there:
        what = f"{len(there)} snapshots: {', '.join(there[:5])}" if there else "no snapshot"
        repair = "Download the model again"
        if there:
            repair = f"Name one of them, {os.path.join(given, 'snapshots', there[0])} for instance"
        raise UserError(f"{given} is a folder of the hub's cache that holds {what}. {repair}.")
    return os.path.join(snapshots, main if main in there else there[0])


def _elsewhere(given: str) -> str:
    """Where a repository that was named by its id is, or how to get it."""
    if not _HUB_ID.fullmatch(given):
        return f"Name one with config.json and {SINGLE}, as the hub has them."
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    home = os.environ.get("HF_HOME") or os.path.join(caches, "huggingface")
    hub = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    cached = os.path.join(hub, f"models--{given.replace('/', '--')}")
    if os.path.isdir(cached):
        return f"The hub's repository of this name is in its cache: name {cached}."
    return (
        f"Nothing is downloaded here. For the hub's repository of this name run hf download {given} "
        f"--local-dir {given.rpartition('/')[2]}, and name that folder."
    )


def no_config(folder: str) -> str:
    """Why there is no config.json in a folder, and the repair."""
    names = _names(folder)
    if caches := [n for n in names if n.startswith("models--")]:
        one = os.path.join(folder, caches[0])
        return f"it is the hub's cache. Name one of its folders, {one} for instance."
    return _instead(folder, names) or (
        f"there is no config.json. Name a folder with config.json and "
        f"{SINGLE}, as the hub has them, or the folder of a run."
    )


def no_weights(folder: str) -> UserError:
    """What to say of a folder with config.json, and neither model.safetensors nor an index nor all parts."""
    names = _names(folder)
    parts = [m for n in names if (m := _SHARD.fullmatch(n))]
    if parts:
        count, there = int(parts[0][3]), {int(m[2]) for m in parts}
        missing = list(itertools.islice((i for i in range(1, count + 1) if i not in there), 5))
        more = " and more" if len(missing) == 5 else ""
        return UserError(
            f"{folder} holds {len(parts)} of {count} safetensors files, and no {INDEX}; missing "
            f"are those of the numbers {', '.join(map(str, missing))}{more}. {FINISH}."
        )
    why = (
        _instead(folder, names)
        or f"{SINGLE} is missing, and so is {INDEX}. Download the weights too."
    )
    return UserError(f"{folder}: {why}")


def all_shards(folder: str) -> list[str]:
    """model-00001-of-00003.safetensors and so on, if the folder has all of one set; else nothing."""
    found: dict[tuple[str, str], dict[int, str]] = {}
    for name in _names(folder):
        if m := _SHARD.fullmatch(name):
            found.setdefault((m[1], m[3]), {})[int(m[2])] = name
    whole = [
        f
        for (_, count), f in found.items()
        if (len(f), min(f), max(f)) == (int(count), 1, int(count))
    ]
    return [whole[0][i] for i in sorted(whole[0])] if len(whole) == 1 else []


def missing_files(folder: str, missing: list[str], count: int) -> UserError:
    """What to say of an index that names files which are not there."""
    return UserError(
        f"{folder}/{INDEX}: it names {len(missing)} of {count} files that are missing: "
        f"{some(missing)}. {FINISH}, or copy them."
    )


def check_downloaded(folder: str, file: str) -> None:
    """Raises UserError for a file of which git has the pointer only."""
    path = os.path.join(folder, file)
    if _text(path, len(_POINTER)) == _POINTER:
        raise UserError(
            f"{path} is a pointer of Git LFS and not the file. Run git lfs pull in that folder, "
            f"or get it with hf download."
        )


def _instead(folder: str, names: list[str]) -> str:
    """What a folder holds in place of safetensors files, and the repair; empty if nothing that is known."""
    target = f"{os.path.basename(folder.rstrip('/'))}-safetensors"
    if "adapter_config.json" in names:
        base = _json_key(os.path.join(folder, "adapter_config.json"), "base_model_name_or_path")
        return (
            f"it holds an adapter{f' of {base}' if base else ''} and not a model. Merge it into its base "
            f'model: python -c "from peft import AutoPeftModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').merge_and_unload().save_pretrained('{target}')\"."
        )
    if any(
        n.endswith((".bin", ".bin.index.json")) and n.startswith("pytorch_model") for n in names
    ):
        return (
            f"its weights are pickles (pytorch_model*.bin), which are not read here, as they can run "
            f'code. Convert them: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{target}')\", and copy the "
            f"tokenizer's files."
        )
    if any(n.endswith(".gguf") for n in names):
        return (
            "its weights are GGUF, quantised for llama.cpp. Take the repository of the original weights, "
            "in safetensors files."
        )
    if any(n.startswith("consolidated") and n.endswith((".safetensors", ".pth")) for n in names):
        return (
            "its weights have their authors' own names (consolidated.*). Take the repository in Hugging "
            "Face's format (often ...-hf)."
        )
    return ""


def _names(folder: str) -> list[str]:
    return sorted(os.listdir(folder))


def _text(path: str, count: int = 1 << 16) -> str:
    """The first bytes of a file as text; nothing where they cannot be read."""
    try:
        with open(path, "rb") as f:
            return f.read(count).decode(errors="replace")
    except OSError:
        return ""


def quantised(folder: str) -> str:
    """How NVIDIA's ModelOpt quantised the weights, which it says beside config.json; empty if it did not."""
    return _json_key(os.path.join(folder, "hf_quant_config.json"), "quantization", "quant_algo")


def _json_key(path: str, *keys: str) -> str:
    """A text in a JSON file, which other tools wrote; empty if there is none."""
    try:
        value = json.loads(_text(path))
    except (ValueError, RecursionError):
        return ""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, str) else ""


def some(values: list[str]) -> str:
    """The first of them, and how many more."""
    return ", ".join(map(str, values[:5])) + (
        f" and {len(values) - 5} more" if len(values) > 5 else ""
    )
