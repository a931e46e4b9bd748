"""The header of a safetensors file: read with every rule checked, and laid out for writing.

We read tensors by offset rather than through the safetensors library, so the library's rules
are enforced here, and some that it lets pass: no tensor name, metadata key or field may occur
twice, a tensor has its three fields by name and no others, and sizes without the zeros among
them must be countable, too.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from know_cli.checkpoints.dtypes import BITS, RANK
from know_cli.checkpoints.json_text import MAX_BYTES, BadJsonError, is_unicode, parse_json
from know_cli.errors import CheckpointError, counted, quoted
from know_cli.files import open_file

METADATA_KEY = "__metadata__"
_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 8
# The library counts bits in 64 of them; torch's sizes are signed.
_MAX_COUNT = 2**63


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of one file: ``dtype`` by its safetensors name, byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """Number of elements; 1 for a tensor without dimensions."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself: tensors in file order, and its metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    file_bytes: int
    stamp: Stamp


@dataclass(frozen=True)
class Stamp:
    """What changes with a file: which file it is, its size, and when it was last written to."""

    device: int
    inode: int
    file_bytes: int
    modified_ns: int

    @staticmethod
    def of(found: os.stat_result) -> Stamp:
        """The stamp of a file that was looked at."""
        return Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def read_header(path: Path) -> Header:
    """Read and check the header of one safetensors file; no tensor data is touched.

    Raises:
        CheckpointError: the file is missing, or breaks a rule of the format; the message names
            the file, where it can the tensor, and what the file really is (a Git-LFS pointer,
            a web page, a pickle, half a download).
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            _fail(path, "is not a file; a checkpoint is read at many places, so no pipe will do")
        with open_file(path) as file:
            stamp = Stamp.of(os.fstat(file.fileno()))
            start = file.read(_LENGTH.size)
            if len(start) < _LENGTH.size:
                _fail(
                    path,
                    f"is only {counted(stamp.file_bytes, 'byte')} long; no safetensors file is",
                )
            (length,) = _LENGTH.unpack(start)
            if length > MAX_BYTES or _LENGTH.size + length > stamp.file_bytes:
                _fail(path, _what_it_is(start + file.read(START_BYTES), length, stamp.file_bytes))
            raw = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from error
    return _parse(path, raw, stamp)


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error for an input that the operating system does not let us read."""
    if isinstance(error, FileNotFoundError):
        if path.is_symlink():
            return CheckpointError(
                f"{path}: is a link to {quoted(str(path.readlink()))}, where there is no file; "
                "download or copy it again"
            )
        return CheckpointError(f"{path}: no such file; check the path")
    return CheckpointError(f"{path}: cannot be read: {error.strerror or error}")


