"""Records the sessions of structured forgetting from any training loop, and can resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from know_cli.checkpoints import open_checkpoint, save_checkpoint
from know_cli.checkpoints.metadata import REGIME, TRAJECTORY, Continuation, Regime, Session
from know_cli.checkpoints.reading import as_bytes
from know_cli.checkpoints.state import read_state
from know_cli.errors import CheckpointError, OutputError, UsageError, a_type
from know_cli.files import check_writable, json_text, make_folder, write_text
from know_cli.forgetting.measurements import plain_measurements
from know_cli.forgetting.record_checks import FORMAT, RECORD, read_record
from know_cli.forgetting.subsets import Indices
from know_cli.forgetting.wrappers import bare_name, inside_wrappers

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class TrainingSession:
    """One session to train, as a training function receives it.

    Attributes:
        index: k of the session, 0 for the full data; −1, −2, … for a continuation of Θ0 on
            the larger data sets D(−1), D(−2), …; of a branch 1, 2, …
        fraction: share of session 0's data, ``rate ** index``; of a branch the rate itself.
        indices: sorted int64 indices of the samples to train on.
        start: state dict to continue from (float and integer tensors on the CPU), with the names
            of the bare model: load it before the model is wrapped or compiled. None for session
            0 of a chain, which starts from fresh weights.
        seed: for this session's random numbers, different in each session.
        trajectory_seed: the same for all sessions of the trajectory.
        options: the caller's ``key=value`` pairs, as text.
        is_branch: whether this is one of several trainings that go on from the same Θ0.
    """

    index: int
    fraction: float
    indices: Indices = field(repr=False)
    start: Mapping[str, Tensor] | None = field(repr=False)
    seed: int
    trajectory_seed: int
    options: Mapping[str, str]
    is_branch: bool = False

    @property
    def is_continuation(self) -> bool:
        """Whether this session continues Θ0 on more data instead of forgetting."""
        return self.index < 0

    @property
    def name(self) -> str:
        """``session 2``, ``continuation 1`` or ``branch 3``, for messages."""
        if self.is_branch:
            return f"branch {self.index}"
        return f"continuation {-self.index}" if self.index < 0 else f"session {self.index}"


def checkpoint_name(index: int) -> str:
    """File name of a session's checkpoint (0, 1, …) or of a continuation's (−1, −2, …)."""
    return f"continued{-index}.safetensors" if index < 0 else f"ckpt{index}.safetensors"


class Recorder:
    """Takes a training loop through the sessions and saves each one's checkpoint.

    Iterating yields the sessions that are not on disk yet, so a run that crashed continues where
    it stopped. Each yielded session must be passed to :meth:`save` before the next one.
    Continuations of Θ0 come after the sessions.

    Args:
        folder: where ``ckpt0.safetensors``, … and ``trajectory.json`` go; created if missing.
        subsets: nested sets of indices, the largest first
            (:func:`~know_cli.forgetting.subsets.nested_subsets`).
        rate: sampling rate from one subset to the next.
        seed: the trajectory's seed, not negative.
        before: the first ``before`` subsets are D(−before) … D(−1), held back from the
            sessions; session 0 trains on the one after them.
        options: passed to every session, and part of the trajectory's identity.
        function: name of the training function for the record, also part of the identity.
        start: state dict that every session starts from (the regime of the authors' sample
            script); without it each session continues from the previous one (the paper's text).
        first: state dict of a Θ0 that is trained already, such as a public model's; session 0 is
            then not yielded, but recorded as it is. Without it session 0 trains Θ0.

    Raises:
        UsageError: the folder holds another trajectory.
        CheckpointError: a checkpoint in it is corrupt, or one is missing that others were trained
            from.

    Example:
        >>> from torch import nn
        >>> from know_cli.forgetting import nested_subsets
        >>> def train(session):
        ...     model = nn.Linear(2, 1)
        ...     if session.start is not None:  # every session but the first
        ...         model.load_state_dict(session.start)
        ...     return model  # trained on the samples session.indices, with session.seed
        >>> subsets = nested_subsets(100, rate=0.5, sessions=3, seed=0)
        >>> recorder = Recorder("run", subsets, rate=0.5)
        >>> for session in recorder:
        ...     recorder.save(session, train(session))
        >>> recorder.done
        [0, 1, 2]
    """

    def __init__(
        self,
        folder: Path | str,
        subsets: Sequence[Indices],
        *,
        rate: float,
        seed: int = 0,
        before: int = 0,
        options: Mapping[str, str] | None = None,
        function: str = "",
        start: Mapping[str, Tensor] | None = None,
        first: Mapping[str, Tensor] | None = None,
    ) -> None:
        if start is not None and first is not None:
            raise UsageError(
                "a common start and a Θ0 that is trained already exclude each other: all sessions "
                "would begin at the one, and session 1 at the other"
            )
        if not 0 <= before < len(subsets):
            raise UsageError(
                f"{before} of {len(subsets)} subsets held back as larger data sets: at least one "
                "must remain for session 0"
            )
        self._begin(folder, rate, seed, options, start)
        self._first = None if first is None else dict(first)
        self._subsets = {
            number - before: np.asarray(subset, dtype=np.int64)
            for number, subset in enumerate(subsets)
        }
        self.indices = [*range(len(subsets) - before), *range(-1, -before - 1, -1)]
        self.regime = Regime.CHAIN if start is None else Regime.COMMON_START
        self.trajectory = self._identity(function)
        self._record: dict[str, Any] = {
            "format": FORMAT,
            "trajectory": self.trajectory,
            "function": function,
            "options": self.options,
            "seed": seed,
            "rate": rate,
            "sessions": len(subsets) - before,
            "continuations": before,
            "regime": self.regime.value,
            "recorded": {},
        }
        self._resume()

    # What other recorders have in other ways: names, the record's file, shares, seeds, metadata.
    _record_name = RECORD
    _first: dict[str, Tensor] | None = None

    def _begin(
        self,
        folder: Path | str,
        rate: float,
        seed: int,
        options: Mapping[str, str] | None,
        start: Mapping[str, Tensor] | None,
    ) -> None:
        if seed < 0:
            raise UsageError(f"seed {seed}: must not be negative")
        # A training may change the working folder.
        self.folder = Path(folder).absolute()
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{self.folder}: is a file; name a folder for the checkpoints")
        self.rate, self.seed, self.options = rate, seed, dict(options or {})
        self._common_start = None if start is None else dict(start)
        self._open: TrainingSession | None = None
        self._has_record = False

    def path(self, index: int) -> Path:
        """Where the checkpoint of a session goes."""
        return self.folder / checkpoint_name(index)

    def _session(self, index: int) -> TrainingSession:
        return TrainingSession(
            index=index,
            fraction=self.rate**index,
            indices=self._subsets[index].copy(),
            start=self._start(index),
            seed=derived_seed(self.seed, *(([0, index]) if index >= 0 else ([1, -index]))),
            trajectory_seed=self.seed,
            options=dict(self.options),
        )

    def _metadata(self, session: TrainingSession) -> dict[str, str]:
        kept = (session.fraction, self.rate, self.trajectory)
        if session.is_continuation:
            metadata = Continuation(-session.index, *kept).to_metadata()
        else:
            metadata = Session(session.index, *kept).to_metadata()
        return {REGIME: self.regime.value, **metadata}

    def _identity(self, function: str) -> str:
        digest = hashlib.sha256()
        facts = [function, self.rate, self.seed, sorted(self.options.items()), self.indices]
        digest.update(json.dumps(facts).encode())
        for index in self.indices:
            digest.update(self._subsets[index].tobytes())
        for name, tensor in sorted((self._common_start or self._first or {}).items()):
            digest.update(name.encode())
            digest.update(as_bytes(tensor.detach().cpu()))
        if self._first is not None:
            digest.update(b"first")
        return digest.hexdigest()[:12]

    def _resume(self) -> None:
        record = self.folder / self._record_name
        if record.exists():
            found = read_record(self.folder, self._record_name)
            if found["trajectory"] != self.trajectory:
                raise self._other(record, found["trajectory"])
            self._record["recorded"] = found["recorded"]
            self._has_record = True
        for index in self.done:
            path = self.path(index)
            with open_checkpoint(path) as checkpoint:
                trajectory = checkpoint.metadata.get(TRAJECTORY, "none recorded")
            if trajectory != self.trajectory:
                raise self._other(path, trajectory)
        self._check_unbroken()

    def _check_unbroken(self) -> None:
        """Refuse checkpoints whose predecessor is gone: what replaced it would not be theirs."""
        # A Θ0 that is given is written again as it was.
        gone = {index for index in self.missing if index or self._first is None}
        cut_off: dict[int, int] = {}
        for index in self.done:
            before = self._before(index)
            if before is not None and before in gone:
                cut_off[index] = before
                gone.add(index)
        if cut_off:
            missing = self.path(next(iter(cut_off.values())))
            names = ", ".join(self.path(index).name for index in cut_off)
            raise CheckpointError(
                f"{missing}: is missing, and what was trained from it is there: {names}; put it "
                "back, or remove these as well, so that they are trained again"
            )

    def _other(self, path: Path, trajectory: str) -> UsageError:
        return UsageError(
            f"{path}: is of another trajectory ({trajectory}, this one is {self.trajectory}); "
            "its data, seed, rate, sessions, options, function or start differ; record into "
            "another folder"
        )

    @property
    def done(self) -> list[int]:
        """Indices of the sessions and continuations that are on disk."""
        return [index for index in self.indices if self.path(index).exists()]

    @property
    def missing(self) -> list[int]:
        """Indices of the sessions and continuations that are still to be trained."""
        done = set(self.done)
        return [index for index in self.indices if index not in done]

    def measurements(self, index: int) -> dict[str, float]:
        """The measurements passed to :meth:`save` for a session; empty if it is not recorded."""
        entry = self._record["recorded"].get(str(index), {})
        return dict(entry.get("measurements", {}))

    def __iter__(self) -> Iterator[TrainingSession]:
        if missing := self.missing:
            # A folder that cannot be written in is told before a training, not after it.
            make_folder(self.folder)
            check_writable(self.folder)
        for index in missing:
            if self._open is not None:
                raise UsageError(
                    f"{self.folder}: {self._open.name} was not saved; call save() first"
                )
            self._open = self._session(index)
            if index == 0 and self._first is not None:
                self.save(self._open, self._first)
            else:
                yield self._open

    def _before(self, index: int) -> int | None:
        """Whose checkpoint a session goes on from; None for a common or a fresh start."""
        if index == 0 or (index > 0 and self._common_start is not None):
            return None
        return max(index - 1, 0)

    def _start(self, index: int) -> dict[str, Tensor] | None:
        before = self._before(index)
        if before is not None:
            return read_state(self.path(before))
        if self._common_start is None:
            return None
        return {name: tensor.clone() for name, tensor in self._common_start.items()}

    def save(
        self,
        session: TrainingSession,
        model: nn.Module | Mapping[str, Tensor],
        measurements: Mapping[str, float | str | bool] | None = None,
    ) -> None:
        """Write a session's checkpoint and measurements, each whole or not at all.

        Args:
            session: the session that was yielded last.
            model: the trained model or its state dict.
            measurements: for ``trajectory.json``, such as accuracies.

        Raises:
            UsageError: the session is not the one in training, ``model`` is neither a model nor a
                state dict, or a measurement is not a number, text or boolean; in the last case
                the checkpoint is saved without that measurement.
            OutputError: the folder cannot be written, or another run has recorded the session.
        """
        if self._open is None or session.index != self._open.index:
            raise UsageError(f"{self.folder}: {session.name} is not the session in training")
        state = state_of(model, f"{self.folder}: {session.name}")
        plain, odd = plain_measurements(measurements or {})
        self._record["recorded"][str(session.index)] = {
            "fraction": session.fraction,
            "samples": len(session.indices),
            "seed": session.seed,
            "measurements": plain,
        }
        # The checkpoint goes last, since it marks a session as done: after a crash between the
        # two writes the session is trained again and its entry replaced.
        record = self.folder / self._record_name
        for taken in (self.path(session.index), *([] if self._has_record else [record])):
            if taken.exists():
                raise OutputError(
                    f"{taken}: another run has recorded it meanwhile; wait until that is done, and "
                    "start this one again to go on from there"
                )
        write_text(record, json_text(self._record, indent=1), replace=self._has_record)
        self._has_record = True
        metadata = {"format": "pt", **self._metadata(session)}
        save_checkpoint(self.path(session.index), state, metadata, replace=False)
        self._open = None
        if odd:
            raise UsageError(
                f"{self.folder}: {session.name} is saved without its measurements "
                f"{', '.join(odd)}; return numbers, texts or booleans"
            )


def state_of(model: nn.Module | Mapping[str, Tensor], where: str) -> Mapping[str, Tensor]:
    """The state dict of a model, or of what is one already, with the names of the bare model.

    What wrappers (DataParallel and its like, ``torch.compile``) add to names is dropped, so that
    the model that is inside loads it.

    Raises:
        UsageError: ``model`` is neither; ``where`` begins the message.
    """
    import torch

    if isinstance(model, _BareState):
        return model
    wrapped: set[str] | None = None
    if isinstance(model, torch.nn.Module):
        wrapped = inside_wrappers(model)
        model = model.state_dict()
        if not model:
            raise UsageError(f"{where}: the model has no parameters or buffers to save")
    if not isinstance(model, Mapping) or not model:
        raise UsageError(
            f"{where}: got {a_type(model)}; return the model, its state dict, or a pair "
            "of that and a dictionary of measurements"
        )
    for name, tensor in model.items():
        if not isinstance(name, str):
            raise UsageError(f"{where}: has {name!r} where a tensor's name should be")
        if not isinstance(tensor, torch.Tensor):
            raise UsageError(
                f"{where}: entry {name!r} of the state dict is {a_type(tensor)}, not a tensor"
            )
    names = {name: bare_name(name, wrapped or set()) for name in model}
    # Of names alone, only what all of them begin with is a wrapper's.
    if wrapped is None and all(name.startswith("module.") for name in names.values()):
        names = {name: bare.removeprefix("module.") for name, bare in names.items()}
    state = _BareState({names[name]: tensor for name, tensor in model.items()})
    return state if len(state) == len(model) else model


class _BareState(dict[str, "Tensor"]):
    """A state dict whose names have been looked at."""


def derived_seed(seed: int, *numbers: int) -> int:
    """A seed in [0, 2⁶³) for an independent random stream, derived from all arguments."""
    sequence = np.random.SeedSequence(seed, spawn_key=numbers)
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
