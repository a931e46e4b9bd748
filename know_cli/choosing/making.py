"""Makes the candidates of a search from the checkpoints that a user has."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from know_cli.checkpoints import Trajectory, open_checkpoint
from know_cli.checkpoints.layouts import SUFFIX
from know_cli.checkpoints.metadata import CHOSEN, TrajectoryKind
from know_cli.checkpoints.writer import CheckpointWriter
from know_cli.choosing.candidates import Candidate
from know_cli.choosing.control import copy_tensor, write_random_direction
from know_cli.choosing.made import Made
from know_cli.choosing.search import BASE, RANDOM
from know_cli.engine.journal import file_identity
from know_cli.engine.progress import Progress
from know_cli.engine.settings import Settings
from know_cli.errors import UsageError
from know_cli.methods.bundles import open_bundle
from know_cli.methods.registry import find_method
from know_cli.prediction.request import Request
from know_cli.prediction.together import Together, open_together


@dataclass(frozen=True)
class Maker:
    """Where candidates come from and go to.

    Attributes:
        checkpoints: of the trajectory, as for a prediction.
        folder: receives the candidates.
        settings: of every prediction, but for the steps.
        kind: of the trajectory.
        tell: is given notices.
        made: the record of what was made there; without one, all is made anew, and what is in its
            place is replaced.
    """

    checkpoints: Sequence[Path]
    folder: Path
    settings: Settings
    kind: TrajectoryKind
    tell: Callable[[str], None]
    made: Made | None = None
    _told: set[str] = field(default_factory=set, repr=False)

    def make(self, candidates: Sequence[Candidate], progress: Progress) -> dict[str, Path]:
        """Predict the candidates that are not there yet, in one pass over the checkpoints.

        Returns:
            Name → path, Θ0's under :data:`~know_cli.choosing.search.BASE`.

        Raises:
            UsageError: a candidate cannot be made of these checkpoints.
            CheckpointError: an input cannot be used.
            OutputError: the folder cannot be written, or has something else in a candidate's place.
        """
        requests = self._requests(candidates)
        try:
            made = self._make_together(requests, progress)
        except UsageError:
            # Too many for the memory, or one that cannot be made, which is named then.
            made = [path for one in requests for path in self._make_together([one], progress)]
        return {BASE: made[0]} | {one.name: self._path(one.name) for one in candidates}

    def _requests(self, candidates: Sequence[Candidate]) -> list[Request]:
        """One request for all steps of a method with its options."""
        families: dict[str, dict[int, Candidate]] = {}
        for one in candidates:
            key = json.dumps(one.request(), sort_keys=True)
            families.setdefault(key, {})[one.steps or 1] = one
        requests = []
        for family in families.values():
            last = max(family)
            paths = {step: self._path(one.name) for step, one in family.items()}
            requests.append(
                Request(
                    self.checkpoints,
                    paths.pop(last),
                    settings=replace(self.settings, steps=last),
                    also=paths,
                    force=True,
                    trajectory=self.kind,
                    **family[last].request(),
                )
            )
        return requests

    def _make_together(self, requests: Sequence[Request], progress: Progress) -> list[Path]:
        """Predict in one pass what is not there, and give Θ0's path."""
        with open_together(requests, tell=self._tell_once) as together:
            missing = [
                one
                for one in together.predictions
                if not all(self._is_made(output.path, output.metadata) for output in one.outputs)
            ]
            if missing:
                with self._writing(*(output.path for one in missing for output in one.outputs)):
                    Together(tuple(missing)).execute(progress)
            return [together.predictions[0].trajectory.first.path]

    def _is_made(self, path: Path, metadata: Mapping[str, str]) -> bool:
        """Whether a candidate is there already: of the same inputs, bundle and options."""
        # Its header tells of the inputs by fingerprints, which most changes leave as they are.
        if self.made is None or not self.made.has(path):
            return False
        with open_checkpoint(path) as checkpoint:
            return checkpoint.metadata == metadata

    def _writing(self, *paths: Path) -> AbstractContextManager[None]:
        return nullcontext() if self.made is None else self.made.writing(*paths)

    def _tell_once(self, notice: str) -> None:
        if notice not in self._told:
            self._told.add(notice)
            self.tell(notice)

    def random_direction(self, base: Path, winner: Path, seed: int) -> Path:
        """Write the random direction as far from Θ0 as the winner is, and give its path."""
        path = self._path(RANDOM)
        with self._writing(path):
            write_random_direction(base, winner, path, seed)
        return path

    def paths(self, candidates: Sequence[Candidate]) -> list[Path]:
        """All that is written for these candidates, the random direction too."""
        return [*(self._path(one.name) for one in candidates), self._path(RANDOM)]

    def clean(self, kept: Sequence[Path]) -> None:
        """Remove the candidates that searches made here and that are not kept."""
        if self.made is not None:
            found = [path for path in self.made.paths() if path.parent == self.folder]
            self.made.remove(path for path in found if path not in kept)

    def _path(self, name: str) -> Path:
        first = Path(self.checkpoints[0])
        return self.folder / (name if first.is_dir() else name + SUFFIX)


def identity_of(trajectory: Trajectory, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """What tells the weights that candidates are made of from others, in plain types.

    Args:
        trajectory: the inputs.
        candidates: that are made of it.

    Raises:
        UsageError: a candidate's bundle does not exist.
        CheckpointError: an input or a bundle cannot be read.
    """

    @cache
    def digest(method: str, weights: str | None) -> str | None:
        bundle = open_bundle(find_method(method), weights, len(trajectory))
        return None if bundle is None else bundle.digest

    files = [path for checkpoint in trajectory.checkpoints for path in checkpoint.headers]
    return {
        "inputs": [checkpoint.fingerprint() for checkpoint in trajectory.checkpoints],
        "files": [file_identity(path) for path in files],
        "bundles": [digest(one.method, one.weights) for one in candidates],
    }


def write_chosen(
    source: Path, output: Path, evidence: Mapping[str, object], *, force: bool
) -> None:
    """Copy a start to the output, with the evidence for it in its header.

    Args:
        source: Θ0 or a candidate.
        output: where it goes.
        evidence: plain types, for the entry :data:`~know_cli.checkpoints.metadata.CHOSEN`.
        force: whether an existing output may be replaced.

    Raises:
        CheckpointError: the source cannot be read.
        OutputError: the output cannot be written.
    """
    with open_checkpoint(source) as checkpoint:
        metadata = {**checkpoint.metadata, CHOSEN: json.dumps(evidence, sort_keys=True)}
        with CheckpointWriter(output, checkpoint, metadata, force=force) as writer:
            for entry in checkpoint.tensors.values():
                copy_tensor(checkpoint, entry, writer)
            writer.flush()
            writer.commit()
