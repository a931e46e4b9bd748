"""One task with one seed: a run, its continuations and averages, measured twice.

Everything that is trained is kept under a hash of what determines it, as for forgettings.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from know_cli.checkpoints import save_checkpoint
from know_cli.checkpoints.state import read_state
from know_cli.evaluation import cache
from know_cli.evaluation.place import USUAL, Place, placed
from know_cli.evaluation.runs import bundles as of_bundles
from know_cli.evaluation.runs import plan
from know_cli.evaluation.runs.averages import AVERAGES, SPACED, Average, coefficients, re_estimate
from know_cli.evaluation.runs.fine_tuning import tuned_value
from know_cli.evaluation.tasks import Problem, Task
from know_cli.evaluation.weights import data_key, load, recorded
from know_cli.forgetting.recorder import derived_seed
from know_cli.lab.averaging import combine, has_running_statistics, shape_of
from know_cli.lab.fitting import one_thread
from know_cli.lab.stepping import Schedule, Training

#: To be raised with every change of what this module and those it uses compute.
PROTOCOL = 2
#: How running statistics came about: left as the training had them, averaged without the spread
#: of the means, averaged with it, or measured again on pre-training data.
STORED, PLAIN, CLOSED, RE_ESTIMATED = "stored", "plain", "closed", "re-estimated"
#: The starts whose downstream value is measured.
DOWNSTREAM = (
    plan.LAST,
    plan.longer(plan.MORE[-1]),
    Average(3).name,
    Average(5).name,
    plan.ORACLE,
)
# Random streams of one seed.
_INITIAL, _RUN = range(70, 72)


class RunTrial:
    """One task with one seed, in a folder that keeps everything that is trained.

    Args:
        task: to run, as it is for forgettings.
        seed: of all random numbers, not negative.
        folder: of all trials, which contains this one's.
        data_folder: where the data sets' files are.
        length: of the run, as a multiple of the task's own.
        place: where networks are trained.

    Attributes:
        task: with the data and the length of a run.
        problem: the task with its data, in its place.

    Raises:
        UsageError: a data set is missing.
    """

    def __init__(
        self,
        task: Task,
        seed: int,
        folder: Path,
        data_folder: Path | None,
        length: float = 1.0,
        place: Place = USUAL,
    ) -> None:
        self.task = plan.for_run(task, length)
        self.seed = seed
        problem = self.task.prepare(seed, data_folder)
        self.problem: Problem = placed(problem, place)
        self.key = cache.key(
            "run", PROTOCOL, self.task.definition(), seed, data_key(problem), *place.facts()
        )
        self.folder = folder / task.name / f"run-{seed:04d}-{self.key}"

    @one_thread()
    def pretraining(self) -> dict[str, Any]:
        """The pre-training's measure of the run, its continuations and its averages.

        Returns:
            ``values``: by name, by treatment of running statistics; ``sweep``: by count, by
            spacing; ``shape`` of the run, see :func:`~know_cli.lab.averaging.shape_of`;
            ``facts`` for tables; processor ``seconds``.
        """
        with cache.held(self.folder):
            path = self.folder / "pretraining.json"
            return cache.read(path) or self._kept(path, self._pretrain)

    @one_thread()
    def cosine(self) -> dict[str, Any]:
        """The pre-training's measure of a run as long whose rate follows a cosine to 0.

        Returns:
            ``value`` and processor ``seconds``.
        """
        with cache.held(self.folder):
            path = self.folder / "cosine.json"
            return cache.read(path) or self._kept(path, self._cosine)

    @one_thread()
    def falling(self) -> dict[str, Any]:
        """The pre-training's measure of a run as long whose rate falls to 0 in a line.

        Returns:
            ``value`` of its end; of averages of its checkpoints ``sweep``, by count, by spacing,
            and ``spaced``, of :data:`~.averages.SPACED` by spacing; processor ``seconds``.
        """
        with cache.held(self.folder):
            path = self.folder / f"{plan.FALLING}.json"
            return cache.read(path) or self._kept(path, self._falling)

    @one_thread()
    def downstream(self, start: str) -> dict[str, Any]:
        """The downstream value of a start at the rate that validation chooses for it.

        Args:
            start: one of :data:`DOWNSTREAM`; :meth:`pretraining` has to come first.

        Returns:
            ``value``, the chosen ``factor``, ``validation`` by factor, processor ``seconds``.
        """
        with cache.held(self.folder):
            path = self.folder / "downstream" / f"{start}.json"
            return cache.read(path) or self._kept(path, lambda: self._fine_tuned(start))

    @one_thread()
    def bundle(self, name: str, path: str) -> dict[str, Any]:
        """The pre-training's measure of what a bundle predicts from five checkpoints.

        Args:
            name: of the bundle.
            path: of its folder.

        Returns:
            ``value`` with the spacing of the main comparison, ``sweep`` by spacing, the bundle's
            ``digest``, processor ``seconds``.
        """
        with cache.held(self.folder):
            file = of_bundles.file_of(self.folder, name, path)
            return cache.read(file) or self._kept(file, lambda: self._predicted(name, path))

    @one_thread()
    def spaced(self) -> dict[str, Any]:
        """The pre-training's measure of :data:`~.averages.SPACED` at every spacing.

        Returns:
            ``sweep`` by spacing, processor ``seconds``.
        """
        with cache.held(self.folder):
            path = self.folder / "spaced.json"
            return cache.read(path) or self._kept(path, self._spaced)

    def found(self, bundles: Mapping[str, str] | None = None) -> dict[str, Any]:
        """What has been measured so far, without measuring anything.

        Args:
            bundles: paths of the bundles that are asked for, by name.
        """
        found = {
            name: cache.read(self.folder / f"{name}.json")
            for name in ("pretraining", "cosine", plan.FALLING, "spaced")
        }
        starts = {
            name: cache.read(self.folder / "downstream" / f"{name}.json") for name in DOWNSTREAM
        }
        predicted = {
            name: cache.read(of_bundles.file_of(self.folder, name, path))
            for name, path in (bundles or {}).items()
        }
        return found | {
            "downstream": {name: value for name, value in starts.items() if value},
            "bundles": {name: value for name, value in predicted.items() if value},
        }

    def _kept(self, path: Path, measure: Any) -> dict[str, Any]:
        began = time.process_time()
        found: dict[str, Any] = measure()
        found["seconds"] = round(time.process_time() - began, 2)
        cache.write(path, found)
        return found

    # --- the run ---------------------------------------------------------------------------

    def _training(self) -> Training:
        recipe, pool = self.task.recipe, self.problem.pool
        return Training(
            self.problem.build(derived_seed(self.seed, _INITIAL)),
            pool.inputs,
            pool.targets,
            batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            seed=derived_seed(self.seed, _RUN),
            weight_decay=recipe.weight_decay,
        )

    @property
    def _pool_size(self) -> int:
        return len(self.problem.pool)

    def _pretrain(self) -> dict[str, Any]:
        run = self._training()
        total = self._total(run)
        constant = warmed_up(total)
        wanted = self._snapshots(total)
        states = _states_at(run, {total, *wanted.values()}, constant)
        last = states[total]
        self._keep(plan.LAST, last)
        values = {plan.LAST: self._measured(plan.LAST, last, STORED)}
        for name, state in self._continued(run, total, constant).items():
            values[name] = self._measured(name, state, STORED)
            if name in DOWNSTREAM:
                self._keep(name, state)
        main = [states[wanted[plan.SPACING, back]] for back in range(plan.CHECKPOINTS)][::-1]
        for average in AVERAGES:
            window, numbers = main[-average.count :], coefficients(average)
            averaged = combine(window, numbers)
            values[average.name] = self._measured(average.name, averaged, CLOSED)
            if average.name in DOWNSTREAM:
                self._keep(average.name, averaged)
                if has_running_statistics(last):
                    plain = combine(window, numbers, spread=False)
                    values[average.name][PLAIN] = self._value(plain)
        return {
            "values": values,
            "sweep": self._sweep(states, wanted),
            "shape": shape_of(main),
            "facts": {
                "parameters": sum(t.numel() for t in last.values() if t.is_floating_point()),
                "samples": self._pool_size,
                "steps": total,
                "tested": len(self.problem.test),
                "measure": self.problem.pretraining_measure.to_json(),
                "downstream_measure": self.problem.measure.to_json(),
            },
        }

    def _total(self, run: Training) -> int:
        """The steps of a run."""
        return self.task.recipe.epochs * run.epoch_steps

    def _have_windows(self) -> None:
        if not of_bundles.has_windows(self.folder):
            # Only for bundles are so many checkpoints kept, and trained for once more.
            run = self._training()
            total = self._total(run)
            wanted = self._snapshots(total)
            steps = {step for (_, back), step in wanted.items() if back < plan.CHECKPOINTS}
            states = _states_at(run, steps, warmed_up(total))
            of_bundles.keep_windows(self.folder, states, wanted)

    def _spaced(self) -> dict[str, Any]:
        self._have_windows()
        return {"sweep": self._by_spacing(lambda of: of_bundles.read_window(self.folder, of))}

    def _by_spacing(
        self, window: Callable[[float], Sequence[Mapping[str, Tensor]]]
    ) -> dict[str, float]:
        """The measure of :data:`SPACED` of the checkpoints, the oldest first, at each spacing."""
        numbers = coefficients(SPACED)
        return {
            f"{spacing:g}": self._value(combine(window(spacing), numbers))
            for spacing in plan.SPACINGS
        }

    def _predicted(self, name: str, path: str) -> dict[str, Any]:
        self._have_windows()
        sweep = {
            f"{spacing:g}": self._value(of_bundles.predicted(self.folder, name, path, spacing))
            for spacing in plan.SPACINGS
        }
        return {
            "value": sweep[f"{plan.SPACING:g}"],
            "sweep": sweep,
            "digest": of_bundles.facts(name, path)["bundle"],
        }

    def _snapshots(self, total: int) -> dict[tuple[float, int], int]:
        """The step of each checkpoint, by spacing and number counted back from the last."""
        wanted = {plan.SPACING: plan.CHECKPOINTS}
        wanted |= dict.fromkeys(plan.SPACINGS, max(plan.COUNTS))
        return {
            (spacing, back): total - back * max(round(spacing * total), 1)
            for spacing, count in wanted.items()
            for back in range(count)
        }

    def _continued(
        self, run: Training, total: int, constant: Schedule
    ) -> dict[str, dict[str, Tensor]]:
        """The ends of the continuations of the run."""
        ends = {}
        for share in plan.MORE:
            steps = max(round(share * total), 1)
            branch = run.branch()
            branch.advance(steps, falling(total, steps))
            ends[plan.annealed(share)] = copied(recorded(branch.model))
        branch = run.branch()
        for share in plan.MORE:
            branch.advance(total + max(round(share * total), 1) - branch.done, constant)
            ends[plan.longer(share)] = copied(recorded(branch.model))
        return ends

    def _sweep(
        self, states: Mapping[int, Mapping[str, Tensor]], wanted: Mapping[tuple[float, int], int]
    ) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for count in plan.COUNTS:
            for spacing in plan.SPACINGS:
                window = [states[wanted[spacing, back]] for back in range(count)][::-1]
                averaged = combine(window, coefficients(Average(count)))
                found.setdefault(str(count), {})[f"{spacing:g}"] = self._value(averaged)
        return found

    def _cosine(self) -> dict[str, Any]:
        run = self._training()
        total = self._total(run)
        run.advance(total, decayed(total, lambda share: (1 + math.cos(math.pi * share)) / 2))
        return {"value": self._value(recorded(run.model))}

    def _falling(self) -> dict[str, Any]:
        run = self._training()
        total = self._total(run)
        wanted = self._snapshots(total)
        schedule = decayed(total, lambda share: 1 - share)
        states = _states_at(run, {total, *wanted.values()}, schedule)

        def window(spacing: float) -> list[dict[str, Tensor]]:
            return [states[wanted[spacing, back]] for back in range(SPACED.count)][::-1]

        return {
            "value": self._value(states[total]),
            "sweep": self._sweep(states, wanted),
            "spaced": self._by_spacing(window),
        }

    # --- measures --------------------------------------------------------------------------

    def _measured(self, name: str, state: Mapping[str, Tensor], treatment: str) -> dict[str, float]:
        """The measure as it is, and of some with running statistics measured again."""
        found = {treatment: self._value(state)}
        if has_running_statistics(state) and name in DOWNSTREAM:
            found[RE_ESTIMATED] = self._value(state, again=True)
        return found

    def _value(self, state: Mapping[str, Tensor], again: bool = False) -> float:
        model = self.problem.build(derived_seed(self.seed, _INITIAL))
        load(model, state)
        if again:
            re_estimate(model, self.problem.pool)
        return round(self.problem.pretraining_measure.function(model, self.problem.test), 6)

    def _keep(self, name: str, state: Mapping[str, Tensor]) -> None:
        save_checkpoint(self.folder / f"{name}.safetensors", state, {"format": "pt"})

    # --- downstream ------------------------------------------------------------------------

    def _fine_tuned(self, start: str) -> dict[str, Any]:
        state = read_state(self.folder / f"{start}.safetensors")
        return tuned_value(self.problem, state, self.seed)


def _states_at(
    run: Training, steps: Collection[int], schedule: Schedule
) -> dict[int, dict[str, Tensor]]:
    """Take a run through some steps; copies of what it records there, by step."""
    states = {}
    for step in sorted(steps):
        run.advance(step - run.done, schedule)
        states[step] = copied(recorded(run.model))
    return states


def warmed_up(total: int) -> Schedule:
    """The rate of a run: rising to 1 in a line in the first steps, then constant."""
    begin = max(round(plan.WARM_UP * total), 1)
    return lambda step: min((step + 1) / begin, 1.0)


def decayed(total: int, decay: Callable[[float], float]) -> Schedule:
    """The rate of a run that falls over its whole length, after the warm-up.

    Args:
        total: steps of the run.
        decay: the rate by the share of the steps after the warm-up that are done, from 0 to 1.
    """
    warm, begin = warmed_up(total), round(plan.WARM_UP * total)
    return lambda step: (
        warm(step) if step < begin else decay((step - begin + 0.5) / (total - begin))
    )


def falling(first: int, steps: int) -> Schedule:
    """The rate of an annealing from step ``first`` on: from 1 to 0 in a line."""
    return lambda step: 1 - (step - first + 0.5) / steps


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy in main memory that training does not change."""
    return {name: torch.clone(tensor).cpu() for name, tensor in state.items()}
