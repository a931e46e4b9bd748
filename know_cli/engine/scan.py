"""One quick look at the data before the plan: what is frozen, and does the order make sense.

Each predictable tensor is compared across the checkpoints until its first difference, which for
a trained tensor is in the first chunk; only frozen tensors are read to their end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from know_cli.checkpoints import Trajectory
from know_cli.checkpoints.dtypes import torch_dtype
from know_cli.checkpoints.reading import chunks, read_bytes
from know_cli.ranks.alone import Ranks

# With ever less data, each session moves the weights less; on recorded trajectories the last
# step was always shorter than the first. A reversed order shows the opposite.
_REVERSAL_RATIO = 1.2


@dataclass(frozen=True)
class Scan:
    """What the look found.

    Attributes:
        frozen: names of tensors that are bit-identical in all checkpoints.
        step_lengths: ‖Θk − Θk+1‖ over the first chunk of every tensor, for k = 0 … S − 2.
    """

    frozen: frozenset[str]
    step_lengths: tuple[float, ...]

    @property
    def looks_reversed(self) -> bool:
        """Whether each step is longer than the one before, the last much longer than the first."""
        return looks_reversed(self.step_lengths)


def looks_reversed(step_lengths: Iterable[float]) -> bool:
    """Whether ‖Θ0 − Θ1‖, ‖Θ1 − Θ2‖, … grow, as they would with the checkpoints in reverse.

    Two steps are needed to tell; fewer never look reversed.
    """
    lengths = list(step_lengths)
    growing = all(after > before for before, after in pairwise(lengths))
    return len(lengths) > 1 and growing and lengths[-1] > _REVERSAL_RATIO * lengths[0]


def scan(trajectory: Trajectory, names: Sequence[str], ranks: Ranks) -> Scan:
    """Look at the named (float) tensors of a trajectory.

    Args:
        trajectory: the inputs.
        names: of tensors.
        ranks: that share the work; all find the same.

    Raises:
        CheckpointError: a file cannot be read.
        PeerError: another rank has failed.
    """
    own = own_names(trajectory, names, ranks)
    found = ranks.gather(_look(trajectory, own, ranks))
    frozen, squared = zip(*ranks.broadcast(found), strict=True)
    return Scan(
        frozenset(name for part in frozen for name in part),
        tuple(sum(parts) ** 0.5 for parts in zip(*squared, strict=True)),
    )


def own_names(trajectory: Trajectory, names: Sequence[str], ranks: Ranks) -> list[str]:
    """A run of some tensors' names that has a rank's share of the bytes."""
    sizes = [trajectory.first.tensors[name].info.nbytes for name in names]
    middles = [end - nbytes / 2 for end, nbytes in zip(accumulate(sizes), sizes, strict=True)]
    total = max(sum(sizes), 1)
    shares = [min(int(m * ranks.size // total), ranks.size - 1) for m in middles]
    return [name for name, rank in zip(names, shares, strict=True) if rank == ranks.rank]


def _look(
    trajectory: Trajectory, names: Iterable[str], ranks: Ranks
) -> tuple[list[str], list[float]]:
    """Names of frozen tensors, and ‖Θk − Θk+1‖² over the first chunks."""
    frozen = []
    squared = [0.0] * (len(trajectory) - 1)
    for name in names:
        entries = trajectory.entries(name)
        same = len({entry.dtype for entry in entries}) == 1
        for position, (start, count) in enumerate(chunks(0, entries[0].info.elements)):
            ranks.check()
            # As bytes, which are compared many times as fast as what torch would lend of them.
            raw = [
                read_bytes(checkpoint, entry, start, count)
                for checkpoint, entry in zip(trajectory.checkpoints, entries, strict=True)
            ]
            if position == 0:
                values = [
                    torch.frombuffer(data, dtype=torch_dtype(entry.dtype)).double()
                    for data, entry in zip(raw, entries, strict=True)
                ]
                for k, (before, after) in enumerate(pairwise(values)):
                    # A mask may hold −inf, which says nothing about the order.
                    change = (before - after).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
                    squared[k] += float(torch.dot(change, change))
            same = same and all(other == raw[0] for other in raw[1:])
            if not same:
                break
        if same:
            frozen.append(name)
    return frozen, squared
