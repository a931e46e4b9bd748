"""What a run reads, which it must neither replace nor remove, nor write into."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from know_cli.errors import OutputError

_Identity = tuple[int, int]


class Protected:
    """Files and folders that stay as they are, known by device and inode.

    Args:
        files: that are read; each is protected under all of its names.
        folders: in which nothing is written, and all files of which are protected.
    """

    def __init__(self, files: Iterable[Path], folders: Iterable[Path] = ()) -> None:
        self._files: dict[_Identity, Path] = {}
        self._folders: dict[_Identity, Path] = {}
        self._above: dict[_Identity, Path] = {}
        for folder in folders:
            self._add_folder(folder)
        for file in files:
            self._add_file(file)

    def _add_folder(self, folder: Path) -> None:
        found = _identity(folder)
        if found is None or found in self._folders:
            return
        self._folders[found] = folder
        self._files.setdefault(found, folder)
        self._add_above(folder, folder)
        for place, _, names in os.walk(folder):
            for name in names:
                self._add_file(Path(place, name))

    def _add_file(self, file: Path) -> None:
        for identity in (_identity(file), _identity(file, follow=False)):
            if identity is not None:
                self._files.setdefault(identity, file)
        self._add_above(file, file)

    def _add_above(self, path: Path, named: Path) -> None:
        """Note in which folders something lies, as it is named and really."""
        for place in {path.parent, Path(os.path.realpath(path)).parent}:
            for identity in _above(place):
                if identity in self._above:
                    break  # and so are those above it
                self._above[identity] = named

    def refuse(self, output: Path, touched: Iterable[Path], *, option: str = "") -> None:
        """Refuse an output that would change what is protected.

        Args:
            output: as the user named it, for the message.
            touched: all that may be made, replaced or removed for it; a folder stands for all
                that is in it.
            option: that it was given with, for the message.

        Raises:
            OutputError: with the input that is meant.
        """
        for path in touched:
            named = output if os.path.realpath(path) == os.path.realpath(output) else path
            start = f"{option} {named}" if option else f"{named}"
            own = [_identity(path), _identity(path, follow=False)]
            for identity in own:
                if identity in self._files:
                    raise OutputError(
                        f"{start}: is the input {self._files[identity]}; an input is never "
                        "overwritten, name another output"
                    )
                if identity is not None and identity in self._above and path.is_dir():
                    raise OutputError(
                        f"{start}: has the input {self._above[identity]} in it; an input is never "
                        "overwritten, name another output"
                    )
            places = [Path(os.path.realpath(path))]
            if path.is_dir():
                places.append(places[0] / "any")  # it may be an input folder itself
            for identity in (one for place in places for one in _above(place.parent)):
                if identity in self._folders:
                    raise OutputError(
                        f"{start}: lies in the input {self._folders[identity]}, in which nothing "
                        "is written; name another output"
                    )


def _identity(path: Path, *, follow: bool = True) -> _Identity | None:
    try:
        found = path.stat() if follow else path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _above(folder: Path) -> Iterator[_Identity]:
    """The identities of a folder and of all above it, from itself on."""
    folder = folder.absolute()
    for place in (folder, *folder.parents):
        identity = _identity(place)
        if identity is not None:
            yield identity


def is_one_file(path: Path, other: Path) -> bool:
    """Whether two names are of one file, also where case or the form of accents does not count.

    Neither has to exist.
    """
    one, two = (Path(os.path.realpath(name)) for name in (path, other))
    found = _identity(one)
    return (found is not None and found == _identity(two)) or folded(one) == folded(two)


def is_within(path: Path, folder: Path) -> bool:
    """Whether a path lies in a folder or is it, as :func:`is_one_file` compares."""
    one, two = (Path(os.path.realpath(name)) for name in (path, folder))
    parts, others = (tuple(map(folded, name.parts)) for name in (one, two))
    found = _identity(two)
    return parts[: len(others)] == others or (found is not None and found in list(_above(one)))


def folded(name: Path | str) -> str:
    """A name as file systems compare it that tell neither case nor forms of accents apart."""
    return unicodedata.normalize("NFC", os.fspath(name)).casefold()


def is_special(path: Path) -> bool:
    """Whether a name, links followed, is neither free nor a file nor a folder: a pipe or device."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
