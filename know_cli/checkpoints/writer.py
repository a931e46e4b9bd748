"""Writes a checkpoint: the header first, tensors at their final offsets, the name at the end.

Nothing is visible under the output's name before :meth:`CheckpointWriter.commit`. Leaving the
``with`` block without it, for whatever reason, removes everything temporary.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from know_cli.checkpoints.checkpoint import Checkpoint
from know_cli.checkpoints.checksum import remove_digest
from know_cli.checkpoints.folders import LEFT_OUT, Beside, copy_other_files, move_files
from know_cli.checkpoints.header import TensorInfo, encode_header
from know_cli.checkpoints.output_checks import is_taken
from know_cli.errors import OutputError
from know_cli.files import output_errors, sync_folder, write_at
from know_cli.files.folders import open_to_write
from know_cli.files.small import reserve, start_flushing
from know_cli.files.temporary import Temporary, join_temporary, reopen_to_write

_STAMPS = 1 << 31  # seconds; fits every file system
# So many bytes are on their way to the disk while more is computed.
_FLUSHED_TOGETHER = 16 << 20


class Sink(Protocol):
    """Where the tensors of an output go; :class:`CheckpointWriter` is one."""

    @property
    def left_out(self) -> list[Path]:
        """Files beside the inputs' weights that are not part of the output."""

    @property
    def remaining(self) -> list[Path]:
        """Files with other weights that were in the output folder before, and stay."""

    @property
    def file_bytes(self) -> int:
        """Size of the output's safetensors files."""

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write bytes of one tensor; ``offset`` counts from the start of its data.

        Called from several threads, never for the same bytes.
        """

    def flush(self) -> None:
        """Flush files and folder to disk."""

    def commit(self) -> None:
        """Give the output its name."""

    def __enter__(self) -> Sink: ...

    def __exit__(self, *exception: object) -> None: ...


class _Places:
    """The open files of an output, and where the bytes of each tensor belong in them."""

    def __init__(self, output: Path, like: Checkpoint, metadata: Mapping[str, str]) -> None:
        self.output = output
        self.left_out: list[Path] = []
        self.remaining: list[Path] = []
        self._like = like
        self._metadata = dict(metadata)
        self._place: dict[str, tuple[int, TensorInfo]] = {}
        self._descriptors: list[int] = []
        self._unflushed = 0

    def _layouts(self) -> Iterator[tuple[Path, bytes, dict[str, TensorInfo]]]:
        """Yield for each file: its model in the other checkpoint, its header, its tensors."""
        for path, header in self._like.headers.items():
            tensors = [(info.name, info.dtype, info.shape) for info in header.tensors.values()]
            yield path, *encode_header(tensors, self._metadata)

    def _take(self, descriptor: int, infos: Mapping[str, TensorInfo]) -> None:
        for name, info in infos.items():
            self._place[name] = (descriptor, info)

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write bytes of one tensor; ``offset`` counts from the start of its data.

        Raises:
            OutputError: the disk is full or fails.
        """
        descriptor, info = self._place[name]
        with output_errors(self.output):
            write_at(descriptor, data, info.begin + offset)
        # Not exact where threads write at the same time, and need not be.
        self._unflushed += data.nbytes
        if self._unflushed >= _FLUSHED_TOGETHER:
            self._unflushed = 0
            start_flushing(descriptor)

    @property
    def file_bytes(self) -> int:
        """Size of the safetensors files that are written."""
        ends: dict[int, int] = {}
        for descriptor, info in self._place.values():
            ends[descriptor] = max(ends.get(descriptor, 0), info.end)
        return sum(ends.values())

    def _sync(self) -> None:
        for descriptor in self._descriptors:
            os.fsync(descriptor)
        self._close()

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())


