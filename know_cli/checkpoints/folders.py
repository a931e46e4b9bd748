"""Folders as outputs: copies the files beside the weights, and replaces an existing folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from know_cli.checkpoints.checkpoint import Checkpoint, is_inside_closely
from know_cli.checkpoints.header import Stamp, unreadable
from know_cli.checkpoints.layouts import OTHER_FORMATS, SUFFIX, is_index, weights_in
from know_cli.checkpoints.training_step import TRAINER_STATE
from know_cli.errors import CheckpointError, OutputError
from know_cli.files import open_to_read, remove_file, sync_folder
from know_cli.files.folders import copy_file, folder_below, open_folder
from know_cli.files.moving import files_below, have_same_content, move

# Weights in other formats and training state would contradict the predicted weights beside them.
LEFT_OUT = {SUFFIX, *OTHER_FORMATS}


def _walk(folder: Path) -> Iterator[Path]:
    """All files and links below a folder, sorted; links to folders are not followed.

    Raises:
        CheckpointError: a folder cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise unreadable(Path(error.filename or folder), error) from error

    for place, folders, names in os.walk(folder, onerror=fail):
        folders.sort()
        yield from (Path(place, name) for name in sorted(names))


def _holds_weights(folder: Path) -> bool:
    return any(path.suffix in LEFT_OUT for path in _walk(folder))


def other_files(
    source: Checkpoint, *, is_converted: bool = False
) -> tuple[dict[Path, Path], list[Path]]:
    """What lies beside a folder's weights (config, tokenizer, shard index) and goes with them.

    Links are judged by what they lead to. Hidden files and weights in other formats are left out,
    and so are whole sub-folders that hold weights, such as those that a trainer saves with its
    state, and what lies out of the folder: what is published with a model must not be any file of
    this disk that a stranger's link names.

    Args:
        source: the folder.
        is_converted: whether the same weights are written in another format, so that what a
            trainer tells of them holds.

    Returns:
        Path within the folder → file, and the files left out because they hold other weights or
        training state, or lead elsewhere.

    Raises:
        CheckpointError: a folder cannot be listed.
    """
    states = [
        path
        for path in sorted(source.path.iterdir())
        if path.is_dir() and not path.name.startswith(".") and _holds_weights(path)
    ]
    copied: dict[Path, Path] = {}
    left_out = list(states)
    for path in _walk(source.path):
        relative = path.relative_to(source.path)
        if _is_hidden(relative) or source.path / relative.parts[0] in states:
            continue
        if not path.is_file() or path in source.headers:
            continue
        is_other = path.suffix in LEFT_OUT or (path.name == TRAINER_STATE and not is_converted)
        is_other |= is_index(path.name) and path != source.index_path
        if is_other or (path.is_symlink() and not _may_be_copied(path, source)):
            left_out.append(path)
        else:
            copied[relative] = path
    return copied, sorted(left_out)


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _may_be_copied(link: Path, source: Checkpoint) -> bool:
    """Whether what a link leads to would be copied under its own name, too."""
    if not is_inside_closely(link, source.path):
        return False
    real, root = link.resolve(), source.path.resolve()
    if not real.is_relative_to(root):  # in a cache, whose files are called by their digests
        return True
    relative = real.relative_to(root)
    return not (_is_hidden(relative) or real.suffix in LEFT_OUT)


def check_other_files(source: Checkpoint) -> None:
    """Open what :func:`copy_other_files` is going to copy, so that it fails before the work.

    Raises:
        CheckpointError: a file cannot be read.
    """
    for path in other_files(source)[0].values():
        try:
            os.close(open_to_read(path))
        except OSError as error:
            raise unreadable(path, error) from error


