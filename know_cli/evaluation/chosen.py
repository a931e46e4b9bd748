"""The row ``chosen``: the procedure of ``know choose`` on a task, scored as every other start is.

It sees what a user of it would: the checkpoints, and the examples of the first repetition's
fine-tuning. Of these a quarter, another one with each of the search's seeds, is held back and
measured on; the task's own recipe fine-tunes on the rest. The test examples are seen only by the
score. The control of a random direction, which decides nothing, is left out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.checkpoints.state import read_state
from know_cli.choosing.candidates import choose_candidates
from know_cli.choosing.making import Maker
from know_cli.choosing.search import (
    BASE,
    RANDOM,
    BaseFailedError,
    Outcome,
    Settings,
    Trial,
    search,
)
from know_cli.engine.progress import Silent
from know_cli.engine.settings import Settings as EngineSettings
from know_cli.evaluation import cache
from know_cli.evaluation import trial as trials
from know_cli.evaluation.anchors import NAIVE
from know_cli.evaluation.starts import SESSIONS, Chosen
from know_cli.evaluation.tasks import Cell
from know_cli.evaluation.tasks.task import permutation
from know_cli.files import make_folder, remove_tree
from know_cli.forgetting.recorder import derived_seed

#: Share of the fine-tuning's examples that a measure holds back.
HELD_BACK = 0.25
# To be raised with every change of what this module computes.
_PROTOCOL = 1
_VALIDATION = 25  # the random stream of a seed, beside those of trials


def choose_starts(trial: trials.Trial, keys: Mapping[int, str], budget: int) -> Iterator[Chosen]:
    """Choose a start for every cell of a trial.

    Args:
        trial: whose checkpoints there are, with its folder held.
        keys: the hash of each session's weights, Θ0's first.
        budget: fine-tunings that a search may take.
    """
    starts = _Starts(trial, keys)
    try:
        for cell in trial.problem.cells:
            values = {
                name: trial.downstream(cell, key, _Loaded(starts, name))
                for name, key in starts.keys.items()
            }
            facts = _searched(trial, cell, starts, budget)
            yield Chosen(cell.name, values[facts["start"]], {**facts, "candidates": values})
    finally:
        remove_tree(starts.folder, quietly=True)


@dataclass
class _Starts:
    """Θ0 and the usual candidates, made on demand.

    Attributes:
        trial: whose checkpoints they are made from.
        sessions: the hash of each session's weights.
    """

    trial: trials.Trial
    sessions: Mapping[int, str]

    def __post_init__(self) -> None:
        self.candidates = choose_candidates((), SESSIONS)
        self.folder: Path = self.trial.folder / "candidates"
        self._states: dict[str, dict[str, Tensor]] = {}

    @cached_property
    def keys(self) -> dict[str, str]:
        """The hash of the weights of each start, by its name; Θ0's is ``naive``."""
        texts = [candidate.text for candidate in self.candidates]
        name = cache.key(_PROTOCOL, list(self.sessions.values()), texts, cache.code_key())
        path = self.trial.folder / "predicted" / f"{name}.json"
        found = cache.read(path)
        if found is None:
            found = {c.name: cache.tensors_key(self.state(c.name)) for c in self.candidates}
            cache.write(path, found)
        return {NAIVE: self.sessions[0], **{name: str(key) for name, key in found.items()}}

    def state(self, name: str) -> dict[str, Tensor]:
        """The weights of a start."""
        if name not in self._states:
            self._states[name] = read_state(self._paths[name])
        return self._states[name]

    @cached_property
    def _paths(self) -> dict[str, Path]:
        files = [self.trial.checkpoint(index) for index in range(SESSIONS)]
        make_folder(self.folder)
        maker = Maker(
            files, self.folder, EngineSettings(), TrajectoryKind.FORGETTING, lambda notice: None
        )
        self.trial.computed += len(self.candidates)
        made = maker.make(self.candidates, Silent())
        return {NAIVE: made.pop(BASE), **made}


@dataclass
class _Loaded:
    """The weights of a start, as a trial asks for them."""

    starts: _Starts
    name: str

    def load(self) -> Mapping[str, Tensor]:
        return self.starts.state(self.name)


def _searched(trial: trials.Trial, cell: Cell, starts: _Starts, budget: int) -> dict[str, Any]:
    """The outcome of a search for one cell, in plain types."""
    names = [name for name in starts.keys if name != NAIVE]
    procedure = search(names, [()], Settings(budget))
    taken = 0
    outcome: Outcome | None = None
    try:
        asked = next(procedure)
        while True:
            results = {}
            for one in asked:
                if one.arm.start != RANDOM:
                    results[one] = _measured(trial, cell, starts, one)
                    taken += 1
            asked = procedure.send(results)
    except StopIteration as end:
        outcome = end.value
    except BaseFailedError:  # then there is nothing to choose with, and Θ0 stays
        pass
    facts: dict[str, Any] = {"start": NAIVE, "winner": None, "confirmed": None}
    if outcome is not None and outcome.winner is not None:
        facts["winner"] = outcome.winner.start
        if outcome.is_better:
            facts["start"] = outcome.winner.start
        if outcome.confirmed is not None:
            of = outcome.confirmed
            facts["confirmed"] = {"mean": of.mean, "low": of.low, "high": of.high}
    return {**facts, "fine_tunings": taken}


def _measured(trial: trials.Trial, cell: Cell, starts: _Starts, asked: Trial) -> float | None:
    """Fine-tune on most of the examples, and measure on those that are held back."""
    name = NAIVE if asked.arm.start == BASE else asked.arm.start
    key = cache.key(_PROTOCOL, trial.key, cell.name, starts.keys[name], asked.seed)
    path = trial.folder / "validation" / f"{key}.json"
    found = cache.read(path)
    if found is None:
        began = time.process_time()
        size = cell.downstream.size
        examples = trial.examples(cell, 0)
        seed = derived_seed(trial.seed, _VALIDATION, asked.seed)
        order = permutation(size, seed)
        held = max(1, round(HELD_BACK * size))
        model = trial.fine_tuned(cell, starts.state(name), examples.take(order[held:]), seed)
        value = trial.problem.measure.function(model, examples.take(order[:held]))
        found = {"value": value, "seconds": round(time.process_time() - began, 3)}
        cache.write(path, found)
    trial.seconds += found["seconds"]
    value = float(found["value"])
    return value if math.isfinite(value) else None
