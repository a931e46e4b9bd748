"""Checkpoints as files and as sharded folders."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from know_cli.checkpoints import checkpoint as module
from know_cli.checkpoints import open_checkpoint
from know_cli.checkpoints.open_files import OpenFiles
from know_cli.errors import CheckpointError
from tests.support.folders import shards, values


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.arange(4.0)}, path, {"k": "v"})
    with open_checkpoint(path) as checkpoint:
        assert not checkpoint.is_folder
        assert checkpoint.metadata == {"k": "v"}
        assert checkpoint.nbytes == path.stat().st_size
        assert values(checkpoint, "w") == [0, 1, 2, 3]
        part = bytearray(4)
        checkpoint.read_into(checkpoint.tensors["w"], 8, memoryview(part))
        assert bytes(part) == torch.tensor(2.0).numpy().tobytes()


def test_folder_with_one_file(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.is_folder
        assert values(checkpoint, "w") == [1]


def test_more_shards_than_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_OPEN_FILES", 2)
    with open_checkpoint(shards(tmp_path, 5)) as checkpoint:
        for _ in range(2):
            for number in range(5):
                assert values(checkpoint, f"layer{number}.weight") == [number] * 3
        assert len(checkpoint._files) == 2
    assert len(checkpoint._files) == 0


def test_files_that_are_read_from_stay_open(tmp_path: Path) -> None:
    """Another file of the same number would be read instead."""
    for name in "abc":
        (tmp_path / name).write_text(name)
    files = OpenFiles(1)
    with files.using(tmp_path / "a") as first, files.using(tmp_path / "b") as second:
        with files.using(tmp_path / "c") as third:
            assert [os.pread(one, 1, 0) for one in (first, second, third)] == [b"a", b"b", b"c"]
        assert len(files) == 3
        with files.using(tmp_path / "a") as again:
            assert again == first
    with files.using(tmp_path / "c"), pytest.raises(FileNotFoundError), files.using(tmp_path / "d"):
        pass
    assert len(files) == 1
    files.close()
    assert len(files) == 0


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", 3, "..\\x"]
)
def test_index_must_not_lead_outside(tmp_path: Path, shard: object) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "x.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(CheckpointError, match="bare name"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[]", "no weight_map"), ('{"weight_map": {}}', "no weight_map")],
)
def test_index_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    (shards(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors: no such file"):
        open_checkpoint(tmp_path)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="does not have tensor 'ghost'"):
        open_checkpoint(tmp_path)
    del content["weight_map"]["ghost"]
    index.write_text(json.dumps(content))
    save_file(
        {"layer0.weight": torch.ones(3), "more": torch.ones(1)},
        tmp_path / "model-00001-of-00002.safetensors",
    )
    with pytest.raises(CheckpointError, match="has, against the index, tensor 'more'"):
        open_checkpoint(tmp_path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    shards(tmp_path)
    save_file(
        {"layer0.weight": torch.ones(3), "layer1.weight": torch.ones(3)},
        tmp_path / "model-00002-of-00002.safetensors",
    )
    with pytest.raises(CheckpointError, match="'layer0.weight' is in model-00001"):
        open_checkpoint(tmp_path)


def test_checkpoint_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="has no tensors"):
        open_checkpoint(tmp_path / "a.safetensors")


def test_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.arange(1000.0)}, path)
    with open_checkpoint(path) as checkpoint:
        with path.open("rb+") as file:
            file.truncate(200)
        with pytest.raises(CheckpointError, match="'w': the file has become shorter"):
            values(checkpoint, "w")


def test_file_that_vanishes_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.arange(10.0)}, path)
    with open_checkpoint(path) as checkpoint:
        path.unlink()
        with pytest.raises(CheckpointError, match="no such file"):
            values(checkpoint, "w")
