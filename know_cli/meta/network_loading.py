"""Reads what hyper-models are taught with through networks, of any one kind of trajectory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.errors import UsageError
from know_cli.meta.branch_recording import BRANCH_RECORD
from know_cli.meta.network_branches import load_branches
from know_cli.meta.network_data import NetworkRun, folders_in, load_runs
from know_cli.meta.network_forgettings import load_forgettings
from know_cli.meta.run_recording import RUN_RECORD
from know_cli.meta.windows import find_trajectories

# What has a folder each, with a record by which it is known.
_RECORDS = {TrajectoryKind.RUN: RUN_RECORD, TrajectoryKind.BRANCHES: BRANCH_RECORD}
_LOAD = {TrajectoryKind.RUN: load_runs, TrajectoryKind.BRANCHES: load_branches}


def load_networks(
    paths: Sequence[Path], checkpoints: int, data_folder: Path | None
) -> tuple[list[NetworkRun], dict[Path, str]]:
    """Read runs, branches or collected forgettings, with their networks and data.

    Args:
        paths: folders of runs or branches, files of forgettings, or folders of these.
        checkpoints: S; shorter ones are of no use.
        data_folder: where the data sets' files are.

    Returns:
        All of one kind, and the reasons why others were left out.

    Raises:
        CheckpointError: a file is corrupt.
        UsageError: there are none in one of the paths, they are of several kinds, two have the
            same number and seed, or a data set is missing.
    """
    kinds = {path: _kind_in(path) for path in paths}
    recorded = next((path for path in paths if kinds[path] in _RECORDS), None)
    if recorded is None:
        files = [file for path in paths for file in _forgettings_in(path)]
        found = load_forgettings(files, checkpoints, data_folder)
    else:
        kind = kinds[recorded]
        other = next((path for path in paths if kinds[path] is not kind), None)
        if other is not None:
            raise UsageError(
                f"{recorded} holds {kind.plural} and {other} does not; teach on one kind of "
                "trajectory"
            )
        folders = [folder for path in paths for folder in folders_in(path, _RECORDS[kind])]
        found = _LOAD[kind](folders, checkpoints, data_folder)
    # By their names they are split and counted, and what was taught on is known again.
    names = Counter(run.name for run in found[0])
    twice = next((name for name, count in names.items() if count > 1), None)
    if twice is not None:
        raise UsageError(
            f"{paths[0]} …: {twice} is there more than once; give different collections another "
            "--seed each"
        )
    return found


def _kind_in(path: Path) -> TrajectoryKind:
    """What a path holds: runs or branches by their records, else forgettings, if anything."""
    kinds = [kind for kind, record in _RECORDS.items() if folders_in(path, record)]
    if len(kinds) > 1:
        both = " and ".join(kind.plural for kind in kinds)
        raise UsageError(f"{path}: holds {both}; teach on one kind of trajectory")
    return kinds[0] if kinds else TrajectoryKind.FORGETTING


def _forgettings_in(path: Path) -> list[Path]:
    try:
        return find_trajectories([path])
    except UsageError as error:
        raise UsageError(
            f"{path}: holds no collected forgettings, runs or branches; record some with 'know "
            "collect', for runs and branches with --regime"
        ) from error
