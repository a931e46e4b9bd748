"""Kinds of tensors by all that there is: names, shapes, modules, and what their values do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from know_cli.behaviour import (
    copied_by_behaviour,
    elements_to_watch,
    settle,
    without_rectified_sources,
)
from know_cli.checkpoints import Trajectory
from know_cli.checkpoints.trajectory import packed_notices
from know_cli.engine.scan import Scan, scan
from know_cli.kinds import Classification, Kind, Override, classify_trajectory
from know_cli.names import read_name
from know_cli.normalisation import NormLayer, find_norm_layers
from know_cli.ranks.alone import Ranks
from know_cli.structure import is_packed

# Told apart already, with what to do about it.
_COMPLEX = "C64"


@dataclass(frozen=True)
class Classified:
    """What the tensors of a trajectory are.

    Attributes:
        classes: the kind of each, by name.
        layers: normalisation layers; sources of their statistics that the values contradict are
            taken away.
        scan: what the scan of the values found.
        packed: lines for the user on quantised weights that are not the same in all checkpoints.
    """

    classes: dict[str, Classification]
    layers: list[NormLayer]
    scan: Scan
    packed: tuple[str, ...] = ()

    @property
    def notices(self) -> list[str]:
        """Lines for the user on tensors that are copied although their values move."""
        return [*self.packed, *copied_by_behaviour(self.classes)]


def classify_values(
    trajectory: Trajectory,
    overrides: Sequence[Override] = (),
    ranks: Ranks | None = None,
    *,
    rescales: bool = False,
) -> Classified:
    """Classify the tensors of a trajectory, with one scan of their values.

    Args:
        trajectory: the open checkpoints.
        overrides: of the user, which go before everything else.
        ranks: that share the scan; None is this process alone.
        rescales: whether running statistics will be rescaled; then running means are scanned for
            whether they are ever negative, too.

    Raises:
        UsageError: an override matches nothing, or wants what cannot be predicted.
        CheckpointError: a file cannot be read.
        PeerError: another rank has failed.
    """
    classes = classify_trajectory(trajectory, overrides)
    tensors = {name: (entry.shape, entry.dtype) for name, entry in trajectory.first.tensors.items()}
    layers = find_norm_layers({name: shape for name, (shape, _) in tensors.items()})
    names = [name for name, of in classes.items() if of.kind is not Kind.COPY]
    watched = elements_to_watch(tensors, classes, layers if rescales else [])
    found = scan(trajectory, names, watched, ranks or Ranks())
    packed = (
        name
        for name, (shape, dtype) in tensors.items()
        if dtype != _COMPLEX and is_packed(read_name(name).leaf, shape, dtype)
    )
    return Classified(
        settle(classes, found.behaviours),
        without_rectified_sources(layers, found.behaviours),
        found,
        tuple(packed_notices(trajectory, packed)),
    )
