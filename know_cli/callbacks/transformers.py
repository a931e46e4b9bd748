"""For Hugging Face's Trainer: keeps the last checkpoints of a run, and records after training.

Needs transformers and accelerate: the extra ``transformers``.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike
from torch.utils.data import Subset
from transformers import Trainer, TrainerCallback

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
from know_cli.forgetting.recorder import state_of

_FUNCTION = "transformers.Trainer"
_OWN = (
    "the Trainer's own checkpoints (save_steps, save_total_limit) are read by 'know predict "
    "OUTPUT_DIR --trajectory run'"
)


class RunCallback(TrainerCallback):
    """Keeps the last checkpoints of a run as safetensors, for ``know predict FOLDER``.

    A checkpoint of a ``PreTrainedModel`` is a folder that ``from_pretrained`` loads; of any other
    model, a file.

    Args:
        folder: for the checkpoints; not the Trainer's ``output_dir``.
        every: optimiser steps from one checkpoint to the next.
        last: how many are kept, 2 to 16.

    Raises:
        UsageError: a number cannot be, or ``folder`` is a file.
    """

    def __init__(self, folder: Path | str, *, every: int, last: int = 5) -> None:
        self.run = RunRecorder(folder, every=every, last=last)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Check that the run can be recorded.

        Raises:
            UsageError: the folder is in use, or no process has all of the model.
        """
        if Path(args.output_dir).resolve() == self.run.folder.resolve():
            raise UsageError(
                f"{self.run.folder}: is the Trainer's output_dir; name another folder for the run"
            )
        if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
            raise UsageError(f"RunCallback: FSDP and DeepSpeed divide the weights; {_OWN}")
        if hasattr(given.get("model"), "peft_config"):
            raise UsageError(f"RunCallback: does not save adapters apart from their model; {_OWN}")
        if state.is_world_process_zero:
            self.run.begin(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Save a checkpoint if it is due."""
        if not state.is_world_process_zero:
            return
        model = given["model"]
        weights = state_of(model, _FUNCTION)
        if not hasattr(model, "save_pretrained"):
            self.run.save(state.global_step, weights)
            return
        # What is tied to another tensor has no place in the model's own files either.
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        weights = {name: tensor for name, tensor in weights.items() if name not in tied}
        self.run.save(state.global_step, weights, _configuration_of(model))

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Say if there is too little of the run to average."""
        if state.is_world_process_zero and len(self.run.kept) < 2:
            warnings.warn(
                f"{self.run.folder}: has {len(self.run.kept)} of the 2 checkpoints that an average "
                f"needs: the run has {counted(state.global_step, 'step')}, and "
                f"every={self.run.every}",
                stacklevel=2,
            )


def _configuration_of(model: Any) -> Any:
    def write(folder: Path) -> None:
        model.config.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)

    return write


