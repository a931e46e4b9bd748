"""How long each task's run is, when its checkpoints are taken, and what it is compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace

from know_cli.evaluation.tasks import Task

#: Names of the arms that are trained; ``LAST`` is the end of the run itself.
LAST = "last"
COSINE = "cosine"
FALLING = "falling"
#: More training as shares of the run: with the rate falling to 0 in a line, and at the same rate.
MORE = (0.1, 0.2)
#: The share of the run's steps in which the rate rises to its constant value.
WARM_UP = 0.05
#: The share of the run's steps between the checkpoints of the main comparison.
SPACING = 0.02
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
        tested: the most test examples.
    """

    samples: int
    epochs: int
    tested: int = 2000


# People's runs see much data a few times, and what annealing gives shows in tenths of a point:
# more data than a forgetting takes, fewer passes, more examples to test on. Of the glyphs there
# are no more.
_IMAGES, _GLYPHS = Length(6000, 6), Length(1000, 24, tested=1000)
_LENGTHS = {
    "fashion-classes-cnn": _IMAGES,
    "fashion-classes-cnn-batchnorm": _IMAGES,
    "fashion-classes-resnet": _IMAGES,
    "fashion-classes-mobilenetv2": _IMAGES,
    "fashion-classes-vit": _IMAGES,
    "fashion-classes-pyramid": _IMAGES,
    "fashion-digits-cnn": _IMAGES,
    "fashion-digits-resnet": _IMAGES,
    "glyphs-digits-cnn-batchnorm": _GLYPHS,
    "glyphs-alphabets-cnn": _GLYPHS,
    "glyphs-alphabets-resnet": _GLYPHS,
    "text-language-model": Length(5000, 5, tested=800),
    "text-lora": Length(2000, 6, tested=800),
    "domains-resnet": _IMAGES,
    "scenes-segmentation": Length(1500, 6, tested=500),
    "scenes-captioning": Length(4000, 6, tested=1000),
    "cifar10-classes-resnet": _IMAGES,
    "cifar10-classes-vit": _IMAGES,
}


def for_run(task: Task, length: float = 1.0) -> Task:
    """A task with as much data, seen as often, and tested on as many examples as its run takes.

    Args:
        task: as it is for forgettings.
        length: factor of the number of passes over the data.
    """
    default = Length(task.largest, task.recipe.epochs, task.tested)
    own = _LENGTHS.get(task.name, default)
    return replace(
        task,
        samples=round(own.samples * task.samples / task.largest),
        tested=own.tested,
        recipe=replace(task.recipe, epochs=max(round(length * own.epochs), 1)),
    )
