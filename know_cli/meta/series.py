"""A trajectory in one compact file: the values of some of its parameters in every checkpoint.

A recorded trajectory is a folder of whole checkpoints. Meta-training needs only a sample of each
tensor, with one row per parameter and one column per checkpoint, whatever the window length and
target. It is kept as a safetensors file, with its facts as JSON in the metadata.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from know_cli.checkpoints import Checkpoint, Trajectory, open_checkpoint, save_checkpoint
from know_cli.checkpoints.reading import as_bytes, read_float32
from know_cli.engine.classification import classify_values
from know_cli.errors import CheckpointError
from know_cli.forgetting.record_checks import check_record, read_record
from know_cli.forgetting.recorder import checkpoint_name
from know_cli.kinds import PREDICTED_KINDS, Kind
from know_cli.normalisation import find_norm_layers

Floats = NDArray[np.float32]
SERIES = "know.series"
FORMAT = 1
_TENSOR = ".tensor"


class NotUsableError(Exception):
    """A trajectory cannot be used; the message says why."""


# What reading facts can fail with that somebody else wrote.
_WRONG = (
    KeyError,
    ValueError,
    IndexError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)


@dataclass(frozen=True)
class Series:
    """Sampled parameters of one trajectory in all its checkpoints.

    Attributes:
        indices: what each column is: session 0, 1, 2, … or −1, −2, … for Θ0 continued on more
            data.
        values: for each kind ``[rows, columns]`` float32; rows of one tensor are adjacent.
        tensors: for each kind ``[rows]`` int32, each row's tensor as a position in :attr:`names`.
        names: of the tensors.
        facts: about the trajectory, in plain types: its record (identity, function, rate,
            regime, options, measurements of each session) and what its recorder adds.
    """

    indices: tuple[int, ...]
    values: dict[Kind, Floats]
    tensors: dict[Kind, NDArray[np.int32]]
    names: tuple[str, ...]
    facts: dict[str, Any]

    @property
    def identity(self) -> str:
        """Hexadecimal digits that name the trajectory."""
        return str(self.facts["trajectory"])

    def columns(self, indices: list[int]) -> list[int]:
        """Columns of sessions or continuations.

        Raises:
            NotUsableError: one is not recorded.
        """
        missing = [index for index in indices if index not in self.indices]
        if missing:
            raise NotUsableError(f"{checkpoint_name(missing[0])} is not recorded")
        return [self.indices.index(index) for index in indices]


def read_trajectory(folder: Path, *, rows_per_tensor: int, seed: int) -> Series:
    """Sample a recorded trajectory.

    Running statistics and tensors that never change are left out; a normalisation layer's
    weight and bias are of kind bias.

    Args:
        folder: with ``trajectory.json`` and all checkpoints that it lists.
        rows_per_tensor: the most elements kept of one tensor, drawn without replacement; the
            same elements in every checkpoint.
        seed: of the sampling, together with the trajectory's identity.

    Raises:
        NotUsableError: a checkpoint is not recorded yet, or has values that are not finite.
        CheckpointError: a checkpoint is corrupt, or the checkpoints do not match.
        UsageError: the folder has no record.
    """
    record = read_record(folder)
    indices = (*range(record["sessions"]), *range(-1, -record["continuations"] - 1, -1))
    for index in indices:
        if not (folder / checkpoint_name(index)).exists():
            raise NotUsableError(f"{checkpoint_name(index)} is not recorded yet")
    generator = np.random.default_rng([seed, int(record["trajectory"], 16)])
    tables: dict[Kind, list[Floats]] = {kind: [] for kind in PREDICTED_KINDS}
    numbers: dict[Kind, list[NDArray[np.int32]]] = {kind: [] for kind in PREDICTED_KINDS}
    names: list[str] = []
    with ExitStack() as stack:
        opened = [
            stack.enter_context(open_checkpoint(folder / checkpoint_name(index)))
            for index in indices
        ]
        shapes = {name: entry.shape for name, entry in opened[0].tensors.items()}
        statistics = {name for layer in find_norm_layers(shapes) for name in layer.statistics}
        for name in sorted(shapes.keys() - statistics):
            _check_in_all(opened, name, shapes[name])
        classes = classify_values(Trajectory(opened, None, [])).classes
        for name in sorted(shapes.keys() - statistics):
            kind = classes[name].kind
            if kind is Kind.COPY:
                continue
            table = read_tensor(opened, name, shapes[name])
            if not np.isfinite(table).all():
                raise NotUsableError(f"tensor {name!r} is not finite; its training diverged")
            if (table == table[0]).all():
                continue
            count = table.shape[1]
            if count > rows_per_tensor:
                table = table[:, np.sort(generator.choice(count, rows_per_tensor, replace=False))]
            tables[kind].append(np.ascontiguousarray(table.T))
            numbers[kind].append(np.full(table.shape[1], len(names), dtype=np.int32))
            names.append(name)
    empty = np.empty((0, len(indices)), dtype=np.float32)
    return Series(
        indices,
        {kind: np.concatenate([empty, *tables[kind]]) for kind in PREDICTED_KINDS},
        {kind: np.concatenate([np.empty(0, np.int32), *numbers[kind]]) for kind in PREDICTED_KINDS},
        tuple(names),
        {key: value for key, value in record.items() if key != "format"},
    )


def read_tensor(opened: Sequence[Checkpoint], name: str, shape: tuple[int, ...]) -> Floats:
    """One tensor of several checkpoints, ``[checkpoints, elements]`` float32.

    Raises:
        CheckpointError: one lacks it, or has it in another shape.
    """
    _check_in_all(opened, name, shape)
    values = torch.empty(len(opened), math.prod(shape))
    for row, checkpoint in zip(values, opened, strict=True):
        read_float32(checkpoint, checkpoint.tensors[name], 0, row)
    table: Floats = values.numpy()
    return table


def _check_in_all(opened: Sequence[Checkpoint], name: str, shape: tuple[int, ...]) -> None:
    for checkpoint in opened:
        entry = checkpoint.tensors.get(name)
        if entry is None or entry.shape != shape:
            found = "missing" if entry is None else f"of shape {entry.shape}"
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name!r} is {found}, elsewhere in the trajectory of "
                f"shape {shape}; record the trajectory again"
            )


def save_series(series: Series, path: Path) -> None:
    """Write a series as one file, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    tensors = {}
    for kind in PREDICTED_KINDS:
        tensors[kind.value] = torch.from_numpy(series.values[kind])
        tensors[kind.value + _TENSOR] = torch.from_numpy(series.tensors[kind])
    facts = {
        **series.facts,
        "format": FORMAT,
        "indices": series.indices,
        "names": series.names,
    }
    save_checkpoint(path, tensors, {SERIES: json.dumps(facts)})


