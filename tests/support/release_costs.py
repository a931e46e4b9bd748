"""What training on one example of the release regime's tasks takes.

``python -m tests.support.release_costs paper`` (or ``ours``) measures it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from know_cli.evaluation.paper.plan import experiments
from know_cli.evaluation.release.fine_tuning import FINE_TUNING_AUGMENTATIONS, has_batch_norm
from know_cli.evaluation.release.network import ReleaseResNet18
from know_cli.evaluation.release.plan import RELEASE_TASKS
from know_cli.evaluation.release.recipes.captions import CAPTIONS, LENGTH
from know_cli.evaluation.release.recipes.networks import deep_lab, pvt_captioner, pvt_classifier
from know_cli.evaluation.release.task import ReleaseTask
from know_cli.evaluation.tasks.cifar import Reduced
from know_cli.lab.fitting import one_thread
from know_cli.lab.machine import machine
from know_cli.lab.stepping import Training

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "know_cli" / "evaluation" / "release" / "seconds.json"
BATCH, STEPS = 8, 3
# Of the small networks, whose steps are short.
SMALL_STEPS = 60
# Of the source's images, in pixels, before a task reduces them.
SIDES = {"cifar10": 32, "fashion-mnist": 28}


@one_thread()
def seconds(
    model: nn.Module,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    steps: int = STEPS,
    **more: Any,
) -> float:
    """Processor time of a step, by the example, to two digits; the first is not counted."""
    training = Training(
        model, inputs, targets, batch_size=len(inputs), learning_rate=1e-3, seed=0, **more
    )
    training.advance(1, lambda step: 1.0)
    began = time.process_time()
    training.advance(steps, lambda step: 1.0)
    return float(f"{(time.process_time() - began) / steps / len(inputs):.2g}")


def of_small(task: ReleaseTask) -> tuple[float, nn.Module]:
    """Of a task of our own, as it fine-tunes, and its network."""
    base, fine_tuning = task.base, task.fine_tuning
    assert isinstance(base, Reduced)
    side = SIDES[base.target] // base.factor
    model = base.network.build((3, side, side), base.target_classes, 0)
    count = BATCH if base.large else fine_tuning.batch_size
    found = seconds(
        model, torch.randn(count, 3, side, side), torch.arange(count) % base.target_classes,
        STEPS if base.large else SMALL_STEPS, optimiser=fine_tuning.optimiser, weight_decay=fine_tuning.weight_decay,
        augmentation=FINE_TUNING_AUGMENTATIONS[task.augmentation],
    )  # fmt: skip
    return found, model


def of_paper() -> dict[str, tuple[float, nn.Module]]:
    """Of the paper's tasks, with their networks; those with the same and the same shapes alike."""
    small = torch.randn(BATCH * 4, 3, 32, 32)
    large = torch.randint(0, 256, (BATCH, 3, 224, 224), dtype=torch.uint8)
    wide = torch.randint(0, 256, (BATCH, 3, 256, 512), dtype=torch.uint8)
    captions = torch.randint(2, 99, (BATCH, CAPTIONS * LENGTH))
    packed = torch.cat([large.flatten(1).short(), captions.short()], 1)
    labels = torch.arange(BATCH)
    networks = {
        "resnet18": (
            ReleaseResNet18().build((3, 32, 32), 10, 0), small, torch.arange(len(small)) % 10
        ),
        "pvt": (pvt_classifier(100, 0), large, labels),
        "flickr8k-pvt": (pvt_captioner(3000, LENGTH, (3, 224, 224), 0), packed, captions),
        "deeplab": (deep_lab(19, 0), wide, torch.zeros(BATCH, 256, 512, dtype=torch.int64)),
    }  # fmt: skip
    found = {name: (seconds(*of), of[0]) for name, of in networks.items()}
    return {
        one.task: next(found[end] for end in sorted(found, key=len, reverse=True) if one.task.endswith(end))
        for one in experiments(None)
    }  # fmt: skip


def measured(of_task: Mapping[str, tuple[float, nn.Module]]) -> dict[str, Any]:
    """By task what it takes, and which have BatchNorm."""
    return {
        "processor": machine()["processor"],
        "seconds": {name: seconds for name, (seconds, _) in of_task.items()},
        "batch_norm": [name for name, (_, model) in of_task.items() if has_batch_norm(model)],
    }


def main(which: str) -> None:
    """Measure the ``paper``'s tasks, whose networks need its extra, or ``ours``; the rest stays."""
    names = {one.task for one in experiments(None)}
    if which == "paper":
        of_task = of_paper()
    else:
        of_task = {name: of_small(of) for name, of in RELEASE_TASKS.items() if name not in names}
    before, found = json.loads(TARGET.read_text("utf-8")), measured(of_task)
    if before["processor"] != found["processor"]:
        raise SystemExit(f"the others were measured on {before['processor']}; measure both here")
    kept = [name for name in before.get("batch_norm", []) if name not in of_task]
    found = found | {
        "seconds": before["seconds"] | found["seconds"],
        "batch_norm": kept + found["batch_norm"],
    }
    TARGET.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