@dataclass(frozen=True)
class Beside:
    """What goes with a folder's weights, as it was before the work.

    Attributes:
        copied: path within the folder → file, and what tells when it changes.
        left_out: files that hold other weights or training state, or lead elsewhere.
    """

    copied: Mapping[Path, tuple[Path, Stamp]] = field(default_factory=dict)
    left_out: Sequence[Path] = ()

    @staticmethod
    def of(source: Checkpoint, *, is_converted: bool = False) -> Beside:
        """What :func:`other_files` finds, which has the arguments.

        Raises:
            CheckpointError: a folder cannot be listed, or a file not be looked at.
        """
        copied, left_out = other_files(source, is_converted=is_converted)
        return Beside({name: (path, _stamp(path)) for name, path in copied.items()}, left_out)


def _stamp(path: Path) -> Stamp:
    try:
        return Stamp.of(path.stat())
    except OSError as error:
        raise unreadable(path, error) from error


def copy_other_files(beside: Beside, target: int) -> None:
    """Copy what goes with a folder's weights into an open folder.

    Raises:
        CheckpointError: a file cannot be read, or has changed since it was found.
        OSError: a copy cannot be written.
    """
    for relative, (path, stamp) in beside.copied.items():
        try:
            descriptor = open_to_read(path)
        except OSError as error:
            raise unreadable(path, error) from error
        try:
            with folder_below(target, relative.parent.parts, make=True) as folder:
                copy_file(descriptor, relative.name, folder)
            if Stamp.of(os.fstat(descriptor)) != stamp:
                raise CheckpointError(
                    f"{path}: has changed while it was read, so that nothing made of it can be "
                    "relied on; do not write to inputs during a run, and run again"
                )
        finally:
            os.close(descriptor)


def move_files(temporary: int, output: Path, *, replace: bool) -> None:
    """Move the files of an open folder into the folder that has the output's name.

    Whoever opens the output meanwhile, or after a run that was killed in here, finds the old model,
    the new one, or none; never weights of both, nor the weights of one with the configuration of
    the other. The next run can always tell what is left of the old model: the old index, which
    names the old shards, is removed after them.

    Args:
        temporary: descriptor of the folder with the new files.
        output: the folder that exists; no link.
        replace: whether files in it are replaced and the old model's removed.

    Raises:
        OutputError: something in the way cannot be replaced.
        OSError: the system refuses.
    """
    os.fsync(temporary)
    descriptor = open_folder(output)
    try:
        _move_files(temporary, descriptor, output, replace)
    finally:
        os.close(descriptor)


def _move_files(temporary: int, target: int, output: Path, replace: bool) -> None:
    files = list(files_below(temporary))
    for relative in files:  # as has been done before the work
        refuse_what_is_in_place(output, relative)
    index = next((at for at in files if is_index(str(at))), None)
    weights = [at for at in files if at.suffix == SUFFIX]
    others = [at for at in files if at != index and at not in weights]
    old = weights_in(output) if replace else []
    is_one_step = len(weights) == 1 and all(
        have_same_content(temporary, target, at) for at in others
    )
    # Otherwise renaming one file does not replace the whole model.
    if not is_one_step:
        _remove(output, old)
    for relative in (*others, *weights):
        move(temporary, target, relative, replace=replace)
    # What is left of the model before, its index above all, would be taken for this one's.
    _remove(output, [name for name in old if Path(name) not in weights])
    if index is not None:
        move(temporary, target, index, replace=replace)
        sync_folder(output)


def refuse_what_is_in_place(output: Path, relative: Path) -> None:
    """Refuse to begin a replacement that would fail halfway, or go through a link."""
    target = output / relative
    if target.is_dir() and not target.is_symlink():
        raise OutputError(f"{target}: is a folder where a file must go; name another output")
    if os.path.lexists(target) and not (target.is_file() or target.is_symlink()):
        raise OutputError(f"{target}: is no file, and is not replaced; name another output")
    for parent in [output / above for above in relative.parents if above.name]:
        if parent.is_symlink():
            raise OutputError(f"{parent}: is a link, but a folder must go there; remove it")
        if parent.exists() and not parent.is_dir():
            raise OutputError(f"{parent}: is no folder, but one must go there")


def _remove(folder: Path, names: Iterable[str]) -> None:
    """Remove files, and flush the folder to disk before anything else happens."""
    for name in names:
        remove_file(folder / name)
    sync_folder(folder)
