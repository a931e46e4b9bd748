"""The compiled passes against torch and numpy, bit for bit; skipped where none were compiled."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from know_cli.errors import EXIT_DONE
from know_cli.passes import native as compiled_passes
from know_cli.passes import numbers
from know_cli.passes.native import LIBRARY, native
from know_cli.passes.numbers import (
    all_finite,
    cast_finite,
    change_sums,
    read_finite,
    round_to_odd,
    same_bits,
    weighted_sum,
)
from tests.support.command import Command
from tests.support.trajectories import states, write_trajectory

compiled = pytest.mark.skipif(native() is None, reason=f"there is no {LIBRARY.name}")
TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
#: Around the sizes of vectors, blocks and pieces.
SIZES = [0, 1, 3, 7, 8, 9, 15, 16, 17, 33, 1023, 1024, 1025, 5000, 32 * 1024 + 5]
sizes = st.sampled_from(SIZES)
#: Any bits at all: subnormal numbers, infinities, what is not a number.
seeds = st.integers(0, 2**32 - 1)


def any_bits(count: int, dtype: str, seed: int) -> Tensor:
    size = TORCH[dtype].itemsize
    data = np.random.default_rng(seed).integers(0, 256, count * size, dtype=np.uint8)
    return (
        torch.from_numpy(data).view(TORCH[dtype]) if count else torch.empty(0, dtype=TORCH[dtype])
    )


def finite_bits(count: int, seed: int) -> Tensor:
    """Any float32, but half of them as large as weights."""
    values = any_bits(count, "F32", seed)
    values = torch.where(values.isfinite(), values, 0.0)
    return torch.where(torch.arange(count) % 2 == 0, values, torch.sin(values) * 0.1)


def with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "native", lambda: None)


def bits_of(values: Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes() if len(values) else b""


@compiled
@given(sizes, st.sampled_from(sorted(TORCH)), seeds, st.booleans(), st.integers(0, 9))
@settings(max_examples=60)
def test_what_is_read_is_what_torch_converts(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    dtype: str,
    seed: int,
    tame: bool,
    gap: int,
) -> None:
    stored = any_bits(count, dtype, seed)
    if tame:
        stored = torch.where(stored.abs() < 1e4, stored, 0)
    path = tmp_path_factory.mktemp("read") / "data"
    path.write_bytes(b"x" * gap + bits_of(stored))
    out = torch.full((count + 2,), 7.0)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        done, finite = read_finite(descriptor, gap, dtype, out[1:-1])
    finally:
        os.close(descriptor)
    expected = stored.float()
    assert done == count
    assert finite == bool(expected.isfinite().all())
    numeric = ~expected.isnan()  # which NaN it is does not matter
    assert bits_of(out[1:-1][numeric]) == bits_of(expected[numeric])
    assert out[1:-1][~numeric].isnan().all()
    assert out[0] == out[-1] == 7


@compiled
@pytest.mark.parametrize("dtype", sorted(TORCH))
def test_a_file_that_ends_too_early(tmp_path: Path, dtype: str) -> None:
    size, out = TORCH[dtype].itemsize, torch.zeros(70_000)
    (tmp_path / "short").write_bytes(bytes(40_000 * size + 1))
    descriptor = os.open(tmp_path / "short", os.O_RDONLY)
    assert read_finite(descriptor, 0, dtype, out) == (40_000, True)
    assert read_finite(descriptor, 40_000 * size, dtype, out) == (0, True)
    os.close(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        read_finite(descriptor, 0, dtype, out)


@compiled
@pytest.mark.parametrize("count", SIZES)
def test_one_value_that_is_not_finite_is_seen_wherever_it_is(count: int) -> None:
    values = torch.full((count,), torch.finfo(torch.float32).max)
    values[::2] = 1e-45
    assert all_finite(values)
    places = range(count) if count < 50 else [0, 1, count // 2, count - 2, count - 1]
    for place in places:
        for bad in (math.inf, -math.inf, math.nan):
            spoilt = values.clone()
            spoilt[place] = bad
            assert not all_finite(spoilt)


def both_ways(work: Callable[[], Any]) -> tuple[Any, Any]:
    """What the compiled passes and torch make of the same."""
    compiled_result = work()
    with pytest.MonkeyPatch.context() as patch:
        with_torch(patch)
        return compiled_result, work()


@compiled
@given(
    sizes, st.lists(st.sampled_from([0.0, 1.0, 0.2, -0.7, 1 / 3, 1e30]), min_size=1, max_size=7),
    seeds, st.booleans(),
)  # fmt: skip
@settings(max_examples=60)
def test_sums_are_rounded_alike(count: int, weights: list[float], seed: int, to_odd: bool) -> None:
    rows = finite_bits(len(weights) * (count + 3), seed).reshape(len(weights), count + 3)
    out = torch.empty(count)

    def work() -> bytes:
        weighted_sum(weights, rows[:, :count], out, to_odd=to_odd)
        return bits_of(out)

    actual, expected = both_ways(work)
    assert actual == expected


def test_sums_are_those_of_exact_arithmetic() -> None:
    """By hand: 1 + 2⁻⁸ is halfway between two bfloat16, and what is added is below float32's."""
    rows = torch.tensor([[1 + 2**-8], [2**-30]])
    out = torch.empty(1)
    weighted_sum([1.0, 1.0], rows, out, to_odd=False)
    assert out.item() == 1 + 2**-8
    weighted_sum([1.0, 1.0], rows, out, to_odd=True)
    assert out.item() == 1 + 2**-8 + 2**-23
    assert out.bfloat16().item() == 1 + 2**-7
    exact = torch.tensor([1 + 2**-8 + 2**-30], dtype=torch.float64)
    assert round_to_odd(exact).float().item() == out.item()


