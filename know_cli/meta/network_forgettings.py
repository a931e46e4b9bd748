"""Collected forgettings as networks: whole tensors, and data that no session was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from know_cli.errors import CheckpointError, UsageError
from know_cli.kinds import PREDICTED_KINDS
from know_cli.meta.network_data import (
    FEWEST_UNSEEN,
    NetworkRun,
    State,
    Unseen,
)
from know_cli.meta.recording import first_network
from know_cli.meta.series import Series, load_series
from know_cli.meta.setup import Setup


class _PartialError(Exception):
    """A series has not all elements of a tensor; the message says which."""


def load_forgettings(
    files: Sequence[Path], checkpoints: int, data_folder: Path | None
) -> tuple[list[NetworkRun], dict[Path, str]]:
    """Read collected forgettings with their networks and data.

    Their networks normalise by the batch, as predicted starts with fresh BatchNorm layers do:
    running statistics are not recorded.

    Args:
        files: that ``know collect`` wrote.
        checkpoints: S; of shorter ones no use can be made.
        data_folder: where the data sets' files are.

    Returns:
        The forgettings, and the reasons why others were left out.

    Raises:
        CheckpointError: a file is corrupt.
        UsageError: a data set is missing, or a forgetting was recorded by somebody else.
    """
    unseen = Unseen(data_folder)
    found, left_out = [], {}
    for file in files:
        if file.is_dir():
            raise UsageError(
                f"{file}: nothing says how its networks were made; take what 'know collect' wrote"
            )
        series = load_series(file)
        setup = _setup(series, file)
        if setup.sessions < checkpoints:
            left_out[file] = f"fewer than {checkpoints} sessions"
            continue
        inputs, labels = unseen.of(setup)
        if len(labels) < FEWEST_UNSEEN:
            left_out[file] = (
                f"fewer than {FEWEST_UNSEEN} samples that it has not seen (--samples leaves some)"
            )
            continue
        model = first_network(setup)
        try:
            states = _states(series, model, setup)
        except _PartialError as error:
            left_out[file] = str(error)
            continue
        name = f"{file.stem}-{setup.seed % 16**8:08x}"
        _normalise_by_batch(model.eval().requires_grad_(False))
        sessions = sum(index >= 0 for index in series.indices)
        run = NetworkRun(name, setup, states[:sessions], None, model, inputs, labels)
        found.append(replace(run, continued=states[sessions:]))
    return found, left_out


def _setup(series: Series, file: Path) -> Setup:
    try:
        return Setup.from_json(series.facts["setup"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: does not say how its networks were made ({error!r}); collect it again"
        ) from error


def _states(series: Series, model: nn.Module, setup: Setup) -> list[State]:
    """The trained tensors of every session, the most forgotten first, then of Θ0 continued.

    What never moves is not recorded, and is as the first session's network had it.
    """
    first: Mapping[str, torch.Tensor] = model.state_dict()
    if setup.start == "pretrained":
        for name, _ in model.named_parameters():
            if name not in series.names:
                raise _PartialError(f"tensor {name!r}, which never moves, is not kept")
    columns = series.columns(sorted(series.indices, reverse=True))
    fixed = {
        name: tensor
        for name, tensor in first.items()
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }
    states: list[State] = [dict(fixed) for _ in columns]
    for kind in PREDICTED_KINDS:
        numbers = torch.from_numpy(series.tensors[kind])
        for number in sorted(set(numbers.tolist())):
            name = series.names[number]
            rows = torch.from_numpy(series.values[kind])[numbers == number]
            if name not in first or rows.shape[0] != first[name].numel():
                raise _PartialError(
                    f"only a part of tensor {name!r} is kept; --rows-per-tensor can keep it whole"
                )
            for state, column in zip(states, columns, strict=True):
                state[name] = rows[:, column].reshape(first[name].shape)
    return states


def _normalise_by_batch(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean = module.running_var = module.num_batches_tracked = None
            module.track_running_stats = False
