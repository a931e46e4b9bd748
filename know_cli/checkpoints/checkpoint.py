"""One checkpoint, a file or a folder of shards, read by offset."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from know_cli.checkpoints.header import Header, Stamp, TensorInfo, read_header, unreadable
from know_cli.checkpoints.json_text import MAX_BYTES, BadJsonError, is_unicode, parse_json
from know_cli.checkpoints.layouts import SUFFIX, find_model
from know_cli.checkpoints.open_files import OpenFiles
from know_cli.errors import CheckpointError, quoted
from know_cli.files import read_bytes

# A fingerprint reads the ends of at most this many tensors.
_FINGERPRINT_TENSORS = 256
_FINGERPRINT_BYTES = 64
# Files that a checkpoint keeps open; hundreds of shards must not hit the usual limit of 1024.
_MAX_OPEN_FILES = 32
# Git's digests and SHA-256, and shorter ones.
_DIGEST = re.compile(r"[0-9a-f]{6,}")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor of a checkpoint and the file that holds it."""

    info: TensorInfo
    path: Path

    @property
    def name(self) -> str:
        """Name in the state dict."""
        return self.info.name

    @property
    def dtype(self) -> str:
        """Safetensors name of the element type."""
        return self.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape; empty for a scalar."""
        return self.info.shape


@dataclass
class Checkpoint:
    """An open checkpoint: headers in memory, data on disk.

    Attributes:
        path: what the user named, a file or a folder.
        is_folder: whether ``path`` is a folder, in one of the
            :data:`~know_cli.checkpoints.layouts.LAYOUTS`.
        headers: each safetensors file of the checkpoint with its header, in shard order.
        tensors: every tensor by name, in the order of the files and of their data.
        index_path: the folder's shard index, if it has one.
    """

    path: Path
    is_folder: bool
    headers: dict[Path, Header]
    tensors: dict[str, TensorEntry]
    index_path: Path | None = None
    _files: OpenFiles = field(default_factory=lambda: OpenFiles(_MAX_OPEN_FILES), repr=False)

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of the first file; all shards of a checkpoint carry the same."""
        return next(iter(self.headers.values())).metadata

    @property
    def nbytes(self) -> int:
        """Size of all its safetensors files together."""
        return sum(header.file_bytes for header in self.headers.values())

    def nbytes_of(self, names: Iterable[str]) -> int:
        """Size of the data of some tensors together, as far as it has them."""
        infos = [self.tensors[name].info for name in names if name in self.tensors]
        return sum(info.end - info.begin for info in infos)

    def read_into(self, entry: TensorEntry, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with bytes of a tensor, from byte ``offset`` of its data on.

        Safe to call from several threads.

        Raises:
            CheckpointError: the file cannot be read any more, or has become shorter.
        """

        def read(descriptor: int, done: int) -> int:
            return os.preadv(descriptor, [buffer[done:]], entry.info.begin + offset + done)

        self.read_with(entry, len(buffer), read)

    def read_with(self, entry: TensorEntry, count: int, read: Callable[[int, int], int]) -> None:
        """Read something of a tensor in one's own way, until all is there.

        Safe to call from several threads.

        Args:
            entry: of the tensor.
            count: how much there is to read.
            read: called with the file's descriptor and how much has been read, returns how much
                more is; 0 at the end of the file.

        Raises:
            CheckpointError: the file cannot be read any more, or has become shorter.
        """
        done = 0
        try:
            with self._files.using(entry.path) as descriptor:
                while done < count:
                    more = read(descriptor, done)
                    if more == 0:
                        raise CheckpointError(
                            f"{entry.path}: tensor {quoted(entry.name)}: the file has become "
                            "shorter while it was read; do not write to inputs during a run"
                        )
                    done += more
        except OSError as error:
            raise unreadable(entry.path, error) from error

    def drop_cached(self, entry: TensorEntry, offset: int, nbytes: int) -> None:
        """Let the system drop bytes of a tensor from its page cache, where it can be told so.

        They can be read again, from the disk. Advice that is refused changes nothing.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        with suppress(OSError), self._files.using(entry.path) as descriptor:
            os.posix_fadvise(descriptor, entry.info.begin + offset, nbytes, os.POSIX_FADV_DONTNEED)

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that tell checkpoints of one training apart.

        They come from all names, dtypes and shapes and from the first and last 64 bytes of up to
        256 tensors, so even the largest checkpoint takes no longer. A file and a sharded folder
        with the same tensors have the same. This is no checksum: most changes of single values
        leave it as it is.

        Raises:
            CheckpointError: a file cannot be read.
        """
        hasher = hashlib.sha256()
        names = sorted(self.tensors)
        for name in names:
            entry = self.tensors[name]
            hasher.update(f"{name!r} {entry.dtype} {entry.shape}\n".encode())
        for name in names[:: -(-len(names) // _FINGERPRINT_TENSORS)]:
            entry = self.tensors[name]
            nbytes = entry.info.end - entry.info.begin
            size = min(_FINGERPRINT_BYTES, nbytes)
            ends = bytearray(2 * size)
            self.read_into(entry, 0, memoryview(ends)[:size])
            self.read_into(entry, nbytes - size, memoryview(ends)[size:])
            hasher.update(ends)
        return hasher.hexdigest()[:16]

    def check_unchanged(self) -> None:
        """Refuse files that have changed since their headers were read.

        Raises:
            CheckpointError: one has vanished, was replaced or was written to.
        """
        for path, header in self.headers.items():
            try:
                same = Stamp.of(path.stat()) == header.stamp
            except OSError as error:
                raise unreadable(path, error) from error
            if not same:
                raise CheckpointError(
                    f"{path}: has changed while it was read, so that nothing made of it can be "
                    "relied on; do not write to inputs during a run, and run again"
                )

    def close(self) -> None:
        """Close its files; reading opens them again."""
        self._files.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a ``.safetensors`` file, or a folder with one file or with shards; headers only.

    Raises:
        CheckpointError: nothing usable is there; the message says what there is instead.
    """
    try:
        return _open(path)
    except OSError as error:  # no permission to search the folder, for one
        raise unreadable(path, error) from error


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path in a folder leads to a file of that folder, links followed.

    The cache of Hugging Face counts as inside: there ``snapshots/REVISION``, and every folder
    below it, holds links to files in ``blobs`` beside ``snapshots``.
    """
    real, root = path.resolve(), folder.resolve()
    return real.is_relative_to(root) or any(
        real.parent == blobs.resolve() for blobs in _caches(root)
    )


def is_inside_closely(path: Path, folder: Path) -> bool:
    """As :func:`is_inside`, for files of which nothing else is checked.

    Who packed a folder may have made its ``blobs`` a link to anywhere; a cache's own files are
    called by their digests, as hardly anything else is.
    """
    real, root = path.resolve(), folder.resolve()
    if any(blobs.is_symlink() for blobs in _caches(root)) and not real.is_relative_to(root):
        return is_inside(path, folder) and _DIGEST.fullmatch(real.name) is not None
    return is_inside(path, folder)


def _caches(root: Path) -> list[Path]:
    """Where the files of a snapshot in the cache of Hugging Face are; none for other folders."""
    return [
        above.parent.parent / "blobs"
        for above in (root, *root.parents)
        if above.parent.name == "snapshots"
    ]


def _open(path: Path) -> Checkpoint:
    if not path.is_dir():
        return _collect(path, False, [path], None)
    model = find_model(path)
    index = None if model.index is None else path / model.index
    shards = None if index is None else _read_index(path, index)
    names = model.files if shards is None else shards
    if model.single not in names and os.path.lexists(path / model.single):
        raise CheckpointError(
            f"{path}: the folder has both {model.single} and the shards of {model.index}, two "
            "models for two kinds of readers; remove the one that is not meant"
        )
    files = [path / name for name in names]
    for file in files:
        _refuse_outside(file, path)
    checkpoint = _collect(path, True, files, index)
    if shards is not None:
        _check_index(checkpoint, shards)
    return checkpoint


def _refuse_outside(file: Path, folder: Path) -> None:
    if not is_inside(file, folder):
        raise CheckpointError(
            f"{file}: is a link that leads out of the folder, so the checkpoint may not be what "
            "it seems; refused; copy the file to its place if it is meant"
        )


def _collect(path: Path, is_folder: bool, files: list[Path], index: Path | None) -> Checkpoint:
    headers = {file: read_header(file) for file in files}
    tensors: dict[str, TensorEntry] = {}
    for file, header in headers.items():
        for name, info in header.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{file}: tensor {quoted(name)} is in {tensors[name].path.name} as well; "
                    "save the checkpoint again"
                )
            tensors[name] = TensorEntry(info, file)
    if not tensors:
        raise CheckpointError(f"{path}: has no tensors")
    return Checkpoint(path, is_folder, headers, tensors, index)


def _read_index(folder: Path, index: Path) -> dict[str, list[str]]:
    """Shard file name → names of its tensors, sorted by shard; bare names only."""
    _refuse_outside(index, folder)
    try:
        found = index.stat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{index}: is not a file")
        if found.st_size > MAX_BYTES:
            raise CheckpointError(
                f"{index}: is too long: {found.st_size} bytes, of {MAX_BYTES} that are read"
            )
        content = parse_json(read_bytes(index, MAX_BYTES))
    except OSError as error:
        raise unreadable(index, error) from error
    except BadJsonError as error:
        raise CheckpointError(f"{index}: {error}; download it again") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map; download it again")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_bare_name(shard):
            raise CheckpointError(
                f"{index}: tensor {quoted(name)}: {quoted(shard)} is not the bare name of a "
                f"{SUFFIX} file in the folder; refused"
            )
        shards.setdefault(shard, []).append(name)
    return dict(sorted(shards.items()))


def _is_bare_name(shard: str) -> bool:
    """Whether a shard's name cannot lead anywhere but to a file in the folder.

    A name that is a path could make us read, or mirror to, any place on this disk.
    """
    plain = is_unicode(shard) and not any(mark in shard for mark in "/\\\0")
    return plain and shard.endswith(SUFFIX) and len(shard) > len(SUFFIX)


def _check_index(checkpoint: Checkpoint, shards: dict[str, list[str]]) -> None:
    for shard, names in shards.items():
        held = checkpoint.headers[checkpoint.path / shard].tensors
        for problem, wrong in (
            ("does not have", set(names) - held.keys()),
            ("has, against the index,", held.keys() - set(names)),
        ):
            if wrong:
                raise CheckpointError(
                    f"{checkpoint.path / shard}: {problem} tensor {quoted(min(wrong))} "
                    f"({len(wrong)} such); index and shards are not of one checkpoint"
                )
