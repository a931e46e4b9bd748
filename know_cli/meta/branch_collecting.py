"""Which branches are collected, as :mod:`know_cli.meta.run_collecting` does it with runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.forgetting.recorder import derived_seed
from know_cli.lab.data import DataSet
from know_cli.meta.branch_recording import BRANCH_RECORD, record_branches
from know_cli.meta.branch_setup import CHECKPOINTS, BranchSetup, draw_branch_setup
from know_cli.meta.run_collecting import CollectingRequest


@dataclass(frozen=True)
class BranchRequest(CollectingRequest[BranchSetup]):
    """Which branches are to be collected.

    Attributes:
        checkpoints: S, Θ0 and its branches.
    """

    trajectory: ClassVar[TrajectoryKind] = TrajectoryKind.BRANCHES
    record_file: ClassVar[str] = BRANCH_RECORD
    checkpoints: int = CHECKPOINTS

    def draw(self, number: int, data_sets: Mapping[str, DataSet]) -> BranchSetup:
        """See :meth:`CollectingRequest.draw`."""
        return draw_branch_setup(
            derived_seed(self.seed, number),
            data_sets,
            self.architectures,
            checkpoints=self.checkpoints,
        )

    def record(self, setup: BranchSetup, data: DataSet, folder: Path) -> dict[str, Any]:
        """See :meth:`CollectingRequest.record`."""
        return record_branches(setup, data, folder, self.device)
