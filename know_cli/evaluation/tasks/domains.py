"""Domain generalisation: fine-tuning on three appearances of some classes, test on a fourth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from know_cli.evaluation.tasks.appearance import DOMAINS, in_domain, mixed
from know_cli.evaluation.tasks.classification import BACKBONES, Network, some
from know_cli.evaluation.tasks.data import load_images, of_classes
from know_cli.evaluation.tasks.measures import ACCURACY
from know_cli.evaluation.tasks.task import (
    Cell,
    Downstream,
    Problem,
    Task,
    permutation,
)

_CLASSES = 5
_CNN = Network("cnn")
_ORDER, _POOL, _TEST, _TRAIN, _MEASURED, _CHANGES = range(40, 46)


@dataclass(frozen=True)
class Domains(Task):
    """Five classes of Fashion-MNIST in all four domains, then the other five in three of them.

    There is one downstream condition for each domain that is left out for testing.

    Attributes:
        network: to train.
    """

    network: Network = _CNN

    @property
    def data_sets(self) -> tuple[str, ...]:
        """Fashion-MNIST."""
        return ("fashion-mnist",)

    def prepare(self, seed: int, data_folder: Path | None) -> Problem:
        """Draw classes, images and their appearances."""
        train, test, count = load_images("fashion-mnist", data_folder)
        order = permutation(count, seed, _ORDER)
        classes, others = order[:_CLASSES], order[_CLASSES : 2 * _CLASSES]
        every = list(DOMAINS)
        most = max(downstream.size for downstream in self.downstream)
        learned = some(of_classes(train, others), 4 * most, seed, _TRAIN)
        measured = some(of_classes(test, others), self.tested, seed, _MEASURED)
        cells = []
        for number, left_out in enumerate(every):
            used = [domain for domain in every if domain != left_out]
            shown = mixed(learned, used, seed, _CHANGES, number)
            tested = in_domain(measured, left_out, seed, _CHANGES, 10 + number)
            cells += [
                Cell(f"{left_out} unseen", downstream, shown, tested)
                for downstream in self.downstream
            ]
        shape = (3, *train.inputs.shape[2:])

        def network(number: int) -> nn.Module:
            return self.network.build(shape, _CLASSES, number)

        return Problem(
            pool=mixed(
                some(of_classes(train, classes), self.largest, seed, _POOL), every, seed, _CHANGES
            ),
            test=mixed(
                some(of_classes(test, classes), self.tested, seed, _TEST),
                every,
                seed,
                _CHANGES,
                20,
            ),
            build=network,
            build_downstream=network,
            fresh=("head",),
            cells=tuple(cells),
            pretraining_measure=ACCURACY,
            measure=ACCURACY,
        )


TASKS = tuple(
    Domains(
        name=f"domains-{name}",
        title="classes of Fashion-MNIST in four domains to others in an unseen one, "
        f"{BACKBONES[name].title}",
        samples=600,
        recipe=BACKBONES[name].recipe,
        downstream=(Downstream(120, 15, BACKBONES[name].downstream_rate, repetitions=1),),
        tested=1000,
        network=BACKBONES[name].network,
    )
    for name in ("resnet",)
)
