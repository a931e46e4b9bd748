"""From recorded trajectories to training windows, one table per kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from know_cli.checkpoints.metadata import Regime
from know_cli.errors import UsageError, counted
from know_cli.forgetting.record_checks import RECORD
from know_cli.kinds import PREDICTED_KINDS, Kind
from know_cli.meta.series import (
    Floats,
    NotUsableError,
    Series,
    is_series,
    load_series,
    read_trajectory,
)
from know_cli.meta.settings import Target


@dataclass(frozen=True)
class Windows:
    """Histories of scalar parameters, and the values that are to be predicted from them.

    Attributes:
        windows: ``[rows, S]`` float32, **oldest-forgotten first, θ0 last**.
        targets: ``[rows, steps]`` float32: the value after one step, after two, …; NaN where it
            was not recorded, which never holds for the first.
        trajectory: ``[rows]`` int32, a position in :attr:`Collection.trajectories`.
    """

    windows: Floats
    targets: Floats
    trajectory: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def steps(self) -> int:
        """The number of steps that targets are for."""
        return int(self.targets.shape[1])

    def of(self, trajectories: Iterable[int]) -> Windows:
        """The rows of some trajectories."""
        return self.rows(np.isin(self.trajectory, list(trajectories)))

    def has_target(self, step: int) -> NDArray[np.bool_]:
        """``[rows]``: which rows have a target after this many steps, at least 1."""
        there: NDArray[np.bool_] = np.isfinite(self.targets[:, step - 1])
        return there

    def with_target(self, step: int) -> Windows:
        """The rows that have a target after this many steps, with only that target."""
        there = self.rows(self.has_target(step))
        return Windows(there.windows, there.targets[:, step - 1 : step], there.trajectory)

    def rows(self, chosen: NDArray[np.bool_]) -> Windows:
        """The rows that a mask ``[rows]`` selects."""
        return Windows(self.windows[chosen], self.targets[chosen], self.trajectory[chosen])


@dataclass(frozen=True)
class RecordedTrajectory:
    """A trajectory that windows were taken from.

    Attributes:
        folder: that it was read from, or file.
        identity: hexadecimal digits that name it.
        function: name of the function that trained it.
        rate: sampling rate.
        architecture: of the network; empty if unknown.
        data_set: that it was trained on; empty if unknown.
        data_limited: see :func:`is_data_limited`.
        regime: ``chain`` or ``common-start``; see
            :class:`~know_cli.checkpoints.metadata.Regime`.
    """

    folder: Path
    identity: str
    function: str
    rate: float
    architecture: str = ""
    data_set: str = ""
    data_limited: bool | None = None
    regime: str = Regime.CHAIN.value


@dataclass(frozen=True)
class Collection:
    """All windows of some trajectories.

    Attributes:
        windows: one table for each of conv, fc and bias; some may be empty.
        trajectories: those that were used.
        skipped: by path, why the others were not used.
    """

    windows: dict[Kind, Windows]
    trajectories: list[RecordedTrajectory]
    skipped: dict[Path, str]


def find_trajectories(paths: Sequence[Path]) -> list[Path]:
    """Recorded trajectories (folders) and collected ones (files), at or below the given paths.

    Returns:
        Their paths without duplicates; for each given path the folders, then the files, sorted.

    Raises:
        UsageError: one of the paths holds none.
    """
    found: list[Path] = []
    for path in paths:
        folders = sorted(record.parent for record in path.rglob(RECORD)) if path.is_dir() else []
        # Hidden folders hold the checkpoints of trajectories that are not finished yet.
        folders = [folder for folder in folders if not folder.name.startswith(".")]
        candidates = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        files = [file for file in candidates if is_series(file)]
        if not folders and not files:
            raise UsageError(
                f"{path}: holds no {RECORD} and no collected trajectory; record some with "
                "'know forget' or 'know collect'"
            )
        found += [*folders, *files]
    return list(dict.fromkeys(found))


def is_data_limited(facts: dict[str, Any]) -> bool | None:
    """Whether more data would have helped a trajectory's Θ0 more than longer training.

    Compares the test accuracy of Θ0 continued on 1/r times its data with that of Θ0 trained for
    as many steps on its own data, and with that of Θ0 itself. The answer is no if neither helps,
    or if longer training helps as much.

    Returns:
        None if these accuracies were not recorded.
    """
    try:
        session = facts["recorded"]["0"]["measurements"]
        more_data = facts["recorded"]["-1"]["measurements"]["test_accuracy"]
        return bool(more_data > max(session["longer_test_accuracy"], session["test_accuracy"]))
    except (KeyError, TypeError):
        return None


def collect_windows(
    paths: Sequence[Path],
    *,
    target: Target,
    checkpoints: int = 5,
    steps: int = 1,
    rows_per_tensor: int = 1000,
    seed: int = 0,
) -> Collection:
    """Take windows from recorded trajectories.

    For retrodiction they slide along the sessions: Θ(j+S−1) … Θ(j) with targets Θ(j−1), Θ(j−2),
    …, for every j ≥ 1 that the trajectory is long enough for. For continuation there is one,
    Θ(S−1) … Θ0, with targets ``continued1``, ``continued2``, …

    As in prediction, tensors that stay the same throughout a window are left out, and so are
    running statistics; a normalisation layer's weight and bias are of kind bias.

    Args:
        paths: folders that have a ``trajectory.json``, or files of collected trajectories.
        target: what is to be predicted.
        checkpoints: S, the length of a window.
        steps: the most targets per window.
        rows_per_tensor: the most elements of one tensor per window position, drawn without
            replacement.
        seed: of the draw; what is drawn from a trajectory does not depend on the others.

    Raises:
        UsageError: no trajectory can be used.
        CheckpointError: a checkpoint is corrupt, or the checkpoints of a trajectory do not match.
    """
    tables: dict[Kind, list[Windows]] = {kind: [] for kind in PREDICTED_KINDS}
    used: list[RecordedTrajectory] = []
    skipped: dict[Path, str] = {}
    seen: dict[str, Path] = {}
    for path in paths:
        try:
            series = _load(path, rows_per_tensor, seed)
            same = seen.setdefault(series.identity, path)
            if same is not path:
                # On both sides of a split, KNOWN would be evaluated on what it was fitted to.
                raise NotUsableError(f"is the same trajectory as {same}")
            facts = series.facts
            positions = _positions(
                facts["sessions"], facts["continuations"], target, checkpoints, steps
            )
            generator = np.random.default_rng([seed, int(series.identity, 16)])
            for window, targets in positions:
                taken = _take(series, window, targets, rows_per_tensor, generator, len(used))
                for kind, windows in taken:
                    tables[kind].append(_padded(windows, steps))
        except NotUsableError as error:
            skipped[path] = str(error)
            continue
        used.append(_described(path, facts))
    if not used:
        first = [f"{path}: {reason}" for path, reason in skipped.items()][:1]
        reason = first[0] if first else "there are no trajectories"
        raise UsageError(f"no trajectory can be used for {target.value}: {reason}")
    return Collection(
        {kind: _join(tables[kind], checkpoints, steps) for kind in PREDICTED_KINDS}, used, skipped
    )


def _load(path: Path, rows_per_tensor: int, seed: int) -> Series:
    if path.is_file():
        return load_series(path)
    return read_trajectory(path, rows_per_tensor=rows_per_tensor, seed=seed)


def _described(path: Path, facts: dict[str, Any]) -> RecordedTrajectory:
    setup = facts.get("setup", {})
    return RecordedTrajectory(
        path,
        str(facts["trajectory"]),
        str(facts.get("function", "")),
        float(facts["rate"]),
        str(setup.get("design", {}).get("architecture", "")),
        str(setup.get("data_set", "")),
        is_data_limited(facts),
        str(facts.get("regime", Regime.CHAIN.value)),
    )


def _positions(
    sessions: int, continuations: int, target: Target, checkpoints: int, steps: int
) -> list[tuple[list[int], list[int]]]:
    """Each window of a trajectory: its sessions, oldest-forgotten first, and its targets.

    Continuations are −1, −2, …
    """
    if target is Target.CONTINUATION:
        if not continuations or sessions < checkpoints:
            raise NotUsableError(
                f"has {counted(sessions, 'session')} and {counted(continuations, 'continuation')}, "
                f"{checkpoints} and 1 are needed; record with --sessions and --before"
            )
        targets = [-step for step in range(1, min(steps, continuations) + 1)]
        return [(list(range(checkpoints - 1, -1, -1)), targets)]
    if sessions <= checkpoints:
        raise NotUsableError(
            f"has {counted(sessions, 'session')}, {checkpoints + 1} are needed; record with "
            "--sessions"
        )
    return [
        (
            list(range(j + checkpoints - 1, j - 1, -1)),
            list(range(j - 1, max(j - 1 - steps, -1), -1)),
        )
        for j in range(1, sessions - checkpoints + 1)
    ]


def _take(
    series: Series,
    window: list[int],
    targets: list[int],
    rows_per_tensor: int,
    generator: np.random.Generator,
    number: int,
) -> list[tuple[Kind, Windows]]:
    """The windows of all tensors at one position of a trajectory."""
    columns, wanted = series.columns(window), series.columns(targets)
    tables = []
    for kind in PREDICTED_KINDS:
        values, tensors = series.values[kind], series.tensors[kind]
        moved = (values[:, columns] != values[:, columns[:1]]).any(axis=1)
        # A tensor is left out if none of its elements moves within the window.
        kept = np.flatnonzero(np.isin(tensors, np.unique(tensors[moved])))
        kept = _at_most(kept, tensors[kept], rows_per_tensor, generator)
        numbers = np.full(len(kept), number, dtype=np.int32)
        windows = np.ascontiguousarray(values[kept][:, columns])
        tables.append((kind, Windows(windows, values[kept][:, wanted], numbers)))
    return tables


def _at_most(
    rows: NDArray[np.int64],
    tensors: NDArray[np.int32],
    count: int,
    generator: np.random.Generator,
) -> NDArray[np.int64]:
    """Draw rows so that at most this many are of the same tensor."""
    if not len(rows) or np.bincount(tensors).max() <= count:
        return rows
    order = np.lexsort((generator.random(len(rows)), tensors))
    starts = np.searchsorted(tensors[order], tensors[order])
    return np.sort(rows[order[np.arange(len(rows)) - starts < count]])


def _padded(windows: Windows, steps: int) -> Windows:
    """Fill up the targets with NaN to this many steps."""
    absent = np.full((len(windows), steps - windows.steps), np.nan, dtype=np.float32)
    targets = np.concatenate([windows.targets, absent], axis=1)
    return Windows(windows.windows, targets, windows.trajectory)


def _join(tables: list[Windows], checkpoints: int, steps: int) -> Windows:
    nothing = Windows(
        np.empty((0, checkpoints), dtype=np.float32),
        np.empty((0, steps), dtype=np.float32),
        np.empty(0, dtype=np.int32),
    )
    tables = [nothing, *tables]
    return Windows(
        np.concatenate([table.windows for table in tables]),
        np.concatenate([table.targets for table in tables]),
        np.concatenate([table.trajectory for table in tables]),
    )
