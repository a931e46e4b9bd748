"""A tiny module and its Trainer. Lightning takes seconds to import: only tests that run import this."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor, nn

from know_cli.callbacks.lightning import RunCallback, record_branches, record_forgetting

__all__ = ["Line", "RunCallback", "lightning", "record_branches", "record_forgetting", "trainer"]


class Line(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self.layer(inputs)[:, 0], targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


_TRAINER = lightning.Trainer


def trainer(*callbacks: RunCallback, **more: Any) -> lightning.Trainer:
    given = {"max_epochs": 1, **more}
    return _TRAINER(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), **given,
    )  # fmt: skip


def trainer_of_the_page(max_epochs: int, callbacks: Any = ()) -> lightning.Trainer:
    return trainer(*callbacks, max_epochs=max_epochs)
