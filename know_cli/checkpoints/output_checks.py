"""Checks whether an output may be written, before any work is done."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from know_cli.checkpoints.checkpoint import Checkpoint
from know_cli.checkpoints.checksum import digest_path
from know_cli.checkpoints.layouts import SUFFIX
from know_cli.errors import OutputError
from know_cli.files import missing_folder


def check_output(output: Path, inputs: list[Checkpoint], *, is_folder: bool, force: bool) -> None:
    """Refuse an output that must not or cannot be written, before any work is done.

    Args:
        output: the path as the user gave it.
        inputs: checkpoints that must never be overwritten.
        is_folder: whether a folder is going to be written.
        force: whether an existing output may be replaced.

    Raises:
        OutputError: the reason, and what to do.
    """
    if output == Path("-"):
        raise OutputError(f"{output}: a checkpoint is written at many places at once; name a file")
    parent = output.parent
    try:
        has_parent = parent.is_dir()
        output.exists()
    except OSError as error:  # a name too long, for one
        raise OutputError(f"{output}: cannot be written: {error.strerror or error}") from error
    if not has_parent:
        raise missing_folder(parent)
    if is_folder and output.suffix.lower() == SUFFIX and not output.is_dir():
        raise OutputError(
            f"{output}: is the name of a file, but the output is a folder with the same files as "
            "the first checkpoint is; name a folder"
        )
    for checkpoint in inputs:
        _refuse_input(output, checkpoint, is_folder)
    if output.exists() or output.is_symlink():
        if output.is_dir() != is_folder:
            wanted, found = ("folder", "file") if is_folder else ("file", "folder")
            raise OutputError(
                f"{output}: is a {found}, but the output is a {wanted} as the first checkpoint "
                "is; name another"
            )
        if not (output.is_file() or output.is_dir() or output.is_symlink()):
            raise OutputError(f"{output}: is neither a file nor a folder; name another output")
        if output.is_dir() and output.resolve().parent == output.resolve():
            raise OutputError(f"{output}: is the root of all files; name another output")
        if not force and is_taken(output):
            raise OutputError(f"{output}: exists already; --force replaces it")
    folder = output if output.is_dir() else parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{output}: no permission to write in {folder}")


def _refuse_input(output: Path, checkpoint: Checkpoint, is_folder: bool) -> None:
    inputs = [checkpoint.path, *checkpoint.headers]
    outputs = [output]
    if is_folder:
        outputs += [output / path.name for path in checkpoint.headers]
    for one in inputs:
        for other in outputs:
            if other.exists() and one.samefile(other):
                raise OutputError(
                    f"{output}: is the input {checkpoint.path}; an input is never overwritten, "
                    "name another output"
                )


def check_file_output(output: Path, inputs: Sequence[Path], *, force: bool) -> None:
    """Refuse a single file that must not or cannot be written, before any work is done.

    Args:
        output: the path as the user gave it.
        inputs: files that must never be overwritten.
        force: whether an existing output may be replaced.

    Raises:
        OutputError: the reason, and what to do.
    """
    check_output(output, [], is_folder=False, force=True)
    try:
        for path in inputs:
            if output.exists() and path.exists() and output.samefile(path):
                raise OutputError(
                    f"{output}: is the input; an input is never overwritten, name another output"
                )
    except OSError as error:
        raise OutputError(f"{output}: cannot be written: {error.strerror or error}") from error
    if not force and (output.exists() or output.is_symlink()):
        raise OutputError(f"{output}: exists already; --force replaces it")


def is_taken(output: Path) -> bool:
    """Whether the name is taken; an empty folder does not count, nor our temporary in it."""
    if output.is_dir():
        return any(not path.name.startswith(".know-") for path in output.iterdir())
    return output.exists() or output.is_symlink()


def check_digest_output(output: Path, inputs: Sequence[Checkpoint], *, force: bool) -> None:
    """Refuse an output whose digest exists already, before any work is done.

    Raises:
        OutputError: the reason, and what to do.
    """
    path = digest_path(output)
    if not (path.exists() or path.is_symlink()):
        return
    if not path.is_file():
        raise OutputError(f"{path}: is not a file, but where the output's digest goes")
    if any(path.samefile(file) for one in inputs for file in one.headers):
        raise OutputError(f"{path}: is an input; name another output")
    if not force:
        raise OutputError(f"{path}: exists already; --force replaces it")
