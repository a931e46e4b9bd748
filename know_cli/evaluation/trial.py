"""One task with one seed: pre-train, forget, predict, fine-tune every start, measure.

Everything that is trained is kept under a hash of what determines it, so that a second run trains
only what is missing. On one machine with one version of torch, the seed determines all results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, from_numpy, nn

from know_cli.checkpoints import save_checkpoint
from know_cli.checkpoints.state import read_state
from know_cli.evaluation import cache
from know_cli.evaluation.anchors import (
    ANCHORS,
    CHOSEN,
    HINDSIGHT,
    LAST,
    LONGER,
    MORE_DATA,
    NAIVE,
    ORACLE,
    SCRATCH,
)
from know_cli.evaluation.hindsight import best_combination
from know_cli.evaluation.place import USUAL, Place, placed
from know_cli.evaluation.predicted import Loads, Predicted
from know_cli.evaluation.starts import SESSIONS, Chosen, Outcome, Start, Wanted
from know_cli.evaluation.tasks import Cell, Examples, Problem, Recipe, Task
from know_cli.evaluation.tasks.task import RATE, permutation, train
from know_cli.evaluation.variants import is_available
from know_cli.evaluation.weights import data_key, load, recorded
from know_cli.files import remove_file
from know_cli.forgetting.recorder import Recorder, checkpoint_name, derived_seed
from know_cli.forgetting.subsets import nested_subsets
from know_cli.lab.fitting import one_thread

#: To be raised with every change of what this module computes.
PROTOCOL = 2
FUNCTION = "know eval"
_FILES = {
    NAIVE: checkpoint_name(0),
    LAST: checkpoint_name(SESSIONS - 1),
    LONGER: "longer.safetensors",
    HINDSIGHT: "hindsight.safetensors",
    MORE_DATA: "more-data.safetensors",
    ORACLE: checkpoint_name(-1),
}
# Random streams of one seed.
_LONGER, _HINDSIGHT, _DOWNSTREAM, _HEAD, _DRAW = range(20, 25)

#: Given a trial, the hash of each session's weights and a number of fine-tunings, chooses a start
#: for each cell.
Chooser = Callable[["Trial", Mapping[int, str], int], Iterator[Chosen]]


class Trial:
    """One task with one seed, in a folder that keeps everything that is trained.

    Args:
        task: to run.
        seed: of all random numbers, not negative.
        folder: of all trials, which contains this one's.
        data_folder: where the data sets' files are.
        place: where networks are trained.

    Attributes:
        problem: the task with its data, in its place.
        key: a hash of everything that determines what is trained.
        computed: number of trainings, predictions and fine-tunings done so far.
        seconds: processor time of these, and of earlier ones whose results were used.

    Raises:
        UsageError: a data set is missing.
    """

    def __init__(
        self,
        task: Task,
        seed: int,
        folder: Path,
        data_folder: Path | None,
        place: Place = USUAL,
    ) -> None:
        self.task = task
        self.seed = seed
        problem = task.prepare(seed, data_folder)
        self.problem: Problem = placed(problem, place)
        self.key = cache.key(PROTOCOL, task.definition(), seed, data_key(problem), *place.facts())
        self.folder = folder / task.name / f"seed-{seed:04d}-{self.key}"
        self.seconds = 0.0
        self.computed = 0

    @one_thread()
    def run(self, wanted: Wanted, choose: Chooser | None = None) -> Outcome:
        """Compute what is missing and collect everything that is wanted.

        Of two runs in the same folder, the second waits and reuses what the first computed.

        Args:
            wanted: methods and settings.
            choose: how a start is chosen for each cell, where a budget for that is wanted.

        Raises:
            KnowError: a bundle or the folder cannot be used.
        """
        with cache.held(self.folder):
            return self._run(wanted, choose)

    def _run(self, wanted: Wanted, choose: Chooser | None) -> Outcome:
        trained = self._trained()
        problem = self.problem
        facts = {
            "parameters": trained["parameters"],
            "pretraining_measure": problem.pretraining_measure.to_json(),
            "measure": problem.measure.to_json(),
            "tested": {cell.name: len(cell.test) for cell in problem.cells},
        }
        outcome = Outcome(self.task.name, self.seed, trained["sessions"], facts)
        for start, weights_key, state in self._starts(wanted, trained):
            outcome.values[start] = {
                cell.name: self.downstream(cell, weights_key, state) for cell in problem.cells
            }
        if wanted.budget and choose is not None:
            keys = {index: trained["sessions"][str(index)]["key"] for index in range(SESSIONS)}
            for found in choose(self, keys, wanted.budget):
                outcome.values.setdefault(Start(CHOSEN), {})[found.cell] = found.value
                outcome.searches[found.cell] = found.facts
        if not wanted.keep:
            for path in self.folder.glob("*.safetensors"):
                remove_file(path)
        outcome.seconds, outcome.computed = round(self.seconds, 2), self.computed
        return outcome

    # --- what is pre-trained ---------------------------------------------------------------

    def _trained(self) -> dict[str, Any]:
        path = self.folder / "trained.json"
        found = cache.read(path)
        if found is None:
            found = self._record()
            cache.write(path, found)
        self.seconds += found["seconds"]
        return found

    def _record(self) -> dict[str, Any]:
        """Train every session and anchor whose checkpoint is missing."""
        began = time.process_time()
        recorder = self._recorder
        for session in recorder:
            model = self.problem.build(session.seed)
            if session.start is not None:
                load(model, session.start)
            chosen = self._pool_part(session.index)
            self._fit(model, chosen, self.task.recipe, session.seed)
            recorder.save(session, recorded(model), self._measured(model, chosen))
        sessions: dict[str, dict[str, Any]] = {
            (ORACLE if index < 0 else str(index)): dict(recorder.measurements(index))
            for index in recorder.indices
        }
        sessions[LONGER] = self._longer()
        sessions[HINDSIGHT] = self._hindsight()
        sessions[MORE_DATA] = self._more_data()
        files = {str(index): checkpoint_name(index) for index in range(SESSIONS)} | {
            name: _FILES[name] for name in (LONGER, HINDSIGHT, MORE_DATA, ORACLE)
        }
        for name, file in files.items():
            sessions[name]["key"] = cache.tensors_key(read_state(self.folder / file))
        state = read_state(self.folder / _FILES[NAIVE])
        return {
            "sessions": sessions,
            "parameters": sum(t.numel() for t in state.values() if t.is_floating_point()),
            "seconds": time.process_time() - began,
        }

    @cached_property
    def _subsets(self) -> list[Any]:
        """Indices of the samples of D(−1), of D0 and so on."""
        targets = self.problem.pool.targets
        labels = targets.cpu().numpy() if targets.dim() == 1 else None
        return nested_subsets(len(self.problem.pool), RATE, SESSIONS + 1, self.seed, labels)

    @property
    def _recorder(self) -> Recorder:
        return Recorder(
            self.folder,
            self._subsets,
            rate=RATE,
            seed=self.seed,
            before=1,
            options={"trial": self.key},
            function=FUNCTION,
        )

    def _pool_part(self, index: int) -> Examples:
        return self.problem.pool.take(from_numpy(self._subsets[index + 1]))

    def _longer(self) -> dict[str, Any]:
        """Θ0 trained further on D0, for as many steps as the later sessions together."""
        share = sum(RATE**index for index in range(1, SESSIONS))
        recipe = self.task.recipe
        recipe = replace(recipe, epochs=max(round(share * recipe.epochs), 1))
        start = read_state(self.folder / _FILES[NAIVE])
        seed = derived_seed(self.seed, _LONGER)

        def fitted(model: nn.Module) -> Examples:
            load(model, start)
            chosen = self._pool_part(0)
            self._fit(model, chosen, recipe, seed)
            return chosen

        return self._anchor(LONGER, seed, fitted)

    def _hindsight(self) -> dict[str, Any]:
        """The sessions' checkpoints in the combination that fits best what D(−1) adds to D0."""
        import numpy as np

        states = [read_state(self.folder / checkpoint_name(index)) for index in range(SESSIONS)]
        added = np.setdiff1d(self._subsets[0], self._subsets[1])
        seed = derived_seed(self.seed, _HINDSIGHT)

        def combine(model: nn.Module) -> Examples:
            chosen = self.problem.pool.take(from_numpy(added))
            best_combination(model, states, chosen, seed)
            self.computed += 1
            return chosen

        return self._anchor(HINDSIGHT, seed, combine)

    def _more_data(self) -> dict[str, Any]:
        """A network with Θ0's initial weights, trained like it, but on D(−1)."""
        seed = derived_seed(self.seed, 0, 0)

        def fitted(model: nn.Module) -> Examples:
            chosen = self._pool_part(-1)
            self._fit(model, chosen, self.task.recipe, seed)
            return chosen

        return self._anchor(MORE_DATA, seed, fitted)

    def _anchor(
        self, name: str, seed: int, make: Callable[[nn.Module], Examples]
    ) -> dict[str, Any]:
        """Make an anchor if it is missing; ``make`` returns the examples it was fitted to."""
        path = self.folder / f"{name}.json"
        found = cache.read(path)
        if found is not None and (self.folder / _FILES[name]).exists():
            return found
        model = self.problem.build(seed)
        measured = self._measured(model, make(model))
        cache.write(path, measured)
        save_checkpoint(self.folder / _FILES[name], recorded(model), {"format": "pt"})
        return measured

    def _fit(self, model: nn.Module, examples: Examples, recipe: Recipe, seed: int) -> None:
        self.computed += 1
        train(model, examples, recipe, seed)

    def _measured(self, model: nn.Module, examples: Examples) -> dict[str, Any]:
        measure = self.problem.pretraining_measure.function
        return {
            "samples": len(examples),
            "train": round(measure(model, examples), 5),
            "first": round(measure(model, self._pool_part(0)), 5),
            "test": round(measure(model, self.problem.test), 5),
        }

    # --- starts ----------------------------------------------------------------------------

    def _starts(
        self, wanted: Wanted, trained: Mapping[str, Any]
    ) -> Iterator[tuple[Start, str, _State]]:
        """Every start with the hash of its weights, and a function that returns the weights."""
        sessions = trained["sessions"]
        keys = {NAIVE: "0", LAST: str(SESSIONS - 1)}
        for name in ANCHORS:
            weights_key = "" if name == SCRATCH else sessions[keys.get(name, name)]["key"]
            yield Start(name), weights_key, _State(self, None if name == SCRATCH else name)
        for variant in wanted.variants:
            for count in wanted.sessions:
                if not is_available(variant, count):
                    continue
                for norm in wanted.norms:
                    predicted = Predicted(self, variant, norm, count, wanted.steps, sessions)
                    for step, weights_key in predicted.keys().items():
                        start = Start(variant.label, step, norm.value, count)
                        yield start, weights_key, _State(self, None, predicted, step)

    @one_thread()
    def checkpoints(self) -> list[Path]:
        """The files of all sessions' checkpoints; what is missing of the trial is trained."""
        with cache.held(self.folder):
            self._trained()
            return [self.checkpoint(index) for index in range(SESSIONS)]

    def checkpoint(self, index: int) -> Path:
        """The file of a session, which is trained again if it is missing."""
        path = self.folder / checkpoint_name(index)
        if not path.exists():
            self._record()
        return path

    def anchor(self, name: str) -> dict[str, Tensor]:
        """The weights of an anchor, which are trained again if they are missing."""
        path = self.folder / _FILES[name]
        if not path.exists():
            self._record()
        return read_state(path)

    # --- what is fine-tuned ----------------------------------------------------------------

    def downstream(self, cell: Cell, weights_key: str, state: Loads) -> float:
        """The mean over a cell's repetitions, fine-tuned from weights with this hash."""
        found_key = cache.key(self.key, cell.name, weights_key)
        path = self.folder / "downstream" / f"{found_key}.json"
        found = cache.read(path)
        if found is None:
            weights = state.load()
            began = time.process_time()
            values = [
                self._fine_tune(cell, weights, repetition)
                for repetition in range(cell.downstream.repetitions)
            ]
            found = {
                "cell": cell.name,
                "weights": weights_key,
                "values": values,
                "seconds": round(time.process_time() - began, 3),
            }
            cache.write(path, found)
        self.seconds += found["seconds"]
        return float(sum(found["values"]) / len(found["values"]))

    def _fine_tune(
        self, cell: Cell, weights: Mapping[str, Tensor] | None, repetition: int
    ) -> float:
        head, seed = (derived_seed(self.seed, s, repetition) for s in (_HEAD, _DOWNSTREAM))
        model = self.fine_tuned(cell, weights, self.examples(cell, repetition), seed, head)
        return self.problem.measure.function(model, cell.test)

    def examples(self, cell: Cell, repetition: int) -> Examples:
        """What a repetition fine-tunes on: the same for all starts, so differences are paired."""
        draw = derived_seed(self.seed, _DRAW, repetition)
        return cell.pool.take(permutation(len(cell.pool), draw)[: cell.downstream.size])

    def fine_tuned(
        self,
        cell: Cell,
        weights: Mapping[str, Tensor] | None,
        examples: Examples,
        seed: int,
        head: int | None = None,
    ) -> nn.Module:
        """A network fine-tuned from weights; ``head`` is the seed of what is fresh."""
        model = self.problem.build_downstream(seed if head is None else head)
        if weights is not None:
            load(model, weights, self.problem.fresh)
        self._fit(model, examples, cell.downstream.recipe, seed)
        return model


@dataclass
class _State:
    """Those of an anchor or of a step of a prediction."""

    trial: Trial
    anchor: str | None
    predicted: Predicted | None = None
    step: int = 0

    def load(self) -> Mapping[str, Tensor] | None:
        if self.predicted is not None:
            return self.predicted.states()[self.step]
        return None if self.anchor is None else self.trial.anchor(self.anchor)
