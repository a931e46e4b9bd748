"""The hyper-models that networks can teach, behind one interface; the registry is at the end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.engine.movements import Course
from know_cli.errors import UsageError
from know_cli.kinds import PREDICTED_KINDS, Kind
from know_cli.known import bundle as known_bundle
from know_cli.known.module import Known, initialise, roll
from know_cli.known.shipped import MANIFEST
from know_cli.meta.network_data import State, Window
from know_cli.meta.network_settings import HyperModel, NetworkSettings
from know_cli.methods import bundles
from know_cli.settle import bundle as settle_bundle
from know_cli.settle.module import Settle, shares
from know_cli.settle.role import TensorRole

NetworkBundle = known_bundle.Bundle | settle_bundle.SettleBundle


class NetworkModel(ABC):
    """A hyper-model that is taught.

    Attributes:
        name: for tables.
        module: what has its weights.
        steps: how many steps of prediction are taught, and measured.
    """

    name: str
    module: nn.Module
    steps: int = 1

    @abstractmethod
    def predicted(self, window: Window, step: int = 1) -> State:
        """The tensors that change, of a prediction.

        Args:
            window: with as many checkpoints as it reads.
            step: of the prediction.
        """

    @abstractmethod
    def bundle(self, manifest: Mapping[str, Any], trajectory: TrajectoryKind) -> NetworkBundle:
        """The bundle that ``know predict`` reads, with entries for the manifest."""


class SettleModel(NetworkModel):
    """The hyper-model settle; all its steps are the same.

    Args:
        module: its weights.
    """

    name = "settle"

    def __init__(self, module: Settle) -> None:
        self.module: Settle = module

    @staticmethod
    def new(settings: NetworkSettings, trajectory: TrajectoryKind) -> SettleModel:
        """An untaught one, with torch's random numbers."""
        sizes = settings.checkpoints, settings.hidden, settings.width
        branches = trajectory is TrajectoryKind.BRANCHES
        return SettleModel(Settle(*sizes, roles=settings.roles, branches=branches))

    def predicted(self, window: Window, step: int = 1) -> State:
        """See :meth:`NetworkModel.predicted`; with running statistics that fit the weights."""
        return settled(self.module, window)[0]

    def bundle(
        self, manifest: Mapping[str, Any], trajectory: TrajectoryKind
    ) -> settle_bundle.SettleBundle:
        """See :meth:`NetworkModel.bundle`."""
        return settle_bundle.SettleBundle.of(self.module, manifest, trajectory)


def settled(model: Settle, window: Window) -> tuple[State, Tensor]:
    """The weights that settle predicts, with running statistics that fit them.

    Args:
        model: the hyper-model.
        window: with as many checkpoints as it reads.

    Returns:
        The tensors that change, and the window's mean coefficients ``[S]``.
    """
    courses, kinds = window.courses, window.run.kinds
    run = Course.together(courses.values())
    roles = window.run.roles
    rows = [model.features(run, courses[name], kinds[name], roles[name]) for name in kinds]
    rows.append(model.features(run, run, None, None))
    coefficients, conditions = model.gates(torch.tensor(rows))
    found = {}
    for number, name in enumerate(kinds):
        history = window.stacked(name)
        values = coefficients[number] @ history
        if model.width:
            length, size = (torch.tensor(v) for v in (courses[name].length, courses[name].size))
            values = values + model.correction(history, conditions[number], length, size)
        found[name] = values.view_as(window.states[-1][name])
    found |= window.statistics(shares(coefficients[-1]))
    return found, coefficients[-1]


