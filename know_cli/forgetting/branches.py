"""Branches: several trainings that go on from one Θ0, on the same data or on parts of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from know_cli.checkpoints.metadata import Branch
from know_cli.checkpoints.reading import as_bytes
from know_cli.errors import UsageError, counted
from know_cli.forgetting.record_checks import FORMAT
from know_cli.forgetting.recorder import (
    Recorder,
    TrainingSession,
    checkpoint_name,
    derived_seed,
)
from know_cli.forgetting.subsets import MOST_SESSIONS, Indices, check_size, nested_subsets

if TYPE_CHECKING:
    from torch import Tensor

RECORD = "branches.json"
# Of random numbers, beside those of sessions (0) and continuations (1).
_STREAM = 2


class BranchRecorder(Recorder):
    """Takes a training loop through Θ0 and its branches, and can resume.

    Iterating yields what is not on disk yet: session 0, which trains Θ0 on all samples, unless a
    ``start`` is given; then the branches, which start from Θ0. A branch has a seed of its own, so
    that it sees the data in another order, and with a ``rate`` below 1 samples of its own.

    Branches can be added later: the first ones are the same whatever their number.

    Args:
        folder: where ``ckpt0.safetensors`` (Θ0), ``branch1.safetensors``, … and
            ``branches.json`` go; created if missing.
        size: number of training samples.
        branches: how many.
        rate: share of the samples that each branch is trained on, drawn independently; 1 is all.
        seed: of the recording, not negative.
        labels: ``[size]`` class of each sample, so that subsets keep the classes' shares.
        options: passed to every session, and part of the recording's identity.
        function: name of the training function for the record, also part of the identity.
        start: state dict of a Θ0 that is trained already.

    Raises:
        UsageError: the folder holds something else, or a number cannot be.
        CheckpointError: a checkpoint in it is corrupt, or branches are there without their Θ0.

    Example:
        >>> from torch import nn
        >>> from know_cli.forgetting import BranchRecorder
        >>> def train(session):
        ...     model = nn.Linear(2, 1)
        ...     if session.start is not None:  # every branch
        ...         model.load_state_dict(session.start)
        ...     return model  # trained on the samples session.indices, with session.seed
        >>> recorder = BranchRecorder("run", 100, branches=3, rate=0.5)
        >>> for session in recorder:
        ...     recorder.save(session, train(session))
        >>> sorted(path.name for path in recorder.folder.iterdir())[:3]
        ['branch1.safetensors', 'branch2.safetensors', 'branch3.safetensors']
    """

    _record_name = RECORD

    def __init__(
        self,
        folder: Path | str,
        size: int,
        *,
        branches: int,
        rate: float = 1.0,
        seed: int = 0,
        labels: ArrayLike | None = None,
        options: Mapping[str, str] | None = None,
        function: str = "",
        start: Mapping[str, Tensor] | None = None,
    ) -> None:
        if branches < 1:
            raise UsageError(f"{branches} branches: at least 1 is needed")
        if branches >= MOST_SESSIONS:  # Θ0 counts, too
            raise UsageError(f"{branches} branches: at most {MOST_SESSIONS - 1} can be recorded")
        if not 0 < rate <= 1:
            raise UsageError(f"rate {rate:g} of branches: must be above 0 and at most 1, as 0.5 is")
        check_size(size)
        if round(rate * size) < 1:
            raise UsageError(
                f"{counted(size, 'sample')} {'is' if size == 1 else 'are'} too few for rate "
                f"{rate:g}: a branch would have none; use a "
                "higher rate"
            )
        self._begin(folder, rate, seed, options, start)
        everything = np.arange(size, dtype=np.int64)
        self.indices = [*([0] if start is None else []), *range(1, branches + 1)]
        self._subsets = {
            index: _samples(everything, rate, derived_seed(seed, _STREAM, index), labels)
            if index
            else everything
            for index in self.indices
        }
        facts = [function, rate, seed, sorted(self.options.items()), size]
        digest = hashlib.sha256(json.dumps(facts).encode())
        if labels is not None:
            digest.update(repr(np.asarray(labels).tolist()).encode())
        for name, tensor in sorted((self._common_start or {}).items()):
            digest.update(name.encode())
            digest.update(as_bytes(tensor.detach().cpu()))
        self.trajectory = digest.hexdigest()[:12]
        self._record: dict[str, Any] = {
            "format": FORMAT,
            "trajectory": self.trajectory,
            "function": function,
            "options": self.options,
            "seed": seed,
            "rate": rate,
            "samples": size,
            "branches": branches,
            "sessions": len(self.indices),
            "continuations": 0,
            "recorded": {},
        }
        self._resume()

    def path(self, index: int) -> Path:
        """Where Θ0 (0) or a branch (1, 2, …) goes."""
        return self.folder / (f"branch{index}.safetensors" if index else checkpoint_name(0))

    def _session(self, index: int) -> TrainingSession:
        seed = derived_seed(self.seed, *((_STREAM, index) if index else (0, 0)))
        return TrainingSession(
            index=index,
            fraction=self.rate if index else 1.0,
            indices=self._subsets[index].copy(),
            start=self._start(index),
            seed=seed,
            trajectory_seed=self.seed,
            options=dict(self.options),
            is_branch=index > 0,
        )

    def _before(self, index: int) -> int | None:
        return 0 if index and self._common_start is None else None

    def _metadata(self, session: TrainingSession) -> dict[str, str]:
        branch = Branch(session.index, session.fraction, session.seed, self.trajectory)
        return branch.to_metadata()


def _samples(everything: Indices, rate: float, seed: int, labels: ArrayLike | None) -> Indices:
    """The samples of one branch, sorted."""
    if rate == 1:
        return everything
    return nested_subsets(len(everything), rate, 2, seed, labels)[1]
