"""A trajectory as its user wants to see it before predicting: how far, which way, what is odd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from know_cli.checkpoints import TensorEntry, Trajectory
from know_cli.checkpoints.dtypes import is_float
from know_cli.checkpoints.metadata import Session, TrajectoryKind
from know_cli.checkpoints.reading import chunks, read_elements, read_float32
from know_cli.engine.progress import Progress
from know_cli.engine.scan import looks_reversed
from know_cli.kinds import PREDICTED_KINDS, Classification, Kind

# Below this share of ‖Θ0‖ the whole trajectory is within what float32 training rounds away.
_TINY_MOVEMENT = 1e-6
#: A run whose steps are more parallel than this, by the mean cosine of the angle between
#: successive ones, is warned of. Learned by :func:`know_cli.meta.parallel_steps.learn`;
#: ``docs/averages.md`` says from what, and how often the warning is right.
PARALLEL_STEPS = 0.45


@dataclass
class KindMovement:
    """How the tensors of one kind move.

    Attributes:
        tensors: number of tensors.
        parameters: their parameters.
        squared_norm: ‖Θ0‖².
        products: ``[S − 1, S − 1]`` float64, ⟨dj, dk⟩ of the steps dk = Θk+1 − Θk (only the
            diagonal and its neighbours are filled); of branches, all of dk = Θk+1 − Θ0.
    """

    tensors: int
    parameters: int
    squared_norm: float
    products: Tensor

    @property
    def step_lengths(self) -> list[float]:
        """‖Θk − Θk+1‖ for k = 0 … S − 2; of branches ‖Θk+1 − Θ0‖."""
        return [float(value) for value in self.products.diagonal().sqrt()]

    @property
    def cosines(self) -> list[float | None]:
        """Cosine between each step and the next; None where one of them has no length."""
        lengths, between = self.step_lengths, self.products.diagonal(1)
        return [
            float(product) / (one * two) if one * two > 0 else None
            for product, one, two in zip(between, lengths, lengths[1:], strict=False)
        ]

    @property
    def cosines_of_branches(self) -> list[list[float | None]]:
        """Cosine between every two branches' steps from Θ0; None where one has no length."""
        lengths = self.step_lengths
        return [
            [
                float(self.products[j, k]) / (one * two) if one * two > 0 else None
                for k, two in enumerate(lengths)
            ]
            for j, one in enumerate(lengths)
        ]


