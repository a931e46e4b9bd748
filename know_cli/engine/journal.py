"""Finished batches of a run, kept beside the output, so that a run that was ended can be resumed.

The journal is a file of records, one a batch in the order of the plan, that is only ever added
to: the bytes that were written to the outputs, then a line of JSON with what else the report
needs, and checksums. A run that finds a journal of the same inputs and options takes the batches
from it instead of computing them; a record that was not finished ends it. The run's output
itself is always a new temporary file, so that nothing half-written can get into it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from know_cli.errors import CheckpointError, OutputError
from know_cli.files import OwnFile, lock, open_file, open_own

_MAGIC = b"know journal 4\n"
# Of a record's end: its length, then its CRC-32 continued from that of the data before it.
_END = struct.Struct("<II")
_LARGEST_END = 1 << 30
_CHUNK = 1 << 20
_SUFFIX = ".journal"
_WHAT = "journal"


@dataclass(frozen=True)
class Finished:
    """A batch that an earlier run has written.

    Attributes:
        position: of its data in the journal.
        nbytes: of its data.
        facts: what else was noted of it.
    """

    position: int
    nbytes: int
    facts: dict[str, Any]


def journal_path(output: Path, rank: int = 0, size: int = 1) -> Path:
    """Where the journal of an output is; hidden, and not longer than names may be.

    Args:
        output: of the run.
        rank: that the journal is of, where ranks write the output together.
        size: how many ranks there are.
    """
    part = f"-{rank}-of-{size}" if size > 1 else ""
    return output.absolute().parent / f"{_stem(output)}{part}{_SUFFIX}"


def _stem(output: Path) -> str:
    digest = hashlib.sha256(os.fsencode(output.absolute().name)).hexdigest()[:16]
    return f".know-{digest}"


def _journals(output: Path) -> Iterator[Path]:
    """Those of all numbers of ranks."""
    return output.absolute().parent.glob(f"{_stem(output)}*{_SUFFIX}")


def _has_others(output: Path, size: int) -> bool:
    """Whether there is a journal of a run to an output with another number of ranks."""
    own = {journal_path(output, rank, size) for rank in range(size)}
    return any(path not in own for path in _journals(output))


def remove_journals(output: Path) -> None:
    """Take away what runs with ``--resume`` left before this output was complete.

    One that a run holds at the moment stays, and so does what cannot be removed: the output is
    whole without.
    """
    for path in _journals(output):
        with suppress(OSError, OutputError):
            file = open_own(path, _WHAT, create=False)
            try:
                lock(file.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.remove()
            finally:
                file.close()


def file_identity(path: Path) -> list[int | str]:
    """What tells a safetensors file from another, without reading its data.

    Returns:
        Its size, the time of its last change in nanoseconds, and the SHA-256 of its header.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with open_file(path) as file:
            found = os.fstat(file.fileno())
            start = file.read(8)
            header = file.read(int.from_bytes(start, "little"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return [found.st_size, found.st_mtime_ns, hashlib.sha256(start + header).hexdigest()]


class Journal:
    """The records of one run. Use as a context manager.

    Ask for the records in the order of the batches with :meth:`finished` until there is none,
    then :meth:`add` data and :meth:`finish` each batch; :meth:`remove` it when the output is
    complete. It stays where the ``with`` block is left without that and a batch is in it.

    Args:
        output: the run's last output.
        identity: everything that the numbers depend on; a journal of another identity is
            started anew.
        rank: whose batches these are, where ranks write the output together.
        size: how many ranks there are.

    Attributes:
        path: of the file.
        notices: for the user, of what was there and is not taken.
    """

    def __init__(self, output: Path, identity: str, rank: int = 0, size: int = 1) -> None:
        self.path = journal_path(output, rank, size)
        self.notices: list[str] = []
        self._output, self._size = output, size
        digest = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()
        self._start = _MAGIC + digest.encode() + b"\n"
        self._file: OwnFile | None = None
        self._position = 0
        self._crc = 0
        self._reading = True
        self._has_records = False

    def __enter__(self) -> Journal:
        with self._errors():
            self._file = open_own(self.path, _WHAT)
        try:
            with self._errors():
                self._lock()
                if not self._file.has_name():  # another run has just completed it
                    raise OutputError(f"{self._output}: another run has just written it")
                found = os.pread(self._descriptor, len(self._start), 0)
                if found != self._start:
                    if found:
                        self.notices.append(
                            "--resume: the journal that was there was of other inputs or options; "
                            "all was computed anew"
                        )
                    self._truncate(0)
                    self._write(memoryview(self._start))
                self._position = len(self._start)
                if _has_others(self._output, self._size):
                    self.notices.append(
                        "--resume: the journal that was there is of another number of ranks; it is "
                        "not taken"
                    )
        except BaseException:
            self._file.close()
            raise
        return self

    @property
    def _open(self) -> OwnFile:
        assert self._file is not None, "use it in a with block"
        return self._file

    @property
    def _descriptor(self) -> int:
        return self._open.descriptor

    def _lock(self) -> None:
        try:
            lock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{self._output}: another run resumes it; wait until it is done, or name another "
                "output"
            ) from None

    def finished(
        self, nbytes: int, is_valid: Callable[[Any], bool] = lambda facts: True
    ) -> Finished | None:
        """The next batch, whose data has so many bytes, if it is there whole.

        After the first that is not, the journal takes new ones only.

        Args:
            nbytes: of its data.
            is_valid: whether what else was noted can be of this batch.

        Raises:
            OutputError: the journal cannot be read.
        """
        if not self._reading:
            return None
        with self._errors():
            found = self._next(nbytes, is_valid)
            if found is None:
                self._reading = False
                self._truncate(self._position)
        return found

    def _next(self, nbytes: int, is_valid: Callable[[Any], bool]) -> Finished | None:
        data, crc = self._position, 0
        position = data
        while position < data + nbytes:
            chunk = os.pread(self._descriptor, min(_CHUNK, data + nbytes - position), position)
            if not chunk:
                return None
            position, crc = position + len(chunk), zlib.crc32(chunk, crc)
        end = os.pread(self._descriptor, _END.size, position)
        if len(end) < _END.size:
            return None
        length, expected = _END.unpack(end)
        position += _END.size
        if length > _LARGEST_END:
            return None
        text = os.pread(self._descriptor, length, position)
        if len(text) < length or zlib.crc32(text, crc) != expected:
            return None
        try:
            facts = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not is_valid(facts):
            return None
        self._position = position + length
        self._has_records = True
        return Finished(data, nbytes, facts)

    def read(self, position: int, buffer: memoryview) -> None:
        """Fill a buffer from the data of a finished batch.

        Raises:
            OutputError: the journal cannot be read, or has become shorter.
        """
        with self._errors():
            while len(buffer):
                count = os.preadv(self._descriptor, [buffer], position)
                if not count:
                    raise OutputError(f"{self.path}: has become shorter while it was read")
                position, buffer = position + count, buffer[count:]

    def add(self, data: memoryview) -> None:
        """Note data of the batch at hand.

        Raises:
            OutputError: there is no space.
        """
        with self._errors():
            self._crc = zlib.crc32(data, self._crc)
            self._write(data)

    def finish(self, facts: dict[str, Any]) -> None:
        """Note that the batch at hand is finished.

        Raises:
            OutputError: there is no space.
        """
        text = json.dumps(facts).encode()
        with self._errors():
            crc, self._crc = zlib.crc32(text, self._crc), 0
            self._write(memoryview(_END.pack(len(text), crc) + text))
        self._has_records = True

    def remove(self) -> None:
        """Take it away, if that can be: the output is complete without."""
        with suppress(OSError):
            self._open.remove()

    def _truncate(self, position: int) -> None:
        self._open.truncate(position)
        self._position = position

    def _write(self, data: memoryview) -> None:
        while len(data):
            count = self._open.write(data, self._position)
            self._position, data = self._position + count, data[count:]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{self.path}: the journal of --resume cannot be used: {error.strerror or error}"
            ) from error

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and not self._has_records:
            with suppress(OSError):
                self._open.remove()
        self._open.close()
