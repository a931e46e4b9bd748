"""How libraries name the weights in a folder: :data:`LAYOUTS`, the one table of them.

A model in a folder is one file, ``STEM.safetensors``, or shards,
``STEM-00001-of-00002.safetensors``, mostly with an index, ``STEM.safetensors.index.json``. A
variant of it (``fp16``) stands before the last suffix: ``STEM.fp16.safetensors``,
``STEM.fp16-00001-of-00002.safetensors``, ``STEM.safetensors.index.fp16.json``. Here names are
read, and nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from know_cli.checkpoints.json_text import MAX_BYTES
from know_cli.errors import CheckpointError, quoted
from know_cli.files import read_text

SUFFIX = ".safetensors"

#: What the weights' files are called before the suffix. Where a folder has weights under several
#: of these names, the first is read.
LAYOUTS = (
    "model",  # transformers, timm, accelerate, MLX and most others
    "diffusion_pytorch_model",  # diffusers
    "adapter_model",  # PEFT
    "pytorch_lora_weights",  # diffusers' adapters
    "open_clip_model",
    "open_clip_pytorch_model",
    "consolidated",  # Mistral, Meta
    "pytorch_model",  # scripts that keep the pickle's name
    "adapters",  # MLX's adapters
)

_CONVERT = "make safetensors of it with 'know convert'"
_SAVE = "save it as safetensors with the library that wrote it"
#: Weights in other formats: suffix → what it is, and what to do.
OTHER_FORMATS: dict[str, tuple[str, str]] = {
    ".bin": ("a PyTorch pickle", _CONVERT),
    ".pt": ("a PyTorch pickle", _CONVERT),
    ".pth": ("a PyTorch pickle", _CONVERT),
    ".ckpt": ("a PyTorch pickle", _CONVERT),
    ".h5": ("HDF5", _SAVE),
    ".msgpack": ("Flax", _SAVE),
    ".onnx": ("ONNX", _SAVE),
    ".onnx_data": ("ONNX", _SAVE),  # of a large model all weights are there
    ".gguf": ("GGUF", _SAVE),
    ".keras": ("Keras", _SAVE),
    ".tflite": ("TensorFlow Lite", _SAVE),
    ".ot": ("libtorch, as rust-bert reads it", _SAVE),
}

# What a folder of several models, one a sub-folder, has.
_PIPELINE = "model_index.json"
# A trainer's own state, which is pickled, too.
_STATE = re.compile(r"(?:optimizer|scheduler|scaler|rng_state|random_states|training_args).*")
_SHARD = re.compile(
    r"(?P<stem>.+)-(?P<number>\d{1,6})-of-(?P<count>\d{1,6})(?:\.(?P<variant>[\w-]+))?\.safetensors"
)
_INDEX = re.compile(r"(?P<stem>.+)\.safetensors\.index(?:\.(?P<variant>[\w.-]+))?\.json")
_ANY_INDEX = re.compile(r".+\.index(?:\.[\w-]+)?\.json")
_TEMPORARY = ".know-*.tmp"
_MOST_NAMED = 6
# How far a folder without a model is searched for the one that could be meant.
_DEPTH = 3
_MOST_FOLDERS = 500


@dataclass(frozen=True)
class Model:
    """A model in a folder, by the names of its files.

    Attributes:
        stem: what its files are called, such as ``model``.
        variant: such as ``fp16``; empty for the model without one.
        files: its safetensors files, sorted; none where only the index can say.
        index: the shard index, if it has one.
    """

    stem: str
    variant: str
    files: tuple[str, ...] = ()
    index: str | None = None

    @property
    def single(self) -> str:
        """The one file that a model of this stem and variant is where it has no shards."""
        return f"{self.stem}.{self.variant}{SUFFIX}" if self.variant else self.stem + SUFFIX

    @property
    def place(self) -> tuple[bool, bool, int]:
        """Sorts what is read first before what is read only where there is nothing else."""
        known = self.stem in LAYOUTS
        return not known, bool(self.variant), LAYOUTS.index(self.stem) if known else 0


@dataclass
class _Shards:
    """Shards that belong together by their names: number → name."""

    stem: str
    variant: str
    count: int
    names: dict[int, str] = field(default_factory=dict)

    @property
    def missing(self) -> int:
        """How many there are not; they are counted from 1 or, rarely, from 0."""
        first = 0 if 0 in self.names else 1
        return self.count - sum(first <= number < first + self.count for number in self.names)

    @property
    def first_missing(self) -> str:
        """The name of the first that there is not."""
        first = 0 if 0 in self.names else 1
        number = next(n for n in range(first, first + self.count) if n not in self.names)
        name = min(self.names.values())
        digits = len(_shard(name)["number"])
        start, end = _shard(name).span("number")
        return f"{name[:start]}{number:0{digits}d}{name[end:]}"


def is_index(name: str) -> bool:
    """Whether a file is called as an index of shards is, in whatever format these are."""
    return _ANY_INDEX.fullmatch(name) is not None


def find_model(folder: Path) -> Model:
    """The model that a folder holds.

    Raises:
        CheckpointError: there is none, or several that could be meant; the message says what
            there is, and what to do.
        OSError: the folder cannot be listed.
    """
    names = _names(folder)
    models = _models(names)
    if not models:
        raise CheckpointError(f"{folder}: {_what_is_there(folder, names)}")
    place = min(model.place for model in models)
    best = [model for model in models if model.place == place]
    # An index says what belongs to it, and a single file is whole; shards alone may be left over.
    found = (
        [model for model in best if model.index]
        or [model for model in best if model.files == (model.single,)]
        or best
    )
    if len(found) > 1 or len({(model.stem, model.variant) for model in best}) > 1:
        listing = _listing([model.index or model.files[0] for model in best])
        raise CheckpointError(
            f"{folder}: the folder has several models, none of which goes first: {listing}; name "
            "the file that is meant, or leave one of them in the folder"
        )
    model = found[0]
    is_plain = model.index is not None or model.files == (model.stem + SUFFIX,)
    if not is_plain and any(folder.glob(_TEMPORARY)):
        # An index goes last into its place, and until then its shards, which can have any names,
        # may look like all of a model.
        raise CheckpointError(
            f"{folder}: the folder is being replaced, or a run that did so was killed; predict it "
            "again"
        )
    return model


def has_model(folder: Path) -> bool:
    """Whether a folder holds weights under names that are known."""
    try:
        return bool(_models(_names(folder)))
    except OSError:
        return False


def weights_in(folder: Path) -> list[str]:
    """Names of all files of models in a folder, or of what was one before a run was killed.

    They are in the order in which they can be removed: the model that the folder is read as
    goes after the others, and every index after the shards.
    """
    names = _names(folder)
    models = _models(names)
    last = min((model.place for model in models), default=None)
    others = {name for name in names if _SHARD.fullmatch(name)}
    own: set[str] = set()
    for model in models:
        files = {*model.files, *(_indexed(folder / model.index) if model.index else ())}
        (own if model.place == last else others).update(files)
    weights = [name for name in (*sorted(others - own), *sorted(own)) if name.endswith(SUFFIX)]
    indexes = [name for name in names if _INDEX.fullmatch(name)]
    return [name for name in (*weights, *indexes) if not (folder / name).is_dir()]


def _indexed(index: Path) -> set[str]:
    """The files that an index names, as far as it can be read."""
    try:
        content = json.loads(read_text(index, MAX_BYTES))
        return {name for name in content["weight_map"].values() if Path(name).name == name}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def _models(names: Iterable[str]) -> list[Model]:
    """All models that the names of a folder's files tell of, without incomplete ones."""
    names = list(names)
    models: list[Model] = []
    for name in names:
        index = _INDEX.fullmatch(name)
        if index is not None:
            models.append(Model(*_split(index["stem"], index["variant"]), index=name))
        elif name.endswith(SUFFIX) and not _SHARD.fullmatch(name):
            stem, variant = _split(name.removesuffix(SUFFIX))
            if stem in LAYOUTS:
                models.append(Model(stem, variant, (name,)))
    indexed = {(model.stem, model.variant) for model in models if model.index}
    for shards in _all_shards(names):
        if not shards.missing and (shards.stem, shards.variant) not in indexed:
            files = tuple(sorted(shards.names.values()))
            models.append(Model(shards.stem, shards.variant, files))
    return models


