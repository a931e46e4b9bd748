"""How far each tensor moves from checkpoint to checkpoint, for methods that standardise by it.

Branches have no order: their movements are those from Θ0 to each of them.

Sums are formed in float64 over chunks of fixed size and joined in the order of the chunks, by
the rank that has the whole tensor, so that they are the same bytes for any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from know_cli.checkpoints import Trajectory
from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.checkpoints.reading import chunks, read_elements
from know_cli.engine.scan import own_names
from know_cli.ranks.alone import Ranks


@dataclass(frozen=True, slots=True)
class Course:
    """How weights went from checkpoint to checkpoint, of one tensor or of all together.

    Attributes:
        count: elements that are finite in all checkpoints; the others are left out.
        products: ``[S − 1][S − 1]``, the mean over elements of the product of two movements, in
            the order of a window.
        size: root mean square of Θ0's elements.
    """

    count: int
    products: tuple[tuple[float, ...], ...]
    size: float

    @property
    def length(self) -> float:
        """Root mean square of all movements."""
        total = sum(self.products[k][k] for k in range(len(self.products)))
        return math.sqrt(total / len(self.products))

    @staticmethod
    def together(courses: Iterable[Course]) -> Course:
        """That of several tensors as one; at least one is needed."""
        found = list(courses)
        count = sum(course.count for course in found)
        shares = [course.count / max(count, 1) for course in found]
        ranks = range(len(found[0].products))
        products = tuple(
            tuple(
                math.fsum(s * c.products[i][j] for s, c in zip(shares, found, strict=True))
                for j in ranks
            )
            for i in ranks
        )
        squares = math.fsum(s * c.size**2 for s, c in zip(shares, found, strict=True))
        return Course(count, products, math.sqrt(squares))


def moved_in(window: torch.Tensor, kind: TrajectoryKind) -> torch.Tensor:
    """The movements in a window: from one checkpoint to the next, of branches from Θ0 to each.

    Args:
        window: ``[S, n]``, Θ0 last.
        kind: how the checkpoints came about.

    Returns:
        ``[S − 1, n]``, in the order of the window.
    """
    if kind is TrajectoryKind.BRANCHES:
        return window[:-1] - window[-1]
    return window[1:] - window[:-1]


def course_of(window: torch.Tensor, kind: TrajectoryKind = TrajectoryKind.RUN) -> Course:
    """The course of a window ``[S, n]`` that is finite, most-forgotten first, θ0 last."""
    moved = moved_in(window.double(), kind)
    count = window.shape[1]
    products = (moved @ moved.T / max(count, 1)).tolist()
    size = float(window[-1].double().square().mean().sqrt()) if count else 0.0
    return Course(count, tuple(tuple(row) for row in products), size)


@dataclass(frozen=True, slots=True)
class Movements:
    """Statistics of one tensor's movements Θ(k) − Θ(k+1), k = S − 2 … 0, the last one into Θ0.

    Of branches they are Θ(k) − Θ0, k = S − 1 … 1; see :func:`moved_in`.

    Attributes:
        count: elements that are finite in all checkpoints; the others are left out.
        mean: ``[S − 1]``, of each movement, in the order of a window; 0 where count is 0.
        spread: ``[S − 1]``, its standard deviation (that of the population).
        course: of this tensor.
        run: of all tensors that were measured, together.
    """

    count: int
    mean: tuple[float, ...]
    spread: tuple[float, ...]
    course: Course
    run: Course


def measure_movements(
    trajectory: Trajectory, names: Sequence[str], ranks: Ranks
) -> dict[str, Movements]:
    """Read tensors once, a chunk at a time, and measure their movements.

    Args:
        trajectory: the inputs.
        names: of (float) tensors that all checkpoints have.
        ranks: that share the work; all get the whole answer.

    Raises:
        CheckpointError: a file cannot be read.
        PeerError: another rank has failed.
    """
    own = {name: _measure(trajectory, name, ranks) for name in own_names(trajectory, names, ranks)}
    parts = ranks.gather(own)
    joined: Mapping[str, list] = ranks.broadcast(  # type: ignore[type-arg]
        {name: values for part in parts for name, values in part.items()}
    )
    courses = {
        name: Course(count, tuple(tuple(row) for row in products), size)
        for name, (count, _, _, products, size) in joined.items()
    }
    if not courses:
        return {}
    # In the order of the names, so that sums do not depend on who measured what.
    run = Course.together(courses[name] for name in names)
    return {
        name: Movements(count, tuple(mean), tuple(spread), courses[name], run)
        for name, (count, mean, spread, _, _) in joined.items()
    }


def _measure(trajectory: Trajectory, name: str, ranks: Ranks) -> list[Any]:
    """The numbers of one tensor: count, mean, spread, products and size."""
    entries = trajectory.entries(name)
    count = 0
    mean = squares = torch.zeros(len(entries) - 1, dtype=torch.float64)
    products = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    newest = 0.0
    for start, rows in chunks(0, entries[0].info.elements):
        ranks.check()
        window = torch.stack(
            [
                read_elements(checkpoint, entry, start, rows).double()
                for checkpoint, entry in zip(trajectory.checkpoints, entries, strict=True)
            ]
        ).flip(0)
        finite = torch.isfinite(window).all(dim=0)
        moved = moved_in(window, trajectory.kind)[:, finite]
        size = moved.shape[1]
        if not size:
            continue
        products += moved @ moved.T
        newest += float(window[-1, finite].square().sum())
        # Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample
        # variances" (1979), equation 2.1: joins two parts without cancellation.
        of_chunk = moved.mean(dim=1)
        apart = of_chunk - mean
        squares = (
            squares
            + (moved - of_chunk[:, None]).square().sum(dim=1)
            + apart.square() * (count * size / (count + size))
        )
        mean = mean + apart * (size / (count + size))
        count += size
    spread = (squares / max(count, 1)).sqrt()
    products /= max(count, 1)
    norm = math.sqrt(newest / max(count, 1))
    return [count, mean.tolist(), spread.tolist(), products.tolist(), norm]
