"""Runs a user's training function through the sessions of one or more trajectories."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from know_cli.checkpoints.state import read_state
from know_cli.errors import KnowError, UsageError, a_type, counted
from know_cli.forgetting.branches import BranchRecorder
from know_cli.forgetting.recorder import Recorder, TrainingSession, derived_seed, state_of
from know_cli.forgetting.subsets import nested_subsets

#: What may accompany a training function, as an attribute of it or of its module.
_SIZE, _LABELS = "size", "labels"
_RATE_DIGITS = 3
# In PyTorch's message about keys that a wrapped model misses.
_WRAPPED_NAMES = re.compile(r"Missing key.*[\".](?:module|_orig_mod)\.", re.DOTALL)

Measurements = Mapping[str, "float | str | bool"]


@dataclass(frozen=True)
class TrainingFunction:
    """A user's training function and what it declares about its data.

    Attributes:
        name: as the user wrote it.
        function: session → model or state dict, or a pair of that and measurements.
        size: number of samples, if declared.
        labels: classes of the samples, or a function of (seed, options) that returns them.
    """

    name: str
    function: Callable[[TrainingSession], Any]
    size: int | None = None
    labels: Any = None

    def data_labels(self, seed: int, options: Mapping[str, str]) -> NDArray[Any] | None:
        """Classes ``[n]`` of a trajectory's samples, or None if the function declares none.

        Raises:
            UsageError: they are not one class per sample, or the function of them fails.
        """
        found = self.labels
        if callable(found):
            with user_code(self.name, _LABELS):
                found = found(seed, dict(options))
        return None if found is None else as_labels(found, f"{self.name}: {_LABELS}")

    def train(
        self, session: TrainingSession, folder: Path
    ) -> tuple[Mapping[str, Any], dict[str, float | str | bool]]:
        """Train one session and return its state dict and measurements.

        Raises:
            UsageError: the function fails or returns something else.
        """
        where = f"{self.name}: {folder.name}, {session.name}"
        with user_code(self.name, f"{folder.name}, {session.name}"):
            result = self.function(session)
        measurements: Any = {}
        if isinstance(result, tuple) and len(result) == 2:
            result, measurements = result
        if not isinstance(measurements, Mapping):
            raise UsageError(f"{where}: measurements are {a_type(measurements)}, not a dictionary")
        return state_of(result, where), dict(measurements)


def as_labels(found: Any, where: str) -> NDArray[Any]:
    """Labels of any library as an array ``[n]``.

    Raises:
        UsageError: they are not one class per sample, or cannot be sorted; ``where`` begins the
            message.
    """
    try:
        labels = np.asarray(found.detach().cpu() if hasattr(found, "detach") else found)
        np.unique(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"{where}: cannot be taken for classes: {error}; give one class per sample, all "
            "numbers or all texts"
        ) from error
    if labels.ndim != 1:
        raise UsageError(f"{where}: has shape {labels.shape}; give one class per sample")
    return labels


class user_code:  # noqa: N801  used like a function
    """Turns any exception from a user's code into one line that says where it happened."""

    def __init__(self, name: str, where: str) -> None:
        self.text = f"{name}: {where}"

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, (Exception, SystemExit)) and not isinstance(error, KnowError):
            text = f"{type(error).__name__}: {error}"
            hint = ""
            if _WRAPPED_NAMES.search(text.partition("Unexpected key")[0]):
                hint = "load session.start, which has the bare model's names, before wrapping; "
            raise UsageError(
                f"{self.text}: {text}; {hint}KNOW_DEBUG=1 shows the traceback"
            ) from error


def load_function(name: str) -> TrainingFunction:
    """Import a training function.

    Args:
        name: ``module:function`` (importable from the current folder too), or
            ``file.py:function``. An attribute ``size`` or ``labels`` of the function, or else of
            its module, describes its data.

    Raises:
        UsageError: there is no such function, or importing it fails.
    """
    module, function = _load(name)
    if not callable(function):
        raise UsageError(f"{name}: is {a_type(function)}, not a function")
    size = getattr(function, _SIZE, getattr(module, _SIZE, None))
    labels = getattr(function, _LABELS, getattr(module, _LABELS, None))
    if size is not None and not isinstance(size, int):
        raise UsageError(f"{name}: its size is {a_type(size)}, not an integer")
    return TrainingFunction(name, function, size, labels)


def load_object(name: str) -> Any:
    """Import any object by ``module:name`` or ``file.py:name``.

    Raises:
        UsageError: there is no object of that name, or importing it fails.
    """
    return _load(name)[1]


def _load(name: str) -> tuple[ModuleType, Any]:
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise UsageError(f"{name}: write it as module:name or file.py:name")
    module = _load_module(name, place)
    if not hasattr(module, attribute):
        raise UsageError(f"{name}: {place} has no {attribute!r}; check the name")
    return module, getattr(module, attribute)