def encode_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorInfo]]:
    """Lay out a safetensors file as the library's ``save_file`` does.

    Tensors come by element type (largest first), then by name; the JSON is padded with spaces
    to 8 bytes. Unlike the library's, metadata keys are sorted, so that the same input always
    gives the same bytes.

    Args:
        tensors: (name, safetensors dtype, shape) of every tensor, in any order.
        metadata: string to string; left out of the header when empty.

    Returns:
        The first bytes of the file (length and JSON), and for each name in file order its
        :class:`TensorInfo` with offsets from the start of the file.
    """
    ordered = sorted(tensors, key=lambda item: (-RANK[item[1]], item[0].encode()))
    entries: dict[str, Any] = {}
    if metadata:
        entries[METADATA_KEY] = dict(sorted(metadata.items()))
    position = 0
    for name, dtype, shape in ordered:
        size = math.prod(shape) * BITS[dtype] // 8
        entries[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    data_start = _LENGTH.size + len(text)
    infos = {
        name: TensorInfo(
            name,
            dtype,
            tuple(shape),
            data_start + entries[name]["data_offsets"][0],
            data_start + entries[name]["data_offsets"][1],
        )
        for name, dtype, shape in ordered
    }
    return _LENGTH.pack(len(text)) + text, infos


def _fail(path: Path, problem: str) -> NoReturn:
    raise CheckpointError(f"{path}: {problem}")


#: Bytes by which a file is known for what it is.
START_BYTES = 512
# First bytes of what else is given for a checkpoint → what it is and what to do.
_ZIP = b"PK\x03\x04"
_PICKLE = "is a PyTorch pickle, which can run code when it is loaded; make a safetensors file of it"
_OTHERS: tuple[tuple[tuple[bytes, ...], str], ...] = (
    ((_ZIP, *(b"\x80%c" % n for n in range(2, 6))), f"{_PICKLE} with 'know convert'"),
    ((b"\x89HDF\r\n",), "is an HDF5 file, not {wanted}"),
    ((b"GGUF",), "is a GGUF file, not {wanted}"),
    ((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"), "is compressed; unpack it first"),
    ((b"\x93NUMPY",), "is a NumPy file, not {wanted}"),
)
# Where the name of a zip archive's first record has its length, and where it begins.
_ZIP_NAME = struct.Struct("<26xH2x")
# A protocol buffer whose first field is the version of ONNX, and its second one of the model's.
_ONNX = re.compile(rb"\x08[\x01-\x1f][\x12\x1a\x22\x28\x32\x3a\x42\x72]")
# A map of some size, and the length of a text, its first key.
_MSGPACK = re.compile(rb"([\x81-\x8f]|\xde..|\xdf....)[\xa1-\xbf\xd9]", re.DOTALL)
_LFS_SIZE = re.compile(rb"^size (\d{1,20})$", re.MULTILINE)


def known_as(start: bytes, file_bytes: int, wanted: str = "a safetensors file") -> str | None:
    """What is often given for a checkpoint, and what to do about it, from a file's first bytes.

    Args:
        start: these bytes.
        file_bytes: size of the file.
        wanted: what it should be.
    """
    head = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        size = _LFS_SIZE.search(start)
        real = f" of {int(size[1])} bytes" if size else ""
        return (
            f"is a Git-LFS pointer of {file_bytes} bytes, not the file itself{real}; run "
            "'git lfs pull' in its repository"
        )
    if head.startswith((b"/annex/objects/", b"../.git/annex/", b".git/annex/")):
        return "is a git-annex pointer, not the file itself; run 'git annex get' on it"
    if head.startswith(b"<"):
        return (
            f"is a web page of {file_bytes} bytes, not a checkpoint; download the file itself, "
            "perhaps you need to log in"
        )
    if start.startswith(_ZIP) and _zip_as(start) is not None:
        return _zip_as(start)
    for starts, what in _OTHERS:
        if start.startswith(starts):
            return what.format(wanted=wanted)
    if start[8:9] != b"{":  # the length of a header, cut short, can begin as these do
        if _ONNX.match(start):
            return f"is an ONNX file, not {wanted}"
        if _MSGPACK.match(start):
            return f"is a msgpack file, as Flax writes it, not {wanted}"
    if not start.strip(b"\0"):
        return "begins with zeros only, as an unfinished download does; download it again"
    return None


def _zip_as(start: bytes) -> str | None:
    """Which zip archive it is, by the name of its first record; None for one of PyTorch."""
    if len(start) < _ZIP_NAME.size:
        return None
    (length,) = _ZIP_NAME.unpack_from(start)
    name = start[_ZIP_NAME.size : _ZIP_NAME.size + length]
    if name in (b"metadata.json", b"config.json", b"model.weights.h5"):
        return "is a Keras file, not a safetensors file"
    if name.endswith(b".npy"):
        return "is a NumPy archive, not a safetensors file"
    return None


def _what_it_is(start: bytes, length: int, file_bytes: int) -> str:
    """Name what was given instead of a safetensors file, from its first bytes."""
    known = known_as(start, file_bytes)
    if known is not None:
        return known
    head = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[8:9] == b"{":
        needed = _LENGTH.size + length
        if length > MAX_BYTES:
            return f"claims a header of {length} bytes; at most {MAX_BYTES} are read"
        if needed > file_bytes:
            return (
                f"is cut short: its header alone needs {needed} bytes and the file has "
                f"{file_bytes}; download or copy it again"
            )
    if head.startswith((b"{", b"[")):
        if b'"weight_map"' in head:
            return "is an index of shards, not a checkpoint; name its folder"
        return "is a JSON text, not a checkpoint; perhaps a server's error message"
    return f"is not a safetensors file (it claims a header of {length} bytes)"


def _parse(path: Path, raw: bytes, stamp: Stamp) -> Header:
    try:
        content = parse_json(raw)
    except BadJsonError as error:
        if raw[:1] != b"{":
            _fail(
                path,
                _what_it_is(_LENGTH.pack(len(raw)) + raw[:START_BYTES], len(raw), stamp.file_bytes),
            )
        _fail(path, f"its header {error}; download it or save it again")
    if not isinstance(content, dict):
        _fail(path, "header is not a JSON object")
    metadata = content.pop(METADATA_KEY, None)
    if metadata is None:  # some writers' word for none
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _fail(path, f"header: {METADATA_KEY} must map strings to strings")
    for text in (*content, *metadata, *metadata.values()):
        if not is_unicode(text):
            _fail(path, f"header: {quoted(text)} is not valid Unicode; save the checkpoint again")
    data_start = _LENGTH.size + len(raw)
    tensors = [_tensor(path, name, entry, data_start) for name, entry in content.items()]
    tensors.sort(key=lambda info: (info.begin, info.end))
    position = data_start
    for info in tensors:
        if info.begin != position:
            problem = "overlaps the one before" if info.begin < position else "leaves a hole"
            _fail(
                path,
                f"tensor {quoted(info.name)} {problem} (data offset {info.begin - data_start})",
            )
        position = info.end
    if position != stamp.file_bytes:
        _fail(
            path,
            f"is {'cut short' if stamp.file_bytes < position else 'too long'}: {position} bytes "
            f"by its header, {stamp.file_bytes} on disk; download or copy it again",
        )
    return Header({info.name: info for info in tensors}, metadata, stamp.file_bytes, stamp)


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    def fail(problem: str) -> NoReturn:
        _fail(path, f"tensor {quoted(name)}: {problem}")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        fail("needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        fail(f"unknown dtype {quoted(dtype)}")
    if not _is_counts(shape):
        fail(f"shape {quoted(shape)} is not a list of counts")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        fail(f"bad data_offsets {quoted(offsets)}")
    bits = _bits(dtype, shape)
    if bits is None:
        fail(f"shape {quoted(shape)} is larger than can be counted")
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        fail(f"{dtype} of shape {quoted(shape)} does not fill data_offsets {quoted(offsets)}")
    return TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _bits(dtype: str, shape: list[int]) -> int | None:
    """Bits of a tensor's data; None where its sizes, zeros left out, multiply to too many."""
    bits = BITS[dtype]
    for size in shape:
        bits *= size or 1
        # Stopping here bounds the time, too: a product of 100,000 sizes would take minutes.
        if bits >= _MAX_COUNT:
            return None
    return 0 if 0 in shape else bits


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < _MAX_COUNT
        for item in value
    )
