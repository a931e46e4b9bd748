"""Collects many runs, or sets of branches, over processes and machines, resumably."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.errors import CheckpointError, OutputError, UsageError
from know_cli.files import make_folder, read_text, remove_tree, rename_new, write_text
from know_cli.forgetting.recorder import derived_seed
from know_cli.lab.data import DataSet, load
from know_cli.lab.data.samples import reduced
from know_cli.lab.machine import CPU
from know_cli.lab.processes import in_processes
from know_cli.meta.branch_setup import BranchSetup
from know_cli.meta.collecting import LEFT_OUT, OTHERS, check_left_out, read_left_out
from know_cli.meta.run_recording import RUN_RECORD, record_run
from know_cli.meta.run_setup import RunSetup, draw_run_setup
from know_cli.meta.series import NotUsableError

_PARTIAL = ".partial-"
AnyDrawn = TypeVar("AnyDrawn", RunSetup, BranchSetup)


@dataclass(frozen=True)
class CollectingRequest(ABC, Generic[AnyDrawn]):
    """Which runs, or other trajectories with a folder each, are to be collected.

    Attributes:
        trajectory: what they are.
        record_file: name of the file with the setup in a folder, which tells that it is one.
        added: entries that setups of before an option was there lack, as they were meant.
        folder: gets one folder per run, ``00042``, or ``00042.left-out.json`` with the reason if
            its training diverged.
        runs: their number over all shards.
        data_sets: names of the data sets to draw from.
        data_folder: where the data sets' files are.
        architectures: names of the architectures to draw from; None for all.
        seed: of the whole collection. A run depends on this seed, its number and the choices
            above, but not on shards and processes.
        shard: (i, n): this call collects the runs i, i + n, i + 2n, …
        processes: how many train at the same time, each with one thread.
        device: where they train.
        side: images are reduced to this, in pixels; None leaves them.
    """

    trajectory: ClassVar[TrajectoryKind]
    record_file: ClassVar[str]
    added: ClassVar[Mapping[str, Any]] = {}
    folder: Path
    runs: int
    data_sets: Sequence[str]
    data_folder: Path | None = None
    architectures: Sequence[str] | None = None
    seed: int = 0
    shard: tuple[int, int] = (0, 1)
    processes: int = 1
    device: torch.device = CPU
    side: int | None = None

    def numbers(self) -> list[int]:
        """Numbers of the runs of this shard."""
        return list(range(self.shard[0], self.runs, self.shard[1]))

    @abstractmethod
    def draw(self, number: int, data_sets: Mapping[str, DataSet]) -> AnyDrawn:
        """The setup of a run.

        Raises:
            UsageError: nothing can be drawn from these choices.
        """

    @abstractmethod
    def record(self, setup: AnyDrawn, data: DataSet, folder: Path) -> dict[str, Any]:
        """Train and write what was drawn, and return the contents of its record.

        Raises:
            NotUsableError: the training diverged.
            OutputError: the folder cannot be written.
        """

    def place(self, number: int) -> Path:
        """The folder of a collected run."""
        return self.folder / f"{number:05d}"

    def left_out(self, number: int) -> Path:
        """The file with the reason why a run was left out."""
        return self.folder / f"{number:05d}{LEFT_OUT}"


@dataclass(frozen=True)
class RunRequest(CollectingRequest[RunSetup]):
    """Which runs are to be collected.

    Attributes:
        checkpoints: of each run's window; None draws their number.
        brief: whether all that is recorded of what came after the window is one annealing.
    """

    trajectory: ClassVar[TrajectoryKind] = TrajectoryKind.RUN
    record_file: ClassVar[str] = RUN_RECORD
    added: ClassVar[Mapping[str, Any]] = {"brief": False}
    checkpoints: int | None = None
    brief: bool = False

    def draw(self, number: int, data_sets: Mapping[str, DataSet]) -> RunSetup:
        """See :meth:`CollectingRequest.draw`."""
        return draw_run_setup(
            derived_seed(self.seed, number),
            data_sets,
            self.architectures,
            checkpoints=self.checkpoints,
            brief=self.brief,
        )

    def record(self, setup: RunSetup, data: DataSet, folder: Path) -> dict[str, Any]:
        """See :meth:`CollectingRequest.record`."""
        return record_run(setup, data, folder, self.device)


@dataclass(frozen=True)
class CollectedRun:
    """The outcome of one run.

    Attributes:
        number: of the run.
        facts: the contents of its record; empty if it was left out.
        reason: why it was left out; empty if it was not.
        seconds: how long it took; None if an earlier call collected it.
    """

    number: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    seconds: float | None = None


def existing_runs(request: CollectingRequest[AnyDrawn]) -> list[CollectedRun]:
    """The runs of this shard that earlier calls collected or left out.

    Raises:
        CheckpointError: a file is corrupt.
        UsageError: the folder has something else.
    """
    found = []
    for number in request.numbers():
        if request.left_out(number).exists():
            reason = read_left_out(request.left_out(number))["reason"]
            found.append(CollectedRun(number, reason=reason))
        elif request.place(number).exists():
            found.append(CollectedRun(number, _read(_record(request, number))))
    return found


def collect_runs(request: CollectingRequest[AnyDrawn]) -> Iterator[CollectedRun]:
    """Record the missing runs of a shard, yielding each as it is finished.

    Closing the iterator ends the processes; a run that was being trained starts anew in the next
    call.

    Raises:
        UsageError: a data set or an architecture cannot be used, or the folder has runs of other
            options.
        OutputError: the folder cannot be written, or a process was killed.
    """
    make_folder(request.folder)
    missing = [
        number
        for number in request.numbers()
        if not (request.place(number).exists() or request.left_out(number).exists())
    ]
    data = {
        name: reduced(load(name, request.data_folder), request.side) for name in request.data_sets
    }
    # Choices from which nothing can be drawn fail here, before processes start.
    request.draw(0, data)
    # Also where nothing is missing: what is there would be taken for what was asked for.
    _check_same(request, data)
    if not missing:
        return
    yield from in_processes(
        _collect_one,
        [(number,) for number in missing],
        request.processes,
        request.folder,
        _prepare,
        (request, data),
    )


def _record(request: CollectingRequest[AnyDrawn], number: int) -> Path:
    """The record in a run's folder, which is there; refuses a folder of something else."""
    record = request.place(number) / request.record_file
    if not record.exists():
        raise UsageError(
            f"{record.parent}: has no {record.name}, as collected {request.trajectory.plural} "
            "have; take another folder"
        )
    return record


