"""Deciding what happens to each tensor, and how large batches may be within the memory budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from know_cli.checkpoints import Trajectory
from know_cli.checkpoints.dtypes import is_float
from know_cli.engine.movements import Movements
from know_cli.engine.plan import Action, Copy, Group, Plan, PlannedTensor, Stream
from know_cli.engine.predictor import Predictors, TensorPredictor
from know_cli.engine.settings import FrozenMode, NormMode, Settings
from know_cli.errors import UsageError
from know_cli.kinds import PREDICTED_KINDS, Classification, Kind
from know_cli.normalisation import NormLayer


def make_plan(
    trajectory: Trajectory,
    settings: Settings,
    classes: Mapping[str, Classification],
    frozen: frozenset[str],
    layers: Iterable[NormLayer],
    *,
    predictors: Predictors,
    outputs: int,
    movements: Mapping[str, Movements] | None = None,
    beside: int = 0,
) -> Plan:
    """Decide what happens to every tensor, and how large batches are.

    Args:
        trajectory: the inputs.
        settings: the options that the engine follows.
        classes: kind of every tensor.
        frozen: names of tensors that are the same in all checkpoints.
        layers: the normalisation layers.
        predictors: the method, for what it takes at a time and the memory that it needs.
        outputs: how many checkpoints are written.
        movements: of tensors that may be predicted, for methods that ask for them.
        beside: how many other jobs are executed in the same pass; batches get an equal share of
            ``max_memory``.

    Raises:
        UsageError: ``max_memory`` is too small for one block or for tensors that are needed whole.
    """
    overridden = {name for name in classes if classes[name].reason.startswith("--kind")}
    entries = trajectory.first.tensors
    layer_of = {name: layer for layer in layers for name in (*layer.affine, *layer.statistics)}
    decisions: dict[str, tuple[Action, str]] = {}
    for name, found in classes.items():
        layer = layer_of.get(name)
        if layer is None or name in overridden:
            decisions[name] = _decide(name, found, settings, frozen)
    for name in classes.keys() - decisions.keys():
        layer = layer_of[name]
        decisions[name] = _decide_norm(name, layer, classes[name], settings, frozen, decisions)
        sources = (*layer.statistics, layer.source_weight, layer.source_bias)
        whole = [n for n in sources if n in entries and n != layer.num_batches_tracked]
        if decisions[name][0] is Action.RESCALE and not all(
            is_float(entries[n].dtype) for n in whole
        ):
            decisions[name] = Action.COPY, "running statistics, or the layer before, not of floats"
        if decisions[name][0] is Action.AVERAGE:
            problem = _averaging_problem(trajectory, layer, predictors.coefficients)
            if problem:
                decisions[name] = Action.COPY, f"running statistics, {problem}"
    planned = [
        PlannedTensor(
            name,
            classes[name].kind,
            *decisions[name],
            entry.dtype,
            entry.shape,
            entry.info.elements,
            entry.info.nbytes,
            layer_of.get(name),
            movements=(movements or {}).get(name),
        )
        for name, entry in trajectory.first.tensors.items()
    ]
    wholes: tuple[Group, ...] = ()
    if predictors.tensors is not None:
        groups = predictors.tensors.groups([t for t in planned if t.action is Action.PREDICT])
        wholes = tuple(tuple(replace(t, whole=True) for t in group) for group in groups)
    of_name = {tensor.name: tensor for group in wholes for tensor in group}
    tensors = tuple(of_name.get(tensor.name, tensor) for tensor in planned)
    workers = workers_of(settings, predictors)
    # In a pass of several jobs, what is read is divided from two windows beside their batches.
    row_bytes = (workers + bool(beside)) * _history_bytes(len(trajectory), settings.steps)
    if predictors.on_devices:  # the same once more, in 16 bits
        row_bytes += workers * 2 * (len(trajectory) + settings.steps)
    row_bytes += workers * 8 * settings.steps  # cast, until it is its turn to be noted in a journal
    if predictors.pinned:
        row_bytes *= 2  # torch takes page-locked memory in powers of two
    doubles = frozenset(
        tensor.name
        for tensor in tensors
        if tensor.action is Action.PREDICT
        and any(entry.dtype == "F64" for entry in trajectory.entries(tensor.name))
    )
    fixed, stretch_rows = workers * predictors.rows.thread_bytes, _BATCH_ROWS
    if predictors.on_devices or doubles:
        stretch_rows = _FEW_ROWS
        fixed += workers * _STRETCH_BYTES * stretch_rows
    else:
        row_bytes += workers * _STRETCH_BYTES  # a stretch may be all of a batch
    if doubles:
        rows = sum(tensor.elements for tensor in tensors if tensor.name in doubles)
        fixed += workers * _double_bytes(len(trajectory), rows, predictors)
    batch_rows = _batch_rows(
        settings.max_memory,
        fixed,
        row_bytes,
        predictors.rows.block_rows,
        _most_rows(predictors, _longest_stream(tensors)),
        beside,
    )
    whole_bytes = 0
    if predictors.tensors is not None:
        whole_bytes = _whole_bytes(
            wholes, len(trajectory), settings, predictors.tensors, min(batch_rows, stretch_rows)
        )
    of_action = {
        action: tuple(tensor for tensor in tensors if tensor.action is action) for action in Action
    }
    predicted = of_action[Action.PREDICT]
    copied = of_action[Action.COPY]
    rescaled, averaged = of_action[Action.RESCALE], of_action[Action.AVERAGE]
    return Plan(
        tensors=tensors,
        streams=tuple(
            Stream.of(kind, tuple(t for t in predicted if t.kind is kind and not t.whole))
            for kind in PREDICTED_KINDS
        ),
        wholes=wholes,
        copies=tuple(Copy(tensor, 0, tensor.nbytes) for tensor in copied),
        resets=of_action[Action.RESET],
        rescales=rescaled,
        averages=averaged,
        doubles=doubles,
        block_rows=predictors.rows.block_rows,
        batch_rows=batch_rows,
        stretch_rows=min(batch_rows, stretch_rows),
        memory=max(fixed + batch_rows * row_bytes, whole_bytes),
        bytes_to_read=sum(
            checkpoint.nbytes_of([tensor.name for tensor in (*predicted, *averaged)])
            for checkpoint in trajectory.checkpoints
        )
        + sum(tensor.nbytes for tensor in (*copied, *rescaled)),
        bytes_to_write=outputs * trajectory.first.nbytes,
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
        if mode in (NormMode.PREDICT, NormMode.AVERAGE):
            return _decide(name, found, settings, frozen)
        return Action.COPY, "normalisation layer"
    if mode is NormMode.AVERAGE and name in (layer.running_mean, layer.running_var):
        return Action.AVERAGE, "running statistics, those of the averaged distributions"
    if mode is not NormMode.RESCALE or name == layer.num_batches_tracked:
        return Action.COPY, found.reason
    if layer.is_behind_activation:
        return Action.COPY, "running statistics; an activation follows the layer before"
    if layer.source_weight is None:
        return Action.COPY, "running statistics; names do not tell the layer before"
    sources = [source for source in (layer.source_weight, layer.source_bias) if source]
    if all(decisions[source][0] is not Action.PREDICT for source in sources):
        return Action.COPY, "running statistics; the layer before is not predicted"
    return Action.RESCALE, "running statistics, rescaled to the change of the layer before"


def _averaging_problem(
    trajectory: Trajectory, layer: NormLayer, coefficients: Sequence[float] | None
) -> str | None:
    """Why a layer's running statistics cannot be averaged; None if they can.

    Args:
        trajectory: the inputs.
        layer: one of theirs.
        coefficients: ``[S]``, where they are known: what has no share is not looked at.
    """
    first = trajectory.first.tensors
    for name in (layer.running_mean, layer.running_var):
        assert name is not None
        # What is copied by its kind need not be in every checkpoint; of branches those count that
        # have it.
        absent = trajectory.absent.get(name, frozenset())
        present = [k for k in range(len(trajectory)) if k not in absent]
        if absent and present == [0]:
            return "in no branch"
        found = [
            trajectory.checkpoints[k].tensors.get(name)
            for k in present
            if coefficients is None or coefficients[k]
        ]
        if any(entry is None or entry.shape != first[name].shape for entry in found):
            return "not in all checkpoints"
        if any(entry is not None and not is_float(entry.dtype) for entry in found):
            return "not of floats"
    return None


def workers_of(settings: Settings, predictors: Predictors) -> int:
    """How many threads have a batch each, from its bytes in the inputs to those in the outputs.

    Devices compute one batch at a time; beside it one is read and one written.
    """
    return 3 if predictors.on_devices else settings.threads


#: Rows of a batch, whole blocks of every method of ours. Longer ones leave the processor's cache
#: between reading and writing; of shorter ones, handing them out costs more.
_BATCH_ROWS = 3 << 16
#: On devices, where each batch is waited for.
_DEVICE_BATCH_ROWS = 1 << 20
#: A short stream is cut into so many, however many threads there are, so that all have some.
_FEWEST_BATCHES = 32

#: Rows of a stretch where it is not to be as long as a batch.
_FEW_ROWS = 1 << 14
# A row of a stretch on its way: compared, cast, summed in float64.
_STRETCH_BYTES = 64


def _double_bytes(checkpoints: int, rows: int, predictors: Predictors) -> int:
    # A window in float64 and, beside it, Θ0, the change and what is written.
    exact = 0 if predictors.exact is None else predictors.exact.thread_bytes
    return 8 * (checkpoints + 4) * min(rows, _FEW_ROWS) + exact


def _history_bytes(checkpoints: int, steps: int) -> int:
    # Each row also has a mark for being copied, and per step one for being replaced.
    return 4 * (checkpoints + steps) + 1 + steps


def _whole_bytes(
    groups: Iterable[Group],
    checkpoints: int,
    settings: Settings,
    predictor: TensorPredictor,
    stretch_rows: int,
) -> int:
    """Working memory of the largest group that is needed whole; 0 where there is none."""
    most = 0
    for group in groups:
        elements = sum(tensor.elements for tensor in group)
        history = elements * _history_bytes(checkpoints, settings.steps)
        needed = history + predictor.nbytes(group) + _STRETCH_BYTES * min(elements, stretch_rows)
        if needed > settings.max_memory:
            name = group[0].name
            beside = "" if len(group) == 1 else f", with {group[1].name!r},"
            raise UsageError(
                f"--max-memory {settings.max_memory} is too small: this method needs tensor "
                f"{name!r}{beside} whole, which takes {needed} bytes; allow more, or leave it as "
                f"it is with --kind '{name}=copy'"
            )
        most = max(most, needed)
    return most


def _longest_stream(tensors: Iterable[PlannedTensor]) -> int:
    rows = dict.fromkeys(Kind, 0)
    for tensor in tensors:
        if tensor.action is Action.PREDICT and not tensor.whole:
            rows[tensor.kind] += tensor.elements
    return max(rows.values())


def _most_rows(predictors: Predictors, longest: int) -> int:
    """How many rows a batch has where memory allows it."""
    if predictors.on_devices:
        return min(_DEVICE_BATCH_ROWS, longest)
    return min(_BATCH_ROWS, -(-longest // _FEWEST_BATCHES))


def _batch_rows(
    max_memory: int, fixed: int, row_bytes: int, block_rows: int, most: int, beside: int
) -> int:
    allowed = max_memory // (1 + beside)
    if allowed < fixed + row_bytes * block_rows:
        if beside:
            raise UsageError(
                f"--max-memory {max_memory} is too small for {1 + beside} methods in one pass: one "
                f"block of this takes {fixed + row_bytes * block_rows} bytes of its share "
                f"{allowed}; allow more, or fewer methods or --threads"
            )
        of_threads = f", of which {fixed} for the threads" if fixed else ""
        raise UsageError(
            f"--max-memory {max_memory} is too small: one block needs "
            f"{fixed + row_bytes * block_rows} bytes{of_threads}; allow more"
            + (", or fewer --threads" if fixed else "")
        )
    blocks = (allowed - fixed) // row_bytes // block_rows
    return min(blocks, -(-max(most, 1) // block_rows)) * block_rows
