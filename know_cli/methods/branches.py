"""Averages of branches: the mean over those that have a tensor, without the Θ0 they go on from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from know_cli.checkpoints import Trajectory
from know_cli.engine.plan import Block
from know_cli.kinds import PREDICTED_KINDS
from know_cli.methods.combination import LinearPredictor


class BranchesPredictor:
    """The mean of branches, each tensor over those that have it; what none has is Θ0's.

    Args:
        trajectory: of branches, Θ0 first.
        steps: how many are predicted; all are the same.
        rounds_once: see :class:`~know_cli.methods.combination.LinearPredictor`.
    """

    device = torch.device("cpu")

    def __init__(self, trajectory: Trajectory, steps: int, *, rounds_once: bool) -> None:
        size = len(trajectory)

        def predictor(absent: frozenset[int]) -> LinearPredictor:
            weights = [mean_of_branches(size, absent)[::-1]] * steps
            return LinearPredictor(dict.fromkeys(PREDICTED_KINDS, weights), rounds_once=rounds_once)

        self._of_all = predictor(frozenset())
        sets = {absent: predictor(absent) for absent in set(trajectory.absent.values())}
        self._others: Mapping[str, LinearPredictor] = {
            name: sets[absent] for name, absent in trajectory.absent.items()
        }
        self.block_rows, self.thread_bytes = self._of_all.block_rows, self._of_all.thread_bytes

    def predict(self, block: Block, step: int, history: Tensor, out: Tensor) -> None:
        """Predict one step; see :class:`~know_cli.engine.predictor.Predictor`."""
        self._of_all.predict(block, step, history, out)
        if not self._others:
            return
        for segment in block.segments():
            predictor = self._others.get(segment.tensor.name)
            if predictor is not None:
                at = block.rows.start + segment.row
                part = block.batch.block(slice(at, at + segment.count))
                rows = segment.rows
                predictor.predict(part, step, history[:, rows], out[rows])


def mean_of_branches(checkpoints: int, absent: frozenset[int] = frozenset()) -> tuple[float, ...]:
    """The coefficients of the mean of branches.

    Args:
        checkpoints: S, Θ0 and S − 1 branches.
        absent: positions of branches that do not count, Θ0 being 0.

    Returns:
        ``[S]``, Θ0's first; Θ0's is 0 unless no branch counts.

    >>> mean_of_branches(4, frozenset({2}))
    (0.0, 0.5, 0.0, 0.5)
    """
    there = [k for k in range(1, checkpoints) if k not in absent]
    if not there:
        return (1.0, *[0.0] * (checkpoints - 1))
    return tuple(1 / len(there) if k in there else 0.0 for k in range(checkpoints))