@dataclass
class Inspection:
    """What a trajectory looks like.

    Attributes:
        kinds: movement per kind; kinds without tensors are left out.
        total: the same over conv, fc and bias together.
        frozen: tensors of the kinds conv, fc and bias that are the same in all checkpoints.
        nonfinite: (path, tensor, number of values) that are not finite.
        warnings: in words.
        trajectory: how the checkpoints came about.
    """

    kinds: dict[Kind, KindMovement]
    total: KindMovement
    trajectory: TrajectoryKind
    frozen: list[str] = field(default_factory=list)
    nonfinite: list[tuple[str, str, int]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain types for a JSON file."""
        return {
            "kinds": {kind.value: self._movement_json(m) for kind, m in self.kinds.items()},
            "total": self._movement_json(self.total),
            "frozen": self.frozen,
            "nonfinite": [
                {"path": path, "tensor": tensor, "values": count}
                for path, tensor, count in self.nonfinite
            ],
            "warnings": self.warnings,
        }

    def _movement_json(self, movement: KindMovement) -> dict[str, Any]:
        of_branches = self.trajectory is TrajectoryKind.BRANCHES
        return {
            "tensors": movement.tensors,
            "parameters": movement.parameters,
            "norm": movement.squared_norm**0.5,
            "distances" if of_branches else "step_lengths": movement.step_lengths,
            "cosines": movement.cosines_of_branches if of_branches else movement.cosines,
        }


def inspect_trajectory(
    trajectory: Trajectory, classes: Mapping[str, Classification], progress: Progress
) -> Inspection:
    """Read a whole trajectory once, a chunk at a time.

    Args:
        trajectory: the checkpoints.
        classes: kind of each tensor.
        progress: is told of parameters.

    Raises:
        CheckpointError: a file cannot be read.
    """
    size = len(trajectory)
    entries = trajectory.first.tensors
    progress.phase("inspecting", sum(entry.info.elements for entry in entries.values()))
    kinds: dict[Kind, KindMovement] = {}
    inspection = Inspection(kinds, _no_movement(size), trajectory.kind)
    for name, entry in entries.items():
        kind = classes[name].kind
        movement = kinds.setdefault(kind, _no_movement(size))
        movement.tensors += 1
        movement.parameters += entry.info.elements
        # What is only copied need not be alike in all checkpoints.
        if is_float(entry.dtype) and _is_in_all(trajectory, entry):
            _inspect_tensor(trajectory, name, kind, movement, inspection)
        progress.advance(entry.info.elements)
    inspection.kinds = {kind: kinds[kind] for kind in Kind if kind in kinds}
    for kind in PREDICTED_KINDS:
        if kind in kinds:
            inspection.total.tensors += kinds[kind].tensors
            inspection.total.parameters += kinds[kind].parameters
            inspection.total.squared_norm += kinds[kind].squared_norm
            inspection.total.products += kinds[kind].products
    inspection.warnings = _warnings(trajectory, inspection, classes)
    return inspection


def _is_in_all(trajectory: Trajectory, entry: TensorEntry) -> bool:
    others = (checkpoint.tensors.get(entry.name) for checkpoint in trajectory.checkpoints)
    return all(o is not None and is_float(o.dtype) and o.shape == entry.shape for o in others)


def _no_movement(size: int) -> KindMovement:
    return KindMovement(0, 0, 0.0, torch.zeros(size - 1, size - 1, dtype=torch.float64))


def _inspect_tensor(
    trajectory: Trajectory,
    name: str,
    kind: Kind,
    movement: KindMovement,
    inspection: Inspection,
) -> None:
    entries = trajectory.entries(name)
    moved, nonfinite = False, [0] * len(trajectory)
    for start, count in chunks(0, entries[0].info.elements):
        values, finite = _read_window(trajectory, entries, start, count)
        for k, bad in enumerate((~finite).sum(dim=1).tolist()):
            nonfinite[k] += bad
        differs = (values[1:] != values[0]).logical_and(torch.isfinite(values[1:]))
        moved = moved or bool(differs.any())
        # A parameter that is not finite in one checkpoint would make every sum so.
        values = torch.where(finite.all(dim=0), values, 0.0).double()
        movement.squared_norm += float(values[0].square().sum())
        if trajectory.kind is TrajectoryKind.BRANCHES:
            steps = values[1:] - values[0]
            movement.products += steps @ steps.T
            continue
        steps = values.diff(dim=0)
        movement.products += torch.diag(steps.square().sum(dim=1))
        movement.products += torch.diag((steps[1:] * steps[:-1]).sum(dim=1), 1)
    for entry, bad in zip(entries, nonfinite, strict=True):
        if bad:
            inspection.nonfinite.append((str(entry.path), name, bad))
    if not moved and entries[0].info.elements and kind is not Kind.COPY:
        inspection.frozen.append(name)


def _read_window(
    trajectory: Trajectory, entries: Sequence[TensorEntry], start: int, count: int
) -> tuple[Tensor, Tensor]:
    """Elements of a tensor in all checkpoints, and which of them a prediction takes for finite.

    Returns:
        ``[S, count]`` float64 where one of the checkpoints is, else float32, and as many bools.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if all(entry.dtype != "F64" for entry in entries):
        values = torch.empty(len(entries), count)
        for k, checkpoint in enumerate(trajectory.checkpoints):
            read_float32(checkpoint, entries[k], start, values[k])
        return values, torch.isfinite(values)
    values = torch.empty(len(entries), count, dtype=torch.float64)
    for k, checkpoint in enumerate(trajectory.checkpoints):
        values[k] = read_elements(checkpoint, entries[k], start, count)
    # Predictions start in float32, so what is beyond its range is refused as infinite there.
    return values, torch.isfinite(values.float())


def _warnings(
    trajectory: Trajectory, inspection: Inspection, classes: Mapping[str, Classification]
) -> list[str]:
    warnings = []
    lengths = inspection.total.step_lengths
    paths = [checkpoint.path for checkpoint in trajectory.checkpoints]
    recorded = Session.from_metadata(trajectory.first.metadata) is not None
    is_forgetting = trajectory.kind is TrajectoryKind.FORGETTING
    for k, length in enumerate(lengths):
        before = 0 if trajectory.kind is TrajectoryKind.BRANCHES else k
        if length == 0:
            warnings.append(f"{paths[before]} and {paths[k + 1]} have the same weights")
    norm = inspection.total.squared_norm**0.5
    if 0 < sum(lengths) < _TINY_MOVEMENT * norm:
        what = "was forgotten" if is_forgetting else "was learnt"
        warnings.append(
            f"all steps together move the weights by {sum(lengths) / norm:.1e} of their norm: "
            f"nothing {what} that a prediction could bring back"
        )
    cosines = [cosine for cosine in inspection.total.cosines if cosine is not None]
    if trajectory.kind is TrajectoryKind.RUN and cosines:
        mean = sum(cosines) / len(cosines)
        if mean > PARALLEL_STEPS:
            warnings.append(
                f"successive steps point the same way (mean cosine {mean:+.2f}, more than "
                f"{PARALLEL_STEPS:g}): the run is still on its way, and an average of its "
                "checkpoints may be worse than the last one; take checkpoints closer together, "
                "or measure both ('know choose')"
            )
    if looks_reversed(lengths) and is_forgetting and not recorded:
        warnings.append(
            "the steps grow, as if the checkpoints were given in reverse; the order is full "
            "data first, most-forgotten last"
        )
    refused = [
        (path, name)
        for path, name, _ in inspection.nonfinite
        if classes[name].kind is not Kind.COPY and name not in inspection.frozen
    ]
    if refused:
        path, tensor = refused[0]
        count = len({name for _, name in refused})
        warnings.append(
            f"{count} tensor{'s have' if count > 1 else ' has'} values that are not finite, the "
            f"first is {tensor} in {path}; a prediction refuses them unless --allow-nonfinite"
        )
    if inspection.total.parameters and not any(lengths) and not inspection.nonfinite:
        warnings.append("no tensor changes over the checkpoints: there is nothing to predict")
    return warnings
