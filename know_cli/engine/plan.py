"""What happens to each tensor, and in which batches the parameters go through the predictor.

The parameters of one kind, tensor after tensor in the order of Θ0's files, are one long stream
of rows. Blocks are cut from it at fixed positions and batches are whole numbers of blocks, so
the numbers that come out do not depend on the memory budget or the number of threads. Tensors
that a method needs whole come after them, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from know_cli.checkpoints import Trajectory
from know_cli.checkpoints.dtypes import is_float
from know_cli.engine.predictor import Predictors, TensorPredictor
from know_cli.errors import UsageError
from know_cli.kinds import PREDICTED_KINDS, Classification, Kind, Override, classify_all
from know_cli.normalisation import NormLayer, find_norm_layers


class NormMode(str, Enum):
    """What happens to normalisation layers."""

    COPY = "copy"
    PREDICT = "predict"
    RESET = "reset"
    RESCALE = "rescale"


class FrozenMode(str, Enum):
    """What happens to tensors that are the same in all checkpoints."""

    COPY = "copy"
    PREDICT = "predict"


class Action(str, Enum):
    """What happens to one tensor."""

    PREDICT = "predict"
    COPY = "copy"
    RESCALE = "rescale"
    RESET = "reset"


@dataclass(frozen=True)
class Settings:
    """What the user wants of a prediction.

    Attributes:
        steps: how many are predicted, 1 to 8; what a step is, each method says.
        norm: see :class:`NormMode`.
        frozen: see :class:`FrozenMode`.
        overrides: kinds that the user sets.
        allow_nonfinite: copy non-finite values from Θ0 instead of refusing them.
        max_memory: bytes of working memory.
        threads: worker threads on a CPU.
    """

    steps: int = 1
    norm: NormMode = NormMode.RESCALE
    frozen: FrozenMode = FrozenMode.COPY
    overrides: tuple[Override, ...] = ()
    allow_nonfinite: bool = False
    max_memory: int = 1 << 30
    threads: int = 1


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor, and what happens to it.

    Attributes:
        name: in the state dict.
        kind: the KNOWN that predicts it; for other actions the kind that it is.
        action: what happens.
        reason: why, in words for the user.
        dtype: safetensors name in Θ0, and so in the output.
        shape: its shape.
        elements: number of parameters.
        nbytes: size in Θ0.
        layer: the normalisation layer that it belongs to.
        whole: whether it is predicted from all its elements together.
    """

    name: str
    kind: Kind
    action: Action
    reason: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    nbytes: int
    layer: NormLayer | None = None
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of one tensor's elements inside a batch: ``[start, start + count)`` at ``row``."""

    tensor: PlannedTensor
    start: int
    count: int
    row: int


@dataclass(frozen=True)
class Batch:
    """Rows of one kind that are read, predicted and written together."""

    kind: Kind
    segments: tuple[Segment, ...]
    rows: int


@dataclass(frozen=True)
class Copy:
    """A run of one tensor's bytes that is copied: ``[start, start + nbytes)``."""

    tensor: PlannedTensor
    start: int
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """Everything that will happen, before a byte of it has.

    Attributes:
        tensors: every tensor of the output, in the order of Θ0's files.
        batch_rows: rows of a full batch.
        memory: bytes of working memory that the batches, or the largest tensor that is needed
            whole, and the predictor need.
        bytes_to_read: of tensor data, from all checkpoints, without the scan for frozen tensors.
        bytes_to_write: of all outputs together.
    """

    tensors: tuple[PlannedTensor, ...]
    batch_rows: int
    memory: int
    bytes_to_read: int
    bytes_to_write: int

    def with_action(self, action: Action) -> list[PlannedTensor]:
        """The tensors that something happens to."""
        return [tensor for tensor in self.tensors if tensor.action is action]

    @property
    def predicted(self) -> int:
        """Parameters that are predicted."""
        return sum(tensor.elements for tensor in self.with_action(Action.PREDICT))

    def batches(self) -> Iterator[Batch]:
        """The batches of parameters that are predicted row by row, kind after kind."""
        for kind in PREDICTED_KINDS:
            yield from cut_batches(kind, self.stream(kind), self.batch_rows)

    def stream(self, kind: Kind) -> list[PlannedTensor]:
        """The tensors of a kind that are predicted row by row, one after the other."""
        return [t for t in self.with_action(Action.PREDICT) if t.kind is kind and not t.whole]

    def whole_tensors(self) -> Iterator[Batch]:
        """Each tensor that is predicted from all its elements together, as a batch of its own."""
        for tensor in self.with_action(Action.PREDICT):
            if tensor.whole:
                segment = Segment(tensor, 0, tensor.elements, 0)
                yield Batch(tensor.kind, (segment,), tensor.elements)

    def copies(self) -> Iterator[Copy]:
        """What is copied byte by byte."""
        for tensor in self.with_action(Action.COPY):
            yield Copy(tensor, 0, tensor.nbytes)


