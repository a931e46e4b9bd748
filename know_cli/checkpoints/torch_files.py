"""Files of ``torch.save``: what is in them, and the bytes of their storages.

Two forms are read: the zip archive that PyTorch has written since version 1.6, with a pickle and
a record for each storage in it, and the one before, five pickles with the storages behind them.
What a storage claims to have is compared with what there is; compressed records are inflated,
and the checksums that the archive has are checked.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from know_cli.checkpoints.header import START_BYTES, Stamp, known_as, unreadable
from know_cli.checkpoints.pickle_names import ForbiddenError, PickleError, Storage
from know_cli.checkpoints.unpickling import MAX_PICKLE_BYTES, unpickle
from know_cli.errors import CheckpointError, quoted
from know_cli.files import open_file

_ZIP = b"PK\x03\x04"
_PICKLES = tuple(b"\x80%c" % protocol for protocol in range(2, 6))
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_COUNT = struct.Struct("<q")
_READ_BYTES = 8 << 20


class TorchFile(Protocol):
    """An open file of ``torch.save``.

    Attributes:
        path: the file.
        stamp: tells whether it has changed.
    """

    path: Path
    stamp: Stamp

    def content(self) -> Any:
        """What was saved, in stand-ins; see :mod:`~know_cli.checkpoints.pickle_names`."""

    def check(self, storage: Storage) -> str:
        """What is wrong with a storage's size; empty if nothing is."""

    def pieces(self, storage: Storage) -> Iterator[bytes]:
        """The bytes of a storage, in pieces of some megabytes.

        Raises:
            CheckpointError: they are not what was written.
        """


@contextmanager
def open_torch_file(path: Path) -> Iterator[TorchFile]:
    """Open a file of ``torch.save``, of which nothing but data is read.

    Raises:
        CheckpointError: it is missing, damaged, or something else, which the message names.
    """
    try:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "no such file"
            raise CheckpointError(f"{path}: {what}; give a file that torch.save wrote")
        with open_file(path) as file:
            start = file.read(START_BYTES)
            file.seek(0)
            with _readable(path):
                opened: TorchFile
                if start.startswith(_ZIP):
                    opened = _Archive(path, file)
                elif start.startswith(_PICKLES):
                    opened = _Legacy(path, file)
                else:
                    raise CheckpointError(f"{path}: {_what_it_is(path, start)}")
            yield opened
    except OSError as error:
        raise unreadable(path, error) from error


def _what_it_is(path: Path, start: bytes) -> str:
    if not start:
        return "is empty; download or save it again"
    if start[8:9] == b"{":
        return "looks like a safetensors file, which needs no converting"
    wanted = "a file of torch.save"
    what = known_as(start, path.stat().st_size, wanted) or f"is not {wanted}"
    return f"{what}; nothing was read of it"


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Tell in one line what keeps a file from being read."""
    try:
        yield
    except (CheckpointError, MemoryError, OSError):
        raise
    except ForbiddenError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors: loading it would run {quoted(str(error))}, and a "
            "pickle can run any code that way; refused; if you trust it, save its state_dict() "
            "alone"
        ) from error
    except PickleError as error:
        raise CheckpointError(f"{path}: {error}; download or save it again") from error
    except Exception as error:
        # A damaged archive fails in many ways, none of which is this program's.
        text = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: is damaged, or no checkpoint ({type(error).__name__}: {text}); download or "
            "save it again"
        ) from error


class _Archive:
    """The zip form: ``NAME/data.pkl``, and a record ``NAME/data/KEY`` for each storage."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.stamp = Stamp.of(os.fstat(file.fileno()))
        self._zip = zipfile.ZipFile(file)
        entries = self._zip.infolist()
        self._records = {entry.filename: entry for entry in entries}
        if len(self._records) < len(entries):
            raise PickleError("is damaged: it has two records of one name")
        self._root = self._find_root()
        if self._root + "constants.pkl" in self._records:
            raise CheckpointError(
                f"{path}: is a TorchScript archive, which is a program; load it with "
                "torch.jit.load and save its state_dict()"
            )
        # torch.serialization.set_crc32_options(False) leaves them all at zero.
        if not any(entry.CRC for entry in entries):
            for entry in entries:
                del entry.CRC
        if self._byte_order() == b"big":
            raise CheckpointError(
                f"{path}: was written on a machine with the other order of bytes; load it there "
                "and save it as safetensors"
            )

    def _byte_order(self) -> bytes:
        order = self._records.get(self._root + "byteorder")
        if order is None:
            return b""
        with self._zip.open(order) as record:  # which can be of any length
            return record.read(8)

    def _find_root(self) -> str:
        roots = [
            name.removesuffix("data.pkl")
            for name in self._records
            if name.endswith("/data.pkl") and name.count("/") == 1
        ]
        if len(roots) == 1:
            return roots[0]
        raise CheckpointError(f"{self.path}: {_other_archive(list(self._records))}")

    def content(self) -> Any:
        with _readable(self.path):
            entry = self._records[self._root + "data.pkl"]
            if entry.file_size > MAX_PICKLE_BYTES:
                raise PickleError(
                    f"has a pickle of {entry.file_size} bytes, of {MAX_PICKLE_BYTES} that are read"
                )
            return unpickle(io.BytesIO(self._zip.read(entry)), entry.file_size)

    def check(self, storage: Storage) -> str:
        entry = self._records.get(f"{self._root}data/{storage.key}")
        if entry is None:
            return f"its data, record {quoted(storage.key)}, are not in the file"
        return _compared(storage, entry.file_size)

    def pieces(self, storage: Storage) -> Iterator[bytes]:
        with _readable(self.path):
            entry = self._records[f"{self._root}data/{storage.key}"]
            with self._zip.open(entry) as record:
                yield from _pieces(record, entry.file_size)
                record.read(1)  # at its end the checksum is compared