def _check_same(request: CollectingRequest[AnyDrawn], data: Mapping[str, DataSet]) -> None:
    """Refuse to go on with a folder whose runs other options were given for."""
    for number in request.numbers():
        forgetting = request.folder / f"{number:05d}.safetensors"
        if forgetting.exists():
            raise UsageError(
                f"{forgetting}: is a forgetting; for {request.trajectory.plural} take another "
                "folder"
            )
        left_out = request.left_out(number)
        if not (request.place(number).exists() or left_out.exists()):
            continue
        drawn = json.loads(json.dumps(request.draw(number, data).to_json()))
        if left_out.exists():
            check_left_out(left_out, drawn, request.added)
            continue
        path = _record(request, number)
        if {**request.added, **_read(path).get("setup", {})} != drawn:
            raise UsageError(f"{path}: was collected with other options; {OTHERS}")


_request: CollectingRequest[Any]
_data: dict[str, DataSet]


def _prepare(request: CollectingRequest[AnyDrawn], data: dict[str, DataSet]) -> None:
    global _request, _data
    _request, _data = request, data


def _collect_one(number: int) -> CollectedRun:
    began = time.perf_counter()
    partial = _request.folder / f"{_PARTIAL}{number:05d}"
    setup = _request.draw(number, _data)
    try:
        remove_tree(partial, quietly=True)
        facts = _request.record(setup, _data[setup.data_set], partial)
        # A run is there as a whole or not at all.
        rename_new(partial, _request.place(number))
    except NotUsableError as error:
        remove_tree(partial, quietly=True)
        text = json.dumps({"reason": str(error), "setup": setup.to_json()}, indent=1)
        write_text(_request.left_out(number), text + "\n", replace=False)
        return CollectedRun(number, reason=str(error), seconds=time.perf_counter() - began)
    except OSError as error:
        raise OutputError(f"{partial}: cannot be written: {error.strerror or error}") from error
    return CollectedRun(number, facts, seconds=time.perf_counter() - began)


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(read_text(path))
        if not (isinstance(found, dict) and isinstance(found.get("setup", {}), dict)):
            raise TypeError("no object with a setup")
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error!r}); delete its folder") from error
    return found
