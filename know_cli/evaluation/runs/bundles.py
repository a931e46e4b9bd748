"""What a bundle of a hyper-model makes of a run's last checkpoints, beside their averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from know_cli.checkpoints import save_checkpoint
from know_cli.checkpoints.metadata import TRAINING_STEP, TRAJECTORY_KIND, TrajectoryKind
from know_cli.errors import UsageError
from know_cli.evaluation import cache
from know_cli.evaluation.runs import plan
from know_cli.evaluation.runs.averages import AVERAGES
from know_cli.evaluation.variants import identity, is_available, of_bundle, predict


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


def window_files(folder: Path) -> list[Path]:
    """The checkpoints that bundles read, in a trial's folder, the latest first."""
    return [folder / f"window-{back}.safetensors" for back in range(plan.CHECKPOINTS)]


def keep_window(folder: Path, states: Sequence[Mapping[str, Tensor]], steps: Sequence[int]) -> None:
    """Write the checkpoints that bundles read.

    Args:
        folder: of the trial.
        states: the latest first.
        steps: of the training, of each.

    Raises:
        OutputError: they cannot be written.
    """
    for file, state, step in zip(window_files(folder), states, steps, strict=True):
        kind = {TRAJECTORY_KIND: TrajectoryKind.RUN.value, TRAINING_STEP: str(step)}
        save_checkpoint(file, state, {"format": "pt", **kind})


def predicted(folder: Path, name: str, path: str) -> dict[str, Tensor]:
    """The state dict that a bundle predicts from a trial's checkpoints, in one step.

    Raises:
        CheckpointError: the bundle cannot be used with them.
        OutputError: the prediction cannot be written.
    """
    variant = of_bundle(name, path)
    found = predict(variant, window_files(folder), None, 1, None, TrajectoryKind.RUN)
    return found[1]
