"""A tiny model and its Trainer. Transformers takes seconds to import: only tests that run do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from know_cli.callbacks.transformers import RunCallback, record_branches, record_forgetting

__all__ = [
    "GPT2LMHeadModel", "RunCallback", "TrainingArguments", "record_branches", "record_forgetting", "trainer",
]  # fmt: skip

_CONFIG = GPT2Config(
    vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
)


def trainer(folder: Path, *callbacks: RunCallback, data: Any, **more: Any) -> Trainer:
    torch.manual_seed(0)
    given = {
        "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "save_strategy": "no", **more,
    }  # fmt: skip
    args = TrainingArguments(
        output_dir=str(folder / "output"), report_to=[], use_cpu=True, disable_tqdm=True,
        logging_strategy="no", **given,
    )  # fmt: skip
    return Trainer(
        model=GPT2LMHeadModel(_CONFIG), args=args, train_dataset=data,
        callbacks=list(callbacks),
    )  # fmt: skip
