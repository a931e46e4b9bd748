"""Collected branches as networks: whole weights, and data that none of them was trained on."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.checkpoints.state import read_state
from know_cli.errors import CheckpointError
from know_cli.files import read_text
from know_cli.lab.zoo import build
from know_cli.meta.branch_recording import (
    ANNEALED,
    BRANCH_RECORD,
    LONGER,
    branch_file,
    continuation_file,
)
from know_cli.meta.branch_setup import BranchSetup
from know_cli.meta.network_data import (
    FEWEST_UNSEEN,
    NetworkRun,
    State,
    Unseen,
    Window,
)


@dataclass(frozen=True)
class NetworkBranches(NetworkRun):
    """Collected branches; of :class:`NetworkRun` the ``states`` are they, and then Θ0.

    Attributes:
        annealed: Θ0 annealed by as many steps as all branches together.
        longer: Θ0 trained on by as many steps at the same rate.
    """

    longer: State | None = None

    @property
    def trajectory(self) -> TrajectoryKind:
        """What it is."""
        return TrajectoryKind.BRANCHES

    @property
    def ends(self) -> Mapping[str, State]:
        """See :attr:`NetworkRun.ends`."""
        ends = {LONGER: self.longer, ANNEALED: self.annealed}
        return {name: state for name, state in ends.items() if state is not None}

    def window(self, checkpoints: int, *choice: int) -> Window:
        """Some branches, by their positions in ``states``, and Θ0; the target is ``annealed``."""
        states = [*(self.states[k] for k in choice), self.states[-1]]
        return Window(self, states, self.annealed)

    def windows(self, checkpoints: int) -> list[tuple[int, ...]]:
        """All choices of S − 1 branches; their order says nothing."""
        return list(itertools.combinations(range(len(self.states) - 1), checkpoints - 1))

    def measured(self, checkpoints: int) -> list[tuple[int, ...]]:
        """See :meth:`NetworkRun.measured`: the first branches, and the last ones."""
        found = self.windows(checkpoints)
        return [found[0], found[-1]] if len(found) > 1 else found


def load_branches(
    folders: Sequence[Path], checkpoints: int, data_folder: Path | None
) -> tuple[list[NetworkRun], dict[Path, str]]:
    """Read collected branches with their networks and data.

    Args:
        folders: of branches.
        checkpoints: S; of fewer branches than S − 1 no use can be made.
        data_folder: where the data sets' files are.

    Returns:
        The branches, and the reasons why others were left out.

    Raises:
        CheckpointError: a file is corrupt.
        UsageError: a data set is missing.
    """
    unseen = Unseen(data_folder)
    found: list[NetworkRun] = []
    left_out = {}
    for folder in folders:
        setup = _setup(folder / BRANCH_RECORD)
        if setup.checkpoints < checkpoints:
            left_out[folder] = f"fewer than {checkpoints - 1} branches"
            continue
        inputs, labels = unseen.of(setup)
        if len(labels) < FEWEST_UNSEEN:
            left_out[folder] = f"fewer than {FEWEST_UNSEEN} samples that no branch has seen"
            continue
        order = [*range(1, setup.checkpoints), 0]
        found.append(
            NetworkBranches(
                f"{folder.name}-{setup.seed % 16**8:08x}",
                setup,
                [read_state(folder / branch_file(index)) for index in order],
                read_state(folder / continuation_file(ANNEALED)),
                build(setup.design, 0).eval().requires_grad_(False),
                inputs,
                labels,
                longer=read_state(folder / continuation_file(LONGER)),
            )
        )
    return found, left_out


def _setup(path: Path) -> BranchSetup:
    try:
        return BranchSetup.from_json(json.loads(read_text(path))["setup"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error!r}); delete its folder") from error
