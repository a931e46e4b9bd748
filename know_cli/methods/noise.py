"""Θ0 plus noise as large as KNOWN's change: a control for the direction of that change.

Each parameter moves as far as KNOWN moves it, up or down at random: "perturb" in "On Warm-Starting
Neural Network Training" (Ash & Adams, NeurIPS 2020, arXiv 1910.08475), with KNOWN's distances.
Whatever KNOWN gains over it comes from the direction of its change, not the size.

The sign is a hash of the bits of the parameter's recorded window, so the same checkpoints give the
same noise however they are cut into batches, and parameters with the same window get the same sign.
Step n has the size of KNOWN's change after n steps, and the sign of step 1; it runs KNOWN n times.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from know_cli.engine.plan import Block
from know_cli.engine.predictor import Predictors
from know_cli.known.bundle import Bundle
from know_cli.methods.inputs import Inputs
from know_cli.methods.known import KnownPredictor, choose_kernel

# Each value is mixed in by the finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class NoisePredictor:
    """Predicts Θ0 ± |Θ̂ − Θ0|, where Θ̂ is KNOWN's prediction.

    Args:
        known: the method whose change is measured.
        checkpoints: S.
    """

    def __init__(self, known: KnownPredictor, checkpoints: int) -> None:
        self._known = known
        self._checkpoints = checkpoints
        self.device = known.device
        self.block_rows = known.block_rows

    @property
    def thread_bytes(self) -> int:
        """Bytes of main memory that it needs in each thread: KNOWN's, and room for copies."""
        # The window and copies with predictions in float32; three 8-byte numbers to hash.
        return self._known.thread_bytes + self.block_rows * (4 * (self._checkpoints + 4) + 24)

    def predict(self, block: Block, step: int, history: Tensor, out: Tensor) -> None:
        """Predict one step; see :class:`~know_cli.engine.predictor.Predictor`."""
        window = history[: self._checkpoints]
        newest = window[-1]
        shifted = window.clone()
        # The history holds this method's earlier steps; KNOWN needs its own.
        for _ in range(step):
            self._known.predict(block, 1, shifted, out)
            predicted = torch.where(torch.isfinite(out), out, newest)
            shifted = torch.cat([shifted[1:], predicted[None]])
        torch.sub(out, newest, out=out).abs_()
        out.mul_(signs(window)).add_(newest)


def signs(window: Tensor) -> Tensor:
    """Return +1 or −1 for each row, decided by the bits of its window.

    Args:
        window: ``[S, rows]`` float32.

    Returns:
        ``[rows]`` float32.

    >>> signs(torch.tensor([[0.5, 0.25, 0.5], [1.0, 0.5, 1.0]]))
    tensor([ 1., -1.,  1.])
    """
    bits: np.ndarray[Any, np.dtype[np.uint32]] = window.contiguous().numpy().view(np.uint32)
    state = np.zeros(bits.shape[1], dtype=np.uint64)
    for values in bits:
        state += _GOLDEN + values.astype(np.uint64)
        state ^= state >> np.uint64(30)
        state *= _FIRST
        state ^= state >> np.uint64(27)
        state *= _SECOND
        state ^= state >> np.uint64(31)
    return torch.from_numpy(1 - 2 * (state >> np.uint64(63)).astype(np.float32))


def predictors(inputs: Inputs) -> Predictors:
    """Open the method.

    Raises:
        CheckpointError: the bundle is for another number of checkpoints.
    """
    bundle = inputs.bundle_of(Bundle)
    kernel = choose_kernel(inputs, bundle)
    known = KnownPredictor(bundle, inputs.devices[0], kernel)
    return Predictors(NoisePredictor(known, inputs.checkpoints), kernel=kernel)
