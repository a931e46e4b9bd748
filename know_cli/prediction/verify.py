"""Does an output hold what its provenance says: computed again from the inputs, and compared.

An output's header tells the method, its options and the fingerprints of the inputs; blocks of
rows give the same bytes wherever they are computed alone (see :mod:`know_cli.engine.plan`), so
a random sample of them can be checked in seconds, whatever the size of the checkpoint.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from know_cli import __version__
from know_cli.checkpoints import Checkpoint, open_checkpoint
from know_cli.checkpoints import metadata as keys
from know_cli.checkpoints.checksum import check_digest
from know_cli.checkpoints.dtypes import is_float, torch_dtype
from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.checkpoints.reading import as_bytes
from know_cli.engine.parts import sample
from know_cli.engine.progress import Progress, Silent
from know_cli.engine.run import execute
from know_cli.errors import CheckpointError, UsageError, counted, quoted
from know_cli.known.kernels import AUTO
from know_cli.methods.bundles import bundle_with_digest
from know_cli.methods.registry import find_method
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.predict import Prediction
from know_cli.prediction.recipe import Recipe
from know_cli.prediction.request import Request

DEFAULT_SPANS = 256
# Another processor or version of torch may round otherwise; more than this is no rounding.
_ROUNDING = 1e-4


@dataclass
class Difference:
    """A tensor that is not what it should be.

    Attributes:
        name: of the tensor.
        elements: how many of those compared differ; bytes for what is not of floats.
        largest: the largest distance; None where a value is not a number, or not of floats.
        relative: the largest distance over the largest expected value; None as before.
    """

    name: str
    elements: int
    largest: float | None
    relative: float | None


@dataclass
class Verification:
    """What was compared, and what differs.

    Attributes:
        bytes_compared: of tensor data.
        bytes_total: of all tensors.
        tensors: how many were compared, whole or in part.
        tensors_total: how many there are that are not empty.
        rescaled: running statistics that were left out of a sample, since each needs a whole
            layer.
        spans: blocks and whole tensors that were computed; 0 for all.
        seed: of the sample; None for all.
        digest: the file that the output's SHA-256 was compared with, if there is one.
        metadata: keys of the output's metadata that are not what they should be.
        differences: tensors that are not what they should be.
        notices: what the user should know.
    """

    bytes_compared: int = 0
    bytes_total: int = 0
    tensors: int = 0
    tensors_total: int = 0
    rescaled: int = 0
    spans: int = 0
    seed: int | None = None
    digest: Path | None = None
    metadata: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain types for a JSON file."""
        return {**asdict(self), "digest": str(self.digest) if self.digest else None}

    def check(self, output: Path) -> None:
        """Refuse an output that differs.

        Raises:
            CheckpointError: what differs, by how much.
        """
        if self.metadata:
            listing = ", ".join(quoted(key) for key in self.metadata)
            hint = (
                "; coefficients follow from the training steps, which names and metadata of the "
                "checkpoints tell"
                if keys.COEFFICIENTS in self.metadata
                else ""
            )
            raise CheckpointError(
                f"{output}: its metadata is not what it should be: {listing}{hint}"
            )
        if not self.differences:
            return
        worst = max(self.differences, key=lambda d: math.inf if d.relative is None else d.relative)
        distance = "" if worst.largest is None else f", by at most {worst.largest:.3g}"
        more = len(self.differences) - 1
        others = f", and {counted(more, 'more tensor')} differ{'s' * (more == 1)}" if more else ""
        rounding = all(d.relative is not None and d.relative < _ROUNDING for d in self.differences)
        hint = (
            "; so small a difference can come from another processor or version of torch than "
            "it was made with"
            if rounding
            else ""
        )
        raise CheckpointError(
            f"{output}: is not what its provenance gives: tensor {quoted(worst.name)} differs in "
            f"{worst.elements} places{distance}{others}{hint}"
        )