def _compared(storage: Storage, nbytes: int) -> str:
    if storage.nbytes == nbytes:
        return ""
    return (
        f"its storage claims {storage.nbytes} bytes, and the record of it has {nbytes}; the file "
        "is damaged"
    )


def _pieces(file: Any, nbytes: int) -> Iterator[bytes]:
    left = nbytes
    while left:
        piece = file.read(min(left, _READ_BYTES))
        if not piece:
            raise PickleError("is cut short")
        left -= len(piece)
        yield piece


def _other_archive(names: list[str]) -> str:
    if "model.weights.h5" in names:
        return "is a Keras file, not a file of torch.save; nothing was read of it"
    if names and all(name.endswith(".npy") for name in names):
        return "is a NumPy archive, not a file of torch.save; nothing was read of it"
    return "is damaged, or no checkpoint: a zip archive without the one pickle of torch.save"


class _Legacy:
    """The form before version 1.6: magic number, version, machine, content, keys; storages."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.stamp = Stamp.of(os.fstat(file.fileno()))
        self._file = file
        storages: dict[str, Storage] = {}
        if self._pickle(storages) != _MAGIC:
            raise PickleError(
                "is a pickle, but none of torch.save; if you trust it, load it and save its "
                "tensors with torch.save"
            )
        version, machine, self._content, keys = (self._pickle(storages) for _ in range(4))
        if version != _PROTOCOL or not isinstance(machine, dict) or not isinstance(keys, list):
            raise PickleError("is damaged: it does not begin as files of torch.save do")
        if machine.get("little_endian") is not True:
            raise PickleError("was written on a machine with the other order of bytes")
        self._records = self._find_records(keys, storages)

    def _pickle(self, storages: dict[str, Storage]) -> Any:
        return unpickle(self._file, self.stamp.file_bytes - self._file.tell(), storages)

    def _find_records(
        self, keys: list[Any], storages: dict[str, Storage]
    ) -> dict[str, tuple[int, int]]:
        """Key → first byte in the file and size: each has its number of elements before it."""
        found: dict[str, tuple[int, int]] = {}
        position = self._file.tell()
        for key in keys:
            if not isinstance(key, str) or key not in storages or key in found:
                raise PickleError("is damaged: it lists data that no tensor has")
            self._file.seek(position)
            start = self._file.read(_COUNT.size)
            if len(start) < _COUNT.size:
                raise PickleError("is cut short")
            nbytes = _COUNT.unpack(start)[0] * storages[key].element_bytes
            position += _COUNT.size
            if not 0 <= nbytes <= self.stamp.file_bytes - position:
                raise PickleError("is cut short, or damaged")
            found[key] = position, nbytes
            position += nbytes
        return found

    def content(self) -> Any:
        return self._content

    def check(self, storage: Storage) -> str:
        if storage.key not in self._records:
            return f"its data, record {quoted(storage.key)}, are not in the file"
        return _compared(storage, self._records[storage.key][1])

    def pieces(self, storage: Storage) -> Iterator[bytes]:
        begin, nbytes = self._records[storage.key]
        with _readable(self.path):
            self._file.seek(begin)
            yield from _pieces(self._file, nbytes)
