"""Values at the edges of their types, odd shapes and names, and very many or very large tensors."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import know_cli
from know_cli.checkpoints import Checkpoint, TensorEntry, open_checkpoint, open_trajectory
from know_cli.checkpoints import checkpoint as checkpoint_module
from know_cli.checkpoints.pickles import convert_pickle
from know_cli.engine.progress import Silent
from know_cli.engine.run import execute
from know_cli.engine.settings import FrozenMode, Settings
from know_cli.errors import CheckpointError
from know_cli.kinds import Kind, Override, classify_trajectory
from know_cli.prediction.inspection import inspect_trajectory
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request
from know_cli.prediction.verify import verify
from tests.support.hostile import safetensors_file
from tests.support.memory import peak
from tests.support.trajectories import write_trajectory

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def predict(
    paths: list[Path],
    output: Path,
    method: str,
    frozen: FrozenMode = FrozenMode.COPY,
    allow_nonfinite: bool = False,
    **options: float | str,
) -> Any:
    weights = "continuation" if method == "known" else None
    request = Request(
        paths, output, weights, Settings(frozen=frozen, allow_nonfinite=allow_nonfinite),
        device="cpu", method=method, options=options, force=True,
    )  # fmt: skip
    with open_prediction(request) as prediction:
        return prediction.execute()


def extremes(dtype: torch.dtype) -> dict[str, list[float]]:
    """Values that are what they are in a dtype, and in float32, where all is computed."""
    info = torch.finfo(dtype if dtype != torch.float64 else torch.float32)
    least = info.smallest_normal
    return {
        "zeros": [0.0, -0.0],
        "denormals": [least * info.eps, least * 0.5, -least * info.eps, -least * 0.75],
        "least": [least, -least],
        "largest": [info.max, -info.max],
        "next to one": [1.0 + info.eps, 1.0 - info.eps / 2],
        "mixed": [0.0, info.max, least * info.eps, -1.0, -info.max, 0.125],
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", extremes(torch.float32))
def test_edges_of_types(dtype: torch.dtype, case: str, tmp_path: Path) -> None:
    first = torch.tensor(extremes(dtype)[case], dtype=dtype)
    assert torch.isfinite(first).all()
    # The others differ in one value, so that the tensor is not frozen.
    states = []
    for k in range(5):
        values = first.clone()
        values[-1] = first[-1] * (1 - k / 16)
        states.append({"w": torch.stack([values] * 3), "b": values, "one": values[:1].clone()})
    paths = write_trajectory(tmp_path, states)

    report = predict(paths, tmp_path / "naive", "naive")
    found = load_file(tmp_path / "naive")
    assert found["w"].dtype == dtype
    # Bit for bit, the signs of zeros and denormals, too.
    assert torch.equal(found["w"].view(torch.uint8), states[0]["w"].view(torch.uint8))
    assert report.replaced == report.nonfinite == 0

    # All but the last are the same in all checkpoints, and so stay; but not with --frozen predict.
    half = states[0]["b"].double().numpy() * 0.5
    expected = torch.from_numpy(half if dtype == torch.float64 else half.astype(np.float32))
    predict(paths, tmp_path / "half", "shrink", FrozenMode.PREDICT, **{"lambda": 0.5, "of": "all"})
    assert torch.equal(load_file(tmp_path / "half")["b"], expected.to(dtype))
    predict(paths, tmp_path / "half", "shrink", **{"lambda": 0.5, "of": "all"})
    found = load_file(tmp_path / "half")["b"]
    assert torch.equal(found[:-1], first[:-1])
    assert torch.equal(found[-1:], expected[-1:].to(dtype))

    for method in ("known", "linear", "tsv"):
        # Some of the largest are predicted beyond their type.
        predict(paths, tmp_path / method, method, allow_nonfinite=True)
        found = load_file(tmp_path / method)
        assert all(torch.isfinite(tensor).all() for tensor in found.values()), method
        assert {n: (t.dtype, t.shape) for n, t in found.items()} == {
            n: (t.dtype, t.shape) for n, t in states[0].items()
        }


NAMES = [
    "two words", " ", "", "a/b/c", "../../etc/passwd", "größe", "重み", "\U0001f9e0.weight", "a\tb\nc",
    "quote\"'`$(x)", "{brace}", "[bold]x[/bold]", "%s%n", "w" * 5000, "__proto__", "\x00", "\x1b[31m",
]  # fmt: skip


def test_odd_names_and_shapes(tmp_path: Path) -> None:
    shapes: list[tuple[int, ...]] = [
        (), (0,), (1,), (0, 4), (3, 0, 2), (1, 1, 1, 1), (2,) * 10, (1, 7), (5, 1), (1,) * 64,
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    first: dict[str, Tensor] = {name: torch.randn(2, 3, generator=generator) for name in NAMES}
    first |= {
        f"shape{n}": torch.randn(shape, generator=generator) for n, shape in enumerate(shapes)
    }
    paths = write_trajectory(
        tmp_path, [{name: tensor * (1 - k / 8) for name, tensor in first.items()} for k in range(3)]
    )
    predict(paths, tmp_path / "out", "task-vector")
    found = load_file(tmp_path / "out")
    assert found.keys() == first.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(found[name], tensor + (tensor - tensor * (1 - 1 / 8)))
        assert found[name].shape == tensor.shape


#: Tensors of a layer of :func:`tiny`: every kind, and statistics that are rescaled.
PARTS: dict[str, tuple[str, list[int]]] = {
    "conv1.weight": ("F32", [2, 3, 1, 1]),
    "conv1.bias": ("F32", [2]),
    "bn1.weight": ("F32", [2]),
    "bn1.bias": ("F32", [2]),
    "bn1.running_mean": ("F32", [2]),
    "bn1.running_var": ("F32", [2]),
    "bn1.num_batches_tracked": ("I32", []),
    "fc.weight": ("F32", [2, 1]),
    # A vector called weight would be taken for a normalisation layer's.
    "fc.bias": ("F32", [2]),
    "steps": ("I32", [2]),
}


def tiny(folder: Path, layers: int) -> list[Path]:
    """Two checkpoints of very many tensors of hardly any elements, ten a layer."""
    folder.mkdir()
    entries, position = {}, 0
    for layer in range(layers):
        for name, (dtype, shape) in PARTS.items():
            end = position + 4 * math.prod(shape)
            entries[f"layers.{layer}.{name}"] = {
                "dtype": dtype, "shape": shape, "data_offsets": [position, end],
            }  # fmt: skip
            position = end
    header = json.dumps(entries).encode()
    values = np.arange(position // 4, dtype=np.float32).reshape(layers, -1)
    paths = []
    for k in range(2):
        path = folder / f"ckpt{k}.safetensors"
        # Integers are just bits, the same in both.
        integers = [name == "steps" or "num" in name for name in PARTS for _ in _elements(name)]
        # Means that are never negative would be those of what an activation has passed.
        signs = [-1.0 if "mean" in name else 1.0 for name in PARTS for _ in _elements(name)]
        floats = values * np.array(signs, np.float32) + np.float32(k / 4)
        path.write_bytes(safetensors_file(header, np.where(integers, values, floats).tobytes()))
        paths.append(path)
    return paths


def _elements(part: str) -> range:
    return range(math.prod(PARTS[part][1]))


def convert(folder: Path, layers: int) -> None:
    names = [f"layers.{layer}.{name}" for layer in range(layers) for name in PARTS]
    torch.save({name: torch.tensor([float(n)]) for n, name in enumerate(names)}, folder / "in.pt")
    convert_pickle(folder / "in.pt", folder / "converted")


def look(paths: list[Path]) -> None:
    with open_trajectory(paths) as trajectory:
        inspect_trajectory(trajectory, classify_trajectory(trajectory), Silent())


#: What the commands do, on the inputs of so many layers in a folder.
WORKS: dict[str, Callable[[Path, list[Path], int], object]] = {
    "predict": lambda folder, paths, _: predict(paths, folder / "out", "linear"),
    "inspect": lambda folder, paths, _: look(paths),
    "verify": lambda folder, paths, _: verify(folder / "out", paths, spans=None),
    "verify a sample": lambda folder, paths, _: verify(folder / "out", paths, seed=0),
    "convert": lambda folder, _, layers: convert(folder, layers),
}


def instructions(work: Callable[[], object]) -> int:
    """How many of Python's instructions this project's code executes in a call, in all threads."""
    counter, package = itertools.count(), str(Path(know_cli.__file__).parent)

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        if not frame.f_code.co_filename.startswith(package):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            next(counter)
        return trace

    before = sys.gettrace()
    threading.settrace(trace)
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
        threading.settrace(before)  # type: ignore[arg-type]
    return next(counter)


def test_work_grows_in_step_with_the_number_of_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice as many more tensors are twice as many more instructions, not four times."""
    # A fingerprint reads so many tensors at most, which would be all of these.
    monkeypatch.setattr(checkpoint_module, "_FINGERPRINT_TENSORS", 8)
    counts: dict[str, list[int]] = {name: [] for name in WORKS}
    for layers in (2, 3, 5, 9):  # the first is warming up
        folder = tmp_path / str(layers)
        paths = tiny(folder, layers)
        for name, work in WORKS.items():
            counts[name].append(instructions(lambda: work(folder, paths, layers)))  # noqa: B023
    for name, (_, few, more, most) in counts.items():
        assert few > 3 * len(PARTS) * 10, name
        assert 1.95 < (most - more) / (more - few) < 2.05, (name, counts[name])


