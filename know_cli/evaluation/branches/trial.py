"""One Θ0 with one seed: its branches, their mean, and one continuation of as many steps."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from know_cli.evaluation import cache
from know_cli.evaluation.branches import plan
from know_cli.evaluation.branches.plan import BranchTask, Sort
from know_cli.evaluation.place import USUAL, Place, placed
from know_cli.evaluation.runs.fine_tuning import middle_cell, tuned_value
from know_cli.evaluation.runs.plan import for_run
from know_cli.evaluation.runs.trial import copied, falling, warmed_up
from know_cli.evaluation.tasks import Examples, Problem, Task
from know_cli.evaluation.tasks.classification import Classification
from know_cli.evaluation.tasks.task import permutation
from know_cli.evaluation.weights import data_key, load, recorded
from know_cli.forgetting.recorder import derived_seed
from know_cli.lab.averaging import combine
from know_cli.lab.fitting import one_thread
from know_cli.lab.stepping import Training

#: To be raised with every change of what this module and those it uses compute.
PROTOCOL = 1
# Random streams of one seed.
_INITIAL, _RUN, _BRANCH, _SUBSET, _HEAD, _LONGER = range(80, 86)
_State = Mapping[str, Tensor]


class BranchTrial:
    """One task of branches with one seed.

    Args:
        task: to run.
        seed: of all random numbers, not negative.
        folder: of all trials, which contains this one's.
        data_folder: where the data sets' files are.
        length: of the run that is branched, as a multiple of the task's own.
        place: where networks are trained.

    Raises:
        UsageError: a data set is missing.
    """

    def __init__(
        self,
        task: BranchTask,
        seed: int,
        folder: Path,
        data_folder: Path | None,
        length: float = 1.0,
        place: Place = USUAL,
    ) -> None:
        self.task, self.seed = task, seed
        self.base = _base(task, length)
        problem = self.base.prepare(seed, data_folder)
        self.problem: Problem = placed(problem, place)
        splits = (
            self.base.further_splits(seed, data_folder, plan.BRANCHES)
            if task.sort is Sort.TASKS and isinstance(self.base, Classification)
            else []
        )
        self._splits = [split.to(place.device) for split in splits]
        key = cache.key(
            "branches", PROTOCOL, task.sort.value, self.base.definition(), seed,
            data_key(problem), *place.facts(),
        )  # fmt: skip
        self.folder = folder / task.name / f"branches-{seed:04d}-{key}"

    @one_thread()
    def run(self) -> dict[str, Any]:
        """Train what is not there yet and measure every arm.

        Returns:
            ``values`` by arm, the single ``branches``, ``facts`` for tables, and processor
            ``seconds``.
        """
        with cache.held(self.folder):
            path = self.folder / "branches.json"
            found = cache.read(path)
            if found is None:
                began = time.process_time()
                found = self._run()
                found["seconds"] = round(time.process_time() - began, 2)
                cache.write(path, found)
            return found

    def _run(self) -> dict[str, Any]:
        run = self._training(self.problem.pool, _RUN)
        total = self.base.recipe.epochs * run.epoch_steps
        run.advance(total, warmed_up(total))
        start = copied(recorded(run.model))
        steps = max(round(plan.SHARE * total), 1)
        if self.task.sort is Sort.TASKS:
            branches, others = self._of_tasks(start, steps), self._multi_task(start, steps)
            measured, measure = self._downstream, self.problem.measure
        else:
            branches, others = self._of_data(run, steps), self._longer(run, steps)
            measured, measure = self._value, self.problem.pretraining_measure
        single = [measured(state) for state in branches]
        fused = combine(branches, [1 / len(branches)] * len(branches))
        values = {
            plan.NAIVE: measured(start),
            plan.BRANCH: round(float(np.mean(single)), 6),
            plan.BEST: max(single),
            plan.FUSED: measured(fused),
            **{name: measured(state) for name, state in others.items()},
        }
        cell = middle_cell(self.problem)
        tested = cell.test if self.task.sort is Sort.TASKS else self.problem.test
        return {
            "values": values,
            "branches": single,
            "facts": {
                "parameters": sum(t.numel() for t in start.values() if t.is_floating_point()),
                "samples": len(self.problem.pool),
                "steps": total,
                "branch_steps": steps,
                "tested": len(tested),
                "measure": measure.to_json(),
                "downstream": cell.name if self.task.sort is Sort.TASKS else "",
            },
        }

    def _training(
        self, examples: Examples, stream: int, model: nn.Module | None = None
    ) -> Training:
        recipe = self.base.recipe
        return Training(
            model or self.problem.build(derived_seed(self.seed, _INITIAL)),
            examples.inputs,
            examples.targets,
            batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            seed=derived_seed(self.seed, stream),
            weight_decay=recipe.weight_decay,
        )

    # --- branches on the run's own data ------------------------------------------------------

    def _of_data(self, run: Training, steps: int) -> list[dict[str, Tensor]]:
        """Continuations at the run's rate, with the optimiser's moments, as the sort has them."""
        states = []
        for number in range(plan.BRANCHES):
            chosen = None
            if self.task.sort is Sort.SUBSETS:
                pool = len(self.problem.pool)
                order = permutation(pool, derived_seed(self.seed, _SUBSET, number))
                chosen = order[: round(plan.RATE * pool)]
            branch = run.branch(derived_seed(self.seed, _BRANCH, number), chosen)
            branch.advance(steps, _constant)
            states.append(copied(recorded(branch.model)))
        return states

    def _longer(self, run: Training, steps: int) -> dict[str, dict[str, Tensor]]:
        """One continuation of as many steps as all branches together."""
        every = plan.BRANCHES * steps
        schedules = {plan.LONGER: _constant, plan.ANNEALED: falling(run.done, every)}
        found = {}
        for name, schedule in schedules.items():
            branch = run.branch(derived_seed(self.seed, _LONGER))
            branch.advance(every, schedule)
            found[name] = copied(recorded(branch.model))
        return found

    # --- branches on other tasks -------------------------------------------------------------

    def _of_tasks(self, start: _State, steps: int) -> list[dict[str, Tensor]]:
        """Fine-tunings of Θ0 on other classes, each with a fresh head, which is left out."""
        states = []
        for number, split in enumerate(self._splits):
            model = self.problem.build(derived_seed(self.seed, _HEAD, number))
            load(model, start, self.problem.fresh)
            training = self._training(split, _BRANCH + number, model)
            training.advance(steps, falling(0, steps))
            states.append(self._without_heads(recorded(model)))
        return states

    def _multi_task(self, start: _State, steps: int) -> dict[str, dict[str, Tensor]]:
        """One network on all tasks, a batch of each in turn, with a head for each."""
        heads, bodies = [], []
        for number in range(plan.BRANCHES):
            model = self.problem.build(derived_seed(self.seed, _HEAD, number))
            load(model, start, self.problem.fresh)
            heads.append({n: getattr(model, n) for n in self.problem.fresh})
            bodies.append(model)
        body = bodies[0]
        trained = {id(t): t for model in (body,) for t in model.parameters() if t.requires_grad}
        trained |= {id(t): t for head in heads for m in head.values() for t in m.parameters()}
        recipe, every = self.base.recipe, plan.BRANCHES * steps
        optimiser = torch.optim.AdamW(
            list(trained.values()), recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        batches = [
            _batches(split, recipe.batch_size, derived_seed(self.seed, _LONGER, number))
            for number, split in enumerate(self._splits)
        ]
        schedule = falling(0, every)
        body.train()
        for step in range(every):
            number = step % plan.BRANCHES
            for name, head in heads[number].items():
                setattr(body, name, head)
            for group in optimiser.param_groups:
                group["lr"] = recipe.learning_rate * schedule(step)
            inputs, targets = next(batches[number])
            loss = nn.functional.cross_entropy(body(inputs), targets)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        body.eval()
        return {plan.MULTI_TASK: self._without_heads(copied(recorded(body)))}

    def _without_heads(self, state: _State) -> dict[str, Tensor]:
        heads = tuple(f"{name}." for name in self.problem.fresh)
        return {name: t.clone() for name, t in state.items() if not name.startswith(heads)}

    # --- measures ----------------------------------------------------------------------------

    def _value(self, state: _State) -> float:
        model = self.problem.build(derived_seed(self.seed, _INITIAL))
        load(model, state)
        return round(self.problem.pretraining_measure.function(model, self.problem.test), 6)

    def _downstream(self, state: _State) -> float:
        return float(tuned_value(self.problem, state, self.seed)["value"])


def _base(task: BranchTask, length: float) -> Task:
    """The task of the run, with few classes if the others are needed for the branches."""
    base = for_run(task.base, length)
    if task.sort is Sort.TASKS and isinstance(base, Classification):
        samples = round(base.samples * plan.CLASSES / base.source_classes)
        return replace(base, source_classes=plan.CLASSES, samples=samples)
    return base


def _constant(step: int) -> float:
    return 1.0


def _batches(examples: Examples, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the examples for ever, each pass in another order."""
    for epoch in itertools.count():
        order = permutation(len(examples), derived_seed(seed, epoch))
        for begin in range(0, len(examples) - size + 1, size):
            chosen = order[begin : begin + size]
            yield examples.inputs[chosen], examples.targets[chosen]
