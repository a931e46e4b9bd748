"""Checkpoints that are folders, and what programs find in them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from know_cli.checkpoints import Checkpoint, open_checkpoint
from know_cli.errors import CheckpointError

INDEX = "model.safetensors.index.json"
#: Which files a folder's six tensors are in; an index that names them where there are several.
LAYOUTS: dict[str, list[str]] = {
    "nothing": [],
    "one file": ["model.safetensors"],
    "one file with an index": ["model.safetensors", "index"],
    "two shards": [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)] + ["index"],
    "three shards": [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)] + ["index"],
    "odd names": ["a.safetensors", "model.b.safetensors", "index"],
}


def shards(folder: Path, count: int = 2) -> Path:
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for number in range(count):
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        save_file({f"layer{number}.weight": torch.full((3,), float(number))}, folder / name)
        weight_map[f"layer{number}.weight"] = name
    index = {"metadata": {"total_size": 12 * count}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def values(checkpoint: Checkpoint, name: str) -> list[float]:
    entry = checkpoint.tensors[name]
    out = torch.empty(entry.info.elements)
    checkpoint.read_into(entry, 0, memoryview(out.view(torch.uint8).numpy()))
    return out.tolist()


def model(folder: Path, layout: str, value: float, config: float | None = None) -> Path:
    """A folder whose tensors are all of one value, which its configuration tells, too."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model": value if config is None else config}))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("a b c")
    shards = [name for name in LAYOUTS[layout] if name != "index"]
    held = {
        name: [f"layer{n}.weight" for n in range(number, 6, len(shards))]
        for number, name in enumerate(shards)
    }
    for name, tensors in held.items():
        save_file({tensor: torch.full((2,), value) for tensor in tensors}, folder / name)
    if shards != LAYOUTS[layout]:
        weight_map = {tensor: name for name, tensors in held.items() for tensor in tensors}
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def seen_by_us(folder: Path) -> set[float]:
    """Values of the tensors that this program finds; none where it refuses."""
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as error:
        assert str(folder) in str(error)  # noqa: PT017
        return set()
    with checkpoint:
        assert len(checkpoint.tensors) == 6
        return {value for name in checkpoint.tensors for value in values(checkpoint, name)}


def seen_by_transformers(folder: Path) -> set[float]:
    """The same by the rules of transformers' ``from_pretrained``: a single file, else the index.

    See ``_get_resolved_checkpoint_files`` in its modeling_utils.py.
    """
    try:
        if (folder / "model.safetensors").is_file():
            tensors = load_file(folder / "model.safetensors")
        else:
            weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
            tensors = {}
            for shard in sorted(set(weight_map.values())):
                tensors |= load_file(folder / shard)
    except FileNotFoundError:
        return set()
    assert len(tensors) == 6
    return {value for tensor in tensors.values() for value in tensor.tolist()}


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
