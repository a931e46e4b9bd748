"""How far each tensor moves from session to session, for methods that standardise by it.

Sums are formed in float64 over chunks of fixed size and joined in the order of the chunks, by
the rank that has the whole tensor, so that they are the same bytes for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from know_cli.checkpoints import Trajectory
from know_cli.checkpoints.reading import chunks, read_elements
from know_cli.engine.scan import own_names
from know_cli.ranks.alone import Ranks


@dataclass(frozen=True, slots=True)
class Movements:
    """Statistics of one tensor's movements Θ(k) − Θ(k+1), k = S − 2 … 0, the last one into Θ0.

    Attributes:
        count: elements that are finite in all checkpoints; the others are left out.
        mean: ``[S − 1]``, of each movement, in the order of a window; 0 where count is 0.
        spread: ``[S − 1]``, its standard deviation (that of the population).
    """

    count: int
    mean: tuple[float, ...]
    spread: tuple[float, ...]


def measure_movements(
    trajectory: Trajectory, names: Sequence[str], ranks: Ranks
) -> dict[str, Movements]:
    """Read tensors once, a chunk at a time, and measure their movements.

    Args:
        trajectory: the inputs.
        names: of (float) tensors.
        ranks: that share the work; all get the whole answer.

    Raises:
        CheckpointError: a file cannot be read.
        PeerError: another rank has failed.
    """
    own = {name: _measure(trajectory, name, ranks) for name in own_names(trajectory, names, ranks)}
    parts = ranks.gather({name: [m.count, m.mean, m.spread] for name, m in own.items()})
    joined: Mapping[str, list] = ranks.broadcast(  # type: ignore[type-arg]
        {name: values for part in parts for name, values in part.items()}
    )
    return {
        name: Movements(count, tuple(mean), tuple(spread))
        for name, (count, mean, spread) in joined.items()
    }


def _measure(trajectory: Trajectory, name: str, ranks: Ranks) -> Movements:
    entries = trajectory.entries(name)
    count = 0
    mean = squares = torch.zeros(len(entries) - 1, dtype=torch.float64)
    for start, rows in chunks(0, entries[0].info.elements):
        ranks.check()
        window = torch.stack(
            [
                read_elements(checkpoint, entry, start, rows).double()
                for checkpoint, entry in zip(trajectory.checkpoints, entries, strict=True)
            ]
        ).flip(0)
        moved = (window[1:] - window[:-1])[:, torch.isfinite(window).all(dim=0)]
        size = moved.shape[1]
        if not size:
            continue
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
    return Movements(count, tuple(mean.tolist()), tuple(spread.tolist()))