class CheckpointWriter(_Places):
    """Streams a checkpoint that has the tensors of another, each at its final offset.

    Use it as a context manager: :meth:`write` any parts of tensors in any order, then
    :meth:`commit`. In a folder, shards and index keep their names, and files beside them that are
    not weights are copied.

    Args:
        output: file or folder to write, checked before with :func:`check_output`.
        like: the checkpoint whose tensors, dtypes and layout the output takes over.
        metadata: of every safetensors file written.

    Attributes:
        left_out: after the flush of a folder, files and sub-folders that were not copied because
            they hold other weights or training state.
        remaining: after the commit into an existing folder, files in it with other weights or
            training state, which stay there.
    """

    def __init__(
        self, output: Path, like: Checkpoint, metadata: Mapping[str, str], *, force: bool = True
    ) -> None:
        super().__init__(output, like, metadata)
        self._force = force
        self._flushed = False
        self._is_stamped = False
        self._temporary: Temporary | None = None
        self._beside = Beside()

    def __enter__(self) -> CheckpointWriter:
        with output_errors(self.output):
            self._temporary = Temporary(self.output, is_folder=self._like.is_folder)
            try:
                if not self._force and is_taken(self.output):
                    raise OutputError(
                        f"{self.output}: another run has just written it; --force replaces it"
                    )
                self._beside = self._find_beside()
                for path, start, infos in self._layouts():
                    self._start_file(path, start, infos)
            except BaseException:
                self._discard()
                raise
        return self

    def _find_beside(self) -> Beside:
        return Beside.of(self._like) if self._like.is_folder else Beside()

    @property
    def _open_temporary(self) -> Temporary:
        assert self._temporary is not None, "use it in a with block"
        return self._temporary

    def _start_file(self, path: Path, start: bytes, infos: Mapping[str, TensorInfo]) -> None:
        descriptor = self._open_temporary.start_file(path.name)
        self._descriptors.append(descriptor)
        size = max((info.end for info in infos.values()), default=len(start))
        reserve(descriptor, size)
        write_at(descriptor, memoryview(start), 0)
        self._take(descriptor, infos)

    def share(self) -> SharedPlace:
        """Let other processes write parts of it, each through a :class:`CheckpointPart`.

        Raises:
            OutputError: another run has just taken the temporary.
        """
        with output_errors(self.output):
            stamp = secrets.randbelow(_STAMPS)
            for descriptor in self._descriptors:
                os.fsync(descriptor)
                if hasattr(os, "posix_fadvise"):
                    # What this machine has cached of the file must not be written back along
                    # with its own part.
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.utime(descriptor, (stamp, stamp))
            self._is_stamped = True
            temporary = self._open_temporary
            return SharedPlace(temporary.path.absolute(), temporary.share(), stamp)

    def flush(self) -> None:
        """Flush everything to disk, still under the temporary name; only renaming is left to do.

        Raises:
            OutputError: the disk is full or fails.
        """
        with output_errors(self.output):
            if self._is_stamped:
                for descriptor in self._descriptors:
                    os.utime(descriptor)
            self._sync()
            if self._like.is_folder:
                self.left_out = self._write_beside(self._open_temporary.descriptor)
        self._flushed = True

    def _write_beside(self, folder: int) -> list[Path]:
        """Put what belongs beside a folder's weights into it, an open folder; what is left out."""
        copy_other_files(self._beside, folder)
        return list(self._beside.left_out)

    def commit(self) -> None:
        """Flush what is not flushed yet, and give it the output's name, a folder's index last.

        Raises:
            OutputError: the disk is full or fails. An existing output is untouched, except that an
                existing folder may have lost its weights if the failure comes while its files are
                replaced, so that old and new ones are never taken for one model.
        """
        if not self._flushed:
            self.flush()
        with output_errors(self.output):
            temporary = self._open_temporary
            if self._force:
                # Whoever finds it must not take it for the digest of what replaces its output.
                remove_digest(self.output)
            if not self._like.is_folder or not os.path.lexists(temporary.place):
                if self._like.is_folder:
                    os.fsync(temporary.descriptor)
                temporary.give_name(replace=self._force)
            else:
                if not self._force and is_taken(self.output):
                    temporary.keep()
                move_files(temporary.descriptor, temporary.place, replace=self._force)
                self.remaining = self._other_weights()
            sync_folder(temporary.place.absolute().parent)

    def _other_weights(self) -> list[Path]:
        own = {path.name for path in self._like.headers}
        return sorted(
            path
            for path in self.output.iterdir()
            if path.suffix in LEFT_OUT and path.name not in own and not path.is_dir()
        )

    def _discard(self) -> None:
        self._close()
        if self._temporary is not None:
            self._temporary.discard()

    def __exit__(self, *exception: object) -> None:
        self._discard()


@dataclass(frozen=True)
class SharedPlace:
    """Where an output lies until it is complete, for the other processes that write it.

    Attributes:
        path: of the temporary, the same for all of them.
        is_locked: whether a lock keeps other runs away from it.
        stamp: modification time of the files, in whole seconds, drawn at random. A machine that
            does not share the file system may have files of the same name and size there, left
            by a run that was killed.
    """

    path: Path
    is_locked: bool
    stamp: int


class CheckpointPart(_Places):
    """Writes part of a checkpoint that a :class:`CheckpointWriter` in another process has begun.

    The other writer completes it, after this one's :meth:`flush`. Use it as a context manager.

    Args:
        output: the other writer's.
        like: the other writer's.
        metadata: the other writer's.
        place: what the other writer shares; nobody may write before all have opened it.
        check: called while the place is not visible yet; raises an error if waiting is pointless.
    """

    def __init__(
        self,
        output: Path,
        like: Checkpoint,
        metadata: Mapping[str, str],
        place: SharedPlace,
        check: Callable[[], None],
    ) -> None:
        super().__init__(output, like, metadata)
        self._shared = place
        self._check = check
        self._lock = -1

    def __enter__(self) -> CheckpointPart:
        with output_errors(self.output):
            self._lock = join_temporary(
                self._shared.path,
                self.output,
                is_folder=self._like.is_folder,
                is_locked=self._shared.is_locked,
                check=self._check,
            )
            try:
                for path, start, infos in self._layouts():
                    if self._like.is_folder:
                        target = self._shared.path / path.name
                        descriptor = open_to_write(path.name, self._lock)
                    else:
                        target = self._shared.path
                        descriptor = reopen_to_write(self._lock, target)
                    self._descriptors.append(descriptor)
                    size = max((info.end for info in infos.values()), default=len(start))
                    found = os.fstat(descriptor)
                    if (found.st_size, int(found.st_mtime)) != (size, self._shared.stamp):
                        raise OutputError(
                            f"{target}: is not the file that rank 0 has begun; the ranks' machines "
                            "must share the output's file system"
                        )
                    self._take(descriptor, infos)
            except BaseException:
                self._leave()
                raise
        return self

    def flush(self) -> None:
        """Flush what was written here to disk.

        Raises:
            OutputError: the disk is full or fails.
        """
        with output_errors(self.output):
            self._sync()

    def commit(self) -> None:
        """Do nothing: the other writer gives the output its name."""

    def _leave(self) -> None:
        self._close()
        os.close(self._lock)

    def __exit__(self, *exception: object) -> None:
        self._leave()
