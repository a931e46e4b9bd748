"""What is the same in all checkpoints keeps Θ0's bits, element by element, whatever the method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from know_cli.engine.report import Report
from know_cli.engine.settings import FrozenMode, Settings
from know_cli.kinds import Kind, Override
from know_cli.known.bundle import save_bundle
from know_cli.methods.registry import METHODS, find_method
from know_cli.passes.numbers import same_bits
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request
from know_cli.prediction.verify import verify
from tests.support.bundles import random_bundle
from tests.support.command import Command
from tests.support.ranks import together
from tests.support.trajectories import write_trajectory

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SIZE = 3
RULE = {kind: [0.3, -0.9, 1.5] for kind in ("conv", "fc", "bias")}
# Whatever their values are like, these are weights.
ALL = (Override("*", Kind.FC),)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random KNOWN, which moves constant histories, with a rule that does so, too."""
    path = tmp_path_factory.mktemp("moving") / "known"
    save_bundle(random_bundle(SIZE), path, {"rule": RULE})
    return path


def predict(
    paths: list[Path], output: Path, method: str, bundle: Path, *, ranks: int = 1, **wishes: Any
) -> tuple[dict[str, Tensor], Report]:
    weights = str(bundle) if find_method(method).reads_bundle else None
    resume = wishes.pop("resume", False)
    options = Settings(**{"overrides": ALL, **wishes})
    request = Request(
        paths, output, weights, options, device="cpu", force=True, method=method, resume=resume
    )

    def work(which: Any) -> Report:
        with open_prediction(request, which) as opened:
            return opened.execute()

    report = together(ranks, work)[0] if ranks > 1 else work(None)
    return load_file(output), report


