"""Which pickles of a folder make up its model, and what their safetensors files are called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from know_cli.checkpoints.checkpoint import is_inside
from know_cli.checkpoints.header import unreadable
from know_cli.checkpoints.json_text import MAX_BYTES, BadJsonError, is_unicode, parse_json
from know_cli.checkpoints.layouts import SUFFIX
from know_cli.errors import CheckpointError, quoted
from know_cli.files import read_bytes

_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\.[\w.-]+)")
_INDEX = re.compile(
    r"(?P<stem>.+)(?P<suffix>\.(bin|pt|pth|ckpt))\.index(?P<variant>\.[\w-]+)?\.json"
)
_AN_INDEX = re.compile(r"\.index(\.[\w-]+)?\.json$")
# What libraries call the weights of a folder, perhaps with a variant such as ".fp16"; other
# pickles are states of optimizers, arguments of trainers, and the like.
_WEIGHTS = re.compile(
    r"(pytorch_model|diffusion_pytorch_model|adapter_model|open_clip_pytorch_model)"
    r"(\.[\w-]+)?\.bin|consolidated(\.\d\d)?\.pth"
)
# Meta's, one for each device: every tensor is cut, so that none of them is a model.
_PART = re.compile(r"consolidated\.\d\d\.pth")
# Names whose safetensors form is another.
_RENAMED = (
    ("open_clip_pytorch_model", "open_clip_model"),
    ("pytorch_model", "model"),
    ("consolidated.00", "consolidated"),
)
_OTHER_FORMATS = {
    ".h5": "HDF5, as Keras and TensorFlow write it",
    ".keras": "Keras",
    ".onnx": "ONNX",
    ".msgpack": "msgpack, as Flax writes it",
    ".gguf": "GGUF",
    ".pb": "TensorFlow",
    ".tflite": "TensorFlow Lite",
    ".npz": "NumPy",
}
_MAX_LISTED = 5


@dataclass(frozen=True)
class PickleModel:
    """The pickles that make up one model.

    Attributes:
        files: each pickle, and the name of the safetensors file that is made of it.
        index: the shard index of the pickles, if they have one.
        index_name: name of the shard index to write; empty for a single file.
        shards: tensor → name of its pickle, as the index has it.
        metadata: of the index.
    """

    files: dict[Path, str]
    index: Path | None = None
    index_name: str = ""
    shards: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


def find_model(folder: Path) -> PickleModel:
    """The one model that a folder holds as pickles.

    Raises:
        CheckpointError: there is none, or more than one; the message names what there is.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        files = [path for path in paths if path.is_file() or path.is_symlink()]
    except OSError as error:
        raise unreadable(folder, error) from error
    models = [read_index(path) for path in files if _INDEX.fullmatch(path.name)]
    in_index = {path for model in models for path in model.files}
    rest = [path for path in files if path not in in_index]
    models += [
        PickleModel({path: safetensors_name(path.name)})
        for path in rest
        if _WEIGHTS.fullmatch(path.name) and not _SHARD.fullmatch(path.name)
    ]
    models += [
        _complete(shards)
        for (_, stem, _, end), shards in _sets(rest).items()
        if _WEIGHTS.fullmatch(stem + end)
    ]
    if len(models) > 1:
        names = ", ".join(quoted(_first(model).name) for model in models)
        if all(_PART.fullmatch(_first(model).name) for model in models):
            raise CheckpointError(
                f"{folder}: holds the parts of one model, whose tensors are cut for several "
                f"devices: {names}; put it together with the program that it was written for, and "
                "save it whole"
            )
        raise CheckpointError(
            f"{folder}: holds more than one model: {names}; name the one that is meant, the file "
            "or the index"
        )
    if not models:
        raise CheckpointError(f"{folder}: {_what_there_is(paths)}")
    (model,) = models
    for path in (*model.files, *([model.index] if model.index else [])):
        if not is_inside(path, folder):
            raise CheckpointError(
                f"{path}: is a link that leads out of the folder; refused; copy the file to its "
                "place if it is meant"
            )
    for name in _safetensors_of(model):
        if (folder / name).exists():
            raise CheckpointError(
                f"{folder}: has {name} already, which needs no converting; name the pickle itself "
                "if it is meant"
            )
    return model


def read_index(index: Path) -> PickleModel:
    """The model that a shard index of pickles describes.

    Raises:
        CheckpointError: it is no such index, or damaged; shards must be bare names of files
            beside it.
    """
    match = _INDEX.fullmatch(index.name)
    try:
        if not index.is_file():
            raise CheckpointError(f"{index}: is not a file")
        if index.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{index}: is too long for a shard index")
        content = parse_json(read_bytes(index, MAX_BYTES))
    except OSError as error:
        raise unreadable(index, error) from error
    except BadJsonError as error:
        raise CheckpointError(f"{index}: {error}; download it again") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: is no shard index: it has no weight_map; name the folder, a file of "
            "torch.save, or its index"
        )
    for name, shard in weight_map.items():
        if isinstance(shard, str) and shard.endswith(SUFFIX):
            raise CheckpointError(
                f"{index}: is the index of safetensors files, which need no converting"
            )
        if not isinstance(shard, str) or not _is_bare_name(shard):
            raise CheckpointError(
                f"{index}: tensor {quoted(name)}: {quoted(shard)} is not the bare name of a "
                f"{_SUFFIXES[0]} file in the folder; refused"
            )
    if match is None:
        raise CheckpointError(
            f"{index}: is not called as shard indexes are, such as pytorch_model.bin.index.json"
        )
    names = sorted(set(weight_map.values()))
    metadata = content.get("metadata")
    return PickleModel(
        _targets([index.parent / name for name in names]),
        index,
        _renamed(match["stem"]) + f"{SUFFIX}.index{match['variant'] or ''}.json",
        weight_map,
        metadata if isinstance(metadata, dict) else {},
    )