def record_forgetting(
    trainer: Trainer,
    folder: Path | str,
    *,
    sessions: int = 5,
    rate: float = 0.5,
    seed: int = 0,
    labels: ArrayLike | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Record how the model of a Trainer forgets, once it is trained.

    The model is Θ0. Each further session is a training with the Trainer's own arguments (of
    ``max_steps`` the session's share), a fresh optimiser, and the session's subset; afterwards the
    model has Θ0's weights again. What is on disk is not trained again.

    Args:
        trainer: after ``train()``; its training data must have ``__len__``.
        folder: for ``ckpt0.safetensors`` and so on.
        sessions: how many, Θ0 included.
        rate: share of a session's samples that the next one keeps.
        seed: of subsets and trainings.
        labels: class of each sample, so that subsets keep the classes' shares.
        arguments: other values for some of the Trainer's arguments, such as ``num_train_epochs``.

    Returns:
        The paths of all checkpoints, Θ0's first.

    Raises:
        UsageError: the data is streamed, an argument does not exist, the Trainer was given an
            optimiser as an object, a training makes no step, or the folder holds another model's.
        OutputError: the folder cannot be written.
    """
    size = size_of(trainer.train_dataset, "the Trainer's training data")
    recorder = forgetting_recorder(
        folder, size, _FUNCTION, sessions=sessions, rate=rate, seed=seed, labels=labels
    )
    return record_after(recorder, trainer.model, _further(trainer, arguments or {}))


def record_branches(
    trainer: Trainer,
    folder: Path | str,
    *,
    branches: int = 4,
    rate: float = 1.0,
    seed: int = 0,
    labels: ArrayLike | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Record branches of the model of a Trainer, once it is trained.

    The model is Θ0. Each branch is a training from there with the Trainer's own arguments, on the
    data in another order, or with a ``rate`` below 1 on a random share of it. See
    :func:`record_forgetting` for the rest.

    Args:
        trainer: after ``train()``.
        folder: for ``ckpt0.safetensors``, ``branch1.safetensors`` and so on.
        branches: how many.
        rate: share of the samples that each is trained on.
        seed: of subsets and trainings.
        labels: class of each sample.
        arguments: other values for some of the Trainer's arguments.

    Returns:
        The paths of all checkpoints, Θ0's first.

    Raises:
        UsageError: as for :func:`record_forgetting`.
        OutputError: the folder cannot be written.
    """
    size = size_of(trainer.train_dataset, "the Trainer's training data")
    recorder = branch_recorder(
        folder, size, _FUNCTION, branches=branches, rate=rate, seed=seed, labels=labels
    )
    return record_after(recorder, trainer.model, _further(trainer, arguments or {}))


def _further(trainer: Trainer, arguments: Mapping[str, Any]) -> Train:
    """What trains a Trainer's model further.

    Raises:
        UsageError: there are several processes, an argument does not exist, or the Trainer has an
            optimiser that cannot be made again.
    """
    if trainer.args.world_size > 1:
        raise UsageError(
            "sessions are recorded in one process, and this is one of "
            f"{trainer.args.world_size}; load the trained model in a script of its own for that"
        )
    _check_optimizer(trainer)
    names = {field.name for field in dataclasses.fields(trainer.args)}
    for name in arguments:
        if name not in names:
            raise UsageError(f"arguments: {name}: is no argument of the Trainer; check its name")

    def train(session: TrainingSession) -> None:
        # A copy, since making new arguments would interpret the old ones' values again.
        args = copy.copy(trainer.args)
        for name, value in arguments.items():
            setattr(args, name, value)
        args.seed = args.data_seed = seed_of(session)
        # Subsets may be smaller than a batch; one that is dropped leaves nothing to train on.
        enough = len(session.indices) >= args.train_batch_size
        args.dataloader_drop_last = args.dataloader_drop_last and enough
        if args.max_steps > 0:
            args.max_steps = max(1, round(args.max_steps * session.fraction))
        none = type(args.save_strategy)("no")
        args.save_strategy, args.eval_strategy = none, type(args.eval_strategy)("no")
        args.load_best_model_at_end, args.push_to_hub, args.report_to = False, False, []
        trained = type(trainer)(
            model=trainer.model,
            args=args,
            train_dataset=_part(trainer.train_dataset, session),
            data_collator=trainer.data_collator,
            processing_class=trainer.processing_class,
            compute_loss_func=trainer.compute_loss_func,
            optimizer_cls_and_kwargs=trainer.optimizer_cls_and_kwargs,
        ).train()
        if trained.global_step == 0:
            raise no_step(session, "give num_train_epochs or max_steps of 1 or more")

    return train


def _check_optimizer(trainer: Trainer) -> None:
    """Refuse an optimiser that was given as an object: another one would train the sessions.

    Raises:
        UsageError: it is of another class than the Trainer makes itself.
    """
    # Accelerate wraps it while the Trainer trains.
    given = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    makes_its_own = type(trainer).create_optimizer is not Trainer.create_optimizer
    if given is None or makes_its_own or trainer.optimizer_cls_and_kwargs is not None:
        return
    made, _ = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    if isinstance(made, type) and not isinstance(given, made):
        raise UsageError(
            f"the Trainer's optimiser: {type(given).__name__} was given as an object, and sessions "
            f"would be trained with {made.__name__}; give the Trainer optimizer_cls_and_kwargs= "
            "instead of optimizers="
        )


def _part(data: Any, session: TrainingSession) -> Any:
    """The samples of a session; Hugging Face's data sets have columns that must stay."""
    indices = session.indices.tolist()
    return data.select(indices) if hasattr(data, "select") else Subset(data, indices)
