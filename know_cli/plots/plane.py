"""The plane that fits checkpoints best: principal axes from their inner products.

With N checkpoints of P parameters, nothing larger than N × N is decomposed: the Gram matrix of
their differences is accumulated over blocks of parameters, and its eigenvectors are the principal
axes, as linear combinations of the checkpoints (classical scaling: Torgerson, Psychometrika 17,
1952; for training trajectories: Li et al., https://arxiv.org/abs/1712.09913, section 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from know_cli.checkpoints import Checkpoint
from know_cli.checkpoints.reading import CHUNK_ROWS, chunks, read_elements
from know_cli.engine.progress import Progress
from know_cli.errors import CheckpointError, UsageError

Values = NDArray[np.float64]

# Share of the largest eigenvalue below which an axis is rounding error of the inner products and
# not a direction of the checkpoints.
_NO_EXTENT = 1e-12
# Sums of a few inner products must be numbers of float64, too.
_LARGEST = 1e300


@dataclass(frozen=True)
class Plane:
    """The principal axes of N checkpoints, the longest first.

    Attributes:
        coordinates: float64 ``[N, A]``, each checkpoint's offset from the mean along each axis.
        combinations: float64 ``[N, A]``; axis a is Σi ``combinations[i, a]`` · Θi and has length
            1. Each column sums to 0.
        shares: float64 ``[A]``, each axis's share of the sum of all squared distances between
            two checkpoints.
        distances: float64 ``[N, N]``, between the checkpoints in all their parameters.
        off_plane: float64 ``[N]``, each checkpoint's distance from the plane of the first two
            axes.
    """

    coordinates: Values
    combinations: Values
    shares: Values
    distances: Values
    off_plane: Values

    @property
    def is_line(self) -> bool:
        """Whether the checkpoints lie on one line, so there is no second axis."""
        return len(self.shares) < 2

    @property
    def first_two(self) -> tuple[Values, Values]:
        """Coordinates ``[N, 2]`` and shares ``[2]``; zeros if there is no second axis."""
        if self.is_line:
            return np.pad(self.coordinates, ((0, 0), (0, 1))), np.pad(self.shares, (0, 1))
        return self.coordinates[:, :2], self.shares[:2]

    def require_plane(self) -> None:
        """Check that the checkpoints span a plane.

        Raises:
            UsageError: they lie on one line.
        """
        if self.is_line:
            raise UsageError(
                "the checkpoints lie on one line, and a plane needs three that do not; give "
                "another checkpoint"
            )

    def coefficients(self, x: float, y: float) -> Values:
        """The ``[N]`` coefficients, which sum to 1, of the weights at a point of the plane.

        Raises:
            UsageError: the checkpoints lie on one line, so there is no second axis.
        """
        self.require_plane()
        count = len(self.combinations)
        return 1 / count + self.combinations[:, :2] @ np.array([x, y], np.float64)


def inner_products(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    progress: Progress,
    rows: int = CHUNK_ROWS,
) -> Values:
    """⟨Θi − Θ0, Θj − Θ0⟩ over the named tensors, read block by block.

    Args:
        checkpoints: N of them with the same names and shapes; Θ0 first.
        names: of float tensors.
        progress: advanced by numbers of parameters.
        rows: parameters per block; each takes 8·N bytes of memory.

    Returns:
        float64 ``[N, N]``, whose first row and column are zero.

    Raises:
        CheckpointError: a file cannot be read, or a value is not finite or too large.
    """
    entries = [checkpoints[0].tensors[name] for name in names]
    progress.phase("measuring", sum(entry.info.elements for entry in entries))
    products = torch.zeros(len(checkpoints), len(checkpoints), dtype=torch.float64)
    for entry in entries:
        for start, count in chunks(0, entry.info.elements, rows):
            block = _block(checkpoints, entry.name, start, count)
            block -= block[0].clone()
            products += block @ block.T
            progress.advance(count)
        if not bool((products.abs() < _LARGEST).all()):
            raise CheckpointError(
                f"{entry.path}: tensor {entry.name!r} has values that are too large to compare; "
                f"leave it out with --kind '{entry.name}=copy'"
            )
    result: Values = products.numpy()
    return result


def _block(checkpoints: Sequence[Checkpoint], name: str, start: int, count: int) -> Tensor:
    """A run of one tensor's elements in all checkpoints: float64 ``[N, count]``."""
    block = torch.empty(len(checkpoints), count, dtype=torch.float64)
    for row, checkpoint in zip(block, checkpoints, strict=True):
        entry = checkpoint.tensors[name]
        row.copy_(read_elements(checkpoint, entry, start, count))
        if not bool(torch.isfinite(row).all()):
            raise CheckpointError(
                f"{entry.path}: tensor {name!r} has values that are not finite; leave it out "
                f"with --kind '{name}=copy'"
            )
    return block


def principal_axes(products: Values, last: int, first: int = 0) -> Plane:
    """The principal axes of checkpoints from the inner products of their differences.

    The sign of an axis is arbitrary; it is chosen so that checkpoint ``last`` does not lie left of
    or below checkpoint ``first``.

    Args:
        products: float64 ``[N, N]`` from :func:`inner_products`.
        last: index of the checkpoint that the axes point towards.
        first: index of the one that they point away from.

    Raises:
        UsageError: all checkpoints are the same.
    """
    squares = np.diag(products)
    distances = np.sqrt(np.maximum(squares[:, None] + squares[None, :] - 2 * products, 0))
    # Move the origin to the mean of all checkpoints.
    centred = products - products.mean(0) - products.mean(1)[:, None] + products.mean()
    values, vectors = np.linalg.eigh((centred + centred.T) / 2)
    values, vectors = values[::-1], vectors[:, ::-1]
    if values[0] <= 0:
        raise UsageError("all checkpoints have the same weights: there is nothing to draw")
    kept = values > _NO_EXTENT * values[0]
    lengths = np.sqrt(values[kept])
    vectors = vectors[:, kept] * _directions(vectors[:, kept], first, last)
    coordinates = vectors * lengths
    outside = np.diag(centred) - np.square(coordinates[:, :2]).sum(1)
    return Plane(
        coordinates=coordinates,
        combinations=vectors / lengths,
        shares=values[kept] / values[kept].sum(),
        distances=distances,
        off_plane=np.sqrt(np.where(outside > _NO_EXTENT * values[0], outside, 0)),
    )


def _directions(vectors: Values, first: int, last: int) -> Values:
    """+1 or −1 per axis."""
    ahead = vectors[last] - vectors[first]
    # If the two are level, the checkpoint farthest out decides.
    furthest = vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])]
    deciding = np.where(np.abs(ahead) > 1e-9, ahead, furthest)
    return np.where(deciding < 0, -1.0, 1.0)
