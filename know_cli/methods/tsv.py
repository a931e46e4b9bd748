"""Task singular vectors: the trajectory's task vectors, merged matrix by matrix.

TSV-Merge of "Task Singular Vectors: Reducing Task Interference in Model Merging" (Gargiulo et
al., CVPR 2025, arXiv 2412.00081), with Θ0 in the place of the pre-trained model and the T = S − 1
forgotten checkpoints in that of the fine-tuned ones. For each matrix:

1. Δk = Θk − Θ0 = Uk Σk Vkᵀ, of which the leading rank/T singular triples are kept.
2. U = [U1 … UT] and V = [V1 … VT] are replaced by the orthonormal matrices nearest to them
   (P Qᵀ of their singular value decomposition P D Qᵀ), U⊥ and V⊥.
3. The merged task vector is U⊥ Σ V⊥ᵀ, and the prediction Θ0 − n·α·U⊥ Σ V⊥ᵀ for step n, negated
   as in task arithmetic (arXiv 2212.04089). Nothing is iterated.

Where the paper's formulas leave the answer open, nothing is invented: singular vectors of a Δk
whose singular values are zero up to rounding are arbitrary, so they are left out, and where
singular values of U and V are zero, because task vectors share singular vectors, they stay zero.

Beyond the paper, a convolution is the matrix of its output channels by everything else, and a
tensor of kind fc with more than two dimensions is a stack of matrices. Anything that is not a
matrix, or too small for one singular vector per task, gets the mean of its task vectors, as vectors
do in the authors' release, and is streamed.

A matrix needs all its elements at once: it is read whole from all checkpoints and decomposed in
float64 by one thread. A matrix that does not fit in ``--max-memory`` is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from know_cli.engine.plan import Group, PlannedTensor
from know_cli.engine.predictor import Predictors
from know_cli.kinds import Kind
from know_cli.methods.combination import combine
from know_cli.methods.inputs import Inputs


class SingularPredictor:
    """Predicts tensors that are matrices, or stacks of them.

    Args:
        alpha: α.
        checkpoints: S.
    """

    def __init__(self, alpha: float, checkpoints: int) -> None:
        self._alpha = alpha
        self._tasks = checkpoints - 1

    def takes(self, kind: Kind, shape: tuple[int, ...]) -> bool:
        """Whether such a tensor holds matrices with at least one singular vector per task."""
        if kind is Kind.BIAS or len(shape) < 2:
            return False
        count, rows, columns = matrices(kind, shape)
        return count > 0 and min(rows, columns) >= self._tasks

    def groups(self, tensors: Sequence[PlannedTensor]) -> list[Group]:
        """Each such tensor; see :class:`~know_cli.engine.predictor.TensorPredictor`."""
        return [(tensor,) for tensor in tensors if self.takes(tensor.kind, tensor.shape)]

    def nbytes(self, group: Group) -> int:
        """Bytes of main memory to decompose one matrix."""
        return decomposition_nbytes(group[0].kind, group[0].shape)

    def predict(self, group: Group, history: Tensor, out: Tensor) -> None:
        """Predict all steps; see :class:`~know_cli.engine.predictor.TensorPredictor`."""
        count, rows, columns = matrices(group[0].kind, group[0].shape)
        windows = history.view(len(history), count, rows, columns)
        answers = out.view(len(out), count, rows, columns)
        for position in range(count):
            window, newest = windows[:, position], windows[-1, position].double()
            merged = merge(window).mul_(-self._alpha)
            for answer in answers[:, position]:
                answer.copy_(newest.add_(merged))


def matrices(kind: Kind, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return how many matrices a tensor holds, and their rows and columns.

    >>> matrices(Kind.CONV, (64, 32, 3, 3))
    (1, 64, 288)
    >>> matrices(Kind.FC, (8, 64, 32))
    (8, 64, 32)
    """
    if kind is Kind.CONV:
        return 1, shape[0], math.prod(shape[1:])
    *stack, rows, columns = shape
    return math.prod(stack), rows, columns


def decomposition_nbytes(kind: Kind, shape: tuple[int, ...]) -> int:
    """Bytes of main memory to decompose one of a tensor's matrices.

    At its peak there are five matrices of its size (Θ0, a task vector, the two that it is the
    difference of, the copy that is decomposed), the singular vectors of one decomposition and
    of all tasks, and LAPACK's workspace. Measured peaks were 60 to 90 % of this.
    """
    _, rows, columns = matrices(kind, shape)
    rank = min(rows, columns)
    return 8 * (5 * rows * columns + 4 * rank * (rows + columns) + 8 * rank * rank)


def merge(window: Tensor) -> Tensor:
    """Return the merged task vector U⊥ Σ V⊥ᵀ of one matrix.

    Args:
        window: ``[S, rows, columns]``, most-forgotten first, θ0 last; neither side is shorter
            than S − 1.

    Returns:
        ``[rows, columns]`` float64.
    """
    if window.shape[1] < window.shape[2]:
        # A wide matrix would take half as much memory again as a tall one.
        return merge(window.mT).mT
    *forgotten, newest = window
    kept = min(newest.shape) // len(forgotten)
    left, values, right = [], [], []
    for other in reversed(forgotten):
        u, s, v = torch.linalg.svd(other.double() - newest.double(), full_matrices=False)
        counts = (s > _tolerance(s, newest.shape))[:kept]
        left.append(u[:, :kept] * counts)
        values.append(s[:kept])
        right.append(v[:kept] * counts[:, None])
    scaled = nearest_orthonormal(torch.cat(left, dim=1)).mul_(torch.cat(values))
    merged: Tensor = scaled @ nearest_orthonormal(torch.cat(right).T).T
    return merged


def nearest_orthonormal(columns: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal columns, within the space the columns span.

    Args:
        columns: ``[rows, count]`` float64, count ≤ rows. If they are linearly dependent, the
            result is a partial isometry, which maps to zero whatever they map to zero.
    """
    p, d, q = torch.linalg.svd(columns, full_matrices=False)
    answer: Tensor = (p * (d > _tolerance(d, columns.shape))) @ q
    return answer


def _tolerance(values: Tensor, shape: torch.Size) -> float:
    """Largest singular value of a matrix that counts as zero, by the usual rule for its rank."""
    return float(values[0]) * max(shape) * torch.finfo(values.dtype).eps


def predictors(inputs: Inputs) -> Predictors:
    """Open the method."""
    alpha, size = inputs.number("alpha"), inputs.checkpoints
    tasks = size - 1
    weights = []
    for step in range(1, inputs.steps + 1):
        weights.append([-step * alpha / tasks] * tasks + [1 + step * alpha])
    return replace(combine(weights), tensors=SingularPredictor(alpha, size))
