"""What a bundle of a hyper-model makes of a run's last checkpoints, beside their averages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from know_cli.checkpoints import save_checkpoint
from know_cli.checkpoints.metadata import TRAINING_STEP, TRAJECTORY_KIND, TrajectoryKind
from know_cli.checkpoints.state import read_state
from know_cli.errors import UsageError
from know_cli.evaluation import cache
from know_cli.evaluation.runs import plan
from know_cli.evaluation.runs.averages import AVERAGES
from know_cli.evaluation.variants import identity, is_available, of_bundle, predict
from know_cli.files import make_folder


def _arms() -> set[str]:
    """The names of what is measured of a run without any bundle."""
    more = {of(share) for share in plan.MORE for of in (plan.annealed, plan.longer)}
    return {plan.LAST, plan.COSINE, *more, *(average.name for average in AVERAGES)}


def check_bundles(bundles: Mapping[str, str]) -> None:
    """Refuse bundles that cannot be measured.

    Args:
        bundles: paths by name.

    Raises:
        UsageError: a name is taken, or a bundle does not exist or reads another number of
            checkpoints.
        CheckpointError: a bundle is corrupt, or was not taught on runs.
    """
    taken = _arms()
    for name, path in bundles.items():
        if name in taken:
            raise UsageError(f"--bundle {name}=…: is already the name of a start")
        if not is_available(of_bundle(name, path), plan.CHECKPOINTS, TrajectoryKind.RUN):
            raise UsageError(
                f"--bundle {name}={path}: cannot read {plan.CHECKPOINTS} checkpoints, which is "
                "what runs are measured with"
            )


def facts(name: str, path: str) -> dict[str, Any]:
    """In plain types, what determines a bundle's predictions besides the checkpoints."""
    return identity(of_bundle(name, path), plan.CHECKPOINTS)


def file_of(folder: Path, name: str, path: str) -> Path:
    """Where the result of a bundle is kept in a trial's folder."""
    return folder / "bundles" / f"{name}-{cache.key(facts(name, path), cache.code_key())}.json"


def window_files(folder: Path, spacing: float) -> list[Path]:
    """Five checkpoints that bundles read, in a trial's folder, the latest first.

    Args:
        folder: of the trial.
        spacing: share of the run between two of them.
    """
    place = folder / "windows" / f"{spacing:g}"
    return [place / f"{back}.safetensors" for back in range(plan.CHECKPOINTS)]


def keep_windows(
    folder: Path,
    states: Mapping[int, Mapping[str, Tensor]],
    steps: Mapping[tuple[float, int], int],
) -> None:
    """Write the checkpoints that bundles read.

    Args:
        folder: of the trial.
        states: by the step of the training.
        steps: by spacing and number counted back from the last.

    Raises:
        OutputError: they cannot be written.
    """
    for spacing in plan.SPACINGS:
        for back, file in enumerate(window_files(folder, spacing)):
            step = steps[spacing, back]
            make_folder(file.parent)
            kind = {TRAJECTORY_KIND: TrajectoryKind.RUN.value, TRAINING_STEP: str(step)}
            save_checkpoint(file, dict(states[step]), {"format": "pt", **kind})


def read_window(folder: Path, spacing: float) -> list[dict[str, Tensor]]:
    """Five checkpoints of a trial, the oldest first."""
    return [read_state(file) for file in reversed(window_files(folder, spacing))]


def has_windows(folder: Path) -> bool:
    """Whether all of them are there."""
    files = (file for spacing in plan.SPACINGS for file in window_files(folder, spacing))
    return all(file.exists() for file in files)


def predicted(folder: Path, name: str, path: str, spacing: float) -> dict[str, Tensor]:
    """The state dict that a bundle predicts from a trial's checkpoints, in one step.

    Raises:
        CheckpointError: the bundle cannot be used with them.
        OutputError: the prediction cannot be written.
    """
    variant, files = of_bundle(name, path), window_files(folder, spacing)
    return predict(variant, files, None, 1, None, TrajectoryKind.RUN)[1]