def cut_batches(
    kind: Kind, tensors: Sequence[PlannedTensor], batch_rows: int, rows: range | None = None
) -> Iterator[Batch]:
    """Fill batches of ``batch_rows`` rows with tensors, small ones together, large ones cut.

    Args:
        kind: of the tensors.
        tensors: of which one after the other the stream of rows is made.
        batch_rows: of all batches but the last.
        rows: of the stream; None is all.
    """
    segments: list[Segment] = []
    row = position = 0
    for tensor in tensors:
        start, stop = 0, tensor.elements
        if rows is not None:
            start, stop = max(rows.start - position, 0), min(rows.stop - position, stop)
        position += tensor.elements
        while start < stop:
            count = min(stop - start, batch_rows - row)
            segments.append(Segment(tensor, start, count, row))
            start, row = start + count, row + count
            if row == batch_rows:
                yield Batch(kind, tuple(segments), row)
                segments, row = [], 0
    if segments:
        yield Batch(kind, tuple(segments), row)


def classify_trajectory(
    trajectory: Trajectory, overrides: Sequence[Override] = ()
) -> dict[str, Classification]:
    """Kind of every tensor of a trajectory.

    Raises:
        UsageError: an override matches nothing, or wants what cannot be predicted.
    """
    tensors = {name: (e.shape, e.dtype) for name, e in trajectory.first.tensors.items()}
    try:
        return classify_all(tensors, overrides)
    except ValueError as error:
        raise UsageError(str(error)) from error


def make_plan(
    trajectory: Trajectory,
    settings: Settings,
    frozen: frozenset[str],
    *,
    predictors: Predictors,
    outputs: int,
) -> Plan:
    """Decide what happens to every tensor, and how large batches are.

    Args:
        trajectory: the inputs.
        settings: what the user wants.
        frozen: names of tensors that are the same in all checkpoints.
        predictors: the method, for what it takes at a time and the memory that it needs.
        outputs: how many checkpoints are written.

    Raises:
        UsageError: an override cannot be followed, or ``max_memory`` is too small for one block
            or for a tensor that is needed whole.
    """
    classes = classify_trajectory(trajectory, settings.overrides)
    overridden = {name for name in classes if classes[name].reason.startswith("--kind")}
    entries = trajectory.first.tensors
    shapes = {name: entry.shape for name, entry in entries.items()}
    layers = {
        name: layer
        for layer in find_norm_layers(shapes)
        for name in (*layer.affine, *layer.statistics)
    }
    decisions: dict[str, tuple[Action, str]] = {}
    for name, found in classes.items():
        layer = layers.get(name)
        if layer is None or name in overridden:
            decisions[name] = _decide(name, found, settings, frozen)
    for name in classes.keys() - decisions.keys():
        decisions[name] = _decide_norm(
            name, layers[name], classes[name], settings, frozen, decisions
        )
        sources = (*layers[name].statistics, layers[name].source_weight, layers[name].source_bias)
        whole = [n for n in sources if n in entries and n != layers[name].num_batches_tracked]
        if decisions[name][0] is Action.RESCALE and not all(
            is_float(entries[n].dtype) for n in whole
        ):
            decisions[name] = Action.COPY, "running statistics, or the layer before, not of floats"
    tensors = tuple(
        PlannedTensor(
            name,
            classes[name].kind,
            *decisions[name],
            entry.dtype,
            entry.shape,
            entry.info.elements,
            entry.info.nbytes,
            layers.get(name),
            whole=predictors.tensors is not None
            and decisions[name][0] is Action.PREDICT
            and predictors.tensors.takes(classes[name].kind, entry.shape),
        )
        for name, entry in trajectory.first.tensors.items()
    )
    row_bytes = _row_bytes(len(trajectory), settings.steps)
    if predictors.pinned:
        row_bytes *= 2  # torch takes page-locked memory in powers of two
    fixed = settings.threads * predictors.rows.thread_bytes + _CHUNK_BYTES
    batch_rows = _batch_rows(
        settings.max_memory, fixed, row_bytes, predictors.rows.block_rows, _longest_stream(tensors)
    )
    whole_bytes = 0
    if predictors.tensors is not None:
        whole_bytes = _whole_bytes(tensors, len(trajectory), settings, predictors.tensors)
    predicted = [t.name for t in tensors if t.action is Action.PREDICT]
    return Plan(
        tensors,
        batch_rows,
        max(fixed + batch_rows * row_bytes, whole_bytes),
        sum(e.info.nbytes for name in predicted for e in trajectory.entries(name))
        + sum(t.nbytes for t in tensors if t.action in (Action.COPY, Action.RESCALE)),
        outputs * trajectory.first.nbytes,
    )


