"""Files of torch.save, good and bad ones, and what is read of them."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from know_cli.checkpoints.pickle_data import copy_data, problem_of
from know_cli.checkpoints.state_search import find_state
from know_cli.checkpoints.torch_files import open_torch_file
from know_cli.errors import (
    CheckpointError,
)


class Malice:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


def legacy(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def zipped(root: str = "archive/", /, **files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(root + name, content)
    return buffer.getvalue()


def repacked(content: bytes, compression: int = zipfile.ZIP_STORED, **changed: bytes) -> bytes:
    """A zip archive written again, with records added or replaced by the ends of their names."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(buffer, "w", compression) as new,
    ):
        for name in old.namelist():
            end = name.rpartition("/")[2].replace(".", "_")
            new.writestr(name, changed.pop(end) if end in changed else old.read(name))
        for end, data in changed.items():
            new.writestr(f"archive/{end.replace('_', '.')}", data)
    return buffer.getvalue()


def program(*steps: bytes) -> bytes:
    """A file of torch.save whose pickle was written by hand."""
    return repacked(saved({"w": torch.ones(2)}), data_pkl=b"\x80\x02" + b"".join(steps) + b".")


def tensor(**changed: object) -> bytes:
    """{"w": a tensor of four elements} with something else in its description."""
    items = {"elements": 4, "offset": 0, "shape": (4,), "strides": (1,), "key": "0", **changed}
    content = saved({"w": torch.arange(4.0)})
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        pickled = archive.read("archive/data.pkl")
    # ('storage', FloatStorage, '0', 'cpu', 4), 0, (4,), (1,), …
    at = pickled.index(b"X\x01\x00\x00\x000")
    end = pickled.index(b"K\x01\x85") + 3
    flat = {key: pickle.dumps(value, 2)[2:-1] for key, value in items.items()}
    head, _, _ = pickled.partition(pickled[at:end])
    middle = flat["key"] + b"X\x03\0\0\0cpu" + flat["elements"] + b"tQ"
    rest = flat["offset"] + flat["shape"] + flat["strides"]
    return repacked(content, data_pkl=head + middle + rest + pickled[end:])


def read(path: Path) -> dict[str, bytes]:
    """The data of the tensors that would be converted, without a file being written."""
    found: dict[str, bytearray] = {}

    class Sink:
        def write(self, name: str, offset: int, data: memoryview) -> None:
            place = found.setdefault(name, bytearray())
            place.extend(bytes(max(offset - len(place), 0)))  # what comes later
            place[offset : offset + data.nbytes] = data

    with open_torch_file(path) as file:
        tensors = find_state(path, file.content()).tensors
        for problem in filter(None, (problem_of(file, tensor) for tensor in tensors.values())):
            raise CheckpointError(f"{path}: {problem}")
        copy_data(file, tensors, Sink())
    return {name: bytes(data) for name, data in found.items()}


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
