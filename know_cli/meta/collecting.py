"""Collects many trajectories over processes and machines, resumably and within bounded disk."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from know_cli.checkpoints.metadata import Regime
from know_cli.errors import CheckpointError, OutputError, UsageError
from know_cli.files import json_text, make_folder, read_text, remove_tree, write_text
from know_cli.forgetting.recorder import derived_seed
from know_cli.kinds import PREDICTED_KINDS, Kind
from know_cli.lab.data import DataSet, load
from know_cli.lab.data.samples import reduced
from know_cli.lab.machine import CPU
from know_cli.lab.processes import in_processes
from know_cli.meta.recording import ROWS, record_trajectory
from know_cli.meta.release_setup import draw_release_setup
from know_cli.meta.series import NotUsableError, read_facts, save_series
from know_cli.meta.setup import Setup, draw_setup

_PARTIAL = ".partial-"
_SETUP = "setup.json"
LEFT_OUT = ".left-out.json"
#: What to do about a folder that was collected with other options.
OTHERS = "give those, or take another folder"


@dataclass(frozen=True)
class Request:
    """What is to be collected.

    Attributes:
        folder: gets one file per trajectory, ``00042.safetensors``, or ``00042.left-out.json``
            with the reason if training failed.
        trajectories: their number over all shards.
        data_sets: names of the data sets to draw from.
        data_folder: where the data sets' files are.
        architectures: names of the architectures to draw from; None for all.
        regime: of all trajectories; None for both.
        like_release: whether they are recorded as the method's authors do, as chains or from a
            common start; see :mod:`~know_cli.meta.release_setup`.
        side: images are reduced to this, in pixels; None leaves them.
        most_samples, largest_batch: like the release only, see
            :func:`~know_cli.meta.release_setup.draw_release_setup`.
        seed: of the whole collection. A trajectory depends on this seed, its number and the
            choices above, but not on shards and processes.
        rows_per_tensor: the most elements kept of one tensor.
        shard: (i, n): this run collects the trajectories i, i + n, i + 2n, …
        processes: how many train at the same time, each with one thread.
        device: where they train.
    """

    folder: Path
    trajectories: int
    data_sets: Sequence[str]
    data_folder: Path | None = None
    architectures: Sequence[str] | None = None
    regime: Regime | None = None
    like_release: bool = False
    side: int | None = None
    most_samples: int | None = None
    largest_batch: int | None = None
    seed: int = 0
    rows_per_tensor: int = 40_000
    shard: tuple[int, int] = (0, 1)
    processes: int = 1
    device: torch.device = CPU

    def numbers(self) -> list[int]:
        """Numbers of the trajectories of this shard."""
        return list(range(self.shard[0], self.trajectories, self.shard[1]))

    def draw(self, number: int, data_sets: Mapping[str, DataSet]) -> Setup:
        """The setup of a trajectory.

        Raises:
            UsageError: nothing can be drawn from these choices.
        """
        seed = derived_seed(self.seed, number)
        if self.like_release:
            chain = self.regime is Regime.CHAIN
            return draw_release_setup(
                seed,
                data_sets,
                self.architectures,
                chain=chain,
                most_samples=self.most_samples,
                largest_batch=self.largest_batch,
            )
        return draw_setup(seed, data_sets, self.architectures, self.regime)

    def file(self, number: int) -> Path:
        """The file of a collected trajectory."""
        return self.folder / f"{number:05d}.safetensors"

    def left_out(self, number: int) -> Path:
        """The file with the reason why a trajectory was left out."""
        return self.folder / f"{number:05d}{LEFT_OUT}"

    def partial(self, number: int) -> Path:
        """The folder of a trajectory's checkpoints while it is being recorded."""
        return self.folder / f"{_PARTIAL}{number:05d}"


@dataclass(frozen=True)
class Collected:
    """The outcome of one trajectory.

    Attributes:
        number: of the trajectory.
        facts: see :attr:`~know_cli.meta.series.Series.facts`; empty if it was left out.
        rows: sampled parameters of each kind.
        reason: why it was left out; empty if it was not.
        seconds: how long it took; None if an earlier run collected it.
    """

    number: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[Kind, int] = field(default_factory=dict)
    reason: str = ""
    seconds: float | None = None


