"""Checks whether an output may be written, before any work is done."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from know_cli.checkpoints.checkpoint import Checkpoint
from know_cli.checkpoints.checksum import digest_path, digest_paths, is_digest
from know_cli.checkpoints.folders import other_files, refuse_what_is_in_place
from know_cli.checkpoints.layouts import OTHER_FORMATS, SUFFIX, weights_in
from know_cli.errors import OutputError
from know_cli.files import destination, missing_folder
from know_cli.files.names import own_name
from know_cli.files.naming import second_name
from know_cli.files.protected import Protected, is_special


def check_output(output: Path, inputs: list[Checkpoint], *, is_folder: bool, force: bool) -> None:
    """Refuse an output that must not or cannot be written, before any work is done.

    Args:
        output: the path as the user gave it.
        inputs: checkpoints that must never be overwritten, Θ0 first.
        is_folder: whether a folder is going to be written.
        force: whether an existing output may be replaced.

    Raises:
        OutputError: the reason, and what to do.
    """
    folders = [checkpoint.path for checkpoint in inputs if checkpoint.is_folder]
    files = [path for one in inputs for path in (one.path, *one.headers)]
    _check(output, Protected(files, folders), inputs, is_folder, force)


def check_file_output(output: Path, inputs: Sequence[Path], *, force: bool) -> None:
    """Refuse a single file that must not or cannot be written, as :func:`check_output` does.

    Args:
        output: the path as the user gave it.
        inputs: files that must never be overwritten.
        force: whether an existing output may be replaced.
    """
    _check(output, Protected(inputs), [], False, force)


def name_notices(output: Path) -> list[str]:
    """What to know of a file that is going to be named as one of another format.

    >>> name_notices(Path("start.pt"))
    ['warning: start.pt: will be a safetensors file, and no PyTorch pickle as its name says']
    """
    named = OTHER_FORMATS.get(output.suffix.lower())
    if named is None:
        return []
    what = named[0].removeprefix("a ").partition(",")[0]
    return [f"warning: {output}: will be a safetensors file, and no {what} as its name says"]


def check_folder_output(output: Path, protected: Protected, *, force: bool) -> None:
    """Refuse a folder of files that are made anew, as :func:`check_output` does."""
    _check(output, protected, [], True, force)


def _check(
    output: Path,
    protected: Protected,
    inputs: Sequence[Checkpoint],
    is_folder: bool,
    force: bool,
) -> None:
    _check_place(output, is_folder=is_folder)
    try:
        _check_kind(output, is_folder=is_folder)
        _refuse_inputs(output, protected, inputs if is_folder else [])
        _check_taken(output, force=force)
    except OSError as error:
        raise OutputError(f"{output}: cannot be written: {error.strerror or error}") from error
    check_digest_output(output, protected, force=force)


def _check_place(output: Path, *, is_folder: bool) -> None:
    if output == Path("-"):
        raise OutputError(f"{output}: a checkpoint is written at many places at once; name a file")
    try:
        parent = destination(output).parent
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


def _refuse_inputs(output: Path, protected: Protected, inputs: Sequence[Checkpoint]) -> None:
    """Refuse an output for which an input would be replaced or removed, under whatever name."""
    place = destination(output)
    temporary = place.with_name(own_name(place.name, ".tmp"))
    hidden = [temporary, second_name(temporary)]
    touched = [output, place, *(path for path in hidden if os.path.lexists(path))]
    if place.is_dir():
        names = {Path(name) for name in weights_in(place)}
        for checkpoint in inputs[:1]:
            written = {Path(path.name) for path in checkpoint.headers}
            written |= other_files(checkpoint)[0].keys()
            for name in sorted(written):
                refuse_what_is_in_place(place, name)
            names |= written
        touched += [place / name for name in sorted(names)]
    protected.refuse(output, touched)


def _check_kind(output: Path, *, is_folder: bool) -> None:
    """Refuse what is there and is something else."""
    place = destination(output)
    if place.exists() and place.is_dir() != is_folder:
        wanted, found = ("folder", "file") if is_folder else ("file", "folder")
        if not (place.is_file() or place.is_dir()):
            raise OutputError(f"{output}: is neither a file nor a folder; name another output")
        raise OutputError(
            f"{output}: is a {found}, but the output is a {wanted} as the first checkpoint "
            "is; name another"
        )
    if is_special(place):
        raise OutputError(f"{output}: is neither a file nor a folder; name another output")
    if place.is_dir() and place.resolve().parent == place.resolve():
        raise OutputError(f"{output}: is the root of all files; name another output")


def _check_taken(output: Path, *, force: bool) -> None:
    """Refuse what is there and may not be replaced, or a folder that cannot be written in."""
    if not force and is_taken(output):
        raise OutputError(f"{output}: exists already; --force replaces it")
    place = destination(output)
    folder = place if place.is_dir() else place.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{output}: no permission to write in {folder}")


def is_taken(output: Path) -> bool:
    """Whether the name is taken; an empty folder does not count, nor our temporary in it."""
    if output.is_dir():
        return any(not path.name.startswith(".know-") for path in output.iterdir())
    return os.path.lexists(output)


def check_digest_output(output: Path, protected: Protected, *, force: bool) -> None:
    """Refuse an output whose digest exists already, before any work is done.

    With ``force`` it is removed or replaced, but only if it is one.

    Raises:
        OutputError: the reason, and what to do.
    """
    for path in sorted(digest_paths(output)):
        if os.path.lexists(path):
            _check_digest(path, protected, force)


def check_digest_name(output: Path) -> None:
    """Refuse an output whose digest is to be written and cannot have its name, which is longer.

    Raises:
        OutputError: with the system's reason.
    """
    path = digest_path(output)
    try:
        path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(
            f"{path}: --checksum cannot write it: {error.strerror or error}; name another output"
        ) from error


def _check_digest(path: Path, protected: Protected, force: bool) -> None:
    if not path.is_file():
        raise OutputError(f"{path}: is not a file, but where the output's digest goes")
    protected.refuse(path, [path])
    if not force:
        raise OutputError(f"{path}: exists already; --force replaces it")
    if path.is_symlink() or not is_digest(path):
        raise OutputError(
            f"{path}: is where the output's digest goes, but is none; rename it, or name another "
            "output"
        )