def is_series(path: Path) -> bool:
    """Whether :func:`save_series` wrote a file, judging by its header."""
    try:
        with open_checkpoint(path) as checkpoint:
            return SERIES in checkpoint.metadata
    except CheckpointError:
        return False


def read_facts(path: Path) -> tuple[dict[str, Any], dict[Kind, int]]:
    """The facts of a collected trajectory and its number of rows per kind, from its header alone.

    Raises:
        CheckpointError: the file is missing, corrupt, or no series.
    """
    with open_checkpoint(path) as checkpoint:
        try:
            facts = json.loads(checkpoint.metadata[SERIES])
            check_record(facts)
            rows = {kind: checkpoint.tensors[kind.value].shape[0] for kind in PREDICTED_KINDS}
        except _WRONG as error:
            raise _no_series(path, error) from error
    return facts, rows


def _no_series(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: is not a collected trajectory ({error}); collect it again")


def load_series(path: Path) -> Series:
    """Read what :func:`save_series` wrote.

    Raises:
        CheckpointError: the file is missing, corrupt, or no series.
    """
    with open_checkpoint(path) as checkpoint:
        try:
            facts = json.loads(checkpoint.metadata[SERIES])
            check_record(facts)
            if facts.pop("format") != FORMAT:
                raise ValueError("another format")
            indices, names = tuple(facts.pop("indices")), tuple(facts.pop("names"))
            if not all(type(index) is int for index in indices):
                raise ValueError("an index is no number")
            if not all(isinstance(name, str) for name in names):
                raise ValueError("a name is no text")
            values = {kind: _read(checkpoint, kind.value, "F32") for kind in PREDICTED_KINDS}
            tensors = {
                kind: _read(checkpoint, kind.value + _TENSOR, "I32") for kind in PREDICTED_KINDS
            }
            fits = all(
                values[kind].ndim == 2
                and values[kind].shape == (*tensors[kind].shape, len(indices))
                for kind in PREDICTED_KINDS
            )
            if not fits:
                raise ValueError("its tables do not match")
            for table in tensors.values():
                if table.size and not 0 <= table.min() <= table.max() < len(names):
                    raise ValueError("a row is of a tensor that has no name")
        except _WRONG as error:
            raise _no_series(path, error) from error
    return Series(indices, values, tensors, names, facts)


def _read(checkpoint: Checkpoint, name: str, dtype: str) -> NDArray[Any]:
    entry = checkpoint.tensors[name]
    if entry.dtype != dtype:
        raise ValueError(f"tensor {name!r} is {entry.dtype}")
    values = torch.empty(entry.shape, dtype=torch.float32 if dtype == "F32" else torch.int32)
    if values.numel():
        checkpoint.read_into(entry, 0, as_bytes(values))
    table: NDArray[Any] = values.numpy()
    return table
