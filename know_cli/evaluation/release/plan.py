"""Tasks of the release regime, and the starts that they compare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from know_cli.errors import UsageError
from know_cli.evaluation.anchors import LAST, LONGER, MORE_DATA, NAIVE, SCRATCH
from know_cli.evaluation.release.fine_tuning import FineTuning
from know_cli.evaluation.release.network import ReleaseResNet18, SmallResNet
from know_cli.evaluation.tasks import Downstream, Recipe, Task
from know_cli.evaluation.tasks.cifar import Reduced, Whole
from know_cli.evaluation.tasks.classification import BACKBONES, Network
from know_cli.evaluation.variants import Variant, is_available, of_bundle
from know_cli.lab.data import AFFINE

#: Checkpoints of a forgetting, Θ0 among them.
SESSIONS = 5
#: Θ0 trained on for as many steps as the forgetting takes, while the rate falls to 0 in a line.
DECAYED = "longer-decayed"
#: Starts that are trained, not predicted.
TRAINED = (NAIVE, LONGER, DECAYED, MORE_DATA, LAST)
#: Factors of Θ0's weights.
SHRUNK = (0.9, 0.7, 0.5, 0.4)
#: Steps of each prediction that are measured.
STEPS = (1, 3)
#: The shipped families of KNOWN.
SHIPPED = ("continuation", "retrodiction")
#: Whole BatchNorm layers: as a new network has them; as the start has them; as the start has them,
#: with running statistics measured on the pre-training's examples.
FRESH, STORED, RE_ESTIMATED = "fresh", "stored", "re-estimated"
#: Validation examples for the choice of the rate.
VALIDATION = 2000


@dataclass(frozen=True)
class Arm:
    """A start of the fine-tuning.

    Attributes:
        name: of the start.
        variant: the method that predicts it; None if it is trained or has fresh weights.
        step: of the prediction.
        norm: treatment of BatchNorm layers.
    """

    name: str
    variant: Variant | None = None
    step: int = 1
    norm: str = FRESH

    @property
    def label(self) -> str:
        """For the command line and tables; the usual treatment is not named."""
        return self.name if self.norm == FRESH else f"{self.name}-{self.norm}"


@dataclass(frozen=True)
class ReleaseTask:
    """A task in the release regime.

    Attributes:
        base: its data, network and pre-training.
        fine_tuning: of every start.
        rate: |D(k + 1)| / |D(k)|.
        uses_all: whether D0 is all examples that there are, as in the release, so that none are
            left to train a network on more data.
        augmentation: of all images that are trained on, by name; empty for shifts and flips in the
            fine-tuning alone.
    """

    base: Task
    fine_tuning: FineTuning
    rate: float = 0.5
    uses_all: bool = False
    augmentation: str = ""

    @property
    def name(self) -> str:
        """For the command line."""
        return self.base.name

    @property
    def title(self) -> str:
        """What is transferred to what, with which network."""
        return self.base.title

    def definition(self) -> dict[str, Any]:
        """The task in plain types."""
        # What is as usual is left out, so that what was trained before these could differ stays.
        other = {"uses_all": self.uses_all, "augmentation": self.augmentation}
        return {
            **self.base.definition(),
            "rate": self.rate,
            "fine_tuning": asdict(self.fine_tuning),
            **{name: value for name, value in other.items() if value},
        }

    def arms(self, bundles: Mapping[str, str]) -> list[Arm]:
        """Every start: those of the main comparison, then other treatments of BatchNorm.

        Args:
            bundles: paths of further KNOWN bundles, by name.
        """
        variants = [Variant(name, {"weights": name}) for name in SHIPPED]
        variants += [of_bundle(name, path) for name, path in bundles.items()]
        predicted = [arm for variant in variants for arm in self._of_steps(variant)]
        shrunk = [_shrunk(factor) for factor in SHRUNK]
        main = [
            *(Arm(name) for name in TRAINED if not (self.uses_all and name == MORE_DATA)),
            *shrunk,
            *predicted,
            Arm("average", Variant("average", {"method": "average"}, steps=False)),
            Arm(SCRATCH),
        ]
        treated = [NAIVE, _shrunk(0.5).name, *(self._label(name, STEPS[-1]) for name in SHIPPED)]
        by_name = {arm.name: arm for arm in main}
        others = [
            replace(by_name[name], norm=norm) for name in treated for norm in (STORED, RE_ESTIMATED)
        ]
        return main + others

    def _of_steps(self, variant: Variant) -> Iterator[Arm]:
        for step in STEPS:
            yield Arm(self._label(variant.label, step), variant, step)

    def _label(self, name: str, step: int) -> str:
        """The name with the factor of the data that a step stands for."""
        return f"{name}-x{round(self.rate**-step)}"


def _shrunk(factor: float) -> Arm:
    name = f"shrink-{factor:g}"
    options = {"lambda": factor}
    return Arm(name, Variant(name, {"method": "shrink", "options": options}, steps=False))


_ADAM = FineTuning()
# For SGD the release has no rate; from this one the grid goes either way.
_SGD = FineTuning(learning_rate=1e-2, optimiser="sgd", weight_decay=5e-4)
_MOST = 5000
_RESNET = "a ResNet with BatchNorm and biases"


def _task(
    name: str,
    title: str,
    network: Network,
    source: tuple[str, int] = ("cifar10", 5),
    fine_tuning: FineTuning = _ADAM,
    rate: float = 0.5,
    domain: str = "",
) -> ReleaseTask:
    base = Reduced(
        name=f"release-{name}",
        title=title,
        # Half of what five classes have, so that the other half is more data. In batches of this
        # size an epoch has as many steps as one of the release.
        samples=6000,
        recipe=Recipe(1, 1e-3, batch_size=16, weight_decay=0.0, schedule="constant"),
        downstream=tuple(
            Downstream(size, fine_tuning.epochs, fine_tuning.learning_rate, 1)
            for size in (_MOST // 4, _MOST // 2, _MOST)
        ),
        tested=5000,
        network=network,
        source=source[0],
        source_classes=source[1],
        target="cifar10",
        target_classes=5,
        source_domain=domain,
    )
    return ReleaseTask(base, fine_tuning, rate)


#: The release's own, but for 2,000 of CIFAR-10's training images, which choose the rate.
_RESNET18 = ReleaseTask(
    Whole(
        name="release-cifar100-cifar10-resnet18",
        title="CIFAR-100 to CIFAR-10, the release's ResNet18",
        samples=25_000,
        recipe=Recipe(1, 1e-3, batch_size=128, weight_decay=0.0, schedule="constant"),
        downstream=tuple(Downstream(size, 100, 4e-4, 1) for size in (12_000, 24_000, 48_000)),
        tested=10_000,
        large=True,
        network=ReleaseResNet18(),
        source="cifar100",
        source_classes=100,
        target="cifar10",
        target_classes=10,
    ),
    FineTuning(epochs=100, head_epochs=10),
    uses_all=True,
    augmentation=AFFINE,
)
_CLASSES = "five classes of CIFAR-10 at 16×16 to the other five"
#: Tasks of the release regime by name.
RELEASE_TASKS = {
    task.name: task
    for task in (
        _task("cifar10-resnet", f"{_CLASSES}, {_RESNET}", SmallResNet()),
        _task(
            "cifar10-cnn", f"{_CLASSES}, {BACKBONES['cnn'].title}", BACKBONES["cnn"].network
        ),
        _task(
            "cifar10-resnet-sgd",
            f"{_CLASSES}, {_RESNET}, fine-tuned by SGD with momentum and weight decay",
            SmallResNet(),
            fine_tuning=_SGD,
        ),
        _task(
            "cifar10-resnet-third",
            f"{_CLASSES}, {_RESNET}, sessions on a third of the data before",
            SmallResNet(),
            rate=1 / 3,
        ),
        _task(
            "fashion-cifar10-resnet",
            f"Fashion-MNIST in colours to five classes of CIFAR-10 at 14×14, {_RESNET}",
            SmallResNet(),
            source=("fashion-mnist", 10),
            domain="colour",
        ),
        _RESNET18,
    )
}  # fmt: skip


def find_release_tasks(patterns: Sequence[str]) -> list[ReleaseTask]:
    """The tasks that match names or glob patterns, in the registry's order.

    Args:
        patterns: none stands for all that take no hours on a processor.

    Raises:
        UsageError: a pattern matches no task.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in RELEASE_TASKS):
            raise UsageError(
                f"no task of the release regime is named {pattern!r}; choose from "
                f"{', '.join(RELEASE_TASKS)}"
            )
    return [
        task
        for name, task in RELEASE_TASKS.items()
        if (not patterns and not task.base.large)
        or any(fnmatchcase(name, pattern) for pattern in patterns)
    ]