@compiled
@given(sizes, st.integers(2, 6), seeds, st.sampled_from(["none", "some", "all", "zeros"]))
@settings(max_examples=60)
def test_the_same_bits_are_found(count: int, checkpoints: int, seed: int, which: str) -> None:
    window = any_bits(checkpoints * (count + 1), "F32", seed).reshape(checkpoints, count + 1)
    if which != "none" and count:
        same = torch.ones(count + 1, dtype=torch.bool)
        if which == "some":
            same = torch.arange(count + 1) % 3 == 1
        window = torch.where(same, window[-1], window)
    if which == "zeros":
        window[:, ::2] = 0.0
        window[0, ::4] = -0.0
    actual, expected = both_ways(lambda: same_bits(window[:, :count]))
    assert (actual is None) == (expected is None)
    if actual is not None:
        assert actual.dtype == np.bool_
        assert actual.tobytes() == expected.tobytes()  # every byte 0 or 1


@compiled
@given(sizes, st.sampled_from(["F32", "BF16", "F16"]), seeds, st.booleans(), st.booleans())
@settings(max_examples=60)
def test_values_are_cast_as_torch_casts(
    count: int, dtype: str, seed: int, has_mask: bool, tame: bool
) -> None:
    values, others = any_bits(count, "F32", seed), any_bits(count, "F32", seed + 1)
    if tame:
        values, others = (torch.where(v.abs() < 6e4, v, 0.5) for v in (values, others))
    mask = (torch.arange(count) % 3 == 0).numpy() if has_mask else None
    expected = values if mask is None else torch.where(torch.from_numpy(mask), others, values)
    expected = expected.to(TORCH[dtype])
    actual = cast_finite(values, others, mask, dtype)
    assert (actual is not None) == bool(expected.isfinite().all())
    if actual is not None:
        assert bits_of(actual) == bits_of(expected)


@compiled
def test_every_half_comes_back(tmp_path: Path) -> None:
    """All 65,536 of each sort, read and cast again."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    for dtype in ("BF16", "F16"):
        stored = bits.view(TORCH[dtype])
        stored = stored[stored.isfinite()].clone()
        path = tmp_path / dtype
        path.write_bytes(bits_of(stored))
        out = torch.empty(len(stored))
        descriptor = os.open(path, os.O_RDONLY)
        assert read_finite(descriptor, 0, dtype, out) == (len(stored), True)
        os.close(descriptor)
        back = cast_finite(out, out, None, dtype)
        assert back is not None
        assert bits_of(back) == bits_of(stored)


@compiled
@given(
    sizes,
    st.integers(0, 3000),
    st.integers(1, 1500),
    st.sampled_from(["F32", "BF16", "F16"]),
    seeds,
)
@settings(max_examples=60)
def test_changes_are_summed_cell_by_cell(count: int, row: int, grid: int, dtype: str, seed: int) -> None:  # fmt: skip
    before = torch.from_numpy(np.random.default_rng(seed).normal(size=count)).float()
    after = (before * 1.01).to(TORCH[dtype])
    cells: dict[int, list[tuple[float, float]]] = {}
    for i in range(count):
        change = float(after[i]) - float(before[i])
        cells.setdefault((row + i) // grid, []).append((change, float(before[i])))
    expected = [
        [
            math.fsum(abs(c) for c, _ in of),
            math.fsum(c * c for c, _ in of),
            math.fsum(b * b for _, b in of),
        ]
        for of in cells.values()
    ]
    for actual in both_ways(lambda: change_sums(before, after, row, grid)):
        assert actual.shape == (len(expected), 3)
        assert actual == pytest.approx(np.array(expected).reshape(-1, 3), rel=1e-12, abs=1e-300)
    assert change_sums(before, after).sum(0) == pytest.approx(
        np.array(expected).reshape(-1, 3).sum(0), rel=1e-12, abs=1e-300
    )


@pytest.mark.parametrize("content", [b"", b"no library", b"\x7fELF\x02\x01" + bytes(200)])
def test_a_damaged_library_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    path = tmp_path / "_native.so"
    path.write_bytes(content)
    monkeypatch.setattr(compiled_passes, "LIBRARY", path)
    native.cache_clear()
    try:
        assert native() is None
        out = torch.empty(2)
        weighted_sum([0.5, 0.5], torch.tensor([[1.0, 2.0], [3.0, 4.0]]), out, to_odd=False)
        assert out.tolist() == [2.0, 3.0]
    finally:
        native.cache_clear()


@compiled
@pytest.mark.parametrize("spoilt", [False, True])
@pytest.mark.parametrize("method", ["average", "naive", "shrink", "linear", "logfit"])
def test_whole_predictions_are_the_same_with_and_without(
    tmp_path: Path, know: Command, monkeypatch: pytest.MonkeyPatch, method: str, spoilt: bool
) -> None:
    trajectory = states()
    if spoilt:
        trajectory[0]["conv1.weight"][0] = math.inf
        trajectory[3]["half.weight"][2, 3] = math.nan
        for k, state in enumerate(trajectory):  # further on than float16 goes
            state["half.weight"][5] = 60_000 - 8_000 * k
    write_trajectory(tmp_path, trajectory)
    command = ("predict", "ckpt0..ckpt4", "--method", method, "--allow-nonfinite", "--json")
    assert know(*command, "a.json", "-o", "a", cwd=tmp_path).returncode == EXIT_DONE
    with_torch(monkeypatch)
    assert know(*command, "b.json", "-o", "b", cwd=tmp_path).returncode == EXIT_DONE
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with_it, without = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    for kind, numbers_of_kind in with_it["kinds"].items():
        assert numbers_of_kind == pytest.approx(without["kinds"][kind])
    assert with_it["replaced"] == without["replaced"]