class KnownModel(NetworkModel):
    """A KNOWN for each kind; what it predicts is what ``know predict`` does, but for statistics.

    Normalisation layers stay those of the newest checkpoint, as ``--norm copy`` has them: their
    weights and biases, and of networks that have any their running statistics.

    Args:
        known: by kind.
        steps: see :class:`NetworkModel`.
    """

    name = "known"

    def __init__(self, known: Mapping[Kind, Known], steps: int) -> None:
        self.module = nn.ModuleDict({kind.value: of for kind, of in known.items()})
        self._known, self.steps = dict(known), steps

    @staticmethod
    def new(settings: NetworkSettings, trajectory: TrajectoryKind) -> KnownModel:
        """An untaught one, with torch's random numbers: it predicts the newest checkpoint."""
        check_taught_on(settings, trajectory)
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, (1,))))
        found = {}
        for kind in PREDICTED_KINDS:
            known = Known(settings.checkpoints, settings.preparation, factor=settings.factor)
            initialise(known, generator)
            # The paper's first change would be about as long as the window's own, in a direction
            # of chance, and no network says anything with that.
            nn.init.zeros_(known.head.weight)
            found[kind] = known
        return KnownModel(found, settings.predicted_steps)

    def predicted(self, window: Window, step: int = 1) -> State:
        """See :meth:`NetworkModel.predicted`; what does not move stays, element by element."""
        run, found = window.run, {}
        for kind, known in self._known.items():
            names = [
                name
                for name, of in run.kinds.items()
                if of is kind and run.roles[name] is not TensorRole.NORMALISATION
            ]
            if not names:
                continue
            rows = torch.cat([window.stacked(name) for name in names], dim=1).T
            newest = rows[:, -1]
            moves = (rows != newest[:, None]).any(dim=1)
            values = torch.where(moves, roll(known, rows, step)[:, -1], newest)
            shapes = [window.states[-1][name].shape for name in names]
            parts = torch.split(values, [shape.numel() for shape in shapes])
            for name, shape, part in zip(names, shapes, parts, strict=True):
                found[name] = part.view(shape)
        return found

    def bundle(
        self, manifest: Mapping[str, Any], trajectory: TrajectoryKind
    ) -> known_bundle.Bundle:
        """See :meth:`NetworkModel.bundle`."""
        one = self._known[Kind.CONV]
        return known_bundle.Bundle(
            {
                kind: {name: tensor.detach().clone() for name, tensor in of.state_dict().items()}
                for kind, of in self._known.items()
            },
            one.checkpoints,
            one.preparation,
            settle_bundle.TARGET,
            {**manifest, known_bundle.TRAJECTORY: trajectory.value},
        )


_NEW = {HyperModel.SETTLE: SettleModel.new, HyperModel.KNOWN: KnownModel.new}


def new_model(
    settings: NetworkSettings, trajectory: TrajectoryKind = TrajectoryKind.RUN
) -> NetworkModel:
    """An untaught hyper-model, with torch's random numbers.

    Raises:
        UsageError: it cannot be taught on such trajectories.
    """
    return _NEW[settings.model](settings, trajectory)


def check_taught_on(settings: NetworkSettings, trajectory: TrajectoryKind) -> None:
    """Refuse a hyper-model that cannot be taught on a kind of trajectory.

    Raises:
        UsageError: it is KNOWN, whose windows have an order, and these are branches.
    """
    if settings.model is HyperModel.KNOWN and trajectory is TrajectoryKind.BRANCHES:
        raise UsageError(
            f"--model {settings.model.value}: reads checkpoints in their order, and branches have "
            "none; leave it out"
        )


def model_of(bundle: NetworkBundle) -> NetworkModel:
    """The hyper-model of a bundle, to be measured.

    Raises:
        UsageError: it was not taught through networks, so that nothing says which it has seen.
    """
    if isinstance(bundle, settle_bundle.SettleBundle):
        return SettleModel(bundle.module())
    if "taught_on" not in bundle.manifest:
        raise UsageError(
            f"{bundle.source}: was not taught through networks, so that nothing says which of "
            "these it has seen; measure it without --objective network"
        )
    steps = bundle.manifest.get("settings", {}).get("predicted_steps", 1)
    return KnownModel({kind: bundle.module(kind) for kind in PREDICTED_KINDS}, steps)


def load_bundle(path: Path) -> NetworkBundle:
    """Read the bundle of a hyper-model that networks can teach.

    Raises:
        CheckpointError: it is damaged.
        UsageError: there is none.
    """
    if not (path / MANIFEST).exists():
        raise UsageError(f"{path}: holds no hyper-model ({MANIFEST}); name the folder of one")
    bundle = bundles.load_bundle(bundles.method_of_bundle(str(path.absolute())), path)
    assert isinstance(bundle, NetworkBundle)
    return bundle


def save_bundle(bundle: NetworkBundle, path: Path, *, replace: bool) -> None:
    """Write a bundle into a folder.

    Raises:
        OutputError: it cannot be written.
    """
    if isinstance(bundle, settle_bundle.SettleBundle):
        settle_bundle.save_bundle(bundle, path, replace=replace)
    else:
        known_bundle.save_bundle(bundle, path, replace=replace)
