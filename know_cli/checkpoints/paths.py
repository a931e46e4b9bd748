"""Checkpoint arguments as users write them: ranges, missing suffixes, rates, output names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from know_cli.errors import CheckpointError, UsageError

SUFFIX = ".safetensors"
# ckpt0..ckpt4.safetensors, run/ckpt0..ckpt4, run/ckpt0..run/ckpt4, ckpt00..04
_RANGE = re.compile(
    r"^(?P<prefix>.*?)(?P<first>\d+)\.\.(?P<again>.*?)(?P<last>\d+)(?P<suffix>\D*)$"
)
_MAX_RANGE = 64
MIN_CHECKPOINTS = 2
MAX_CHECKPOINTS = 16


def expand_arguments(arguments: list[str]) -> list[Path]:
    """Turn the checkpoint arguments of a command line into existing paths, in their order.

    A single argument that names nothing on disk but reads as a number range
    (``run/ckpt0..ckpt4.safetensors``, ``run/ckpt0..ckpt4``, ``run/ckpt0..4``) becomes its
    members; a path that does not exist, but does with ``.safetensors`` after it, gets it.

    Raises:
        CheckpointError: a path does not exist.
    """
    if len(arguments) == 1 and not _existing(arguments[0]):
        arguments = _expand_range(arguments[0]) or arguments
    paths = []
    for argument in arguments:
        found = _existing(argument)
        if found is None:
            raise CheckpointError(f"{argument}: no such file or folder; check the path")
        paths.append(found)
    return paths


def check_count(paths: Sequence[Path]) -> None:
    """Refuse too few or too many checkpoints, or one given twice.

    Raises:
        UsageError: with what is wrong.
    """
    if not MIN_CHECKPOINTS <= len(paths) <= MAX_CHECKPOINTS:
        raise UsageError(
            f"got {len(paths)} checkpoint{'s' * (len(paths) != 1)}: give "
            f"{MIN_CHECKPOINTS} to {MAX_CHECKPOINTS}, full data first, most-forgotten last"
        )
    for number, path in enumerate(paths):
        for other in paths[:number]:
            if path.resolve() == other.resolve() or (path.exists() and path.samefile(other)):
                raise UsageError(f"{path}: given twice; each session has a checkpoint of its own")


def _existing(argument: str) -> Path | None:
    for candidate in (Path(argument), Path(argument + SUFFIX)):
        try:
            if candidate.exists():
                return candidate
        except OSError as error:  # a name too long, for one
            raise CheckpointError(f"{argument}: {error.strerror or error}") from error
    return None


def _expand_range(argument: str) -> list[str]:
    match = _RANGE.match(argument)
    if match is None:
        return []
    prefix, again = match["prefix"], match["again"]
    if again not in ("", prefix, prefix.rpartition("/")[2]):
        return []
    first, last = int(match["first"]), int(match["last"])
    if abs(last - first) >= _MAX_RANGE:
        return []
    width = len(match["first"]) if match["first"].startswith("0") else 0
    direction = 1 if last >= first else -1
    return [
        f"{prefix}{number:0{width}d}{match['suffix']}"
        for number in range(first, last + direction, direction)
    ]


def factor_name(rate: float, steps: int) -> str:
    """The factor of training data that ``steps`` steps at a sampling rate stand for.

    >>> factor_name(0.5, 3)
    'x8'
    >>> factor_name(1 / 3, 2)
    'x9'
    >>> factor_name(0.7, 1)
    'x1.43'
    """
    factor = rate**-steps
    # Three digits that count; more where fewer would say that nothing is gained.
    rounded = float(f"{factor:.3g}")
    if rounded == 1:
        return f"x{factor:.6g}"
    return f"x{rounded:.0f}" if rounded >= 100 else f"x{rounded:.3g}"


def step_path(output: Path, rate: float, step: int, is_folder: bool) -> Path:
    """Where ``--every-step`` writes an intermediate step: ``out.x2.safetensors``, ``out.x2/``."""
    name = factor_name(rate, step)
    if not output.name:  # "." and the like
        output = output.resolve()
    if is_folder or not output.suffix:
        return output.with_name(f"{output.name}.{name}")
    return output.with_name(f"{output.stem}.{name}{output.suffix}")