def _load_module(name: str, place: str) -> ModuleType:
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise UsageError(f"{name}: {place}: no such file; check the path")
        _search_first(path.resolve().parent)
        specification = importlib.util.spec_from_file_location(path.stem, path)
        if specification is None or specification.loader is None:
            raise UsageError(f"{name}: {place}: cannot be imported")
        module = importlib.util.module_from_spec(specification)
        # Data loader processes and pickle find modules by name.
        sys.modules[path.stem] = module
        with user_code(name, "import"):
            specification.loader.exec_module(module)
        return module
    _search_first(Path.cwd())
    try:
        found = importlib.util.find_spec(place)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise UsageError(
            f"{name}: there is no module {place!r} here or installed; check the name, or write "
            "the path of its file: file.py:function"
        )
    with user_code(name, "import"):
        return importlib.import_module(place)


def _search_first(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@dataclass(frozen=True)
class Protocol:
    """How trajectories are recorded.

    Attributes:
        sessions: number of sessions, session 0 included.
        rates: lowest and highest sampling rate; each trajectory draws its own.
        seed: of a single trajectory; several trajectories have seeds derived from it.
        before: number of larger data sets held back, on which Θ0 is continued.
        options: passed to the training function.
        size: number of samples, unless there are labels.
        labels: classes of the samples; None asks the training function.
        start: checkpoint that every session starts from; None for a chain.
        first: checkpoint of a Θ0 that is trained already, of a forgetting or of branches; None
            trains it.
        branches: record so many branches of Θ0 instead of a forgetting, each on a share ``rates``
            of the data; 0 is a forgetting.
    """

    sessions: int = 5
    rates: tuple[float, float] = (0.5, 0.5)
    seed: int = 0
    before: int = 0
    options: Mapping[str, str] = field(default_factory=dict)
    size: int | None = None
    labels: NDArray[Any] | None = None
    start: Path | None = None
    first: Path | None = None
    branches: int = 0


def open_recorder(
    function: TrainingFunction, folder: Path, protocol: Protocol, number: int | None = None
) -> Recorder:
    """The recorder of one trajectory, new or already begun.

    Args:
        function: trains the sessions.
        folder: of the trajectory, or of all trajectories if there is a ``number``.
        protocol: how to record.
        number: index of one trajectory among several, from 0; its folder is ``folder/0000`` and
            so on.

    Raises:
        UsageError: the size of the data is unknown, the subsets cannot be drawn, or the folder
            holds another trajectory.
    """
    seed = protocol.seed
    if number is not None:
        seed, folder = derived_seed(protocol.seed, number), folder / f"{number:04d}"
    lowest, highest = protocol.rates
    rate = lowest
    if highest > lowest:
        drawn = np.random.default_rng([seed, 0]).uniform(lowest, highest)
        rate = round(float(drawn), _RATE_DIGITS)
    labels = protocol.labels
    if labels is None and protocol.size is None:
        labels = function.data_labels(seed, protocol.options)
    size = protocol.size or function.size
    if labels is not None:
        if size is not None and size != len(labels):
            raise UsageError(
                f"{function.name}: {counted(size, 'sample')}, but {counted(len(labels), 'label')}"
            )
        size = len(labels)
    if size is None:
        raise UsageError(
            f"{function.name}: does not declare its number of samples; give --size or --labels"
        )
    start = None if protocol.start is None else read_state(protocol.start)
    first = None if protocol.first is None else read_state(protocol.first, folders=True)
    if protocol.branches:
        return BranchRecorder(
            folder,
            size,
            branches=protocol.branches,
            rate=rate,
            seed=seed,
            labels=labels,
            options=protocol.options,
            function=function.name,
            start=first,
        )
    subsets = nested_subsets(size, rate, protocol.before + protocol.sessions, seed, labels)
    return Recorder(
        folder,
        subsets,
        rate=rate,
        seed=seed,
        before=protocol.before,
        options=protocol.options,
        function=function.name,
        start=start,
        first=first,
    )


def record(
    function: TrainingFunction,
    recorder: Recorder,
    report: Callable[[TrainingSession, Measurements], None] = lambda session, measurements: None,
) -> int:
    """Train and save all sessions that are not on disk yet.

    Args:
        function: trains the sessions.
        recorder: of the trajectory.
        report: called after each session.

    Returns:
        The number of sessions and continuations that were trained.

    Raises:
        UsageError: the function fails or does not return a model.
        OutputError: the folder cannot be written.
    """
    count = 0
    for session in recorder:
        state, measurements = function.train(session, recorder.folder)
        recorder.save(session, state, measurements)
        report(session, measurements)
        count += 1
    return count
