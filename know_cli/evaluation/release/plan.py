"""The tasks of the release regime, and the choice among them and their starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from know_cli.errors import UsageError
from know_cli.evaluation.anchors import NAIVE
from know_cli.evaluation.release.fine_tuning import FineTuning
from know_cli.evaluation.release.network import ReleaseResNet18, SmallResNet
from know_cli.evaluation.release.recipes import captions, domains, segmentation, transfer
from know_cli.evaluation.release.task import FRESH, SESSIONS, SHIPPED, Arm, ReleaseTask
from know_cli.evaluation.tasks import Downstream, Recipe
from know_cli.evaluation.tasks.cifar import Reduced, Whole
from know_cli.evaluation.tasks.classification import BACKBONES, Network
from know_cli.evaluation.variants import is_available, of_bundle
from know_cli.lab.data import AFFINE

_ADAM = FineTuning()
# For SGD the release has no rate; from this one the grid goes either way.
_SGD = FineTuning(learning_rate=1e-2, optimiser="sgd", weight_decay=5e-4)
# What shrinking is to be told apart from. At the rates that are best here, AdamW shrinks weights in
# the course of a fine-tuning by about as much as λ from 0.9 to 0.4 does before it.
_DECAYS = (0.1, 0.3, 1.0)
_ONE_EPOCH = Recipe(1, 1e-3, batch_size=16, weight_decay=0.0, schedule="constant")
_CONVERGED = replace(_ONE_EPOCH, epochs=12, schedule="cosine")
# How long the fine-tuning takes, in epochs, beside the usual length.
_LENGTHS = (10, 90)
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
    target: tuple[str, int, str] = ("cifar10", 5, ""),
    factor: int = 2,
    large: bool = False,
    recipe: Recipe = _ONE_EPOCH,
) -> ReleaseTask:
    base = Reduced(
        name=f"release-{name}",
        title=title,
        # Half of what five classes have, so that the other half is more data. In the recipe's
        # batches an epoch has as many steps as one of the release.
        samples=6000,
        recipe=recipe,
        downstream=tuple(
            Downstream(size, fine_tuning.epochs, fine_tuning.learning_rate, 1)
            for size in (_MOST // 4, _MOST // 2, _MOST)
        ),
        tested=5000,
        large=large,
        network=network,
        source=source[0],
        source_classes=source[1],
        target=target[0],
        target_classes=target[1],
        source_domain=domain,
        target_domain=target[2],
        factor=factor,
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
    steps=(1, 2, 3),
    fewer=(2, 3, 4),
)
_CLASSES = "five classes of CIFAR-10 at 16×16 to the other five"
_NETWORKS = {
    "resnet": (_RESNET, SmallResNet()),
    "cnn": (BACKBONES["cnn"].title, BACKBONES["cnn"].network),
    "pyramid": (f"{BACKBONES['pyramid'].title} such as PVTv2", BACKBONES["pyramid"].network),
}
_CONVERGED_TASKS = tuple(
    _task(
        f"cifar10-{name}-converged",
        f"{_CLASSES}, {title}, trained until the rate has fallen to 0",
        network,
        recipe=_CONVERGED,
    )
    for name, (title, network) in _NETWORKS.items()
)
_DECAY_TASKS = tuple(
    _task(
        f"cifar10-cnn-decay-{decay:g}",
        f"{_CLASSES}, {_NETWORKS['cnn'][0]}, fine-tuned by AdamW with weight decay {decay:g}",
        _NETWORKS["cnn"][1],
        fine_tuning=FineTuning(weight_decay=decay),
    )
    for decay in _DECAYS
)
_THIRD_TASKS = tuple(
    _task(
        f"cifar10-{name}-third",
        f"{_CLASSES}, {title}, sessions on a third of the data before",
        network,
        rate=1 / 3,
    )
    for name, (title, network) in _NETWORKS.items()
)
_LENGTH_TASKS = tuple(
    _task(
        f"cifar10-{name}-epochs-{epochs}",
        f"{_CLASSES}, {title}, fine-tuned for {epochs} epochs",
        network,
        fine_tuning=FineTuning(epochs=epochs),
    )
    for epochs in _LENGTHS
    for name, (title, network) in _NETWORKS.items()
)
# And of the longest, what weight decay does to it: there shrinking gains most.
_LONG_DECAY_TASK = _task(
    f"cifar10-cnn-epochs-{_LENGTHS[-1]}-decay-{_DECAYS[-1]:g}",
    f"{_CLASSES}, {_NETWORKS['cnn'][0]}, fine-tuned for {_LENGTHS[-1]} epochs by AdamW with weight "
    f"decay {_DECAYS[-1]:g}",
    _NETWORKS["cnn"][1],
    fine_tuning=FineTuning(epochs=_LENGTHS[-1], weight_decay=_DECAYS[-1]),
)
#: Tasks of the release regime by name.
RELEASE_TASKS = {
    task.name: task
    for task in (
        *(
            _task(f"cifar10-{name}", f"{_CLASSES}, {title}", network)
            for name, (title, network) in _NETWORKS.items()
        ),
        _task(
            "cifar10-resnet-sgd",
            f"{_CLASSES}, {_RESNET}, fine-tuned by SGD with momentum and weight decay",
            SmallResNet(),
            fine_tuning=_SGD,
        ),
        *_THIRD_TASKS,
        _task(
            "fashion-cifar10-resnet",
            f"Fashion-MNIST in colours to five classes of CIFAR-10 at 14×14, {_RESNET}",
            SmallResNet(),
            source=("fashion-mnist", 10),
            domain="colour",
        ),
        _task(
            "cifar10-fashion-resnet",
            f"CIFAR-10 at 16×16 to Fashion-MNIST in colours, {_RESNET}",
            SmallResNet(),
            source=("cifar10", 10),
            target=("fashion-mnist", 10, "colour"),
        ),
        _task(
            "cifar10-whole-resnet",
            f"five classes of CIFAR-10 at 32×32 to the other five, {_RESNET}",
            SmallResNet(),
            factor=1,
        ),
        _task(
            "cifar10-resnet18",
            "five classes of CIFAR-10 at 32×32 to the other five, the release's ResNet18",
            ReleaseResNet18(),
            factor=1,
            large=True,
        ),
        *_CONVERGED_TASKS,
        *_DECAY_TASKS,
        *_LENGTH_TASKS,
        _LONG_DECAY_TASK,
        _RESNET18,
        *transfer.TASKS,
        *domains.TASKS,
        *segmentation.TASKS,
        *captions.TASKS,
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
        patterns: none stands for all but those that are measured only by name, of which a pattern
            has to spell out the treatment of BatchNorm, or where it is the usual one the whole.
    """
    wanted = [NAIVE, *patterns] if patterns else ["*"]
    return [arm for arm in arms if any(_takes(pattern, arm) for pattern in wanted)]


def _takes(pattern: str, arm: Arm) -> bool:
    return fnmatchcase(arm.label, pattern) and (
        not arm.by_name
        or pattern == arm.label
        or (arm.norm != FRESH and pattern.endswith(arm.norm))
    )


def check_methods(
    tasks: Sequence[ReleaseTask], bundles: Mapping[str, str], patterns: Sequence[str]
) -> None:
    """Refuse names of bundles that are taken, unusable bundles, and patterns that take no start.

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
    arms = [arm for task in tasks for arm in task.arms(bundles)]
    labels = list(dict.fromkeys(arm.label for arm in arms))
    for pattern in patterns:
        matching = [label for label in labels if fnmatchcase(label, pattern)]
        if not matching:
            raise UsageError(f"unknown start {pattern!r}; choose from {', '.join(labels)}")
        if not any(_takes(pattern, arm) for arm in arms):
            raise UsageError(
                f"--method {pattern}: matches only starts that have to be written out: "
                f"{', '.join(matching)}"
            )
