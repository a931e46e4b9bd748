"""From recorded trajectories to training windows, one table a kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from know_cli.checkpoints import open_checkpoint
from know_cli.errors import UsageError
from know_cli.forgetting.recorder import RECORD, checkpoint_name, read_record
from know_cli.kinds import Kind, classify
from know_cli.meta.series import (
    KINDS,
    Floats,
    NotUsableError,
    Series,
    is_series,
    load_series,
    read_tensor,
)
from know_cli.normalisation import find_norm_layers


class Target(str, Enum):
    """What KNOWN is taught to predict from a window.

    ``RETRODICTION``: the session before the window in the chain, trained on 1/r times the data
    of the window's newest (the paper).
    ``CONTINUATION``: Θ0 continued on 1/r times its data.
    """

    RETRODICTION = "retrodiction"
    CONTINUATION = "continuation"


@dataclass(frozen=True)
class Windows:
    """Histories of scalar parameters, and the value that each is to be continued with.

    Attributes:
        windows: ``[rows, S]`` float32, **oldest-forgotten first, θ0 last**.
        targets: ``[rows]`` float32.
        trajectory: ``[rows]`` int64, position in :attr:`Collection.trajectories`.
    """

    windows: Floats
    targets: Floats
    trajectory: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.targets)

    def of(self, trajectories: Iterable[int]) -> Windows:
        """The rows of some trajectories."""
        chosen = np.isin(self.trajectory, list(trajectories))
        return Windows(self.windows[chosen], self.targets[chosen], self.trajectory[chosen])


@dataclass(frozen=True)
class RecordedTrajectory:
    """A trajectory that windows were taken from."""

    folder: Path
    identity: str
    function: str
    rate: float


@dataclass(frozen=True)
class Collection:
    """All windows of some trajectories.

    Attributes:
        windows: one table for each of conv, fc and bias; some may be empty.
        trajectories: those used.
        skipped: why others were not, in words.
    """

    windows: dict[Kind, Windows]
    trajectories: list[RecordedTrajectory]
    skipped: list[str]


def find_trajectories(paths: Sequence[Path]) -> list[Path]:
    """Recorded trajectories (folders) and collected ones (files), at or below the given paths.

    Returns:
        Without repetition; below each path the folders, then the files, each sorted.

    Raises:
        UsageError: there is none below one of the paths.
    """
    found: list[Path] = []
    for path in paths:
        folders = sorted(record.parent for record in path.rglob(RECORD)) if path.is_dir() else []
        candidates = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        files = [file for file in candidates if is_series(file)]
        if not folders and not files:
            raise UsageError(
                f"{path}: holds no {RECORD} and no collected trajectory; record some with "
                "'know forget'"
            )
        found += [*folders, *files]
    return list(dict.fromkeys(found))


def collect_windows(
    folders: Sequence[Path],
    *,
    target: Target,
    checkpoints: int = 5,
    rows_per_tensor: int = 1000,
    seed: int = 0,
) -> Collection:
    """Take windows out of recorded trajectories.

    For retrodiction they slide along the sessions: Θ(j+S−1) … Θ(j) with target Θ(j−1), for all
    j ≥ 1 that the trajectory is long enough for. For continuation there is one, Θ(S−1) … Θ0
    with target ``continued1``.

    As in predicting, tensors that stay the same throughout a window are left out, and so are
    running statistics; a normalisation layer's weight and bias are of the kind bias.

    Args:
        folders: with a ``trajectory.json`` each; or files of collected trajectories, which are
            samples already, of which all rows are taken.
        target: what is to be predicted.
        checkpoints: S, the length of a window.
        rows_per_tensor: the most elements of one tensor that are taken for one window position,
            drawn without replacement.
        seed: of the drawing; what is drawn from a trajectory does not depend on the others.

    Raises:
        UsageError: no trajectory can be used.
        CheckpointError: a checkpoint is corrupt, or those of a trajectory do not fit together.
    """
    tables: dict[Kind, list[Windows]] = {kind: [] for kind in KINDS}
    used: list[RecordedTrajectory] = []
    skipped: list[str] = []
    for folder in folders:
        series = load_series(folder) if folder.is_file() else None
        record = read_record(folder) if series is None else series.facts
        try:
            positions = _positions(record["sessions"], record["continuations"], target, checkpoints)
            generator = np.random.default_rng([seed, int(record["trajectory"], 16)])
            found = [
                _take(folder, window, before, rows_per_tensor, generator, len(used))
                if series is None
                else _take_columns(series, window, before, len(used))
                for window, before in positions
            ]
        except NotUsableError as error:
            skipped.append(f"{folder}: {error}")
            continue
        for tensors in found:
            for kind, windows in tensors:
                tables[kind].append(windows)
        identity, function = str(record["trajectory"]), str(record.get("function", ""))
        used.append(RecordedTrajectory(folder, identity, function, float(record["rate"])))
    if not used:
        reason = skipped[0] if skipped else "there are no trajectories"
        raise UsageError(f"no trajectory can be used for {target.value}: {reason}")
    return Collection({kind: _join(tables[kind], checkpoints) for kind in KINDS}, used, skipped)


def _positions(
    sessions: int, continuations: int, target: Target, checkpoints: int
) -> list[tuple[list[int], int]]:
    """For each window of a trajectory its sessions, oldest-forgotten first, and its target.

    Continuations are −1, −2, …
    """
    if target is Target.CONTINUATION:
        if not continuations or sessions < checkpoints:
            raise NotUsableError(
                f"has {sessions} sessions and {continuations} continuations, {checkpoints} and 1 "
                "are needed; record with --sessions and --before"
            )
        return [(list(range(checkpoints - 1, -1, -1)), -1)]
    if sessions <= checkpoints:
        raise NotUsableError(
            f"has {sessions} sessions, {checkpoints + 1} are needed; record with --sessions"
        )
    return [
        (list(range(j + checkpoints - 1, j - 1, -1)), j - 1)
        for j in range(1, sessions - checkpoints + 1)
    ]


def _take_columns(
    series: Series, window: list[int], target: int, number: int
) -> list[tuple[Kind, Windows]]:
    """The windows of all tensors at one position of a collected trajectory."""
    columns, (last,) = series.columns(window), series.columns([target])
    tables = []
    for kind in KINDS:
        values, tensors = series.values[kind], series.tensors[kind]
        moved = (values[:, columns] != values[:, columns[:1]]).any(axis=1)
        # Tensors that stay the same throughout the window are left out whole.
        kept = np.isin(tensors, np.unique(tensors[moved]))
        windows = np.ascontiguousarray(values[kept][:, columns])
        numbers = np.full(len(windows), number, dtype=np.int64)
        tables.append((kind, Windows(windows, values[kept, last], numbers)))
    return tables


def _take(
    folder: Path,
    window: list[int],
    target: int,
    rows_per_tensor: int,
    generator: np.random.Generator,
    number: int,
) -> list[tuple[Kind, Windows]]:
    """The windows of all tensors at one position of one trajectory."""
    paths = [folder / checkpoint_name(index) for index in [*window, target]]
    for path in paths:
        if not path.exists():
            raise NotUsableError(f"{path.name} is not recorded yet; run 'know forget' to its end")
    tables = []
    with ExitStack() as stack:
        opened = [stack.enter_context(open_checkpoint(path)) for path in paths]
        newest = opened[-2]
        shapes = {name: entry.shape for name, entry in newest.tensors.items()}
        statistics = {name for layer in find_norm_layers(shapes) for name in layer.statistics}
        for name in sorted(shapes):
            entry = newest.tensors[name]
            kind = classify(name, entry.shape, entry.dtype).kind
            if kind not in KINDS or name in statistics:
                continue
            table = read_tensor(opened, name, entry.shape)
            if not np.isfinite(table).all():
                raise NotUsableError(f"tensor {name!r} is not finite; its training diverged")
            if (table[:-1] == table[0]).all():
                continue
            count = table.shape[1]
            if count > rows_per_tensor:
                drawn = np.sort(generator.choice(count, rows_per_tensor, replace=False))
                table = table[:, drawn]
            windows = np.ascontiguousarray(table[:-1].T)
            numbers = np.full(len(windows), number, dtype=np.int64)
            tables.append((kind, Windows(windows, table[-1].copy(), numbers)))
    return tables


def _join(tables: list[Windows], checkpoints: int) -> Windows:
    if not tables:
        empty = np.empty(0, dtype=np.float32)
        return Windows(
            np.empty((0, checkpoints), dtype=np.float32), empty, np.empty(0, dtype=np.int64)
        )
    return Windows(
        np.concatenate([table.windows for table in tables]),
        np.concatenate([table.targets for table in tables]),
        np.concatenate([table.trajectory for table in tables]),
    )
