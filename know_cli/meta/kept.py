"""Where trainings keep what they have learned so far: beside their bundle, for the next call."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from know_cli.checkpoints import open_checkpoint
from know_cli.errors import CheckpointError, OutputError
from know_cli.files import remove_file
from know_cli.files.folders import remove_empty
from know_cli.files.names import is_temporary


def kept_beside(output: Path) -> Path:
    """The file or folder in which a training to a bundle keeps what it has learned."""
    named = output if output.name else output.absolute()  # "." has no name
    return named.with_name(named.name + ".partial")


def check_kept_file(path: Path, key: str) -> None:
    """Refuse a file that no training has written, before one would replace and remove it.

    Args:
        path: of the file; it may be missing.
        key: in the metadata of what such a training writes.

    Raises:
        OutputError: something else is there.
    """
    if (path.exists() or path.is_symlink()) and not _is_kept(path, key):
        raise _something_else(path)


def check_kept_folder(path: Path, names: Collection[str], key: str) -> None:
    """Refuse a folder with anything in it that no training has written; see above.

    Args:
        path: of the folder; it may be missing.
        names: of the files that such a training writes.
        key: in their metadata.

    Raises:
        OutputError: something else is there.
    """
    if not (path.exists() or path.is_symlink()):
        return
    if path.is_symlink() or not path.is_dir():
        raise _something_else(path)
    try:
        found = sorted(path.iterdir())
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {error.strerror or error}") from error
    for one in found:
        # What a training that was killed left is emptied when its file is written.
        is_own = one.name in names and _is_kept(one, key)
        if not (is_own or is_temporary(one.name)):
            raise _something_else(one)


def remove_kept_folder(path: Path, names: Collection[str]) -> None:
    """Remove the files that a training keeps, and their folder if nothing else is in it."""
    for name in names:
        with suppress(OSError):
            remove_file(path / name)
    remove_empty(path)


def _is_kept(path: Path, key: str) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with open_checkpoint(path) as checkpoint:
            return key in checkpoint.metadata
    except CheckpointError:
        return False


def _something_else(path: Path) -> OutputError:
    return OutputError(
        f"{path}: is where the training keeps what it has learned, but is something else; move it "
        "away, or name another -o"
    )
