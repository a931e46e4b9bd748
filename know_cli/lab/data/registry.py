"""The data sets by name. To add one, write a module with a :class:`Source` and a line here."""

from __future__ import annotations

from pathlib import Path

from know_cli.errors import UsageError
from know_cli.lab.data import cifar, digits, glyphs, idx, text
from know_cli.lab.data.samples import DataSet
from know_cli.lab.data.source import Source

DATA_SETS: dict[str, Source] = {
    "cifar10": cifar.CIFAR10,
    "cifar100": cifar.CIFAR100,
    "digits": digits.DIGITS,
    "fashion-mnist": idx.FASHION_MNIST,
    "glyphs-cyrillic": glyphs.CYRILLIC,
    "glyphs-greek": glyphs.GREEK,
    "glyphs-latin": glyphs.LATIN,
    "mnist": idx.MNIST,
    "text": text.TEXT,
}
# The first is where Debian's packages of data sets install.
SYSTEM_FOLDERS = (Path("/usr/share/datasets"), Path("/usr/local/share/datasets"))


def _folders(name: str, folder: Path | None) -> list[Path]:
    given = [] if folder is None else [folder / name, folder]
    return given + [system / name for system in SYSTEM_FOLDERS]


def _check(folder: Path | None) -> None:
    if folder is not None and not folder.is_dir():
        raise UsageError(f"{folder}: no such folder of data sets")


def load(name: str, folder: Path | None = None) -> DataSet:
    """Read or generate a data set.

    Args:
        name: one of ``DATA_SETS``.
        folder: of the data sets' files, which are searched for in ``folder/name``, then in
            ``folder``, then where system packages put them.

    Raises:
        UsageError: there is no such data set or folder, files or a package that it needs are
            missing, or a file is corrupt.
    """
    if name not in DATA_SETS:
        raise UsageError(f"unknown data set {name!r}; choose from {', '.join(DATA_SETS)}")
    _check(folder)
    return DATA_SETS[name].read(_folders(name, folder))


def available(folder: Path | None = None) -> list[str]:
    """Sorted names of the data sets that :func:`load` finds; none is read completely.

    Args:
        folder: as for :func:`load`.

    Raises:
        UsageError: there is no such folder.
    """
    _check(folder)
    return sorted(name for name, source in DATA_SETS.items() if source.find(_folders(name, folder)))
