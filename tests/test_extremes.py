"""Values at the edges of their types, odd shapes and names, and very many or very large tensors."""

from __future__ import annotations

import json
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from know_cli.checkpoints import open_checkpoint
from know_cli.engine.plan import Settings
from know_cli.methods.prediction import Request, open_prediction
from tests.conftest import write_trajectory
from tests.figures import record
from tests.hostile import safetensors_file

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def predict(paths: list[Path], output: Path, method: str, **options: float | str) -> Any:
    weights = "continuation" if method == "known" else None
    request = Request(
        paths, output, weights, Settings(), device="cpu", method=method, options=options, force=True
    )
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

    predict(paths, tmp_path / "half", "shrink", **{"lambda": 0.5})
    expected = (states[0]["b"].float().numpy() * np.float32(0.5)).astype(np.float32)
    assert torch.equal(load_file(tmp_path / "half")["b"], torch.from_numpy(expected).to(dtype))

    for method in ("known", "linear", "tsv"):
        predict(paths, tmp_path / method, method)
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


def tiny(folder: Path, count: int) -> list[Path]:
    """Two checkpoints of very many tensors of two elements, a third of them not predicted."""
    folder.mkdir()
    entries = {
        f"layers.{n // 3}.{('weight', 'bias', 'steps')[n % 3]}": {
            "dtype": "I32" if n % 3 == 2 else "F32",
            # A vector called weight would be taken for a normalisation layer's.
            "shape": [2, 1] if n % 3 == 0 else [2],
            "data_offsets": [8 * n, 8 * n + 8],
        }
        for n in range(count)
    }
    header = json.dumps(entries).encode()
    paths = []
    for k in range(2):
        values = np.arange(2 * count, dtype=np.float32).reshape(-1, 3, 2) + np.float32(k) / 4
        values[:, 2] = 1  # as integers just bits, the same in both
        path = folder / f"ckpt{k}.safetensors"
        path.write_bytes(safetensors_file(header, values.tobytes()))
        paths.append(path)
    return paths


def seconds_for(count: int, folder: Path) -> float:
    """Time of this process for predicting so many tensors, and a look at what comes out."""
    paths = tiny(folder, count)
    began = time.process_time()
    predict(paths, folder / "out", "linear")
    seconds = time.process_time() - began
    with open_checkpoint(folder / "out") as out:
        assert len(out.tensors) == count
        entry = out.tensors[f"layers.{count // 3 - 1}.bias"]
        data = bytearray(8)
        out.read_into(entry, 0, memoryview(data))
        start = 2 * count - 4
        assert struct.unpack("<2f", data) == (start - 0.25, start + 0.75)
    shutil.rmtree(folder)
    return seconds


def test_ten_thousand_tensors_take_linear_time(tmp_path: Path) -> None:
    few, many = (seconds_for(count, tmp_path / str(count)) for count in (1_998, 9_999))
    assert many < 5 * few * 2 + 1
    record("tensors", tensors=9_999, seconds=round(many, 1))


@pytest.mark.slow
def test_a_hundred_thousand_tensors_take_linear_time(tmp_path: Path) -> None:
    few, many = (seconds_for(count, tmp_path / str(count)) for count in (9_999, 99_999))
    assert many < 10 * few * 2
    record("tensors_slow", tensors=99_999, seconds=round(many, 1))


def test_a_checkpoint_of_one_scalar(tmp_path: Path) -> None:
    paths = write_trajectory(tmp_path, [{"s": torch.tensor(2.0 - k / 2)} for k in range(2)])
    predict(paths, tmp_path / "out", "linear")
    assert load_file(tmp_path / "out")["s"].item() == 2.5
    save_file({"s": torch.empty(0)}, paths[0])
    save_file({"s": torch.empty(0)}, paths[1])
    predict(paths, tmp_path / "out", "linear")
    assert load_file(tmp_path / "out")["s"].shape == (0,)
