"""Recording a forgetting or branches of a model that a trainer has trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from know_cli.checkpoints.reading import as_bytes
from know_cli.checkpoints.state import read_state
from know_cli.errors import UsageError
from know_cli.forgetting import BranchRecorder, Recorder, TrainingSession, nested_subsets
from know_cli.forgetting.recorder import state_of

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Trains a model in place on the samples of a session, with its seed.
Train = Callable[[TrainingSession], None]
# What libraries take as a seed.
_SEEDS = 2**31


def forgetting_recorder(
    folder: Path | str,
    size: int,
    function: str,
    *,
    sessions: int,
    rate: float,
    seed: int,
    labels: ArrayLike | None,
) -> Recorder:
    """The recorder of a forgetting whose Θ0 is trained already.

    Raises:
        UsageError: subsets cannot be drawn, or the folder holds something else.
    """
    subsets = nested_subsets(size, rate, sessions, seed, labels)
    return Recorder(folder, subsets, rate=rate, seed=seed, function=function)


def branch_recorder(
    folder: Path | str,
    size: int,
    function: str,
    *,
    branches: int,
    rate: float,
    seed: int,
    labels: ArrayLike | None,
) -> BranchRecorder:
    """The recorder of branches whose Θ0 is trained already.

    Raises:
        UsageError: a number cannot be, or the folder holds something else.
    """
    return BranchRecorder(
        folder,
        size,
        branches=branches,
        rate=rate,
        seed=seed,
        labels=None if labels is None else np.asarray(labels),
        function=function,
    )


def record_after(recorder: Recorder, model: nn.Module, train: Train) -> list[Path]:
    """Save a trained model as Θ0, train what is missing after it, and put the model back.

    Args:
        recorder: of a forgetting or of branches.
        model: as it was trained; has its weights again at the end.
        train: trains it further, from the weights that it has.

    Returns:
        The paths of all checkpoints, Θ0's first.

    Raises:
        UsageError: the folder holds another model's.
        OutputError: it cannot be written.
    """
    where = f"{recorder.folder}: Θ0"
    first = recorder.path(0)
    if first.exists():
        _check_same(first, state_of(model, where))
    try:
        for session in recorder:
            if session.index:
                assert session.start is not None
                load(model, session.start)
                train(session)
            recorder.save(session, model)
    finally:
        if first.exists():
            load(model, read_state(first))
    return [recorder.path(index) for index in recorder.indices]


def load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a recorded state into a model, whatever is wrapped around its parts."""
    import torch

    with torch.no_grad():
        for name, tensor in state_of(model, "the model").items():
            tensor.copy_(state[name])


def seed_of(session: TrainingSession) -> int:
    """A session's seed, as small as libraries want it."""
    return session.seed % _SEEDS


def no_step(session: TrainingSession, advice: str) -> UsageError:
    """The error of a training that left the model as it was, which would be recorded as trained."""
    return UsageError(f"{session.name}: its training made no step; {advice}")


def size_of(data: Any, what: str) -> int:
    """The number of samples of a data set.

    Raises:
        UsageError: it has none, as streamed data do not.
    """
    from torch.utils.data import IterableDataset

    # Torch gives a streamed data set a __getitem__ that only raises, and its author a __len__.
    is_streamed = isinstance(data, IterableDataset)
    if is_streamed or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise UsageError(
            f"{what}: is streamed, and subsets need samples by their numbers; give a data set with "
            "__len__ and __getitem__"
        )
    return len(data)


def _check_same(first: Path, state: Mapping[str, Tensor]) -> None:
    recorded = read_state(first)
    same = recorded.keys() == state.keys() and all(
        _is_same(tensor.detach().cpu(), recorded[name]) for name, tensor in state.items()
    )
    if not same:
        raise UsageError(
            f"{first}: is another model than the one that was trained; record into another folder, "
            "or load this file into the model to go on"
        )


def _is_same(one: Tensor, two: Tensor) -> bool:
    # By bytes, since NaN, which buffers can have from the start, is not equal to itself.
    return (one.dtype, one.shape) == (two.dtype, two.shape) and as_bytes(one) == as_bytes(two)
