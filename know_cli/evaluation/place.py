"""Where and in which precision networks are trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from know_cli.evaluation.precision import Precision
from know_cli.evaluation.tasks import Examples, Problem
from know_cli.lab.machine import CPU, machine


@dataclass(frozen=True)
class Place:
    """Where networks are trained, and how they compute.

    Attributes:
        device: of networks and examples.
        precision: of matrix products and the like.
    """

    device: torch.device = CPU
    precision: Precision = Precision.FLOAT32

    def facts(self) -> list[str]:
        """What a key has of it, since other processors and precisions round differently.

        Nothing for the CPU and float32, so that a trial's folder is the same with and without a
        choice.
        """
        device = [] if self.device.type == "cpu" else [self.device.type]
        own = self.precision is Precision.FLOAT32
        return device if own else [*device, self.precision.value]

    def machine(self) -> dict[str, Any]:
        """What results tell of it: as :func:`~know_cli.lab.machine.machine`, of the device."""
        found = machine()
        if self.device.type == "cuda":
            found["processor"] += f" with {torch.cuda.get_device_name(self.device)}"
        elif self.device.type != "cpu":
            found["processor"] += f" with {self.device.type}"
        if self.precision is not Precision.FLOAT32:
            found["processor"] += f", in {self.precision.value}"
        return found


#: The CPU, in float32.
USUAL = Place()


def placed(problem: Problem, place: Place) -> Problem:
    """The problem with all its examples, and the networks that it builds, in a place."""
    moved: dict[int, Examples] = {}  # cells share theirs

    def move(examples: Examples) -> Examples:
        if id(examples) not in moved:
            moved[id(examples)] = examples.to(place.device)
        return moved[id(examples)]

    def built(build: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
        return lambda seed: in_precision(build(seed).to(place.device), place)

    cells = (replace(c, pool=move(c.pool), test=move(c.test)) for c in problem.cells)
    return replace(
        problem,
        pool=move(problem.pool),
        test=move(problem.test),
        build=built(problem.build),
        build_downstream=built(problem.build_downstream),
        cells=tuple(cells),
    )


def in_precision(model: nn.Module, place: Place) -> nn.Module:
    """A network that computes in a precision; its weights and outputs stay float32.

    Done by hooks, so that copies of the network have it, too.
    """
    if place.precision is Precision.FLOAT32:
        return model
    entered: list[torch.autocast] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        context = torch.autocast(place.device.type, torch.bfloat16)
        context.__enter__()  # type: ignore[no-untyped-call]
        entered.append(context)

    def leave(module: nn.Module, inputs: Any, output: Any) -> Any:
        entered.pop().__exit__(None, None, None)
        return output.float() if isinstance(output, Tensor) else output

    model.register_forward_pre_hook(enter)
    # Also where the network fails, so that what comes after it is not affected.
    model.register_forward_hook(leave, always_call=True)
    return model
