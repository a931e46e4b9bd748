"""Collected runs in memory, with data that they have not seen: what networks are taught with.

Forgettings are read by :mod:`know_cli.meta.network_forgettings` and are used alike, the newest of
their checkpoints being Θ0, the one that a prediction starts from; branches, whose last one is Θ0,
by :mod:`know_cli.meta.network_branches`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.checkpoints.state import read_state
from know_cli.engine.movements import Course, course_of
from know_cli.errors import CheckpointError, UsageError
from know_cli.files import read_text
from know_cli.kinds import Classification, Kind, classify_all
from know_cli.lab.data import DataSet, load
from know_cli.lab.data.samples import reduced
from know_cli.lab.zoo import build
from know_cli.meta.recording import AnySetup, unseen_samples
from know_cli.meta.run_recording import RUN_RECORD, annealed_file, checkpoint_file
from know_cli.meta.run_setup import RunSetup
from know_cli.settle.role import TensorRole, role_of

#: The annealed continuation that gains are compared with.
ANNEALED = 0.2
#: So many samples that a run has not seen are needed at least, and kept at most.
FEWEST_UNSEEN, MOST_UNSEEN = 200, 2000
#: Ends of the names of running statistics.
MEAN, VARIANCE = "running_mean", "running_var"

State = dict[str, Tensor]


@dataclass(frozen=True)
class OtherTask:
    """Samples of another data set as a network takes them.

    Attributes:
        inputs: ``[n, …]``, standardised, then grey where channels are missing.
        labels: ``[n]`` int64.
        classes: their number.
    """

    inputs: Tensor
    labels: Tensor
    classes: int


@dataclass(frozen=True)
class NetworkRun:
    """A collected run, or a forgetting; of branches see its subclass.

    Attributes:
        name: of its folder or file, with the last digits of its seed.
        setup: of the run.
        states: its checkpoints, the oldest first; of a forgetting the most forgotten.
        annealed: the newest one annealed by 20 % more steps; None of a forgetting.
        model: the network, whose weights are replaced at every use.
        inputs, labels: samples of the task that the run was not trained on.
        others: tasks that it was not trained on at all, if any are wanted.
        continued: of a forgetting, Θ0 trained further on 1/r, 1/r², … times its samples, as far
            as that was recorded.
    """

    name: str
    setup: AnySetup
    states: Sequence[State]
    annealed: State | None
    model: nn.Module
    inputs: Tensor
    labels: Tensor
    others: tuple[OtherTask, ...] = ()
    continued: Sequence[State] = ()

    @property
    def trajectory(self) -> TrajectoryKind:
        """The kind of trajectory that it is."""
        is_run = isinstance(self.setup, RunSetup)
        return TrajectoryKind.RUN if is_run else TrajectoryKind.FORGETTING

    @cached_property
    def _classes(self) -> dict[str, Classification]:
        """The tensors that are predicted: those that move, and are no running statistics."""
        found = classify_all({name: (tuple(t.shape), "F32") for name, t in self._floats.items()})
        return {
            name: of
            for name, of in found.items()
            if of.kind is not Kind.COPY
            and any(not torch.equal(self._floats[name], state[name]) for state in self.states)
        }

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """The kinds of the tensors that are predicted."""
        return {name: of.kind for name, of in self._classes.items()}

    @cached_property
    def roles(self) -> dict[str, TensorRole]:
        """Their roles, as a prediction has them."""
        return {
            name: role_of(name, tuple(self._floats[name].shape), of.reason)
            for name, of in self._classes.items()
        }

    @property
    def _floats(self) -> State:
        return {name: t for name, t in self.states[-1].items() if t.is_floating_point()}

    @property
    def ends(self) -> Mapping[str, State]:
        """What came of other trainings, to be measured beside the checkpoints, by name."""
        return {} if self.annealed is None else {f"annealed-{round(100 * ANNEALED)}": self.annealed}

    def window(self, checkpoints: int, *choice: int) -> Window:
        """Some checkpoints, and Θ0 or the last of them at the end.

        Args:
            checkpoints: S, how many.
            choice: one of :meth:`windows`: every ``apart``-th checkpoint, the last of them
                ``back`` before the newest.
        """
        apart, back = choice
        last = len(self.states) - 1 - back
        states = [self.states[last - apart * k] for k in range(checkpoints - 1, -1, -1)]
        return Window(self, states, self._target(apart, last))

    def _target(self, apart: int, last: int) -> State | None:
        """What a window's prediction is to be near to, if it was recorded.

        Of the newest window of a run these are the annealed weights. Of a forgetting's they are the
        paper's target, the weights after training on 1/r times the data of the window's newest
        checkpoint: the session before it, or of Θ0 what it was continued to. Of every second
        checkpoint only, r is the square of the recorded one, and the target two steps further.
        """
        if self.trajectory is TrajectoryKind.RUN:
            return self.annealed if last == len(self.states) - 1 else None
        further = [*self.states[last + 1 :], *self.continued]
        return further[apart - 1] if len(further) >= apart else None

    def windows(self, checkpoints: int) -> list[tuple[int, ...]]:
        """All that :meth:`window` can take: pairs of ``apart`` and ``back``."""
        most = (len(self.states) - 1) // (checkpoints - 1)
        return [
            (apart, back)
            for apart in range(1, most + 1)
            for back in range(len(self.states) - apart * (checkpoints - 1))
        ]

    def measured(self, checkpoints: int) -> list[tuple[int, ...]]:
        """Those that are measured: up to the newest checkpoint, near together and far apart."""
        most = (len(self.states) - 1) // (checkpoints - 1)
        return [(apart, 0) for apart in sorted({1, most})]


@dataclass(frozen=True)
class Window:
    """Some checkpoints of a run.

    Attributes:
        run: that they are of.
        states: the oldest first; of branches Θ0 last.
        target: what a prediction from them is to be near to: annealed weights of a run or of
            branches, a forgetting's weights after training on more data; None where it was not
            recorded.
    """

    run: NetworkRun
    states: Sequence[State]
    target: State | None

    def stacked(self, name: str) -> Tensor:
        """A tensor's history ``[S, elements]``."""
        return torch.stack([state[name].flatten() for state in self.states])

    @cached_property
    def courses(self) -> dict[str, Course]:
        """How each predicted tensor went."""
        kind = self.run.trajectory
        return {name: course_of(self.stacked(name), kind) for name in self.run.kinds}

    def statistics(self, parts: Tensor) -> State:
        """Running statistics of the checkpoints' distributions, mixed.

        Args:
            parts: ``[S]``, the share of each checkpoint.
        """
        found = {}
        for name in self.states[-1]:
            if name.endswith(MEAN):
                found[name] = parts @ self.stacked(name)
            elif name.endswith(VARIANCE):
                means = self.stacked(name.removesuffix(VARIANCE) + MEAN)
                apart = (means - parts @ means).square()
                found[name] = parts @ (self.stacked(name) + apart)
        return found


