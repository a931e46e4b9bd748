"""Whole predictions of generated checkpoints on disk, against a bare copy of the same bytes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from know_cli.benchmark.scaling import COPY, Scaling, measure_predictions
from know_cli.benchmark.timing import Times, take_turns
from know_cli.checkpoints.dtypes import FLOATS, torch_dtype
from know_cli.checkpoints.header import encode_header
from know_cli.checkpoints.reading import as_bytes
from know_cli.engine.settings import Settings
from know_cli.errors import OutputError
from know_cli.files import append, new_file, open_file, remove_file, write_bytes
from know_cli.methods.registry import DEFAULT_METHOD
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request
from know_cli.ranks.environment import own_command

PIPELINE = "pipeline"
COMMAND = "command"
#: Methods that are also measured with one thread: reading and writing alone, a sum, KNOWN.
SCALED = ("naive", "average", DEFAULT_METHOD)
SCALED_DTYPES = ("F32", "BF16")
_COPY_BYTES = 1 << 20
# A run takes minutes from this many parameters on, so a cold first one hardly matters.
_MANY = 10**8
_LARGEST_TENSOR = 1 << 24
_OUT = "out.safetensors"


def write_trajectory(
    folder: Path, parameters: int, checkpoints: int, dtype: str = "F32"
) -> list[Path]:
    """Write random checkpoints of convolutions, matrices and biases.

    Args:
        folder: gets ``ckpt0.safetensors`` and so on.
        parameters: approximate number of parameters.
        checkpoints: how many to write.
        dtype: of all tensors, by its safetensors name.

    Returns:
        Their paths, full data first.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    paths = [folder / f"ckpt{k}.safetensors" for k in range(checkpoints)]
    write_checkpoints(paths, shapes(parameters), dtype)
    return paths


def write_checkpoints(
    paths: Sequence[Path], layout: Mapping[str, tuple[int, ...]], dtype: str
) -> None:
    """Write random checkpoints tensor by tensor; each is the previous one plus noise.

    Args:
        paths: where, full data first.
        layout: the shape of each tensor.
        dtype: of all tensors, by its safetensors name.

    Raises:
        OutputError: a file cannot be written, or the disk is full.
    """
    start, infos = encode_header([(name, dtype, shape) for name, shape in layout.items()], {})
    try:
        for path in paths:
            write_bytes(path, start, replace=False)
        for number, info in enumerate(infos.values()):
            random = np.random.default_rng(number)
            values = random.standard_normal(info.elements, dtype=np.float32) * 0.05
            for k, path in enumerate(paths):
                stored = torch.from_numpy(values).to(torch_dtype(dtype))
                append(path, as_bytes(stored))
                noise = random.standard_normal(info.elements, dtype=np.float32)
                values += np.float32(0.01 * 0.5**k) * noise
    except OSError as error:
        folder = paths[0].parent
        raise OutputError(f"{folder}: cannot be written: {error.strerror or error}") from error


def shapes(parameters: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of tensors: half convolutions, half matrices, a bias for each matrix."""
    found: dict[str, tuple[int, ...]] = {}
    left, number = parameters, 0
    while left >= 64 * 9:
        size = min(left // 2, _LARGEST_TENSOR)
        width = max(int((size / 9) ** 0.5), 1)
        found[f"layers.{number}.conv.weight"] = (width, width, 3, 3)
        side = max(int(size**0.5) - 1, 1)
        found[f"layers.{number}.fc.weight"] = (side, side)
        found[f"layers.{number}.fc.bias"] = (side,)
        left -= width * width * 9 + side * side + side
        number += 1
    return found


def measure_runs(
    folder: Path,
    parameters: int,
    weights: str | None,
    checkpoints: int,
    threads: int,
    max_memory: int,
    rounds: int,
    device: str,
) -> tuple[int, dict[str, Times], Scaling]:
    """Time predictions from generated files, by library and by command, and a copy of the bytes.

    Args:
        folder: for the files, which are removed afterwards.
        parameters: approximate number of parameters.
        weights: KNOWN bundle, as for ``know predict``.
        checkpoints: S.
        threads: workers.
        max_memory: bytes.
        device: as for ``know predict``.
        rounds: of each; a single one without warm-up from 100 million parameters on.

    Returns:
        The exact number of parameters, times by name, and of some methods and types by the
        number of threads, where that is more than one. The command's processor time is not
        measured.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    paths = write_trajectory(folder, parameters, checkpoints)
    out = folder / _OUT
    try:
        settings = Settings(threads=threads, max_memory=max_memory)
        request = Request(paths, out, weights, settings, force=True, device=device)

        def pipeline() -> None:
            with open_prediction(request) as prediction:
                prediction.execute()

        command = [
            *own_command("know_cli"), "predict", *map(str, paths), "-o", str(out),
            "--force", "--quiet", "--device", device, "--threads", str(threads),
            "--max-memory", str(max_memory), *(["--weights", weights] if weights else []),
        ]  # fmt: skip
        cases: dict[str, Callable[[], object]] = {
            PIPELINE: pipeline,
            COMMAND: lambda: subprocess.run(command, check=True),
            COPY: lambda: copy_bytes(paths, out),
        }
        elements = sum(int(np.prod(shape)) for shape in shapes(parameters).values())
        many = parameters >= _MANY
        times = take_turns(cases, 1 if many else rounds, warm_up=not many)
        scaling: Scaling = {}
        if threads > 1 and not many:
            for dtype in SCALED_DTYPES:
                for path in paths:
                    remove_file(path)
                write_trajectory(folder, parameters, checkpoints, dtype)
                found = measure_predictions(
                    request, SCALED, rounds, threads, lambda: copy_bytes(paths, out)
                )
                scaling |= {f"{name}, {FLOATS[dtype]}": of for name, of in found.items()}
        return elements, times, scaling
    finally:
        for path in (*paths, out):
            remove_file(path)


def copy_bytes(paths: Sequence[Path], out: Path) -> None:
    """Read all inputs, write one of them and flush it to disk: the least that a prediction does."""
    buffer = memoryview(bytearray(_COPY_BYTES))
    remove_file(out)
    with new_file(out) as target:
        for path in paths:
            with open_file(path, buffering=0) as source:
                while count := source.readinto(buffer):
                    if path == paths[0]:
                        target.write(buffer[:count])
        os.fsync(target.fileno())