def _all_shards(names: Iterable[str]) -> list[_Shards]:
    sets: dict[tuple[str, str, str], _Shards] = {}
    for name in names:
        if _SHARD.fullmatch(name):
            match = _shard(name)
            stem, variant = _split(match["stem"], match["variant"])
            count = match["count"]
            shards = sets.setdefault((stem, variant, count), _Shards(stem, variant, int(count)))
            shards.names[int(match["number"])] = name
    return list(sets.values())


def _shard(name: str) -> re.Match[str]:
    match = _SHARD.fullmatch(name)
    assert match is not None, name
    return match


def _split(stem: str, variant: str | None = None) -> tuple[str, str]:
    """Stem and variant of ``model.fp16``, where the variant does not stand elsewhere."""
    if variant:
        return stem, variant
    for known in LAYOUTS:
        if stem.startswith(f"{known}."):
            return known, stem.removeprefix(f"{known}.")
    return stem, ""


# ---------------------------------------------------------------------- where there is no model


def _what_is_there(folder: Path, names: Sequence[str]) -> str:
    """Why a folder is no checkpoint: what it holds instead, and what to do about it."""
    start = f"the folder has neither model{SUFFIX} nor other weights by a name that is known"
    for shards in _all_shards(names):
        if shards.missing:
            return (
                f"{start}, but {len(shards.names)} of the {shards.count} shards of one model; "
                f"{shards.first_missing} is missing: download or copy it again"
            )
    single = [name for name in names if name.endswith(SUFFIX)]
    if single:
        return f"{start}, but {_listing(single)}; name the file itself, {folder / single[0]}"
    folders, others = _search(folder)
    if folders:
        what = (
            f"is a pipeline of several models: {_listing(folders)}"
            if _PIPELINE in names
            else f"{start} itself, but these folders in it have: {_listing(folders)}"
        )
        return f"{what}; name one of them for every checkpoint, here {folder / folders[0]}"
    if others:
        kind, advice = OTHER_FORMATS[Path(others[0]).suffix]
        alike = [name for name in others if OTHER_FORMATS[Path(name).suffix] == (kind, advice)]
        return f"{start}, but {_listing(alike)} ({kind}); {advice}"
    what = f"it has {_listing(names)}" if names else "it is empty"
    return f"{start}; {what}; name the checkpoint's folder or file itself"


def _search(folder: Path) -> tuple[list[str], list[str]]:
    """Folders with models in a folder, and files with weights in other formats, by their paths."""
    models: list[str] = []
    others: list[str] = []
    level = [(folder, "")]
    left = _MOST_FOLDERS
    for _ in range(_DEPTH + 1):
        below: list[tuple[Path, str]] = []
        for place, path in level[:left]:
            try:
                names = _names(place)
            except OSError:
                continue
            if path and _models(names):
                models.append(path)
                continue
            for name in names:
                if Path(name).suffix in OTHER_FORMATS and not _STATE.fullmatch(name):
                    others.append(f"{path}/{name}" if path else name)
                elif (place / name).is_dir():
                    below.append((place / name, f"{path}/{name}" if path else name))
        level, left = below, left - len(level)
        if left <= 0:
            break
    return models, others


def _listing(names: Sequence[str]) -> str:
    """At most six names, as they may be shown."""
    more = len(names) - _MOST_NAMED
    shown = ", ".join(quoted(name)[1:-1] for name in names[:_MOST_NAMED])
    return f"{shown} and {more} more" if more > 0 else shown