def existing(request: Request) -> list[Collected]:
    """The trajectories of this shard that earlier runs collected or left out.

    Raises:
        CheckpointError: a file is corrupt.
    """
    found = []
    for number in request.numbers():
        if request.left_out(number).exists():
            found.append(
                Collected(number, reason=read_left_out(request.left_out(number))["reason"])
            )
        elif request.file(number).exists():
            found.append(Collected(number, *read_facts(request.file(number))))
    return found


def collect(request: Request) -> Iterator[Collected]:
    """Record the missing trajectories of a shard, yielding each as it is finished.

    Closing the iterator, or throwing an exception into it, ends the processes; a trajectory that
    was being trained continues from its last session in the next run.

    Raises:
        UsageError: a data set or an architecture cannot be used, or the folder has trajectories
            of other options.
        OutputError: the folder cannot be written, or a process was killed.
    """
    make_folder(request.folder)
    missing = [
        number
        for number in request.numbers()
        if not (request.file(number).exists() or request.left_out(number).exists())
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
    # Data sets are shared, so no process loads or renders them again.
    yield from in_processes(
        _collect_one,
        [(number,) for number in missing],
        request.processes,
        request.folder,
        _prepare,
        (request, data),
    )


def _check_same(request: Request, data: Mapping[str, DataSet]) -> None:
    """Refuse to go on with a folder whose trajectories other options were given for."""
    for number in request.numbers():
        path, left_out = request.file(number), request.left_out(number)
        if (request.folder / f"{number:05d}").is_dir():
            raise UsageError(f"{path.with_suffix('')}: is no forgetting; take another folder")
        if not (path.exists() or left_out.exists()):
            continue
        drawn = json.loads(json.dumps(request.draw(number, data).to_json()))
        if left_out.exists():
            check_left_out(left_out, drawn)
            continue
        facts = read_facts(path)[0]
        # What was collected before it was noted does not tell how much is kept of a tensor.
        rows = facts.get(ROWS, request.rows_per_tensor)
        if facts.get("setup") != drawn or rows != request.rows_per_tensor:
            raise UsageError(f"{path}: was collected with other options; {OTHERS}")


_request: Request
_data: dict[str, DataSet]


def _prepare(request: Request, data: dict[str, DataSet]) -> None:
    global _request, _data
    _request, _data = request, data


def _collect_one(number: int) -> Collected:
    began = time.perf_counter()
    folder = _request.partial(number)
    setup = _request.draw(number, _data)
    _forget_another(folder, setup)
    try:
        series = record_trajectory(
            setup,
            _data[setup.data_set],
            folder,
            rows_per_tensor=_request.rows_per_tensor,
            device=_request.device,
        )
        save_series(series, _request.file(number))
    except NotUsableError as error:
        text = json.dumps({"reason": str(error), "setup": setup.to_json()}, indent=1)
        write_text(_request.left_out(number), text + "\n", replace=False)
        return Collected(number, reason=str(error), seconds=time.perf_counter() - began)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        if _request.file(number).exists() or _request.left_out(number).exists():
            remove_tree(folder, quietly=True)
    return Collected(
        number,
        series.facts,
        {kind: len(series.values[kind]) for kind in PREDICTED_KINDS},
        seconds=time.perf_counter() - began,
    )


def _forget_another(folder: Path, setup: Setup) -> None:
    """Remove what was being recorded with other options, and note these ones."""
    text = json_text(setup.to_json(), indent=1)
    noted = folder / _SETUP
    if noted.exists() and read_text(noted) != text:
        remove_tree(folder, quietly=True)
    make_folder(folder)
    write_text(noted, text, replace=True)


def read_left_out(path: Path) -> dict[str, Any]:
    """Why something was left out (``reason``), and with which ``setup``.

    Raises:
        CheckpointError: the file is corrupt.
    """
    try:
        found: dict[str, Any] = json.loads(read_text(path))
        if not isinstance(found.get("setup", {}), dict):
            raise TypeError("its setup is no object")
        return {**found, "reason": str(found["reason"])}
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error!r}); delete it") from error


def check_left_out(
    path: Path, drawn: Mapping[str, Any], added: Mapping[str, Any] | None = None
) -> None:
    """Refuse to count as left out what other options were given for.

    Args:
        path: of the file with the reason.
        drawn: the setup that the options give, as JSON.
        added: entries that older setups lack, with what they stand for.

    Raises:
        CheckpointError: the file is corrupt.
        UsageError: its setup is another one.
    """
    setup = read_left_out(path).get("setup", drawn)
    if {**(added or {}), **setup} != drawn:
        raise UsageError(f"{path}: was left out with other options; {OTHERS}")