def chosen(arms: Sequence[Arm], patterns: Sequence[str]) -> list[Arm]:
    """The starts whose labels match names or glob patterns; Θ0 is always among them.

    Args:
        arms: of a task.
        patterns: none stands for all.
    """
    wanted = [NAIVE, *patterns]
    return [
        arm
        for arm in arms
        if not patterns or any(fnmatchcase(arm.label, pattern) for pattern in wanted)
    ]


def check_methods(
    tasks: Sequence[ReleaseTask], bundles: Mapping[str, str], patterns: Sequence[str]
) -> None:
    """Refuse names of bundles that are taken, unusable bundles, and patterns that no start has.

    Raises:
        UsageError: the reason.
        CheckpointError: a bundle is corrupt.
    """
    own = {arm.label for task in tasks for arm in task.arms({})} | set(SHIPPED)
    for name, path in bundles.items():
        if name in own:
            raise UsageError(f"--bundle {name}=…: is already the name of a start")
        if not is_available(of_bundle(name, path), SESSIONS):
            raise UsageError(f"--bundle {name}={path}: cannot read {SESSIONS} checkpoints")
    labels = list(dict.fromkeys(arm.label for task in tasks for arm in task.arms(bundles)))
    for pattern in patterns:
        if not any(fnmatchcase(label, pattern) for label in labels):
            raise UsageError(f"unknown start {pattern!r}; choose from {', '.join(labels)}")