def verify(
    output: Path,
    checkpoints: Sequence[Path],
    *,
    spans: int | None = DEFAULT_SPANS,
    seed: int | None = None,
    weights: str | None = None,
    device: str | None = None,
    threads: int = 1,
    max_memory: int = 1 << 30,
    progress: Progress | None = None,
) -> Verification:
    """Compute an output again, all or a sample of it, and compare.

    Args:
        output: a checkpoint that this program wrote.
        checkpoints: that it was made from, in the same order; of a run in any, and there may be
            more than were used.
        spans: how many blocks of rows, and tensors that a method needs whole, are computed;
            None is all, and all copied and rescaled tensors, too.
        seed: which ones; None takes another one each time.
        weights: where the bundle is, if it is none of the shipped ones.
        device: where to compute; None is where the output was made.
        threads: worker threads.
        max_memory: bytes of working memory.
        progress: is told of phases and parameters.

    Returns:
        What was compared; :meth:`Verification.check` refuses what differs.

    Raises:
        CheckpointError: the output has no provenance, is damaged, or was made from other
            checkpoints or with another bundle.
        UsageError: the provenance cannot be followed here.
    """
    progress = progress or Silent()
    with open_checkpoint(output) as found:
        recipe = _recipe(found)
        if recipe.trajectory is TrajectoryKind.RUN and recipe.checkpoints < len(checkpoints):
            checkpoints = _used(checkpoints, recipe)
        if recipe.checkpoints != len(checkpoints):
            for path in checkpoints:  # a folder of checkpoints is none, and says which it has
                open_checkpoint(path).close()
            raise CheckpointError(
                f"{output}: was made from {counted(recipe.checkpoints, 'checkpoint')}, "
                f"{len(checkpoints)} {'was' if len(checkpoints) == 1 else 'were'} given"
            )
        result = Verification(
            bytes_total=sum(entry.info.nbytes for entry in found.tensors.values()),
            tensors_total=sum(entry.info.nbytes > 0 for entry in found.tensors.values()),
        )
        progress.phase("comparing the digest")
        result.digest = check_digest(output)
        with _open(found, recipe, checkpoints, weights, device, threads, max_memory) as prediction:
            _check_inputs(found, recipe, prediction)
            result.metadata = _metadata_differences(found, recipe, prediction)
            plan = prediction.plan
            if spans is not None:
                result.seed = random.SystemRandom().getrandbits(32) if seed is None else seed
                plan = sample(plan, spans, result.seed)
                result.spans = sum(len(s.spans) for s in plan.streams) + len(plan.wholes)
                result.rescaled = len(prediction.plan.rescales)
            comparer = _Comparer(found)
            execute(replace(prediction.job(progress), plan=plan, open_sink=lambda _: comparer))
            result.notices = list(prediction.notices)
    result.bytes_compared, result.tensors = comparer.nbytes, len(comparer.compared)
    result.differences = sorted(comparer.differences.values(), key=lambda d: d.name)
    return result


def _recipe(found: Checkpoint) -> Recipe:
    if keys.METHOD not in found.metadata:
        raise CheckpointError(
            f"{found.path}: has no provenance ({keys.METHOD} in its metadata); only what "
            "'know predict' wrote can be verified"
        )
    try:
        return Recipe.from_metadata(found.metadata)
    except ValueError as error:
        raise CheckpointError(
            f"{found.path}: its provenance cannot be read ({quoted(str(error))}); it was not "
            "written by this program, or by a much older one"
        ) from error


def _used(checkpoints: Sequence[Path], recipe: Recipe) -> list[Path]:
    """Those of a run's checkpoints that an output was made from, by their fingerprints."""
    used = []
    for path in checkpoints:
        with open_checkpoint(path) as checkpoint:
            if checkpoint.fingerprint() in recipe.inputs:
                used.append(path)
    return used


def _open(
    found: Checkpoint,
    recipe: Recipe,
    checkpoints: Sequence[Path],
    weights: str | None,
    device: str | None,
    threads: int,
    max_memory: int,
) -> Prediction:
    """Open the prediction; options that cannot be are the provenance's fault, not the user's."""
    try:
        request = recipe.to_request(
            checkpoints,
            found.path,
            weights=_bundle(found.path, recipe, weights),
            device=device,
            threads=threads,
            max_memory=max_memory,
        )
        return _open_alike(request)
    except UsageError as error:
        if str(error).startswith(("--max-memory", "--device", "--weights")):
            raise
        raise CheckpointError(
            f"{found.path}: its provenance cannot be followed: {error}"
        ) from error


def _open_alike(request: Request) -> Prediction:
    """Open it with the kernel that the output was made by; with another if that does not run."""
    try:
        return open_prediction(request)
    except UsageError as error:
        if not str(error).startswith("--kernel"):
            raise
    return open_prediction(replace(request, kernel=AUTO))


