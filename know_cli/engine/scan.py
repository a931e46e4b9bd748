"""One quick scan before the plan: what is frozen or no weight, and does the order make sense.

Each predictable tensor is compared across the checkpoints until its first difference, which for
a trained tensor is in the first chunk; only frozen tensors, and vectors whose behaviour is asked
for, are read to their end. A tensor is scanned by one rank, so that what is found does not depend
on their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from know_cli.behaviour import Behaviour, BehaviourWatch, least_precise
from know_cli.checkpoints import Checkpoint, TensorEntry, Trajectory
from know_cli.checkpoints.dtypes import is_float, torch_dtype
from know_cli.checkpoints.reading import chunks, read_bytes
from know_cli.ranks.alone import Ranks

# With ever less data, each session moves the weights less; on recorded trajectories the last
# step was always shorter than the first. A reversed order shows the opposite.
_REVERSAL_RATIO = 1.2
# Elements of a matrix after which it is mostly clear that it is an ordinary weight.
_FIRST_FEW = 256


@dataclass(frozen=True)
class Scan:
    """What the scan found.

    Attributes:
        frozen: names of tensors that are bit-identical in all checkpoints; none of a single one.
        step_lengths: ‖Θk − Θk+1‖ over the first chunk of every tensor, for k = 0 … S − 2.
        behaviours: of the tensors for which it was asked, those that may be no weights.
    """

    frozen: frozenset[str]
    step_lengths: tuple[float, ...]
    behaviours: Mapping[str, Behaviour] = field(default_factory=dict)

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


def scan(
    trajectory: Trajectory, names: Sequence[str], watched: Mapping[str, int], ranks: Ranks
) -> Scan:
    """Scan the named (float) tensors of a trajectory.

    Args:
        trajectory: the inputs.
        names: of tensors that may be predicted.
        watched: for tensors whose behaviour is asked for, among them or not, how many elements to
            read, as :func:`~know_cli.behaviour.elements_to_watch` gives them.
        ranks: that share the work; all find the same.

    Raises:
        CheckpointError: a file cannot be read.
        PeerError: another rank has failed.
    """
    own = own_names(trajectory, names, ranks)
    frozen, squared, behaviours = _scan(trajectory, own, watched, ranks)
    # What is copied in any case, such as running means, says nothing of the order.
    predictable = set(names)
    others = [name for name in watched if name not in predictable]
    for name in own_names(trajectory, others, ranks):
        behaviours |= _scan(trajectory, [name], watched, ranks)[2]
    plain = {name: asdict(behaviour) for name, behaviour in behaviours.items()}
    parts = ranks.broadcast(ranks.gather([frozen, squared, plain]))
    return Scan(
        frozenset(name for part in parts for name in part[0]),
        tuple(sum(of_step) ** 0.5 for of_step in zip(*(part[1] for part in parts), strict=True)),
        {name: Behaviour(**facts) for part in parts for name, facts in part[2].items()},
    )


def own_names(trajectory: Trajectory, names: Sequence[str], ranks: Ranks) -> list[str]:
    """A run of some tensors' names that has a rank's share of the bytes."""
    sizes = [trajectory.first.tensors[name].info.nbytes for name in names]
    middles = [end - nbytes / 2 for end, nbytes in zip(accumulate(sizes), sizes, strict=True)]
    total = max(sum(sizes), 1)
    shares = [min(int(m * ranks.size // total), ranks.size - 1) for m in middles]
    return [name for name, rank in zip(names, shares, strict=True) if rank == ranks.rank]


def _scan(
    trajectory: Trajectory, names: Iterable[str], watched: Mapping[str, int], ranks: Ranks
) -> tuple[list[str], list[float], dict[str, Behaviour]]:
    """Names of frozen tensors, ‖Θk − Θk+1‖² over the first chunks, and behaviours."""
    frozen, behaviours = [], {}
    squared = [0.0] * (len(trajectory) - 1)
    for name in names:
        sources = _sources(trajectory, name)
        entries = [entry for _, entry in sources]
        same = len({entry.info.dtype for entry in entries}) == 1
        dtypes = [torch_dtype(entry.info.dtype) for entry in entries]
        dtype = least_precise([entry.info.dtype for entry in entries])
        watch = BehaviourWatch(entries[0].shape, dtype)
        wanted = watched.get(name, 0)
        for start, count in chunks(0, entries[0].info.elements):
            ranks.check()
            # As bytes, which are compared many times as fast as what torch would lend of them.
            raw = [read_bytes(checkpoint, entry, start, count) for checkpoint, entry in sources]
            if start == 0 or start < wanted:
                values = [
                    torch.frombuffer(data, dtype=of).double()
                    for data, of in zip(raw, dtypes, strict=True)
                ]
            if start == 0:
                for k, (before, after) in enumerate(pairwise(values)):
                    # A mask may hold −inf, which says nothing about the order.
                    change = (before - after).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
                    squared[k] += float(torch.dot(change, change))
            if start < wanted:
                _watch(watch, torch.stack(values)[:, : wanted - start])
            same = same and all(other == raw[0] for other in raw[1:])
            if not same and (start + count >= wanted or watch.is_ordinary):
                break
        if same and len(trajectory) > 1:
            frozen.append(name)
        if wanted and not watch.is_ordinary:
            behaviours[name] = watch.behaviour()
    return frozen, squared, behaviours


def _sources(trajectory: Trajectory, name: str) -> list[tuple[Checkpoint, TensorEntry]]:
    """The checkpoints whose values of a tensor can be compared, Θ0 first.

    These are all, unless it is copied in any case: then others may lack it, or hold something else.
    """
    first, absent = trajectory.first.tensors[name], trajectory.absent.get(name, ())
    found = [
        (checkpoint, first if k in absent else checkpoint.tensors.get(name))
        for k, checkpoint in enumerate(trajectory.checkpoints)
    ]
    return [
        (checkpoint, entry)
        for checkpoint, entry in found
        if entry is not None and is_float(entry.dtype) and entry.shape == first.shape
    ]


def _watch(watch: BehaviourWatch, values: Tensor) -> None:
    """Show a watch some elements, ``[S, count]``, only a few of them where those say enough."""
    few = _FIRST_FEW if values.shape[1] > 4 * _FIRST_FEW else values.shape[1]
    watch.add(values[:, :few])
    if not watch.is_ordinary:
        watch.add(values[:, few:])
