"""Methods that of branches read only the branches, and not the Θ0 that they go on from.

A weight that some branches lack is taken from those that have it: for these the method is opened
again, as if there were no others. What none has is Θ0's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from know_cli.checkpoints import Trajectory
from know_cli.engine.lanes import DevicePredictor
from know_cli.engine.plan import Block
from know_cli.engine.predictor import Predictor, Predictors
from know_cli.methods.inputs import Inputs

#: Positions of branches among the checkpoints, Θ0 being 0.
Positions = tuple[int, ...]


class BranchesPredictor:
    """Predicts each tensor from the branches that have it.

    Args:
        absent: tensor → positions of the branches that do not have it.
        predictors: for the positions of those that do, the method that reads these.
        every: the positions of all branches.
    """

    def __init__(
        self,
        absent: Mapping[str, frozenset[int]],
        predictors: Mapping[Positions, Predictor],
        every: Positions,
    ) -> None:
        self._absent = absent
        self._predictors = predictors
        self._every = every
        whole = predictors[every]
        self.device, self.block_rows = whole.device, whole.block_rows
        most = max(predictor.thread_bytes for predictor in predictors.values())
        # Of the rows of some branches a copy is made.
        self.thread_bytes = most + 4 * len(every) * self.block_rows * (len(predictors) > 1)

    def predict(self, block: Block, step: int, history: Tensor, out: Tensor) -> None:
        """Predict one step; see :class:`~know_cli.engine.predictor.Predictor`."""
        size = len(self._every) + 1
        if not self._absent:
            self._predictors[self._every].predict(block, step, history[: size - 1], out)
            return
        for segment in block.segments():
            there = present(self._absent, segment.tensor.name, self._every)
            if not there:
                out[segment.rows] = history[size - 1, segment.rows]
                continue
            # In a window the last one comes first, and Θ0 is at its end.
            rows = [size - 1 - k for k in reversed(there)]
            at = block.rows.start + segment.row
            part = block.batch.block(slice(at, at + segment.count))
            window = history[:, segment.rows][rows]
            self._predictors[there].predict(part, step, window, out[segment.rows])


def present(absent: Mapping[str, frozenset[int]], name: str, every: Positions) -> Positions:
    """The positions of the branches that have a tensor."""
    lacking = absent.get(name, frozenset())
    return tuple(k for k in every if k not in lacking)


def without_start(opened: Callable[[Inputs], Predictors], inputs: Inputs) -> Predictors:
    """Open a method that reads branches as if they were all there is.

    Args:
        opened: opens the method.
        inputs: with the trajectory, Θ0 first.
    """
    trajectory = inputs.trajectory
    every = tuple(range(1, len(trajectory)))
    sets = {present(trajectory.absent, name, every) for name in trajectory.absent}
    found: dict[Positions, Predictors] = {
        there: opened(replace(inputs, trajectory=_only(trajectory, there)))
        for there in sorted({every, *sets})
        if there
    }
    rows = {there: each.rows for there, each in found.items()}
    plain = {t: each for t, each in rows.items() if not isinstance(each, DevicePredictor)}
    if len(plain) < len(rows) or any(each.tensors is not None for each in found.values()):
        raise ValueError("this method does not go row by row on the CPU")
    return replace(found[every], rows=BranchesPredictor(trajectory.absent, plain, every))


def _only(trajectory: Trajectory, there: Positions) -> Trajectory:
    return replace(trajectory, checkpoints=[trajectory.checkpoints[k] for k in there], absent={})
