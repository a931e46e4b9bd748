"""The header of a safetensors file: read with every rule checked, and laid out for writing.

We read tensors by offset rather than through the safetensors library, so the library's rules
are enforced here, and two that its README states but that it lets pass: no tensor name and no
metadata key may occur twice.
"""

from __future__ import annotations

import json
import math
import stat
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from know_cli.checkpoints.dtypes import BITS, RANK
from know_cli.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
METADATA_KEY = "__metadata__"
_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 8


@dataclass(frozen=True)
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
        with path.open("rb") as file:
            file_bytes = path.stat().st_size
            start = file.read(_LENGTH.size)
            if len(start) < _LENGTH.size:
                _fail(path, f"is only {file_bytes} bytes long; no safetensors file is")
            (length,) = _LENGTH.unpack(start)
            if length > MAX_HEADER_BYTES or _LENGTH.size + length > file_bytes:
                _fail(path, _what_it_is(start + file.read(512), length, file_bytes))
            raw = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from error
    return _parse(path, raw, file_bytes)


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error for an input that the operating system does not let us read."""
    if isinstance(error, FileNotFoundError):
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


def _what_it_is(start: bytes, length: int, file_bytes: int) -> str:
    """Name what was given instead of a safetensors file, from its first bytes."""
    head = start.lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "is a Git-LFS pointer, not the file itself; run 'git lfs pull' in its repository"
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not a checkpoint; download the file itself"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "is a PyTorch pickle; save it with safetensors.torch.save_file and give that file"
    if start.startswith(b"\x89HDF\r\n"):
        return "is an HDF5 file, not a safetensors file"
    if start[8:9] == b"{" and length <= MAX_HEADER_BYTES:
        needed = _LENGTH.size + length
        if needed <= file_bytes:
            return "its header is not valid JSON; download or copy it again"
        return (
            f"is cut short: its header alone needs {needed} bytes and the file has "
            f"{file_bytes}; download or copy it again"
        )
    return f"is not a safetensors file (it claims a header of {length} bytes)"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKeyError(key)
        found[key] = value
    return found


class _DuplicateKeyError(Exception):
    """A JSON object has one key twice."""


def _parse(path: Path, raw: bytes, file_bytes: int) -> Header:
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except _DuplicateKeyError as error:
        _fail(path, f"header has the key {str(error)!r} twice; save the checkpoint again")
    except (ValueError, RecursionError):
        _fail(path, _what_it_is(_LENGTH.pack(len(raw)) + raw[:512], len(raw), file_bytes))
    if not isinstance(content, dict):
        _fail(path, "header is not a JSON object")
    metadata = content.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _fail(path, f"header: {METADATA_KEY} must map strings to strings")
    for text in (*content, *metadata, *metadata.values()):
        if not _is_unicode(text):
            _fail(path, f"header: {text!a} is not valid Unicode; save the checkpoint again")
    data_start = _LENGTH.size + len(raw)
    tensors = [_tensor(path, name, entry, data_start) for name, entry in content.items()]
    tensors.sort(key=lambda info: (info.begin, info.end))
    position = data_start
    for info in tensors:
        if info.begin != position:
            problem = "overlaps the one before" if info.begin < position else "leaves a hole"
            _fail(path, f"tensor {info.name!r} {problem} (data offset {info.begin - data_start})")
        position = info.end
    if position != file_bytes:
        _fail(
            path,
            f"is {'cut short' if file_bytes < position else 'too long'}: {position} bytes by "
            f"its header, {file_bytes} on disk; download or copy it again",
        )
    return Header({info.name: info for info in tensors}, metadata, file_bytes)


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _fail(path, f"tensor {name!r}: needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        _fail(path, f"tensor {name!r}: unknown dtype {dtype!r}")
    if not _is_counts(shape):
        _fail(path, f"tensor {name!r}: shape {shape!r} is not a list of counts")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _fail(path, f"tensor {name!r}: bad data_offsets {offsets!r}")
    bits = BITS[dtype] * math.prod(shape)
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        _fail(
            path,
            f"tensor {name!r}: {dtype} of shape {shape} does not fill data_offsets {offsets}",
        )
    return TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _is_unicode(text: str) -> bool:
    """JSON can escape halves of characters, which no file can hold as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**63 for item in value
    )
