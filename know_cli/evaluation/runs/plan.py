"""How long each task's run is, when its checkpoints are taken, and what it is compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace

from know_cli.evaluation.tasks import Task

#: Names of the arms that are trained; ``LAST`` is the end of the run itself.
LAST = "last"
COSINE = "cosine"
#: More training as shares of the run: with the rate falling to 0 in a line, and at the same rate.
MORE = (0.1, 0.2)
#: The share of the run's steps in which the rate rises to its constant value.
WARM_UP = 0.05
#: The share of the run's steps between the checkpoints of the main comparison.
SPACING = 0.05
#: Checkpoints of the main comparison.
CHECKPOINTS = 5
#: Numbers and spacings (as shares of the run) of the sweep.
COUNTS = (2, 3, 5, 9)
SPACINGS = (0.01, 0.02, 0.04, 0.08)
#: Factors of the task's own downstream rate, among which each start chooses by validation.
RATES = (0.5, 1.0, 2.0, 4.0)
#: Validation examples of the choice of the downstream rate, at most.
VALIDATION = 200


def annealed(share: float) -> str:
    """The name of the run continued by a share of its steps while the rate falls to 0."""
    return f"annealed-{share:.0%}".removesuffix("%")


def longer(share: float) -> str:
    """The name of the run continued by a share of its steps at the same rate."""
    return f"longer-{share:.0%}".removesuffix("%")


#: The most annealing, which recovered gains are shares of.
ORACLE = annealed(MORE[-1])


@dataclass(frozen=True)
class Length:
    """The length of a task's run.

    Attributes:
        samples: that it trains on.
        epochs: passes over them.
    """

    samples: int
    epochs: int


# A run has other needs than a forgetting: more data, seen fewer times.
_LENGTHS = {
    "fashion-classes-cnn": Length(2000, 24),
    "fashion-classes-cnn-batchnorm": Length(2000, 24),
    "fashion-classes-resnet": Length(2000, 20),
    "fashion-classes-mobilenetv2": Length(2000, 20),
    "fashion-classes-vit": Length(2000, 20),
    "fashion-classes-pyramid": Length(2000, 20),
    "fashion-digits-cnn": Length(2000, 24),
    "fashion-digits-resnet": Length(2000, 20),
    "glyphs-digits-cnn-batchnorm": Length(1000, 40),
    "glyphs-alphabets-cnn": Length(1000, 48),
    "glyphs-alphabets-resnet": Length(1000, 40),
    "text-language-model": Length(1200, 20),
    "text-lora": Length(480, 32),
    "domains-resnet": Length(2000, 20),
    "scenes-segmentation": Length(600, 20),
    "scenes-captioning": Length(1600, 24),
    "cifar10-classes-resnet": Length(2000, 24),
    "cifar10-classes-vit": Length(2000, 20),
}


def for_run(task: Task, length: float = 1.0) -> Task:
    """A task with as much data, seen as often, as its run takes.

    Args:
        task: as it is for forgettings.
        length: factor of the number of passes over the data.
    """
    own = _LENGTHS.get(task.name, Length(task.largest, task.recipe.epochs))
    return replace(
        task,
        samples=round(own.samples * task.samples / task.largest),
        recipe=replace(task.recipe, epochs=max(round(length * own.epochs), 1)),
    )
