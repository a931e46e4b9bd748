"""Plans and batches without checkpoints."""

from __future__ import annotations

from collections.abc import Iterable

from know_cli.engine.plan import Action, Batch, Block, Copy, Plan, PlannedTensor, Stream
from know_cli.kinds import PREDICTED_KINDS, Kind


def plan_of(tensors: Iterable[PlannedTensor], batch_rows: int, block_rows: int) -> Plan:
    """All of some tensors, as planning would have it."""
    tensors = tuple(tensors)
    predicted = [tensor for tensor in tensors if tensor.action is Action.PREDICT]
    return Plan(
        tensors=tensors,
        streams=tuple(
            Stream.of(kind, tuple(t for t in predicted if t.kind is kind and not t.whole))
            for kind in PREDICTED_KINDS
        ),
        wholes=tuple((tensor,) for tensor in predicted if tensor.whole),
        copies=tuple(Copy(t, 0, t.nbytes) for t in tensors if t.action is Action.COPY),
        resets=tuple(tensor for tensor in tensors if tensor.action is Action.RESET),
        rescales=tuple(tensor for tensor in tensors if tensor.action is Action.RESCALE),
        averages=tuple(tensor for tensor in tensors if tensor.action is Action.AVERAGE),
        doubles=frozenset(tensor.name for tensor in predicted if tensor.dtype == "F64"),
        block_rows=block_rows,
        batch_rows=batch_rows,
        stretch_rows=batch_rows,
        memory=0,
        bytes_to_read=0,
        bytes_to_write=0,
    )


def batch_of(kind: Kind, rows: int) -> Batch:
    """A batch of no tensor in particular."""
    return Batch(kind, (), rows)


def block_of(kind: Kind, rows: int) -> Block:
    """A whole batch of no tensor in particular, as one block."""
    return batch_of(kind, rows).block(slice(0, rows))