class _Comparer:
    """A sink that compares what it is given with a checkpoint that exists, in any thread."""

    def __init__(self, found: Checkpoint) -> None:
        self.nbytes = 0
        self.file_bytes = 0
        self.left_out: list[Path] = []
        self.remaining: list[Path] = []
        self.compared: set[str] = set()
        self.differences: dict[str, Difference] = {}
        self._found = found
        self._lock = Lock()

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Compare bytes of one tensor, ``offset`` counted from the start of its data."""
        if not data.nbytes:
            return
        entry = self._found.tensors[name]
        expected = torch.frombuffer(data.cast("B"), dtype=torch.uint8)
        actual = torch.empty_like(expected)
        self._found.read_into(entry, offset, as_bytes(actual))
        is_same = torch.equal(expected, actual)
        with self._lock:
            self.compared.add(name)
            self.nbytes += data.nbytes
            if not is_same:
                self._note(name, entry.dtype, expected, actual)

    def _note(self, name: str, dtype: str, expected: torch.Tensor, actual: torch.Tensor) -> None:
        known = self.differences.setdefault(name, Difference(name, 0, 0.0, 0.0))
        if not is_float(dtype):
            known.elements += int((expected != actual).sum())
            known.largest = known.relative = None
            return
        one, two = (values.view(torch_dtype(dtype)).double() for values in (expected, actual))
        differ = (one != two) & ~(one.isnan() & two.isnan())
        known.elements += int(differ.sum())
        distance = float((one - two).abs()[differ].max()) if differ.any() else 0.0
        if not distance < math.inf or known.largest is None or known.relative is None:
            known.largest = known.relative = None
            return
        scale = float(one.abs().nan_to_num(0.0).max())
        known.largest = max(known.largest, distance)
        known.relative = max(known.relative, distance / scale if scale else math.inf)

    def flush(self) -> None:
        """Nothing is kept."""

    def commit(self) -> None:
        """Nothing is shown."""

    def __enter__(self) -> _Comparer:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing is open."""


def _bundle(output: Path, recipe: Recipe, weights: str | None) -> str | None:
    """The folder of the bundle of a recipe: where the user says, or a shipped one."""
    if recipe.bundle is None:
        if weights is not None:
            raise UsageError(
                f"--weights {weights}: {output} was made by --method {recipe.method} without "
                "a hyper-model; leave it out"
            )
        return None
    method = find_method(recipe.method)
    path = bundle_with_digest(method, recipe.bundle, weights, recipe.checkpoints)
    if path is not None:
        return path
    if weights is None:
        raise CheckpointError(
            f"{output}: was made with a hyper-model of digest {quoted(recipe.bundle)}, which is "
            "not one of the shipped; say where it is with --weights"
        )
    raise CheckpointError(
        f"{output}: was made with a hyper-model of digest {quoted(recipe.bundle)}, which --weights "
        f"{weights} is not"
    )


def _check_inputs(found: Checkpoint, recipe: Recipe, prediction: Prediction) -> None:
    """Refuse other inputs than the output was made from, before anything is computed."""
    first = prediction.trajectory.first
    for name in sorted(first.tensors.keys() ^ found.tensors.keys()):
        whose, other = (found, first) if name in found.tensors else (first, found)
        raise CheckpointError(f"{whose.path}: has tensor {quoted(name)}, {other.path} has not")
    for name, entry in first.tensors.items():
        made = found.tensors[name]
        if (entry.dtype, entry.shape) != (made.dtype, made.shape):
            raise CheckpointError(
                f"{found.path}: tensor {quoted(name)} has another dtype or shape than in "
                f"{first.path}"
            )
    recorded, given = recipe.inputs, prediction.recipe.inputs
    if recorded and recorded != given:
        trio = zip(prediction.trajectory.checkpoints, recorded, given, strict=False)
        wrong = next((c.path for c, one, two in trio if one != two), first.path)
        advice = (
            "give them in the order that it was made from"
            if sorted(recorded) == sorted(given)
            else "give the checkpoints that it was made from, unchanged"
        )
        raise CheckpointError(f"{found.path}: was not made from {wrong} in that place; {advice}")


def _metadata_differences(found: Checkpoint, recipe: Recipe, prediction: Prediction) -> list[str]:
    """Keys whose values differ in any file of the output; what the version explains is noted."""
    expected = dict(prediction.outputs[-1].metadata)
    if recipe.version != __version__:
        prediction.notices.add(
            f"{found.path} was made by version {quoted(recipe.version)}, this is {__version__}"
        )
    here = prediction.recipe.kernel
    if recipe.kernel not in (here, None):
        prediction.notices.add(
            f"{found.path} was made by the {recipe.kernel} kernel, here runs that of {here}, which "
            "may differ by a rounding"
        )
    # Outputs of older versions have fewer keys, and a device may be another one.
    optional = {
        keys.VERSION,
        keys.DEVICE,
        keys.FROZEN,
        keys.INPUTS,
        keys.KERNEL,
        keys.TRAJECTORY_KIND,
        "format",
    }
    if recipe.method == "last":  # which came without, and without its normalisation layers
        optional.add(keys.COEFFICIENTS)
    # What 'know choose' adds tells why a start was taken, and nothing of how it was made.
    free = {keys.VERSION, keys.DEVICE, keys.KERNEL, keys.CHOSEN}
    differ = set()
    for header in found.headers.values():
        actual = header.metadata
        for key in expected.keys() | actual.keys():
            missing_as_before = key in optional and key not in actual
            same = actual.get(key) == expected.get(key)
            if not (same or missing_as_before or key in free):
                differ.add(key)
    return sorted(differ)
