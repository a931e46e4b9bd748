"""For Lightning's Trainer: keeps the last checkpoints of a run, and records after training.

Needs lightning: the extra ``lightning``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from numpy.typing import ArrayLike
from torch.utils.data import DataLoader, Subset

from know_cli.callbacks.after_training import (
    Train,
    branch_recorder,
    forgetting_recorder,
    no_step,
    record_after,
    seed_of,
    size_of,
)
from know_cli.errors import UsageError, counted
from know_cli.forgetting import RunRecorder, TrainingSession

_FUNCTION = "lightning.Trainer"
_DIVIDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


class RunCallback(Callback):
    """Keeps the last checkpoints of a run as safetensors, for ``know predict FOLDER``.

    Args:
        folder: for ``checkpoint-500.safetensors`` and so on.
        every: optimiser steps from one checkpoint to the next, counted as Lightning's
            ``global_step`` is: of a module with several optimisers every one's. There give a
            multiple of the steps in a batch, since what a batch goes past is not saved.
        last: how many are kept, 2 to 16.

    Raises:
        UsageError: a number cannot be, or ``folder`` is a file.
    """

    def __init__(self, folder: Path | str, *, every: int, last: int = 5) -> None:
        self.run = RunRecorder(folder, every=every, last=last)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that the run can be recorded.

        Raises:
            UsageError: the folder holds another run, or no process has all of the model.
        """
        strategy = type(trainer.strategy).__name__
        if strategy in _DIVIDED:
            raise UsageError(
                f"RunCallback: {strategy} divides the weights; save whole models with Lightning's "
                "own ModelCheckpoint, and make safetensors of them with 'know convert'"
            )
        if trainer.is_global_zero:
            self.run.begin(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *others: Any) -> None:
        """Save a checkpoint if it is due."""
        if trainer.is_global_zero:
            self.run.save(trainer.global_step, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say if there is too little of the run to average."""
        if trainer.is_global_zero and len(self.run.kept) < 2:
            warnings.warn(
                f"{self.run.folder}: has {len(self.run.kept)} of the 2 checkpoints that an average "
                f"needs: the run has {counted(trainer.global_step, 'step')}, and "
                f"every={self.run.every}",
                stacklevel=2,
            )


def record_forgetting(
    make_trainer: Callable[[], Trainer],
    module: LightningModule,
    loader: DataLoader[Any],
    folder: Path | str,
    *,
    sessions: int = 5,
    rate: float = 0.5,
    seed: int = 0,
    labels: ArrayLike | None = None,
) -> list[Path]:
    """Record how a module forgets, once it is trained.

    The module is Θ0. Each further session is a training by a fresh Trainer on the session's subset
    of the loader's data; afterwards the module has Θ0's weights again. What is on disk is not
    trained again.

    Args:
        make_trainer: makes the Trainer of a session, such as ``lambda: Trainer(max_epochs=1)``.
        module: after its training.
        loader: of the training; its data set must have ``__len__``.
        folder: for ``ckpt0.safetensors`` and so on.
        sessions: how many, Θ0 included.
        rate: share of a session's samples that the next one keeps.
        seed: of subsets and trainings.
        labels: class of each sample, so that subsets keep the classes' shares.

    Returns:
        The paths of all checkpoints, Θ0's first.

    Raises:
        UsageError: the data is streamed, nothing tells the size of its batches, a Trainer makes no
            step, or the folder holds another model's.
        OutputError: the folder cannot be written.
    """
    recorder = forgetting_recorder(
        folder,
        size_of(loader.dataset, "the loader's data set"),
        _FUNCTION,
        sessions=sessions,
        rate=rate,
        seed=seed,
        labels=labels,
    )
    return record_after(recorder, module, _further(make_trainer, module, loader))


def record_branches(
    make_trainer: Callable[[], Trainer],
    module: LightningModule,
    loader: DataLoader[Any],
    folder: Path | str,
    *,
    branches: int = 4,
    rate: float = 1.0,
    seed: int = 0,
    labels: ArrayLike | None = None,
) -> list[Path]:
    """Record branches of a module, once it is trained.

    The module is Θ0. Each branch is a training from there, on the data in another order, or with a
    ``rate`` below 1 on a random share of it. See :func:`record_forgetting` for the rest.

    Args:
        make_trainer: makes the Trainer of a branch.
        module: after its training.
        loader: of the training.
        folder: for ``ckpt0.safetensors``, ``branch1.safetensors`` and so on.
        branches: how many.
        rate: share of the samples that each is trained on.
        seed: of subsets and trainings.
        labels: class of each sample.

    Returns:
        The paths of all checkpoints, Θ0's first.

    Raises:
        UsageError: as for :func:`record_forgetting`.
        OutputError: the folder cannot be written.
    """
    recorder = branch_recorder(
        folder,
        size_of(loader.dataset, "the loader's data set"),
        _FUNCTION,
        branches=branches,
        rate=rate,
        seed=seed,
        labels=labels,
    )
    return record_after(recorder, module, _further(make_trainer, module, loader))


def _further(
    make_trainer: Callable[[], Trainer], module: LightningModule, loader: DataLoader[Any]
) -> Train:
    """What trains a module further.

    Raises:
        UsageError: nothing tells the size of the loader's batches.
    """
    size, drops = _batches(loader)

    def train(session: TrainingSession) -> None:
        trainer = make_trainer()
        if trainer.world_size > 1:
            raise UsageError(
                f"sessions are recorded in one process, and the Trainer has {trainer.world_size}; "
                "make it with devices=1"
            )
        seed = seed_of(session)
        seed_everything(seed, verbose=False)
        part = DataLoader(
            Subset(loader.dataset, session.indices.tolist()),
            batch_size=size,
            shuffle=True,
            num_workers=loader.num_workers,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            drop_last=drops and len(session.indices) >= (size or 1),
            generator=torch.Generator().manual_seed(seed),
        )
        before = trainer.fit_loop.total_batch_idx
        trainer.fit(module, part)
        # A Trainer that has come to its max_epochs does nothing, and says so only to its log.
        if trainer.fit_loop.total_batch_idx == before:
            raise no_step(session, "make a new Trainer each time, with max_epochs of 1 or more")

    return train


def _batches(loader: DataLoader[Any]) -> tuple[int | None, bool]:
    """The size of a loader's batches, None where it makes none, and whether a smaller one is left.

    Raises:
        UsageError: its batches come from a sampler that does not tell.
    """
    sampler = loader.batch_sampler
    if loader.batch_size is not None or sampler is None:
        return loader.batch_size, loader.drop_last
    # A loader with batch_sampler= says None and False itself.
    size = getattr(sampler, "batch_size", None)
    if not isinstance(size, Integral) or size < 1:
        raise UsageError(
            f"the loader's batch_sampler: {type(sampler).__name__} has no batch_size, which the "
            "trainings after it need; give it one, or record with a loader that has batch_size="
        )
    return int(size), bool(getattr(sampler, "drop_last", False))
