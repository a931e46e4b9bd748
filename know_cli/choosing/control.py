"""The control of every search: Θ0 moved in a random direction, as far as the winner is from it.

If the random direction does as well as the winner, the winner's direction means nothing: the task
gains from any disturbance, or from none.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from know_cli.checkpoints import Checkpoint, TensorEntry, open_checkpoint
from know_cli.checkpoints.dtypes import is_float
from know_cli.checkpoints.reading import as_bytes, chunks, read_elements
from know_cli.checkpoints.writer import CheckpointWriter

_COPY_BYTES = 1 << 20
# How many seeds a generator has; a user's may be any whole number.
_SEEDS = 1 << 64


def write_random_direction(base: Path, winner: Path, output: Path, seed: int) -> None:
    """Write Θ0 plus noise: each tensor moves as far as the winner's does, in a random direction.

    Tensors that the winner has not moved, and what is not of floats, are Θ0's. Two chunks are in
    memory at a time.

    Args:
        base: Θ0.
        winner: of the same layout.
        output: replaced if it exists.
        seed: of the noise.

    Raises:
        CheckpointError: an input cannot be read.
        OutputError: the output cannot be written.
    """
    with (
        open_checkpoint(base) as first,
        open_checkpoint(winner) as other,
        CheckpointWriter(output, first, first.metadata, force=True) as writer,
    ):
        for position, (name, entry) in enumerate(first.tensors.items()):
            length = 0.0
            if is_float(entry.dtype):
                length = _distance(first, entry, other, other.tensors[name])
            if length == 0:
                copy_tensor(first, entry, writer)
            else:
                _disturb(first, entry, writer, length, seed, position)
        writer.flush()
        writer.commit()


def _distance(
    first: Checkpoint, entry: TensorEntry, other: Checkpoint, moved: TensorEntry
) -> float:
    total = 0.0
    for start, count in chunks(0, entry.info.elements):
        before = read_elements(first, entry, start, count).double()
        after = read_elements(other, moved, start, count).double()
        total += float((after - before).nan_to_num_(0.0, 0.0, 0.0).square().sum())
    return math.sqrt(total)


def copy_tensor(checkpoint: Checkpoint, entry: TensorEntry, writer: CheckpointWriter) -> None:
    """Copy the bytes of one tensor."""
    for start, count in chunks(0, entry.info.nbytes, _COPY_BYTES):
        data = bytearray(count)
        checkpoint.read_into(entry, start, memoryview(data))
        writer.write(entry.name, start, memoryview(data))


def _disturb(
    first: Checkpoint,
    entry: TensorEntry,
    writer: CheckpointWriter,
    length: float,
    seed: int,
    position: int,
) -> None:
    def noise() -> torch.Generator:
        return torch.Generator().manual_seed((seed * 1_000_003 + position) % _SEEDS)

    # Once for its length, once to write it: the whole direction need not be in memory.
    generator, total = noise(), 0.0
    for _, count in chunks(0, entry.info.elements):
        total += float(torch.randn(count, generator=generator, dtype=torch.float64).square().sum())
    scale, generator = length / math.sqrt(total), noise()
    for start, count in chunks(0, entry.info.elements):
        before = read_elements(first, entry, start, count)
        change = torch.randn(count, generator=generator, dtype=torch.float64) * scale
        values = (before.double() + change).to(before.dtype)
        writer.write(entry.name, start * values.element_size(), as_bytes(values))
