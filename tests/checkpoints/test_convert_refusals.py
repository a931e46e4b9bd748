"""Folders, indexes and outputs that ``know convert`` refuses, with what it says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from know_cli.errors import EXIT_CHECKPOINT, EXIT_DONE, EXIT_OUTPUT, EXIT_USAGE
from tests.support.command import Command, one_line
from tests.support.pickles import names


def _fill(folder: Path) -> None:
    """Folders that cannot be converted, each with its reason."""
    weights = {"w": torch.ones(2)}
    for name in ("ready", "formats", "own", "nothing", "two", "pipeline/unet", "link", "hole",
                 "wrong", "double", "index", "both", "parallel", "extra", "twins", "half", "base"):  # fmt: skip
        (folder / name).mkdir(parents=True)
    save_file(weights, folder / "ready" / "model.safetensors")
    for name in ("tf_model.h5", "flax_model.msgpack", "model.onnx", "model.gguf"):
        (folder / "formats" / name).write_text("x")
    for name in ("own/last.ckpt", "two/pytorch_model.bin", "two/pytorch_model.fp16.bin",
                 "pipeline/unet/diffusion_pytorch_model.bin", "outside.bin", "both/pytorch_model.bin",
                 "hole/pytorch_model-00001-of-00003.bin", "hole/pytorch_model-00003-of-00003.bin",
                 "double/pytorch_model-00001-of-00002.bin", "double/pytorch_model-00002-of-00002.bin",
                 "wrong/a.bin", "parallel/consolidated.00.pth", "parallel/consolidated.01.pth",
                 "extra/pytorch_model-00001-of-00001.bin", "extra/pytorch_model-00002-of-00001.bin"):  # fmt: skip
        torch.save(weights, folder / name)
    (folder / "pipeline" / "model_index.json").write_text("{}")
    (folder / "link" / "pytorch_model.bin").symlink_to("../outside.bin")
    save_file(weights, folder / "both" / "model.safetensors")
    torch.save(weights, folder / "half" / "pytorch_model.bin")
    _index(folder / "half" / "model.safetensors.index.json", {})
    torch.save(weights, folder / "base" / "pytorch_model-00001-of-00001.bin")
    save_file(weights, folder / "base" / "model.safetensors")
    torch.save({"w": torch.ones(1)}, folder / "twins" / "x.bin")
    torch.save({"w": torch.ones(1)}, folder / "twins" / "x.pt")
    torch.save(weights, folder / "same.pt")
    (folder / "other").mkdir()
    torch.save(weights, folder / "other" / "same.bin")


def _index(path: Path, content: object) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text)


REFUSED: dict[str, tuple[str, int, str]] = {
    "safetensors": ("ready -o out", EXIT_CHECKPOINT, "ready: has model.safetensors, which needs no converting"),
    "other formats": ("formats -o out", EXIT_CHECKPOINT, "has no pickles of PyTorch, but flax_model.msgpack (msgpack, as Flax writes it), model.gguf (GGUF), model.onnx (ONNX), tf_model.h5 (HDF5, as Keras and TensorFlow write it)"),
    "names of their own": ("own -o out", EXIT_CHECKPOINT, "has no pytorch_model.bin or the like, but last.ckpt; name the file"),
    "nothing": ("nothing -o out", EXIT_CHECKPOINT, "nothing: has no pytorch_model.bin or the like; give a file"),
    "two models": ("two -o out", EXIT_CHECKPOINT, "holds more than one model: 'pytorch_model.bin', 'pytorch_model.fp16.bin'; name the one"),
    "a pipeline": ("pipeline -o out", EXIT_CHECKPOINT, "has its models in folders of their own (unet); convert them one by one"),
    "a link out": ("link -o out", EXIT_CHECKPOINT, "link/pytorch_model.bin: is a link that leads out of the folder"),
    "a missing shard": ("hole -o out", EXIT_CHECKPOINT, "pytorch_model-00002-of-00003.bin: no such file; a model is converted with all its shards"),
    "a shard too many": ("extra -o out", EXIT_CHECKPOINT, "pytorch_model-00002-of-00001.bin: is one shard too many"),
    "missing shards by name": ("hole/pytorch_model-00001-of-00003.bin hole/pytorch_model-00003-of-00003.bin -o out", EXIT_CHECKPOINT, "00002-of-00003.bin: no such file"),
    "one tensor in two shards": ("double -o out", EXIT_CHECKPOINT, "tensor 'w' is in pytorch_model-00001-of-00002.bin as well"),
    "converted before": ("both -o out", EXIT_CHECKPOINT, "both: has model.safetensors already, which needs no converting"),
    "converted into shards": ("half -o out", EXIT_CHECKPOINT, "half: has model.safetensors.index.json already"),
    "converted into one": ("base -o out", EXIT_CHECKPOINT, "base: has model.safetensors already"),
    "parts of tensors": ("parallel -o out", EXIT_CHECKPOINT, "holds the parts of one model, whose tensors are cut for several devices: 'consolidated.00.pth', 'consolidated.01.pth'; put it together"),
    "a folder to a file": ("two -o out.safetensors", EXIT_OUTPUT, "is named as a file, but the output is a folder"),
    "several to a file": ("same.pt own/last.ckpt -o out.safetensors", EXIT_OUTPUT, "is named as a file, but the output is a folder"),
    "several to one that is there": ("same.pt own/last.ckpt -o outside.bin", EXIT_OUTPUT, "is a file"),
    "one name": ("same.pt other/same.bin -o out", EXIT_USAGE, "would become same.safetensors, as same.pt does"),
    "nobody": ("same.pt nobody.pt -o out", EXIT_CHECKPOINT, "nobody.pt: no such file or folder"),
    "no folder to be in": ("same.pt own/last.ckpt -o no/out", EXIT_OUTPUT, "mkdir -p no"),
    "a JSON file": ("pipeline/model_index.json -o out", EXIT_CHECKPOINT, "is no shard index: it has no weight_map"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, tmp_path: Path, know: Command) -> None:
    _fill(tmp_path)
    before = names(tmp_path)
    arguments, code, message = REFUSED[case]
    done = know("convert", *arguments.split(), cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in one_line(done.stderr)
    assert names(tmp_path) == before


INDEXES: dict[str, tuple[object, str]] = {
    "no JSON": ("{", "is not valid JSON; download it again"),
    "no map": ({"metadata": {}}, "is no shard index: it has no weight_map"),
    "a list": ([], "is no shard index"),
    "of safetensors": ({"weight_map": {"w": "model.safetensors"}}, "is the index of safetensors files"),
    "a path": ({"weight_map": {"w": "../a.bin"}}, "'../a.bin' is not the bare name of a .bin file in the folder; refused"),
    "no name": ({"weight_map": {"w": 7}}, "7 is not the bare name"),
    "another suffix": ({"weight_map": {"w": "a.txt"}}, "'a.txt' is not the bare name"),
    "a shard that is not there": ({"weight_map": {"w": "b.bin"}}, "b.bin: no such file"),
    "a tensor that is not there": ({"weight_map": {"w": "a.bin", "v": "a.bin"}}, "tensor 'v' is in none of the shards, but a.bin by the index; index and shards are not of one checkpoint"),
    "a tensor that it does not have": ({"weight_map": {"x": "a.bin"}}, "tensor 'w' is in a.bin, but not in the index"),
    "twins": ({"weight_map": {"w": "a.bin", "v": "a.pt"}}, "has shards that differ only in their suffix"),
}  # fmt: skip


@pytest.mark.parametrize("by", ["folder", "index"])
@pytest.mark.parametrize("case", INDEXES)
def test_indexes_that_are_refused(case: str, by: str, tmp_path: Path, know: Command) -> None:
    content, message = INDEXES[case]
    (tmp_path / "in").mkdir()
    shard = (
        {"w": torch.ones(1)} if "does not" not in case else {"w": torch.ones(1), "x": torch.ones(1)}
    )
    torch.save(shard, tmp_path / "in" / "a.bin")
    _index(tmp_path / "in" / "pytorch_model.bin.index.json", content)
    given = "in" if by == "folder" else "in/pytorch_model.bin.index.json"
    done = know("convert", given, "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT, done.stderr
    assert message in one_line(done.stderr)
    assert not (tmp_path / "out").exists()


def test_inputs_are_never_overwritten(tmp_path: Path, know: Command) -> None:
    (tmp_path / "in").mkdir()
    torch.save({"w": torch.ones(1)}, tmp_path / "in" / "pytorch_model.bin")
    done = know("convert", "in", "-o", "in", "--force", cwd=tmp_path)
    assert done.returncode == EXIT_OUTPUT
    assert "in: is the input in; an input is never overwritten" in one_line(done.stderr)
    # The output's file is another name of the input.
    (tmp_path / "out").mkdir()
    os.link(tmp_path / "in" / "pytorch_model.bin", tmp_path / "out" / "model.safetensors")
    done = know("convert", "in", "-o", "out", "--force", cwd=tmp_path)
    assert "out/model.safetensors: is the input" in one_line(done.stderr)
    assert torch.load(tmp_path / "in" / "pytorch_model.bin", weights_only=True)["w"] == 1
    # So is one of several outputs, of another input.
    for name in "ab":
        torch.save({"w": torch.ones(1)}, tmp_path / f"{name}.pt")
    os.link(tmp_path / "a.pt", tmp_path / "b.safetensors")
    done = know("convert", "a.pt", "b.pt", "-o", ".", "--force", cwd=tmp_path)
    assert done.returncode == EXIT_OUTPUT
    assert "b.safetensors: is the input" in one_line(done.stderr)
    assert not (tmp_path / "a.safetensors").exists()


def test_an_index_of_other_weights_is_not_taken_along(tmp_path: Path, know: Command) -> None:
    """It would be taken for the new file's, and name shards that are not there."""
    (tmp_path / "in").mkdir()
    torch.save({"w": torch.ones(1)}, tmp_path / "in" / "adapter_model.bin")
    save_file({"w": torch.ones(1)}, tmp_path / "in" / "model-00001-of-00001.safetensors")
    weight_map = {"w": "model-00001-of-00001.safetensors"}
    _index(tmp_path / "in" / "model.safetensors.index.json", {"weight_map": weight_map})
    done = know("convert", "in", "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert names(tmp_path / "out") == ["adapter_model.safetensors"]
    assert "in/model-00001-of-00001.safetensors: left out" in done.stderr


def test_an_index_with_a_name_of_its_own(tmp_path: Path, know: Command) -> None:
    (tmp_path / "in").mkdir()
    torch.save({"w": torch.ones(1)}, tmp_path / "in" / "a.bin")
    _index(tmp_path / "in" / "shards.json", {"weight_map": {"w": "a.bin"}})
    done = know("convert", "in/shards.json", "-o", "out", cwd=tmp_path)
    assert "is not called as shard indexes are" in one_line(done.stderr)