def seconds_for(layers: int, folder: Path, works: Iterable[str]) -> dict[str, float]:
    """This process's time for each command on so many layers, and a look at what comes out."""
    paths, seconds = tiny(folder, layers), {}
    for name in works:
        began = time.process_time()
        WORKS[name](folder, paths, layers)
        seconds[name] = time.process_time() - began
    with open_checkpoint(folder / "out") as out, open_checkpoint(paths[0]) as first:
        assert out.tensors.keys() == first.tensors.keys()
        assert len(out.tensors) == layers * len(PARTS)
        expected = {"fc.bias": -0.25, "fc.weight": -0.25, "conv1.weight": -0.25, "bn1.weight": 0.0}
        for part, change in {**expected, "steps": 0.0}.items():
            name = f"layers.{layers - 1}.{part}"
            before, after = (read_float32s(c, c.tensors[name]) for c in (first, out))
            np.testing.assert_array_equal(after, before + np.float32(change))
        name = f"layers.{layers - 1}.bn1.running_var"
        before, after = (read_float32s(c, c.tensors[name]) for c in (first, out))
        assert (after < before).all()
    shutil.rmtree(folder)
    return seconds


def read_float32s(checkpoint: Checkpoint, entry: TensorEntry) -> np.ndarray:
    data = bytearray(entry.info.nbytes)
    checkpoint.read_into(entry, 0, memoryview(data))
    return np.frombuffer(data, np.float32)