class Unseen:
    """Samples that trajectories have not seen; each data set is read once.

    Args:
        data_folder: where the data sets' files are.
    """

    def __init__(self, data_folder: Path | None) -> None:
        self._folder = data_folder
        self._data: dict[tuple[str, int | None], DataSet] = {}

    def of(self, setup: AnySetup) -> tuple[Tensor, Tensor]:
        """At most :data:`MOST_UNSEEN` inputs as the network takes them, and their labels.

        Raises:
            UsageError: the data set is missing.
        """
        wanted = setup.design.inputs
        side = wanted.side if wanted.kind == "image" else None
        key = setup.data_set, side
        if key not in self._data:
            self._data[key] = reduced(load(setup.data_set, self._folder), side)
        return unseen_samples(setup, self._data[key], MOST_UNSEEN)


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Folders of runs: those given, and those in the folders given, sorted by name.

    Raises:
        UsageError: there are none in one of them.
    """
    found = []
    for path in paths:
        here = folders_in(path, RUN_RECORD)
        if not here:
            raise UsageError(f"{path}: holds no runs; record some with 'know collect --regime run'")
        found += here
    return found


def folders_in(path: Path, record: str) -> list[Path]:
    """The folder itself, if it has a record of this name, and those in it, sorted by name."""
    here = [path] if (path / record).exists() else []
    return here + sorted(found.parent for found in path.glob(f"*/{record}"))


def load_runs(
    folders: Sequence[Path], checkpoints: int, data_folder: Path | None
) -> tuple[list[NetworkRun], dict[Path, str]]:
    """Read runs with their networks and data.

    Args:
        folders: of runs.
        checkpoints: S; shorter windows are of no use.
        data_folder: where the data sets' files are.

    Returns:
        The runs, and the reasons why others were left out.

    Raises:
        CheckpointError: a file is corrupt.
        UsageError: a data set is missing.
    """
    unseen = Unseen(data_folder)
    runs, left_out = [], {}
    for folder in folders:
        setup = _setup(folder / RUN_RECORD)
        if setup.checkpoints < checkpoints:
            left_out[folder] = f"fewer than {checkpoints} checkpoints"
            continue
        if not (folder / annealed_file(ANNEALED)).exists():
            left_out[folder] = f"no {annealed_file(ANNEALED)}"
            continue
        inputs, labels = unseen.of(setup)
        if len(labels) < FEWEST_UNSEEN:
            left_out[folder] = f"fewer than {FEWEST_UNSEEN} samples that it has not seen"
            continue
        states = [read_state(folder / checkpoint_file(step)) for step in setup.window]
        model = build(setup.design, 0).eval().requires_grad_(False)
        annealed = read_state(folder / annealed_file(ANNEALED))
        name = f"{folder.name}-{setup.seed % 16**8:08x}"
        runs.append(NetworkRun(name, setup, states, annealed, model, inputs, labels))
    return runs, left_out


def _setup(path: Path) -> RunSetup:
    try:
        return RunSetup.from_json(json.loads(read_text(path))["setup"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error!r}); delete its folder") from error


def outputs(run: NetworkRun, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """The network's logits with other weights; it keeps its own where there are none."""
    found: Tensor = torch.func.functional_call(run.model, dict(weights), (inputs,))
    return found