def bits(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().reshape(tensor.numel(), -1)


def extremes(dtype: torch.dtype) -> Tensor:
    """Values that any arithmetic would change: zeros of both signs, denormals, the largest."""
    info = torch.finfo(torch.float32 if dtype == torch.float64 else dtype)
    least = info.smallest_normal
    return torch.tensor(
        [0.0, -0.0, least * info.eps, -least / 2, info.max, info.min, 1 / 3, -0.1], dtype=dtype
    )


def trajectory_of(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, share: float, seed: int
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Checkpoints of which a share of the elements never moves, and where those are."""
    generator = torch.Generator().manual_seed(seed)
    still, states = {}, []
    values: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        still[name] = torch.rand(shape, generator=generator) < share
        fixed = extremes(dtype)
        values[name] = fixed[torch.randint(len(fixed), shape, generator=generator)]
    for _ in range(SIZE):
        states.append(
            {
                name: torch.where(
                    still[name],
                    values[name],
                    torch.randn(shape, generator=generator).to(dtype),
                )
                for name, shape in shapes.items()
            }
        )
    return states, still


@pytest.mark.parametrize(
    "method", [method.name for method in METHODS if method.hyper_model != "settle"]
)
@given(
    dtype=st.sampled_from(DTYPES),
    share=st.sampled_from([0.02, 0.5, 0.98]),
    steps=st.integers(1, 3),
    seed=st.integers(0, 1 << 30),
)
@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_frozen_elements_keep_their_bits_and_the_others_move_as_ever(
    method: str, dtype: torch.dtype, share: float, steps: int, seed: int, bundle: Path, tmp_path: Path
) -> None:  # fmt: skip
    shapes = {"a.weight": (7, 9), "bias": (40,), "b.weight": (3, 5)}
    trajectory, still = trajectory_of(shapes, dtype, share, seed)
    paths = write_trajectory(tmp_path, trajectory)
    kinds = (*ALL, Override("bias", Kind.BIAS))
    out, report = predict(paths, tmp_path / "out", method, bundle, steps=steps, overrides=kinds)
    # The others are what they are where nothing is frozen, to the last bit.
    free, other = predict(
        paths, tmp_path / "free", method, bundle, steps=steps, frozen=FrozenMode.PREDICT,
        allow_nonfinite=True, overrides=kinds,
    )  # fmt: skip
    expected = 0
    for name, first in trajectory[0].items():
        where = np.all([bits(s[name]) == bits(first) for s in trajectory], axis=(0, 2))
        assert (where >= still[name].numpy().reshape(-1)).all()
        assert (bits(out[name])[where] == bits(first)[where]).all(), name
        assert (bits(out[name])[~where] == bits(free[name])[~where]).all(), name
        expected += 0 if where.all() else int(where.sum())
    assert (report.frozen, other.frozen) == (expected, 0)


@pytest.mark.parametrize("method", ["known", "lstsq", "shrink"])
def test_what_moves_constants_moves_them_only_with_frozen_predict(
    method: str, bundle: Path, tmp_path: Path
) -> None:
    trajectory = [{"a.weight": torch.full((4, 4), 0.5)} for _ in range(SIZE)]
    for k, state in enumerate(trajectory):
        state["a.weight"][0, 0] = k
    paths = write_trajectory(tmp_path, trajectory)
    out, _ = predict(paths, tmp_path / "out", method, bundle)
    assert (out["a.weight"].view(-1)[1:] == 0.5).all()
    out, _ = predict(paths, tmp_path / "out", method, bundle, frozen=FrozenMode.PREDICT)
    assert (out["a.weight"].view(-1)[1:] != 0.5).all()


def test_what_differs_only_in_float64_or_in_the_sign_of_zero_is_not_frozen(
    bundle: Path, tmp_path: Path
) -> None:
    """Four elements: one still; one whose differences float32 cannot hold; ±0; one that moves."""
    values = [[1.0, 1.0 + k * 1e-12, -0.0 if k == 1 else 0.0, 0.1 * k] for k in range(SIZE)]
    doubles = [torch.tensor(row, dtype=torch.float64) for row in values]
    for first_dtype in (torch.float64, torch.float32):  # Θ0 alone may be of another dtype
        trajectory = [{"bias": values.clone()} for values in doubles]
        trajectory[0]["bias"] = trajectory[0]["bias"].to(first_dtype)
        paths = write_trajectory(tmp_path, trajectory)
        out, report = predict(paths, tmp_path / "out", "known", bundle)
        assert report.frozen == 1
        assert out["bias"][0] == 1
        assert (out["bias"][1:] != doubles[0][1:]).all()
        assert out["bias"].dtype == first_dtype


def test_an_element_that_is_not_finite_anywhere_is_copied_and_not_counted_as_frozen(
    bundle: Path, tmp_path: Path
) -> None:
    trajectory = [{"bias": torch.tensor([float("nan"), 0.0, 0.1 * k])} for k in range(SIZE)]
    paths = write_trajectory(tmp_path, trajectory)
    out, report = predict(paths, tmp_path / "out", "known", bundle, allow_nonfinite=True)
    assert (report.frozen, report.nonfinite) == (1, 1)
    assert (bits(out["bias"])[:2] == bits(trajectory[0]["bias"])[:2]).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_same_bytes_and_counts_for_threads_memory_and_ranks(
    dtype: torch.dtype, bundle: Path, tmp_path: Path
) -> None:
    shapes = {"a.weight": (200, 130), "bias": (700,), "b.weight": (111, 97)}
    trajectory, _ = trajectory_of(shapes, dtype, 0.3, 0)
    paths = write_trajectory(tmp_path, trajectory)
    contents, counts = set(), set()
    wishes: dict[str, Any]
    for wishes in (
        {}, {"threads": 3, "max_memory": 12 << 20}, {"ranks": 3, "max_memory": 8 << 20, "resume": True},
    ):  # fmt: skip
        _, report = predict(paths, tmp_path / "out", "known", bundle, steps=2, **wishes)
        contents.add((tmp_path / "out").read_bytes())
        counts.add(report.frozen)
    assert len(contents) == 1
    assert len(counts) == 1
    assert counts.pop() > 5_000
    # A sample of blocks comes out the same.
    found = verify(tmp_path / "out", paths, spans=3, seed=0, weights=str(bundle))
    assert not found.differences


def test_the_report_counts_them(know: Command, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    trajectory = [{"fc.weight": torch.randn(30, 20, generator=generator)} for _ in range(SIZE)]
    for state in trajectory:
        state["fc.weight"][:, 0] = trajectory[0]["fc.weight"][:, 0]
    write_trajectory(tmp_path, trajectory)
    line = (
        "predict",
        "ckpt0..ckpt2",
        "-o",
        "out",
        "--force",
        "--method",
        "shrink",
        "--json",
        "r.json",
    )
    done = know(*line, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = "copy: frozen: the same in all checkpoints (30 elements of predicted tensors)"
    assert text in done.stdout
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["frozen_elements"], report["kinds"]["fc"]["frozen"]) == (30, 30)
    assert report["kinds"]["fc"]["share_copied"] == pytest.approx(30 / 600)
    assert report["frozen"] == "copy"
    done = know(*line, "--frozen", "predict", cwd=tmp_path)
    assert "frozen" not in done.stdout
    assert json.loads((tmp_path / "r.json").read_text())["frozen_elements"] == 0


@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0]), min_size=2, max_size=5),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=30)
def test_same_bits_is_what_equal_bytes_are(values: list[float], dtype: torch.dtype) -> None:
    column = torch.tensor(values, dtype=dtype)
    window = torch.stack([column, torch.arange(len(values), dtype=dtype)], dim=1)
    same = len({value.numpy().tobytes() for value in column}) == 1
    found = same_bits(window)
    assert found is None if not same else found is not None and found.tolist() == [True, False]
