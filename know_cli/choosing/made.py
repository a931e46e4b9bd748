"""What searches have made in their folder: only that is replaced or removed there.

A folder that a user names may have other files, also under the names of candidates. So what is made
is noted in a record, each file with its size and the time of its last change; what is not in the
record, or is no longer as noted, is somebody else's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from know_cli.checkpoints.checksum import digest_path
from know_cli.errors import OutputError, UsageError
from know_cli.files import json_text, read_text, remove_file, write_text
from know_cli.files.folders import remove_empty
from know_cli.files.protected import is_within

RECORD = "made.json"
_FORMAT = 1
_DO = "move it away, or give another --folder"

# Path relative to what was made → size, and nanoseconds of its last change. A file is itself ".".
_Stamps = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class _Entry:
    """A file or folder that was made: of which inputs, and its files; None while it is made."""

    inputs: str
    files: _Stamps | None

    def changed(self, found: _Stamps) -> list[str]:
        """Of the files that are there now, those that are not as they were made."""
        # Where a run was killed while it made this, nobody else's was there when it began.
        if self.files is None:
            return []
        return sorted(name for name, stamp in found.items() if self.files.get(name) != stamp)


@dataclass(frozen=True)
class Made:
    """The record of a search's folder, read anew by each call, as one search at a time has it.

    Attributes:
        folder: of the search.
        inputs: tells the inputs from others; what was made of others is made again.
    """

    folder: Path
    inputs: str

    def check(self, paths: Iterable[Path]) -> None:
        """Refuse to begin where something that no search has made is in the way.

        Args:
            paths: that a search writes.

        Raises:
            OutputError: there is, or what a search has made was changed since.
        """
        entries = self._read()
        for path in paths:
            for place in (path, digest_path(path)):
                if not os.path.lexists(place):
                    continue
                entry = entries.get(self._key(place))
                if entry is None or place.is_symlink():
                    raise OutputError(
                        f"{place}: is where this search writes, but {RECORD} does not say that "
                        f"one made it; {_DO}"
                    )
                for name in entry.changed(_stamps(place)):
                    if name in (entry.files or {}):
                        raise OutputError(
                            f"{place / name}: has changed since a search made it; {_DO}"
                        )

    def has(self, path: Path) -> bool:
        """Whether this was made of these inputs, and all of it is as it was made."""
        entry = self._read().get(self._key(path))
        if entry is None or entry.files is None or entry.inputs != self.inputs:
            return False
        return entry.files.items() <= _stamps(path).items()

    @contextmanager
    def writing(self, *paths: Path) -> Iterator[None]:
        """Note what is made in the block, also where an error ends it.

        Args:
            paths: that are written in it, within the folder.

        Raises:
            OutputError: something else is in the place of one, or the record cannot be written.
        """
        before = self._read()
        for path in paths:
            entry = before.get(self._key(path))
            if entry is None or path.is_symlink():  # through a link another file would be written
                entry = _Entry(self.inputs, {})
            for name in entry.changed(_stamps(path)):
                raise OutputError(f"{path / name}: is in the way, and not made by a search; {_DO}")
        self._write({**before, **{self._key(path): _Entry(self.inputs, None) for path in paths}})
        try:
            yield
        except BaseException:
            self._note(paths, before)
            raise
        self._note(paths, {})

    def _note(self, paths: Iterable[Path], before: Mapping[str, _Entry]) -> None:
        """Note what is there now; what still is as before was made as before."""
        entries = self._read()
        for path in paths:
            key, found = self._key(path), _stamps(path)
            old = before.get(key)
            if old is not None and old.files in (None, found):
                entries[key] = old
            elif found:
                entries[key] = _Entry(self.inputs, found)
            else:
                entries.pop(key, None)
        self._write(entries)

    def paths(self) -> list[Path]:
        """All that is noted."""
        return [self.folder / key for key in self._read()]

    def remove(self, paths: Iterable[Path]) -> None:
        """Remove what was made at these paths as far as that can be, and nothing else in them."""
        entries = self._read()
        for path in paths:
            entry, found = entries[self._key(path)], _stamps(path)
            names = [
                name for name, stamp in (entry.files or {}).items() if found.get(name) == stamp
            ]
            for name in names:
                with suppress(OSError):
                    remove_file(path / name)
            above = {path / place for name in names for place in PurePosixPath(name).parents}
            for place in sorted(above, key=lambda one: -len(one.parts)):
                remove_empty(place)
            if not os.path.lexists(path):
                del entries[self._key(path)]
        self._write(entries)

    def _key(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _read(self) -> dict[str, _Entry]:
        path = self.folder / RECORD
        try:
            content = json.loads(read_text(path))
            if content["format"] != _FORMAT:
                raise ValueError("of another version")
            return {_relative(key): _entry(entry) for key, entry in content["made"].items()}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise OutputError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise OutputError(
                f"{path}: is not the record of what a search has made, but where it goes; {_DO}"
            ) from error

    def _write(self, entries: Mapping[str, _Entry]) -> None:
        made = {
            key: {"inputs": entry.inputs, "files": entry.files} for key, entry in entries.items()
        }
        content = {"format": _FORMAT, "made": made}
        write_text(self.folder / RECORD, json_text(content, indent=1), replace=True)


def check_places(output: Path, folder: Path) -> None:
    """Refuse an output in the search's folder, where it would be among what is removed, or around.

    Raises:
        UsageError: it is there.
    """
    # A link in the folder, and a link into it.
    if is_within(output, folder) or is_within(output.parent, folder):
        raise UsageError(
            f"-o {output}: lies in the search's own folder, {folder}; name an output outside of it"
        )
    if is_within(folder, output):
        raise UsageError(f"--folder {folder}: lies in the output, {output}; name another folder")


def check_inputs(inputs: Iterable[Path], folder: Path) -> None:
    """Refuse a folder for the search that has an input, or that is in one.

    Raises:
        OutputError: with the input.
    """
    for path in inputs:
        if is_within(path, folder):
            raise OutputError(f"--folder {folder}: has the input {path}; name another folder")
        if is_within(folder, path):
            raise OutputError(f"--folder {folder}: lies in the input {path}; name another folder")


def _entry(content: Mapping[str, object]) -> _Entry:
    inputs, files = content["inputs"], content["files"]
    if not isinstance(inputs, str) or not (files is None or isinstance(files, dict)):
        raise ValueError("no entry")
    if files is None:
        return _Entry(inputs, None)
    return _Entry(inputs, {_relative(name): (size, time) for name, (size, time) in files.items()})


def _relative(name: str) -> str:
    """A path in the folder, and never one that leads out of it."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError("leads elsewhere")
    return name


def _stamps(path: Path) -> _Stamps:
    """The files there; links are not followed."""
    if path.is_dir() and not path.is_symlink():
        files = [Path(place, name) for place, _, names in os.walk(path) for name in names]
    else:
        files = [path]
    found = {}
    for file in files:
        with suppress(OSError):
            one = file.lstat()
            found[file.relative_to(path).as_posix()] = one.st_size, one.st_mtime_ns
    return found
