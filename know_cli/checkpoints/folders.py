"""Folders as outputs: copies the files beside the weights, and replaces an existing folder."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from know_cli.checkpoints.checkpoint import Checkpoint, is_inside_closely
from know_cli.checkpoints.layouts import OTHER_FORMATS, SUFFIX, is_index, weights_in
from know_cli.errors import OutputError
from know_cli.files import sync_folder

# Weights in other formats and training state would contradict the predicted weights beside them.
LEFT_OUT = {SUFFIX, *OTHER_FORMATS}


def _holds_weights(folder: Path) -> bool:
    return any(path.suffix in LEFT_OUT for path in folder.rglob("*"))


def copy_other_files(source: Checkpoint, target: Path) -> list[Path]:
    """Copy what lies beside a folder's weights (config, tokenizer, shard index) into ``target``.

    Links are followed within the folder. Hidden files and weights in other formats are left out,
    and so are whole sub-folders that hold weights, such as those that a trainer saves with its
    state, and links that lead out of the folder: what is published with a model must not be any
    file of this disk that a stranger's link names.

    Returns:
        The files left out because they hold other weights or training state, or lead elsewhere.
    """
    states = [path for path in source.path.iterdir() if path.is_dir() and _holds_weights(path)]
    left_out = sorted(path for path in states if not path.name.startswith("."))
    for path in sorted(source.path.rglob("*")):
        relative = path.relative_to(source.path)
        if source.path / relative.parts[0] in states:
            continue
        if any(part.startswith(".") for part in relative.parts) or not path.is_file():
            continue
        of_other_weights = is_index(path.name) and path != source.index_path
        if path.suffix in LEFT_OUT or of_other_weights:
            if path not in source.headers:
                left_out.append(path)
            continue
        if not is_inside_closely(path, source.path):
            left_out.append(path)
            continue
        copy = target / relative
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        with copy.open("rb+") as file:
            os.fsync(file.fileno())
    return left_out


def move_folder(temporary: Path, output: Path) -> bool:
    """Give a folder its name, or move its files into the folder that has the name.

    Whoever opens the output meanwhile, or after a run that was killed in here, finds the old model,
    the new one, or none; never weights of both, nor the weights of one with the configuration of
    the other. The next run can always tell what is left of the old model: the old index, which
    names the old shards, is removed after them.

    Returns:
        Whether the folder itself was renamed.
    """
    sync_folder(temporary)
    if not output.exists():
        temporary.rename(output)
        return True
    files = {
        path.relative_to(temporary): path for path in sorted(temporary.rglob("*")) if path.is_file()
    }
    for relative in files:
        _refuse_folder_in_place(output, relative)
    index = next((files.pop(at) for at in list(files) if is_index(str(at))), None)
    weights = {at: files.pop(at) for at in list(files) if at.suffix == SUFFIX}
    old = weights_in(output)
    if not _is_one_step(weights, files, output):
        _remove(output, old)
    for relative, path in {**files, **weights}.items():
        target = output / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    # What is left of the model before, its index above all, would be taken for this one's.
    _remove(output, [name for name in old if Path(name) not in weights])
    if index is not None:
        index.replace(output / index.name)
        sync_folder(output)
    return False


def _refuse_folder_in_place(output: Path, relative: Path) -> None:
    """Refuse to begin a replacement that would fail halfway."""
    target = output / relative
    if target.is_dir() and not target.is_symlink():
        raise OutputError(f"{target}: is a folder where a file must go; name another output")
    for parent in relative.parents:
        if (output / parent).exists() and not (output / parent).is_dir():
            raise OutputError(f"{output / parent}: is no folder, but one must go there")


def _is_one_step(weights: Mapping[Path, Path], others: Mapping[Path, Path], output: Path) -> bool:
    """Whether only a single file changes, so that renaming it replaces the whole model."""
    filecmp.clear_cache()  # the cache compares only times and sizes
    return len(weights) == 1 and all(
        (output / at).is_file() and filecmp.cmp(path, output / at, shallow=False)
        for at, path in others.items()
    )


def _remove(folder: Path, names: Iterable[str]) -> None:
    """Remove files, and flush the folder to disk before anything else happens."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    sync_folder(folder)
