"""One task of the release regime with one seed: pre-train, predict, fine-tune at many rates.

Everything that is trained or measured is kept under a hash of what determines it, each fine-tuning
in a file of its own, so that a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from know_cli.checkpoints import save_checkpoint
from know_cli.checkpoints.state import read_state
from know_cli.engine.settings import NormMode
from know_cli.evaluation import cache
from know_cli.evaluation.anchors import HINDSIGHT, LAST, NAIVE, SCRATCH
from know_cli.evaluation.hindsight import best_combination
from know_cli.evaluation.place import USUAL, Place, placed
from know_cli.evaluation.predicted import Predicted
from know_cli.evaluation.release.fine_tuning import (
    FINE_TUNING_AUGMENTATIONS,
    FineTunings,
    has_batch_norm,
    refresh,
    tuned,
)
from know_cli.evaluation.release.pretraining import first_data, given_start, other_data, pretrained
from know_cli.evaluation.release.task import (
    AVERAGE_FORGOTTEN,
    FORGOTTEN,
    FRESH,
    HALVES_FACTOR,
    RE_ESTIMATED,
    SESSIONS,
    SHRUNK_HALVES,
    Arm,
    ReleaseTask,
)
from know_cli.evaluation.runs.averages import re_estimate
from know_cli.evaluation.tasks import Cell, Examples
from know_cli.evaluation.tasks.task import permutation
from know_cli.evaluation.variants import method_of
from know_cli.evaluation.weights import data_key, load, recorded
from know_cli.forgetting.recorder import checkpoint_name, derived_seed
from know_cli.kinds import Kind, classify_all
from know_cli.lab.averaging import combine
from know_cli.lab.fitting import one_thread

#: To be raised with every change of what this module and those it uses compute.
PROTOCOL = 1
# Random streams of one seed.
_HEAD, _DRAW, _FINE_TUNE, _HINDSIGHT = range(95, 99)
# Put together from the sessions' checkpoints.
_COMBINED = (AVERAGE_FORGOTTEN, HINDSIGHT, *SHRUNK_HALVES)
_FILES = {NAIVE: checkpoint_name(0), LAST: checkpoint_name(SESSIONS - 1)}


class ReleaseTrial:
    """One task with one seed, in a folder that keeps everything that is trained.

    Args:
        task: to run.
        seed: of all random numbers, not negative.
        folder: of all trials, which contains this one's.
        data_folder: where the data sets' files are.
        place: where networks are trained.
        first: checkpoint of a Θ0 that is trained already, a file or a folder; None trains it.

    Attributes:
        problem: the task with its data, in its place.
        folder: of this trial.
        computed: number of trainings, predictions and fine-tunings done so far.

    Raises:
        UsageError: a data set is missing, or the checkpoint is of another network.
        CheckpointError: the checkpoint cannot be read.
    """

    def __init__(
        self,
        task: ReleaseTask,
        seed: int,
        folder: Path,
        data_folder: Path | None,
        place: Place = USUAL,
        first: Path | None = None,
    ) -> None:
        self.task, self.seed = task, seed
        problem = task.base.prepare(seed, data_folder)
        self.problem = placed(problem, place)
        self._first = None if first is None else given_start(problem, first)
        given = [] if self._first is None else [cache.tensors_key(self._first)]
        key = cache.key(
            "release", PROTOCOL, task.definition(), seed, data_key(problem), *place.facts(),
            *given,
        )  # fmt: skip
        self.folder = folder / task.name / f"release-{seed:04d}-{key}"
        self.computed = 0
        self._predicted: dict[tuple[str, int], Predicted] = {}

    @one_thread()
    def run(self, arms: Sequence[Arm], shares: Sequence[int]) -> None:
        """Measure starts, one condition after the other; what is there is not computed again.

        Of two runs in the same folder, one waits for the measurement that the other is at.

        Args:
            arms: the starts; treatments of BatchNorm that the network lacks are left out.
            shares: of the downstream examples, in per cent.

        Raises:
            KnowError: a bundle or the folder cannot be used.
        """
        with cache.held(self.folder):
            self._trained()
        for cell in self.cells(shares):
            for arm in self._possible(arms):
                with cache.held(self.folder):
                    self._measured(arm, cell)

    def found(self, arms: Sequence[Arm], shares: Sequence[int]) -> dict[str, Any]:
        """What has been measured so far, without computing anything.

        Returns:
            ``pretraining``, as the file of that name, None before it; and ``cells``: by name of
            the condition, by label of the start, ``factor`` (the rate chosen, as a factor of the
            release's), ``rates`` (by factor, ``validation`` and ``value``) and ``seconds``. Only
            starts whose search for the rate is complete are there.
        """
        trained = cache.read(self._trained_path)
        cells: dict[str, dict[str, Any]] = {}
        for cell in self.cells(shares) if trained else ():
            results = {}
            for arm in self._possible(arms):
                key = self._weights_key(arm, compute=False)
                search = None if key is None else self._search(arm, cell, key, None)
                if search is not None:
                    results[arm.label] = search
            if results:
                cells[cell.name] = results
        return {"pretraining": trained, "cells": cells}

    def cells(self, shares: Sequence[int]) -> list[Cell]:
        """The downstream conditions of these shares in per cent, the smallest first."""
        most = max(cell.downstream.size for cell in self.problem.cells)
        wanted = {most * share // 100 for share in shares}
        found = [cell for cell in self.problem.cells if cell.downstream.size in wanted]
        return sorted(found, key=lambda cell: cell.downstream.size)

    def _possible(self, arms: Sequence[Arm]) -> Iterator[Arm]:
        yield from (arm for arm in arms if arm.norm == FRESH or self._has_batch_norm)

    @cached_property
    def _has_batch_norm(self) -> bool:
        return has_batch_norm(self.problem.build_downstream(0))

    # --- what is pre-trained ---------------------------------------------------------------

    @property
    def _trained_path(self) -> Path:
        return self.folder / "pretraining.json"

    def _trained(self) -> dict[str, Any]:
        found = cache.read(self._trained_path)
        if found is None:
            found = self._train()
            cache.write(self._trained_path, found)
        return found

    def _train(self) -> dict[str, Any]:
        began = time.process_time()
        keys, trained, parameters = {}, {}, 0
        for state in pretrained(self.task, self.problem, self.seed, self._first):
            save_checkpoint(self._path(state.name), state.state, {"format": "pt"})
            self.computed += 1
            keys[state.name] = cache.tensors_key(state.state)
            model = self.problem.build(0)
            load(model, state.state)
            value = self.problem.pretraining_measure.function(model, self.problem.test)
            trained[state.name] = {
                "steps": state.steps, "samples": state.samples, "test": round(value, 6)
            }  # fmt: skip
            parameters = sum(t.numel() for t in state.state.values() if t.is_floating_point())
        return {
            "keys": keys,
            "trained": trained,
            "facts": {
                "parameters": parameters,
                "batch_norm": self._has_batch_norm,
                "tested": len(self.problem.test),
                "downstream_tested": len(self.problem.cells[0].test),
                "validated": len(self._validation),
                "measure": self.problem.measure.to_json(),
            },
            "seconds": round(time.process_time() - began, 2),
        }

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    @one_thread()
    def checkpoints(self) -> list[Path]:
        """The files of all sessions' checkpoints; what is missing of the trial is trained."""
        with cache.held(self.folder):
            self._trained()
            return [self.checkpoint(index) for index in range(SESSIONS)]

    def checkpoint(self, index: int) -> Path:
        """The file of a session's checkpoint, which is trained again if it is missing."""
        return self._file(checkpoint_name(index))

    def _file(self, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            self._train()
        return path

    # --- starts ----------------------------------------------------------------------------

    def _prediction(self, arm: Arm) -> Predicted:
        assert arm.variant is not None
        prediction = arm.variant.label, arm.sessions
        if prediction not in self._predicted:
            keys = self._trained()["keys"]
            checkpoints = {str(k): {"key": keys[f"ckpt{k}"]} for k in range(arm.sessions)}
            # Averages are of normalisation layers, too; for all else BatchNorm is as Θ0 has it,
            # which other treatments of it begin with.
            is_average = method_of(arm.variant).norm is NormMode.AVERAGE
            self._predicted[prediction] = Predicted(
                self,
                arm.variant,
                NormMode.AVERAGE if is_average else NormMode.COPY,
                arm.sessions,
                max(self.task.steps),
                checkpoints,
                self.task.rate,
            )
        return self._predicted[prediction]

    def _weights_key(self, arm: Arm, compute: bool = True) -> str | None:
        """A hash of a start's weights; None if it is not known and is not to be computed."""
        if arm.name == SCRATCH:
            return ""
        if arm.name in _COMBINED:
            return self._combined_key(arm.name, compute)
        if arm.variant is None:
            name = _FILES.get(arm.name, f"{arm.name}.safetensors").removesuffix(".safetensors")
            return str(self._trained()["keys"][name])
        prediction = self._prediction(arm)
        return prediction.keys()[arm.step] if compute or prediction.is_known else None

    def _combined_key(self, name: str, compute: bool) -> str | None:
        path = self.folder / f"{name}.json"
        found = cache.read(path)
        if found is None and compute:
            found = {"key": cache.tensors_key(self._combine(name))}
            cache.write(path, found)
        return None if found is None else str(found["key"])

    def _combine(self, name: str) -> dict[str, Tensor]:
        """One of :data:`_COMBINED`."""
        states = [read_state(self.checkpoint(index)) for index in range(SESSIONS)]
        if name == AVERAGE_FORGOTTEN:
            state = combine(states[-FORGOTTEN:], [1 / FORGOTTEN] * FORGOTTEN)
        elif name in SHRUNK_HALVES:
            # Checkpoints are without what is frozen, which --method shrink leaves as it is, too.
            names = self.problem.build(0).state_dict()
            ordered = {of: states[0][of] for of in names if of in states[0]}
            state = half_shrunk(ordered, self.problem.fresh, SHRUNK_HALVES.index(name))
        else:  # what fits best what D0 lacks
            model = self.problem.build(0)
            other = other_data(self.task, self.problem, self.seed)
            best_combination(model, states, other, derived_seed(self.seed, _HINDSIGHT))
            state = recorded(model)
        self.computed += 1
        save_checkpoint(self._path(name), state, {"format": "pt"})
        return state

    def _state(self, arm: Arm) -> Mapping[str, Tensor]:
        if arm.name in _COMBINED and not self._path(arm.name).exists():
            return self._combine(arm.name)
        if arm.variant is None:
            return read_state(self._file(_FILES.get(arm.name, f"{arm.name}.safetensors")))
        return self._prediction(arm).states()[arm.step]

    def start(self, arm: Arm) -> nn.Module:
        """The network that is fine-tuned: the start's weights, with a fresh head."""
        model = self.problem.build_downstream(derived_seed(self.seed, _HEAD))
        if arm.name != SCRATCH:
            load(model, self._state(arm), self.problem.fresh)
        if arm.norm == FRESH:
            refresh(model)
        elif arm.norm == RE_ESTIMATED:
            re_estimate(model, first_data(self.task, self.problem, self.seed))
        return model

    # --- downstream ------------------------------------------------------------------------

    @cached_property
    def _order(self) -> Tensor:
        pool = self.problem.cells[0].pool
        return permutation(len(pool), derived_seed(self.seed, _DRAW))

    @cached_property
    def _validation(self) -> Examples:
        """Examples that no condition trains on, and none of which is tested on."""
        most = max(cell.downstream.size for cell in self.problem.cells)
        return self.problem.cells[0].pool.take(self._order[most:][: self.task.validation])

    def _measured(self, arm: Arm, cell: Cell) -> None:
        """Fine-tune a start at the rates that the search for the best one asks for."""
        key = self._weights_key(arm)
        assert key is not None
        tunings: list[FineTunings] = []

        def fine_tuned(factor: float) -> nn.Module:
            if not tunings:
                examples = cell.pool.take(self._order[: cell.downstream.size])
                tunings.append(
                    FineTunings(
                        self.task.fine_tuning,
                        self.start(arm),
                        self.problem.fresh,
                        examples,
                        derived_seed(self.seed, _FINE_TUNE),
                        FINE_TUNING_AUGMENTATIONS[self.task.augmentation],
                    )
                )
            self.computed += 1
            return tunings[0].at(factor)

        self._search(arm, cell, key, fine_tuned)

    def _search(
        self, arm: Arm, cell: Cell, weights: str, fine_tune: Callable[[float], nn.Module] | None
    ) -> dict[str, Any] | None:
        """The search for the best rate; None if it lacks a fine-tuning that is not to be done."""
        rates: dict[float, dict[str, float]] = {}

        def score(factor: float) -> float:
            key = cache.key(weights, arm.norm, cell.name, factor)
            path = self.folder / "downstream" / f"{key}.json"
            found = cache.read(path)
            if found is None:
                if fine_tune is None:
                    raise _IncompleteError
                began = time.process_time()
                model = fine_tune(factor)
                measure = self.problem.measure.function
                found = {
                    "start": arm.label,
                    "cell": cell.name,
                    "factor": factor,
                    "validation": round(measure(model, self._validation), 6),
                    "value": round(measure(model, cell.test), 6),
                    "seconds": round(time.process_time() - began, 2),
                }
                cache.write(path, found)
            rates[factor] = found
            return float(found["validation"])

        try:
            best, scores = tuned(score)
        except _IncompleteError:
            return None
        return {
            "factor": best,
            "rates": {
                f"{factor:g}": {name: rates[factor][name] for name in ("validation", "value")}
                for factor in scores
            },
            "seconds": round(sum(found["seconds"] for found in rates.values()), 2),
        }


def half_shrunk(state: Mapping[str, Tensor], head: Sequence[str], half: int) -> dict[str, Tensor]:
    """A state dict in which half of the layers have shrunk by :data:`HALVES_FACTOR`.

    Args:
        state: in the order of the layers.
        head: names of modules that do not count, since they are given fresh weights.
        half: 0 for the first half, 1 for the last, which of an odd number has one more.
    """
    kinds = classify_all({name: (tuple(t.shape), "F32") for name, t in state.items()})
    weights = [
        name
        for name in state
        if kinds[name].kind in (Kind.CONV, Kind.FC)
        and not any(name.startswith(f"{module}.") for module in head)
    ]
    middle = len(weights) // 2
    chosen = weights[middle:] if half else weights[:middle]
    return {name: t * HALVES_FACTOR if name in chosen else t for name, t in state.items()}


class _IncompleteError(Exception):
    """A fine-tuning that a search needs has not been done."""
