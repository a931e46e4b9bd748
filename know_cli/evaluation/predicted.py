"""Weights of starts on demand, so that nothing is predicted whose results are there already."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from know_cli.engine.settings import NormMode
from know_cli.evaluation import cache
from know_cli.evaluation.tasks.task import RATE
from know_cli.evaluation.variants import Variant, identity, predict


class Loads(Protocol):
    """The weights of a start, read or predicted on demand."""

    def load(self) -> Mapping[str, Tensor] | None:
        """The weights; None for fresh ones."""


class Recorded(Protocol):
    """A trial with its checkpoints.

    Attributes:
        folder: of all that is kept.
        computed: number of trainings, predictions and fine-tunings done so far.
    """

    folder: Path
    computed: int

    def checkpoint(self, index: int) -> Path:
        """The file of a session's checkpoint."""


class Predicted:
    """All steps of one prediction, on demand."""

    def __init__(
        self,
        trial: Recorded,
        variant: Variant,
        norm: NormMode,
        count: int,
        steps: int,
        sessions: Mapping[str, Any],
        rate: float = RATE,
    ) -> None:
        self._trial, self._variant, self._norm = trial, variant, norm
        self._count, self._steps, self._rate = count, steps, rate
        name = cache.key(
            [sessions[str(index)]["key"] for index in range(count)],
            identity(variant, count, rate),
            norm.value,
            steps,
            cache.code_key(),
        )
        self._path = trial.folder / "predicted" / f"{name}.json"
        self._states: dict[int, dict[str, Tensor]] | None = None

    def keys(self) -> dict[int, str]:
        """The hashes of the predicted weights, by step."""
        found = cache.read(self._path)
        if found is None:
            found = {str(step): cache.tensors_key(state) for step, state in self.states().items()}
            cache.write(self._path, found)
        return {int(step): str(key) for step, key in found.items()}

    @property
    def is_known(self) -> bool:
        """Whether the hashes are there, so that asking for them predicts nothing."""
        return cache.read(self._path) is not None

    def states(self) -> dict[int, dict[str, Tensor]]:
        """The predicted weights, by step."""
        if self._states is None:
            files = [self._trial.checkpoint(index) for index in range(self._count)]
            self._trial.computed += 1
            self._states = predict(self._variant, files, self._norm, self._steps, self._rate)
        return self._states
