"""What training the paper's networks on one picture takes here: ``python -m …`` measures it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from know_cli.evaluation.paper.plan import experiments
from know_cli.evaluation.release.network import ReleaseResNet18
from know_cli.evaluation.release.recipes.captions import CAPTIONS, LENGTH
from know_cli.evaluation.release.recipes.networks import deep_lab, pvt_captioner, pvt_classifier
from know_cli.lab.fitting import one_thread
from know_cli.lab.machine import machine
from know_cli.lab.stepping import Training

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "know_cli" / "evaluation" / "paper" / "seconds.json"
BATCH, STEPS = 8, 3


@one_thread()
def seconds(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Processor time of a step, by the example, to two digits; the first is not counted."""
    training = Training(
        model, inputs, targets, batch_size=len(inputs), learning_rate=1e-3, seed=0
    )  # fmt: skip
    training.advance(1, lambda step: 1.0)
    began = time.process_time()
    training.advance(STEPS, lambda step: 1.0)
    return float(f"{(time.process_time() - began) / STEPS / len(inputs):.2g}")


def measured() -> dict[str, Any]:
    """By task; those with the same network and shapes take the same."""
    small = torch.randn(BATCH * 4, 3, 32, 32)
    large = torch.randint(0, 256, (BATCH, 3, 224, 224), dtype=torch.uint8)
    wide = torch.randint(0, 256, (BATCH, 3, 256, 512), dtype=torch.uint8)
    captions = torch.randint(2, 99, (BATCH, CAPTIONS * LENGTH))
    packed = torch.cat([large.flatten(1).short(), captions.short()], 1)
    labels = torch.arange(BATCH)
    found = {
        "resnet18": seconds(
            ReleaseResNet18().build((3, 32, 32), 10, 0), small, torch.arange(len(small)) % 10
        ),
        "pvt": seconds(pvt_classifier(100, 0), large, labels),
        "flickr8k-pvt": seconds(pvt_captioner(3000, LENGTH, (3, 224, 224), 0), packed, captions),
        "deeplab": seconds(deep_lab(19, 0), wide, torch.zeros(BATCH, 256, 512, dtype=torch.int64)),
    }
    of_task = {
        one.task: next(found[end] for end in sorted(found, key=len, reverse=True) if one.task.endswith(end))
        for one in experiments(None)
    }  # fmt: skip
    return {"processor": machine()["processor"], "seconds": of_task}


if __name__ == "__main__":
    TARGET.write_text(json.dumps(measured(), indent=1) + "\n", "utf-8")