def test_thousands_of_tensors(tmp_path: Path) -> None:
    seconds_for(300, tmp_path / "many", ["predict"])


@pytest.mark.slow
def test_a_hundred_thousand_tensors_take_linear_time(tmp_path: Path) -> None:
    few, many = (seconds_for(layers, tmp_path / str(layers), WORKS) for layers in (1_000, 10_000))
    for name in WORKS:
        assert many[name] < 15 * few[name], (name, few, many)


#: One more element than a signed 32-bit number counts, and what is not zero among them: at the
#: start, where bytes and elements pass 2³¹, and at the end, where bytes pass 2³².
ELEMENTS = 2**31 + 1
PLACES = {0: 1.0, 2**30 - 1: -1.0, 2**30: -2.0, 2**31 - 1: 3.0, 2**31: -4.0}


def sparse(folder: Path, count: int) -> list[Path]:
    """Checkpoints of one such bfloat16 tensor, which take next to no room on disk."""
    header = safetensors_file(
        {"w": {"dtype": "BF16", "shape": [ELEMENTS], "data_offsets": [0, 2 * ELEMENTS]}}
    )
    paths = []
    for k in range(count):
        paths.append(folder / f"ckpt{k}.safetensors")
        with paths[-1].open("wb") as file:
            file.write(header)
            file.truncate(len(header) + 2 * ELEMENTS)
            for place, value in PLACES.items():
                bits = torch.tensor(value * 0.5**k).bfloat16().view(torch.int16).item()
                file.seek(len(header) + 2 * place)
                file.write(struct.pack("<h", bits))
    return paths