def _decide(
    name: str, found: Classification, settings: Settings, frozen: frozenset[str]
) -> tuple[Action, str]:
    if found.kind is Kind.COPY:
        return Action.COPY, found.reason
    if name in frozen and settings.frozen is FrozenMode.COPY:
        return Action.COPY, "frozen: the same in all checkpoints"
    return Action.PREDICT, found.reason


def _decide_norm(
    name: str,
    layer: NormLayer,
    found: Classification,
    settings: Settings,
    frozen: frozenset[str],
    decisions: Mapping[str, tuple[Action, str]],
) -> tuple[Action, str]:
    mode = settings.norm
    if mode is NormMode.RESET and layer.has_statistics:
        return Action.RESET, "normalisation layer, reset to fresh values"
    if name in layer.affine:
        if mode is NormMode.PREDICT:
            return _decide(name, found, settings, frozen)
        return Action.COPY, "normalisation layer"
    if mode is not NormMode.RESCALE or name == layer.num_batches_tracked:
        return Action.COPY, found.reason
    if layer.source_weight is None:
        return Action.COPY, "running statistics; names do not tell the layer before"
    sources = [source for source in (layer.source_weight, layer.source_bias) if source]
    if all(decisions[source][0] is not Action.PREDICT for source in sources):
        return Action.COPY, "running statistics; the layer before is not predicted"
    return Action.RESCALE, "running statistics, rescaled to the change of the layer before"


# Two batches are in memory, one computed while the next is read; each holds the window and the
# predictions in float32. Converting from other dtypes and casting back goes in chunks.
_BATCHES_IN_MEMORY = 2
_MAX_BATCH_ROWS = 1 << 20
#: Elements that are converted, checked and written at a time; torch takes so few with one thread.
CHUNK_ROWS = 1 << 15
# A chunk on its way in or out: read in its own dtype, compared, cast back, summed in float64.
_CHUNK_BYTES = 64 * CHUNK_ROWS


def _row_bytes(checkpoints: int, steps: int) -> int:
    return _BATCHES_IN_MEMORY * _history_bytes(checkpoints, steps)


def _history_bytes(checkpoints: int, steps: int) -> int:
    # Beside the values there are a mark for what is copied, and one a step for what is replaced.
    return 4 * (checkpoints + steps) + 1 + steps


def _whole_bytes(
    tensors: Sequence[PlannedTensor],
    checkpoints: int,
    settings: Settings,
    predictor: TensorPredictor,
) -> int:
    """Working memory of the largest tensor that is needed whole; 0 where there is none."""
    most = 0
    for tensor in tensors:
        if not tensor.whole:
            continue
        history = tensor.elements * _history_bytes(checkpoints, settings.steps)
        needed = history + predictor.nbytes(tensor.kind, tensor.shape)
        if needed > settings.max_memory:
            raise UsageError(
                f"--max-memory {settings.max_memory} is too small: this method needs tensor "
                f"{tensor.name!r} whole, which takes {needed} bytes; allow more, or leave it as "
                f"it is with --kind '{tensor.name}=copy'"
            )
        most = max(most, needed)
    return most


def _longest_stream(tensors: Sequence[PlannedTensor]) -> int:
    rows = dict.fromkeys(Kind, 0)
    for tensor in tensors:
        if tensor.action is Action.PREDICT and not tensor.whole:
            rows[tensor.kind] += tensor.elements
    return max(rows.values())


def _batch_rows(max_memory: int, fixed: int, row_bytes: int, block_rows: int, longest: int) -> int:
    if max_memory < fixed + row_bytes * block_rows:
        raise UsageError(
            f"--max-memory {max_memory} is too small: one block needs "
            f"{fixed + row_bytes * block_rows} bytes, of which {fixed} for the threads; allow "
            "more, or fewer --threads"
        )
    blocks = min((max_memory - fixed) // row_bytes, max(_MAX_BATCH_ROWS, block_rows)) // block_rows
    needed = -(-max(longest, 1) // block_rows)
    return min(blocks, needed) * block_rows
