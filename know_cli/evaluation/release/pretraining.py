"""The pre-training of the release, and sessions as long on ever smaller subsets.

The release trains for one epoch at a constant rate; a task's recipe may have more epochs, and a
rate that falls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from know_cli.checkpoints.state import read_state
from know_cli.errors import UsageError
from know_cli.evaluation.anchors import LONGER, MORE_DATA
from know_cli.evaluation.release.fine_tuning import FINE_TUNING_AUGMENTATIONS
from know_cli.evaluation.release.task import DECAYED, SESSIONS, ReleaseTask
from know_cli.evaluation.runs.trial import copied, falling
from know_cli.evaluation.tasks import Examples, Problem, Recipe
from know_cli.evaluation.tasks.task import RATE
from know_cli.evaluation.weights import load, recorded
from know_cli.forgetting.recorder import checkpoint_name, derived_seed
from know_cli.forgetting.subsets import nested_subsets
from know_cli.lab.fitting import rate_share
from know_cli.lab.stepping import Training

# Random streams of one seed.
_INITIAL, _FIRST, _SESSION, _LONGER, _SUBSETS = range(90, 95)
_Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Trained:
    """A state of the pre-training.

    Attributes:
        name: of the checkpoint, without the file's ending.
        steps: that it took from the initial weights.
        samples: that its last epoch had.
        state: its tensors.
    """

    name: str
    steps: int
    samples: int
    state: Mapping[str, Tensor]


def first_data(task: ReleaseTask, problem: Problem, seed: int) -> Examples:
    """D0: all examples that there are, or a half of them with every class's share."""
    pool = problem.pool
    if task.uses_all:
        return pool
    return pool.take(from_numpy(_half(pool, seed)))


def other_data(task: ReleaseTask, problem: Problem, seed: int) -> Examples:
    """What D(−1) has and D0 has not; nothing where D0 is all that there is."""
    pool = problem.pool
    if task.uses_all:
        return pool.take(from_numpy(np.zeros(0, np.int64)))
    others = np.setdiff1d(np.arange(len(pool), dtype=np.int64), _half(pool, seed))
    return pool.take(from_numpy(others))


def _half(pool: Examples, seed: int) -> _Indices:
    return nested_subsets(len(pool), RATE, 2, seed, _labels(pool))[1]


def given_start(problem: Problem, path: Path) -> dict[str, Tensor]:
    """The weights of a Θ0 that is trained already, such as a public model's.

    Args:
        problem: whose network they are of; modules that are fresh downstream may have another
            shape, and then stay as a new network has them.
        path: of the checkpoint, a file or a folder.

    Returns:
        By name, all that fits; running counts and the like may be missing.

    Raises:
        UsageError: a tensor is missing, has another shape, or is none of the network's.
        CheckpointError: the checkpoint cannot be read.
    """
    found = read_state(path, folders=True)
    model = problem.build(0)
    head = tuple(f"{name}." for name in problem.fresh)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    trained = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    for name, tensor in found.items():
        if name.startswith(head):
            continue
        if name not in wanted:
            raise UsageError(f"--from {path}: has a tensor {name!r}, which the network lacks")
        if tuple(tensor.shape) != wanted[name]:
            raise UsageError(
                f"--from {path}: tensor {name!r} has the shape {list(tensor.shape)}, the "
                f"network's has {list(wanted[name])}"
            )
    for name in sorted(trained - found.keys()):
        if not name.startswith(head):
            raise UsageError(f"--from {path}: lacks the tensor {name!r}, which the network has")
    return {
        name: tensor for name, tensor in found.items() if tuple(tensor.shape) == wanted.get(name)
    }


def pretrained(
    task: ReleaseTask, problem: Problem, seed: int, given: Mapping[str, Tensor] | None = None
) -> Iterator[Trained]:
    """Train Θ0, its sessions, and what they are compared with.

    Adam's moments are kept from one session to the next, and in what trains Θ0 longer.

    Args:
        task: with the recipe of an epoch.
        problem: its data.
        seed: of initial weights, order and subsets.
        given: the weights of a Θ0 that is trained already, as :func:`given_start` returns them;
            its optimiser's moments are not known, and nothing is trained on more data.

    Yields:
        Θ0 (``ckpt0``) and every session (``ckpt1``, …); Θ0 trained on for as many steps as these
        took, at the same rate and with one that falls to 0; and a network with Θ0's initial weights
        trained for one epoch on all examples, where Θ0 was not.

    Raises:
        UsageError: there are too few examples for the sessions.
    """
    data = first_data(task, problem, seed)
    shuffle = derived_seed(seed, _SUBSETS)
    subsets = nested_subsets(len(data), task.rate, SESSIONS, shuffle, _labels(data))

    augmentation = FINE_TUNING_AUGMENTATIONS[task.augmentation] if task.augmentation else None

    recipe = task.base.recipe

    def begin(examples: Examples) -> Training:
        return Training(
            problem.build(derived_seed(seed, _INITIAL)),
            examples.inputs,
            examples.targets,
            batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            seed=derived_seed(seed, _FIRST),
            weight_decay=recipe.weight_decay,
            augmentation=augmentation,
        )

    first = begin(data)
    if given is None:
        follow(recipe, first)
    else:
        load(first.model, given)
    yield _state(checkpoint_name(0), first, first.done, len(data))
    steps = 0
    for number, run in enumerate(sessions(first, subsets, seed, recipe), 1):
        steps += run.done
        yield _state(checkpoint_name(number), run, first.done + steps, len(subsets[number]))
    schedules: dict[str, Callable[[int], float]] = {LONGER: constant, DECAYED: falling(0, steps)}
    for name, schedule in schedules.items():
        longer = anew(first, derived_seed(seed, _LONGER))
        longer.advance(steps, schedule)
        yield _state(name, longer, first.done + steps, len(data))
    if given is None and not task.uses_all:
        more = begin(problem.pool)
        follow(recipe, more)
        yield _state(MORE_DATA, more, more.done, len(problem.pool))


def sessions(
    first: Training, subsets: Sequence[_Indices], seed: int, recipe: Recipe
) -> Iterator[Training]:
    """A training on each of the nested subsets after the first, with all of the optimiser's state.

    Args:
        first: the training on the first subset.
        subsets: sorted indices into its examples, each in the one before.
        seed: of the order of the examples.
        recipe: whose epochs and schedule each has.
    """
    run, before = first, subsets[0]
    for number, indices in enumerate(subsets[1:], 1):
        positions = from_numpy(np.searchsorted(before, indices))
        run = anew(run, derived_seed(seed, _SESSION, number), positions)
        follow(recipe, run)
        yield run
        before = indices


def anew(run: Training, seed: int, positions: Tensor | None = None) -> Training:
    """A branch whose steps are counted from 0, so that it begins with a whole epoch."""
    branch = run.branch(seed, positions)
    branch.done = 0
    return branch


def follow(recipe: Recipe, run: Training) -> None:
    """Advance a training that has done no step by a recipe's epochs, at its schedule's rate."""
    steps = recipe.epochs * run.epoch_steps
    run.advance(steps, lambda step: rate_share(recipe.schedule, step / steps))


def constant(step: int) -> float:
    """The rate as a share of the given one, at every step."""
    return 1.0


def _labels(examples: Examples) -> _Indices | None:
    """The class of each example, so that subsets keep the classes' shares; None of maps."""
    return examples.targets.cpu().numpy() if examples.targets.dim() == 1 else None


def _state(name: str, run: Training, steps: int, samples: int) -> Trained:
    return Trained(name.removesuffix(".safetensors"), steps, samples, copied(recorded(run.model)))
