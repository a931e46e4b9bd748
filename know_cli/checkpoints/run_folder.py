"""A training run as its folder, and some of its checkpoints: every second one, the last five."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from know_cli.checkpoints.checkpoint import open_checkpoint
from know_cli.checkpoints.layouts import SUFFIX, has_model
from know_cli.checkpoints.training_step import training_steps
from know_cli.errors import CheckpointError

# What trainers call the checkpoints in a run's folder, the most common first.
_NAMES = tuple(
    re.compile(rf"{word}[-_=]?(\d{{1,18}})(?:{re.escape(SUFFIX)})?")
    for word in ("checkpoint", "(?:global_)?step", "ckpt", "iter", "epoch")
)


def run_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, the latest first by the numbers in their names.

    They are called ``checkpoint-500``, as transformers' Trainer does, or else all ``step_500``,
    ``ckpt-500``, ``iter_500`` or ``epoch_5``; each is a folder or a ``.safetensors`` file.

    Returns:
        Their paths; none if there are no such names.

    Raises:
        CheckpointError: the folder cannot be listed.
    """
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror or error}") from error
    for pattern in _NAMES:
        found: dict[int, Path] = {}
        for name in names:
            match, path = pattern.fullmatch(name), folder / name
            if match is None or not (path.is_dir() or name.endswith(SUFFIX)):
                continue
            other = found.get(int(match[1]))
            # A folder of logs does not hide the file beside it.
            if other is None or (not path.is_dir() and not has_model(other)):
                found[int(match[1])] = path
        if found:
            return [path for _, path in sorted(found.items(), reverse=True)]
    return []


def choose(
    paths: Sequence[Path],
    metadata: Sequence[Mapping[str, str]],
    last: int | None = None,
    every: int | None = None,
) -> list[Path]:
    """Every so many checkpoints of a run, counted back from the latest, and the last of these.

    Args:
        paths: of the run, in any order.
        metadata: of each.
        last: how many; None is all.
        every: 2 is the latest, the one before the one before it, and so on; None is all.

    Returns:
        Their paths, the latest first.

    Raises:
        CheckpointError: nothing tells their training steps.

    >>> run = [Path(f"checkpoint-{step}") for step in (100, 200, 300, 400, 500)]
    >>> [path.name for path in choose(run, [{}] * 5, last=2, every=2)]
    ['checkpoint-500', 'checkpoint-300']
    """
    steps = training_steps(list(zip(paths, metadata, strict=True)))
    if steps is None:
        raise CheckpointError(
            f"{paths[0]}: nothing tells the training steps of the checkpoints, which --last and "
            "--every need; name the checkpoints that are meant"
        )
    ordered = [path for _, path in sorted(zip(steps, paths, strict=True), reverse=True)]
    return ordered[:: every or 1][:last]


def read_metadata(path: Path) -> dict[str, str]:
    """A checkpoint's metadata; empty where it cannot be read, which is said when it is opened."""
    try:
        with open_checkpoint(path) as checkpoint:
            return checkpoint.metadata
    except CheckpointError:
        return {}
