"""What a user names in place of a folder with a model: it is found, or one line says what it is and how to
get what is needed."""

import json
import os
import shutil

import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.hf import reader
from deepseek_jax.inference import opener
from deepseek_jax.run import importer
from tests.support.hf_folders import source


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return source(tmp_path_factory.mktemp("source") / "tiny")


def refused(path, tmp_path):
    """The line that loading, importing, init_from and generate say."""
    lines = set()
    for read in (
        reader.open_source,
        lambda p: importer.import_(p, str(tmp_path / "workdir")),
        lambda p: opener.open_model(p),
    ):
        with pytest.raises(UserError) as error:
            read(str(path))
        lines.add(
            str(error.value).replace("holds no model: ", "").replace(": ", " ").replace("  ", " ")
        )
    assert (
        len(lines) == 1
        and "\n" not in (line := lines.pop())
        and not os.path.exists(tmp_path / "workdir")
    )
    assert "Copy that file again" not in line
    return line


def cache(tmp_path, checkpoint, revisions=("0123abc",)):
    """models--org--tiny as huggingface_hub lays it out: snapshots of links to blobs."""
    folder = tmp_path / "hub" / "models--org--tiny"
    (folder / "blobs").mkdir(parents=True)
    for revision in revisions:
        (folder / "snapshots" / revision).mkdir(parents=True)
        for name in os.listdir(checkpoint):
            shutil.copyfile(os.path.join(checkpoint, name), folder / "blobs" / f"{revision}-{name}")
            (folder / "snapshots" / revision / name).symlink_to(f"../../blobs/{revision}-{name}")
    return folder


def test_the_hubs_cache(tmp_path, checkpoint):
    folder = cache(tmp_path, checkpoint)
    opened = reader.open_source(str(folder))[0]
    assert opened.folder == str(folder / "snapshots" / "0123abc") and len(opened.tensors) > 10
    importer.import_(str(folder), str(tmp_path / "w"))
    assert not os.path.islink(tmp_path / "w" / "hf" / "config.json")
    assert "it is the hub's cache. Name one of its folders" in refused(tmp_path / "hub", tmp_path)


def test_several_snapshots(tmp_path, checkpoint):
    folder = cache(tmp_path, checkpoint, ("0123abc", "4567def"))
    assert "holds 2 snapshots 0123abc, 4567def. Name one of them" in refused(folder, tmp_path)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("4567def")
    assert reader.open_source(str(folder))[0].folder.endswith("4567def")
    shutil.rmtree(folder / "snapshots")
    (folder / "snapshots").mkdir()
    assert "holds no snapshot. Download the model again" in refused(folder, tmp_path)


def test_a_hub_id(tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    line = refused("org/tiny", tmp_path)
    assert "org/tiny is not a folder. Nothing is downloaded here" in line
    assert "hf download org/tiny --local-dir tiny" in line
    folder = cache(tmp_path, checkpoint)
    assert f"is in its cache name {folder}" in refused("org/tiny", tmp_path)
    assert "is not a folder. Name one with config.json" in refused("/org/tiny", tmp_path)
    file = os.path.join(checkpoint, "model.safetensors")
    assert f"is not a folder but a file. Name the folder that it is in, {checkpoint}" in refused(
        file, tmp_path
    )


def with_files(tmp_path, checkpoint, *names, config=True):
    folder = tmp_path / "model"
    folder.mkdir()
    if config:
        shutil.copy(os.path.join(checkpoint, "config.json"), folder)
    for name in names:
        (folder / name).write_text("{}")
    return folder


def test_pickles(tmp_path, checkpoint):
    folder = with_files(
        tmp_path, checkpoint, "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"
    )
    line = refused(folder, tmp_path)
    assert "pickles (pytorch_model*.bin)" in line
    assert (
        f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('model-safetensors')" in line
    )


def test_an_adapter(tmp_path, checkpoint):
    folder = with_files(tmp_path, checkpoint, "adapter_model.safetensors", config=False)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    line = refused(folder, tmp_path)
    assert (
        "it holds an adapter of org/base and not a model" in line and "merge_and_unload()" in line
    )
    shutil.copy(os.path.join(checkpoint, "config.json"), folder)
    assert "it holds an adapter of org/base and not a model" in refused(folder, tmp_path)


@pytest.mark.parametrize(
    "file, word",
    [
        ("tiny-Q4_K_M.gguf", "GGUF"),
        ("consolidated.00.pth", "authors' own names"),
        ("tokenizer.json", "model.safetensors is missing, and so is"),
    ],
)
def test_other_weights_and_none(file, word, tmp_path, checkpoint):
    assert word in refused(with_files(tmp_path, checkpoint, file), tmp_path)


def split(tmp_path, checkpoint, index):
    """The checkpoint in three files."""
    import safetensors.numpy

    folder = with_files(tmp_path, checkpoint)
    tensors = safetensors.numpy.load_file(os.path.join(checkpoint, "model.safetensors"))
    files = {name: f"model-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        safetensors.numpy.save_file(
            {n: a for n, a in tensors.items() if files[n] == file}, folder / file
        )
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def test_missing_shards(tmp_path, checkpoint):
    folder = split(tmp_path, checkpoint, index=True)
    os.remove(folder / "model-00002-of-00003.safetensors")
    line = refused(folder, tmp_path)
    assert (
        "names 1 of 3 files that are missing model-00002-of-00003.safetensors. Finish the download"
        in line
    )


def test_a_missing_index(tmp_path, checkpoint):
    """All of the files say what is in them; some of them do not."""
    folder = split(tmp_path, checkpoint, index=False)
    assert reader.open_source(str(folder))[1] == reader.open_source(checkpoint)[1]
    split_, whole = (reader.open_source(str(f))[0].tensors.keys() for f in (folder, checkpoint))
    assert split_ == whole
    os.remove(folder / "model-00003-of-00003.safetensors")
    line = refused(folder, tmp_path)
    assert (
        "holds 2 of 3 safetensors files, and no model.safetensors.index.json; missing are" in line
    )


def test_a_run(tmp_path, checkpoint):
    importer.import_(checkpoint, str(tmp_path / "run"))
    with pytest.raises(
        UserError,
        match="run is the folder of a run of train.py and not a checkpoint. Make "
        "one of it: python -m",
    ):
        reader.open_source(str(tmp_path / "run"))


def test_a_pointer_of_git_lfs(tmp_path, checkpoint):
    folder = with_files(tmp_path, checkpoint)
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
    )
    assert "is a pointer of Git LFS and not the file. Run git lfs pull" in refused(folder, tmp_path)


def test_weights_that_only_a_file_beside_config_json_calls_quantised(tmp_path, checkpoint):
    folder = with_files(tmp_path, checkpoint)
    shutil.copy(os.path.join(checkpoint, "model.safetensors"), folder)
    about = {
        "producer": {"name": "modelopt"},
        "quantization": {"quant_algo": "NVFP4", "group_size": 16},
    }
    (folder / "hf_quant_config.json").write_text(json.dumps(about))
    assert "hf_quant_config.json quant_algo='NVFP4' is not in this version" in refused(
        folder, tmp_path
    )
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": None}}))
    assert reader.open_source(str(folder))[1].vocab_size == 320
