"""What a task of the release regime is, and the starts that it compares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from know_cli.evaluation.anchors import HINDSIGHT, LAST, LONGER, MORE_DATA, NAIVE, SCRATCH
from know_cli.evaluation.release.fine_tuning import FineTuning
from know_cli.evaluation.tasks import Task
from know_cli.evaluation.variants import Variant, of_bundle

#: Checkpoints of a forgetting, Θ0 among them.
SESSIONS = 5
#: Θ0 trained on for as many steps as the forgetting takes, while the rate falls to 0 in a line.
DECAYED = "longer-decayed"
#: The mean of the most forgotten checkpoints, so many of them.
FORGOTTEN = 3
AVERAGE_FORGOTTEN = f"average-forgotten-{FORGOTTEN}"
#: Starts that are trained or put together from checkpoints, not predicted.
TRAINED = (NAIVE, LONGER, DECAYED, MORE_DATA, LAST, AVERAGE_FORGOTTEN, HINDSIGHT)
#: Of these, what examples beside D0 are needed for.
OF_MORE_DATA = (MORE_DATA, HINDSIGHT)
#: Factors of Θ0's weights.
SHRUNK = (0.9, 0.7, 0.5, 0.4)
#: Starts in which only the first or only the last half of the layers have shrunk, by this factor.
SHRUNK_HALVES, HALVES_FACTOR = ("shrink-0.5-first", "shrink-0.5-last"), 0.5
#: Steps of each prediction that are measured, unless a task has others.
STEPS = (1, 3)
#: The shipped families of KNOWN, and the one that stands for the paper's.
RETRODICTION = "retrodiction"
SHIPPED = ("continuation", RETRODICTION)
#: Whole BatchNorm layers: as a new network has them; as the start has them; as the start has them,
#: with running statistics measured on the pre-training's examples.
FRESH, STORED, RE_ESTIMATED = "fresh", "stored", "re-estimated"
#: Validation examples for the choice of the rate, unless a task has others.
VALIDATION = 2000


@dataclass(frozen=True)
class Arm:
    """A start of the fine-tuning.

    Attributes:
        name: of the start.
        variant: the method that predicts it; None if it is trained or has fresh weights.
        step: of the prediction.
        norm: treatment of BatchNorm layers.
        sessions: number of checkpoints that the prediction reads, Θ0 first.
        by_name: whether it is measured only where a pattern names its treatment.
    """

    name: str
    variant: Variant | None = None
    step: int = 1
    norm: str = FRESH
    sessions: int = SESSIONS
    by_name: bool = False

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
        steps: of each prediction that are measured.
        fewer: other numbers S of checkpoints that the paper's KNOWN is measured with.
        validation: number of examples for the choice of the rate.
    """

    base: Task
    fine_tuning: FineTuning
    rate: float = 0.5
    uses_all: bool = False
    augmentation: str = ""
    steps: tuple[int, ...] = STEPS
    fewer: tuple[int, ...] = ()
    validation: int = VALIDATION

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
        other = {
            "uses_all": self.uses_all,
            "augmentation": self.augmentation,
            "validation": self.validation if self.validation != VALIDATION else 0,
        }
        return {
            **self.base.definition(),
            "rate": self.rate,
            "fine_tuning": asdict(self.fine_tuning),
            **{name: value for name, value in other.items() if value},
        }

    def arms(self, bundles: Mapping[str, str]) -> list[Arm]:
        """Every start: those of the main comparison, then other treatments of BatchNorm.

        Args:
            bundles: paths of further bundles, by name.
        """
        variants = [Variant(name, {"weights": name}) for name in SHIPPED]
        variants += [of_bundle(name, path) for name, path in bundles.items()]
        predicted = [arm for variant in variants for arm in self._of_steps(variant)]
        shrunk = [_shrunk(factor) for factor in SHRUNK]
        halves = [Arm(name, by_name=True) for name in SHRUNK_HALVES]
        main = [
            *(Arm(name) for name in TRAINED if not (self.uses_all and name in OF_MORE_DATA)),
            *shrunk,
            *predicted,
            Arm("average", Variant("average", {"method": "average"}, steps=False)),
            Arm(SCRATCH),
        ]
        treated = [
            NAIVE,
            _shrunk(0.5).name,
            *(self._label(name, self.steps[-1]) for name in SHIPPED),
        ]
        others = [
            replace(arm, norm=norm, by_name=arm.name not in treated)
            for arm in main
            if arm.name != SCRATCH
            for norm in (STORED, RE_ESTIMATED)
        ]
        return main + halves + others + list(self._of_fewer())

    def _of_fewer(self) -> Iterator[Arm]:
        variant = Variant(RETRODICTION, {"weights": RETRODICTION})
        for sessions in self.fewer:
            for step in self.steps:
                name = self._label(f"{RETRODICTION}-s{sessions}", step)
                yield Arm(name, variant, step, sessions=sessions)

    def _of_steps(self, variant: Variant) -> Iterator[Arm]:
        if not variant.steps:
            yield Arm(variant.label, variant)
            return
        for step in self.steps:
            yield Arm(self._label(variant.label, step), variant, step)

    def _label(self, name: str, step: int) -> str:
        """The name with the factor of the data that a step stands for."""
        return f"{name}-x{round(self.rate**-step)}"


def _shrunk(factor: float) -> Arm:
    name = f"shrink-{factor:g}"
    options = {"lambda": factor}
    return Arm(name, Variant(name, {"method": "shrink", "options": options}, steps=False))
