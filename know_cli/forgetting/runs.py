"""Keeps the last checkpoints of a training run, at a spacing, while it goes on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from know_cli.checkpoints import open_checkpoint, save_checkpoint
from know_cli.checkpoints.metadata import TRAINING_STEP, TRAJECTORY_KIND, TrajectoryKind
from know_cli.checkpoints.paths import MAX_CHECKPOINTS, MIN_CHECKPOINTS
from know_cli.errors import CheckpointError, OutputError, UsageError
from know_cli.files import (
    check_writable,
    make_folder,
    new_folder,
    output_errors,
    remove_file,
    remove_tree,
    rename_new,
    sync_folder,
)
from know_cli.forgetting.recorder import state_of

if TYPE_CHECKING:
    from torch import Tensor, nn

_MODEL = "model.safetensors"
_NAME = re.compile(r"checkpoint-(\d{1,18})(\.safetensors)?")
_TEMPORARY = ".checkpoint-unfinished"


class RunRecorder:
    """Saves checkpoints of a run and keeps the last of them, for ``know predict FOLDER``.

    Args:
        folder: for ``checkpoint-500.safetensors`` and so on; made if missing.
        every: training steps from one checkpoint to the next.
        last: how many are kept, 2 to 16.

    Raises:
        UsageError: a number cannot be, or ``folder`` is a file.

    Example:
        >>> from torch import nn
        >>> from know_cli.forgetting import RunRecorder
        >>> run = RunRecorder("run", every=10, last=3)
        >>> model = nn.Linear(2, 1)
        >>> for step in range(1, 51):  # your training
        ...     saved = run.save(step, model)
        >>> [path.name for path in run.kept]
        ['checkpoint-30.safetensors', 'checkpoint-40.safetensors', 'checkpoint-50.safetensors']
    """

    def __init__(self, folder: Path | str, *, every: int, last: int = 5) -> None:
        if every < 1:
            raise UsageError(f"every={every}: give a number of training steps, 1 or more")
        if not MIN_CHECKPOINTS <= last <= MAX_CHECKPOINTS:
            raise UsageError(
                f"last={last}: keep {MIN_CHECKPOINTS} to {MAX_CHECKPOINTS} checkpoints"
            )
        # A training may change the working folder.
        self.folder, self.every, self.last = Path(folder).absolute(), every, last
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{self.folder}: is a file; name a folder for the checkpoints")
        self._kept: dict[int, Path] = self._found()

    @property
    def kept(self) -> list[Path]:
        """The checkpoints that are on disk, the latest last."""
        return [self._kept[step] for step in sorted(self._kept)]

    def begin(self, step: int) -> None:
        """Say where a training begins: at 0, or at the step that it goes on from.

        Checkpoints of later steps, of which a run that was cut off knows no more, are removed.

        Raises:
            UsageError: it begins at 0, and the folder holds checkpoints of a run.
            OutputError: the folder cannot be made or written in.
        """
        later = [each for each in self._kept if each > step]
        if later and step == 0:
            raise UsageError(
                f"{self.folder}: holds checkpoints of a run, up to step {max(later)}; name another "
                "folder for a new one"
            )
        make_folder(self.folder)
        check_writable(self.folder)
        for each in later:
            self._remove(each)

    def save(
        self,
        step: int,
        model: nn.Module | Mapping[str, Tensor],
        write_beside: Callable[[Path], None] | None = None,
    ) -> Path | None:
        """Save a checkpoint, if it is due, and remove those that are too many.

        Args:
            step: that the training has come to.
            model: the model or its state dict.
            write_beside: writes a model's other files, such as its configuration, into a folder;
                the checkpoint is a folder then, and else a file.

        Returns:
            Its path; None where the step is not a multiple of ``every``, or is saved already.

        Raises:
            UsageError: ``model`` is neither.
            OutputError: it cannot be written.
        """
        if step <= 0 or step % self.every or step in self._kept:
            return None
        state = state_of(model, f"{self.folder}: step {step}")
        metadata = {
            "format": "pt",
            TRAJECTORY_KIND: TrajectoryKind.RUN.value,
            TRAINING_STEP: str(step),
        }
        make_folder(self.folder)
        if write_beside is None:
            path = self.folder / f"checkpoint-{step}.safetensors"
            save_checkpoint(path, state, metadata, replace=False)
        else:
            path = self.folder / f"checkpoint-{step}"
            self._write_folder(path, state, metadata, write_beside)
        self._kept[step] = path
        for each in sorted(self._kept)[: -self.last]:
            self._remove(each)
        return path

    def _write_folder(
        self,
        path: Path,
        state: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        write_beside: Callable[[Path], None],
    ) -> None:
        """Write a folder under another name first, so that it is never seen half."""
        if path.exists():
            raise OutputError(
                f"{path}: exists already, and is not of this run; name another folder"
            )
        unfinished = self.folder / _TEMPORARY
        with output_errors(path):
            remove_tree(unfinished, quietly=True)
            new_folder(unfinished)
            write_beside(unfinished)
            save_checkpoint(unfinished / _MODEL, state, metadata)
            rename_new(unfinished, path)
            sync_folder(self.folder)

    def _remove(self, step: int) -> None:
        path = self._kept.pop(step)
        with output_errors(path):
            if path.is_dir():
                remove_tree(path)
            else:
                remove_file(path)

    def _found(self) -> dict[int, Path]:
        """The checkpoints of a run that are in the folder already, if they were saved by this."""
        found: dict[int, Path] = {}
        names = [path.name for path in self.folder.iterdir()] if self.folder.exists() else []
        for name in sorted(names):
            match = _NAME.fullmatch(name)
            if match is None:
                continue
            try:
                with open_checkpoint(self.folder / name) as checkpoint:
                    metadata = checkpoint.metadata
            except CheckpointError:
                continue
            of_run = metadata.get(TRAJECTORY_KIND) == TrajectoryKind.RUN.value
            if of_run and metadata.get(TRAINING_STEP) == match[1]:
                found[int(match[1])] = self.folder / name
        return found