class Kept:
    """A sink that keeps what is not zero: (name, place) → bits."""

    left_out: ClassVar[list[Path]] = []
    remaining: ClassVar[list[Path]] = []
    file_bytes = 0

    def __init__(self, size: int) -> None:
        self.size, self.nbytes = size, 0
        self.found: dict[tuple[str, int], int] = {}

    def write(self, name: str, offset: int, data: memoryview) -> None:
        self.nbytes += data.nbytes
        if data.nbytes % 8 == 0 and not np.frombuffer(data, "<u8").any():
            return  # looked at by eights, which is quicker
        values = np.frombuffer(data, f"<u{self.size}")
        for row in np.flatnonzero(values):
            self.found[name, offset // self.size + int(row)] = int(values[row])

    def flush(self) -> None: ...

    def commit(self) -> None: ...

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None: ...


def bits_of(values: dict[int, float]) -> dict[tuple[str, int], int]:
    return {
        ("w", place): torch.tensor(value).bfloat16().view(torch.uint16).item()
        for place, value in values.items()
    }


def test_blocks_beyond_32_bits_are_read_and_written_where_they_belong(tmp_path: Path) -> None:
    """Of such a tensor, the blocks at the places above only, and what they are is not written."""
    # What little there is in it behaves like a counter.
    request = Request(
        sparse(tmp_path, 3), tmp_path / "out", device="cpu", method="task-vector",
        settings=Settings(overrides=(Override("w", Kind.BIAS),)),
    )  # fmt: skip
    with open_prediction(request) as prediction:
        assert prediction.plan.predicted == ELEMENTS
        plan, rows = prediction.plan, prediction.plan.block_rows
        (stream,) = (stream for stream in plan.streams if stream.rows)
        assert (stream.kind, stream.rows) == (Kind.BIAS, ELEMENTS)
        starts = sorted({place // rows * rows for place in PLACES})
        spans = tuple(range(start, min(start + rows, ELEMENTS)) for start in starts)
        part = replace(plan, streams=(replace(stream, spans=spans),), batch_rows=rows)
        kept = Kept(2)
        report = execute(replace(prediction.job(), plan=part, open_sink=lambda _: kept))
    assert kept.found == bits_of({place: value * 1.5 for place, value in PLACES.items()})
    assert kept.nbytes == 2 * sum(map(len, spans))
    assert report.kinds[Kind.BIAS].absolute_change == sum(abs(v) / 2 for v in PLACES.values())


@pytest.mark.slow
def test_a_tensor_of_more_bytes_than_32_bits_count_is_copied_whole(tmp_path: Path) -> None:
    header = safetensors_file(
        {"w": {"dtype": "U8", "shape": [ELEMENTS], "data_offsets": [0, ELEMENTS]}}
    )
    paths = [tmp_path / f"ckpt{k}.safetensors" for k in range(2)]
    for path in paths:
        with path.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + ELEMENTS)
            for place in PLACES:
                file.seek(len(header) + place)
                file.write(bytes([1 + place % 251]))
    kept = Kept(1)
    with open_prediction(Request(paths, tmp_path / "out", device="cpu", method="linear")) as found:
        execute(replace(found.job(), open_sink=lambda _: kept))
    assert kept.nbytes == ELEMENTS
    assert kept.found == {("w", place): 1 + place % 251 for place in PLACES}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak as Linux tells it")
def test_more_elements_than_32_bits_count(tmp_path: Path) -> None:
    """All of it, by the command line; the inputs take no room on disk, the output does."""
    if shutil.disk_usage(tmp_path).free < 6 * 2**30:
        pytest.skip("needs 6 GiB of disk")
    paths, out, memory = sparse(tmp_path, 5), tmp_path / "out", 256 << 20
    try:
        alone = peak("-c", "import know_cli.cli.main, know_cli.prediction.predict")
        used = peak(
            "-m", "know_cli", "predict", *paths, "-o", out, "--method", "task-vector",
            "--max-memory", memory, "--threads", 2, "--quiet",
        )  # fmt: skip
        assert used < (alone + memory) * 1.1, (alone, used)
        kept, chunk = Kept(2), 32 << 20
        with open_checkpoint(out) as checkpoint:
            entry = checkpoint.tensors["w"]
            assert entry.shape == (ELEMENTS,)
            for offset in range(0, entry.info.nbytes, chunk):
                data = bytearray(min(chunk, entry.info.nbytes - offset))
                checkpoint.read_into(entry, offset, memoryview(data))
                kept.write("w", offset, memoryview(data))
        assert kept.found == bits_of({place: value * 1.5 for place, value in PLACES.items()})
        assert not verify(out, paths, spans=16, seed=0).differences
    finally:
        for path in tmp_path.iterdir():
            path.unlink()


def test_a_checkpoint_of_one_scalar(tmp_path: Path) -> None:
    paths = write_trajectory(tmp_path, [{"s": torch.tensor(2.0 - k / 2)} for k in range(2)])
    predict(paths, tmp_path / "out", "linear")
    assert load_file(tmp_path / "out")["s"].item() == 2.5
    for path in paths:
        save_file({"s": torch.empty(0)}, path)
    with pytest.raises(CheckpointError, match="all 1 weight is empty"):
        predict(paths, tmp_path / "out", "linear")