def shards_of(paths: Sequence[Path]) -> PickleModel | None:
    """The model that several files are the shards of; None if their names do not say so.

    Raises:
        CheckpointError: they say so, but one is missing.
    """
    sets = _sets(paths)
    if len(sets) != 1 or sum(map(len, sets.values())) < len(paths):
        return None
    return _complete(next(iter(sets.values())))


def safetensors_name(name: str) -> str:
    """What a pickle's safetensors form is called, by the custom of its library.

    >>> safetensors_name("pytorch_model-00001-of-00002.bin"), safetensors_name("run.pth.tar")
    ('model-00001-of-00002.safetensors', 'run.safetensors')
    """
    name = name.removesuffix(".tar")
    for suffix in (*_SUFFIXES, ".pkl"):
        name = name.removesuffix(suffix)
    return _renamed(name) + SUFFIX


def _renamed(stem: str) -> str:
    for before, after in _RENAMED:
        if stem.startswith(before):
            return after + stem.removeprefix(before)
    return stem


def _is_bare_name(shard: str) -> bool:
    """Whether a shard's name cannot lead anywhere but to a pickle in the folder."""
    plain = is_unicode(shard) and not any(mark in shard for mark in "/\\\0")
    return plain and shard.endswith(_SUFFIXES) and not shard.startswith(".")


def _targets(paths: Iterable[Path]) -> dict[Path, str]:
    targets = {path: safetensors_name(path.name) for path in paths}
    if len(set(targets.values())) < len(targets):
        raise CheckpointError(
            f"{next(iter(targets)).parent}: has shards that differ only in their suffix; rename "
            "them"
        )
    return targets


def _sets(paths: Iterable[Path]) -> dict[tuple[Path, str, str, str], dict[int, Path]]:
    """Shards by what they have in common: folder, stem, count, end of the name."""
    found: dict[tuple[Path, str, str, str], dict[int, Path]] = {}
    for path in paths:
        match = _SHARD.fullmatch(path.name)
        if match is not None and match["end"].endswith(_SUFFIXES):
            key = (path.parent, match["stem"], match["count"], match["end"])
            found.setdefault(key, {})[int(match["number"])] = path
    return found


def _complete(shards: dict[int, Path]) -> PickleModel:
    """A model of shards without an index, if all of them are there."""
    first = next(iter(shards.values()))
    match = _SHARD.fullmatch(first.name)
    assert match is not None, "it was found by that pattern"
    count = int(match["count"])
    missing = sorted(set(range(1, count + 1)) - shards.keys())
    if missing or len(shards) > count:
        number = f"{missing[0] if missing else max(shards):05d}"
        raise CheckpointError(
            f"{first.parent}: {match['stem']}-{number}-of-{match['count']}{match['end']}: "
            f"{'no such file' if missing else 'is one shard too many'}; a model is converted with "
            "all its shards"
        )
    # A variant, such as ".fp16", stands before the number or after it, and at an index's end.
    stem, dot, before = match["stem"].partition(".")
    variant = f"{dot}{before}{Path(match['end']).stem if match['end'].count('.') > 1 else ''}"
    return PickleModel(
        _targets(shards[number] for number in sorted(shards)),
        None,
        f"{_renamed(stem)}{SUFFIX}.index{variant}.json",
    )


def _safetensors_of(model: PickleModel) -> list[str]:
    """Names of the files that hold the model as safetensors, whole or in shards."""
    names = list(model.files.values())
    if model.index_name:
        return [*names, model.index_name, _AN_INDEX.sub("", model.index_name)]
    return [*names, f"{names[0]}.index.json"]


def _first(model: PickleModel) -> Path:
    return model.index or next(iter(model.files))


def _what_there_is(paths: Sequence[Path]) -> str:
    """Why a folder cannot be converted, from what lies in it."""
    names = [path.name for path in paths if path.is_file()]
    ready = [name for name in names if name.endswith((SUFFIX, f"{SUFFIX}.index.json"))]
    if ready:
        return f"has {ready[0]}, which needs no converting"
    models = [
        path.name
        for path in paths
        if path.is_dir() and any(_WEIGHTS.fullmatch(one.name) for one in path.glob("*"))
    ]
    if models:
        return (
            f"has its models in folders of their own ({_list(models)}); convert them one by one, "
            "or all with -o FOLDER"
        )
    pickles = [name for name in names if name.endswith((*_SUFFIXES, ".tar", ".pkl"))]
    if pickles:
        return (
            f"has no pytorch_model.bin or the like, but {_list(pickles)}; name the file that is "
            "meant itself"
        )
    others = [
        f"{name} ({_OTHER_FORMATS[Path(name).suffix]})"
        for name in names
        if Path(name).suffix in _OTHER_FORMATS
    ]
    if others:
        return f"has no pickles of PyTorch, but {_list(others)}, which are not converted"
    return "has no pytorch_model.bin or the like; give a file of torch.save, or a folder with one"


def _list(names: Sequence[str]) -> str:
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
