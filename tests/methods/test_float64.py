"""A float64 checkpoint keeps the digits that float32 does not have."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from know_cli.engine.plan import Batch
from know_cli.engine.report import Report
from know_cli.engine.settings import FrozenMode, Settings
from know_cli.kinds import Kind, Override
from know_cli.known.bundle import save_bundle
from know_cli.known.preparation import Preparation
from know_cli.methods.combination import LinearPredictor
from know_cli.methods.registry import METHODS, find_method
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request
from know_cli.prediction.verify import verify
from tests.support.bundles import random_bundle
from tests.support.trajectories import write_trajectory

SIZE = 4
RULE = [0.125, 0.3, -0.9, 1.5]
# Whatever their values are like, these are weights.
ALL = (Override("*", Kind.BIAS),)
EPSILON = Fraction(1, 2**52)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ruled") / "known"
    rules = dict.fromkeys(("conv", "fc", "bias"), RULE)
    save_bundle(random_bundle(SIZE), path, {"rule": rules})
    return path


def predict(
    paths: list[Path], output: Path, method: str, bundle: Path, **wishes: Any
) -> tuple[dict[str, Tensor], Report]:
    weights = str(bundle) if find_method(method).reads_bundle else None
    options = wishes.pop("options", {})
    request = Request(
        paths, output, weights, Settings(**{"overrides": ALL, **wishes}), device="cpu", force=True,
        method=method, options=options,
    )  # fmt: skip
    with open_prediction(request) as opened:
        report = opened.execute()
    return load_file(output), report


def same_bytes(one: Tensor, two: Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), two.view(torch.uint8))


# ---------------------------------------------------------------------- naive, and last


DOUBLES = st.one_of(
    st.floats(-1e12, 1e12),
    st.floats(-3e38, 3e38),
    st.sampled_from([0.0, -0.0, 5e-324, 1e12, 1e12 + 2**-10, -1 / 3, 1e-300]),
)


@given(
    windows=st.lists(st.tuples(DOUBLES, DOUBLES, DOUBLES), min_size=1, max_size=20),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    steps=st.integers(1, 3),
    frozen=st.sampled_from(FrozenMode),
)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_naive_and_last_are_the_bytes_of_a_checkpoint(
    windows: list[tuple[float, ...]], dtype: torch.dtype, steps: int, frozen: FrozenMode,
    bundle: Path, tmp_path: Path,
) -> None:  # fmt: skip
    info = torch.finfo(dtype)
    states = [
        {"b": torch.tensor(values, dtype=torch.float64).clamp(info.min, info.max).to(dtype)}
        for values in zip(*windows, strict=True)
    ]
    paths = write_trajectory(tmp_path, states)
    for method, which in (("naive", 0), ("last", -1)):
        out, report = predict(paths, tmp_path / "out", method, bundle, steps=steps, frozen=frozen)
        assert same_bytes(out["b"], states[which]["b"]), method
    assert report.replaced == 0


def test_naive_keeps_values_near_1e12_whose_steps_are_small(bundle: Path, tmp_path: Path) -> None:
    moving = torch.arange(50, dtype=torch.float64)
    states = [
        {"w": torch.cat([1e12 + 1e-3 * k + moving, 0.1 + 1e-10 * k * moving])} for k in range(SIZE)
    ]
    states[0]["w"][7] = -0.0
    paths = write_trajectory(tmp_path, states)
    out, report = predict(paths, tmp_path / "out", "naive", bundle)
    assert same_bytes(out["w"], states[0]["w"])
    assert report.kinds[Kind.BIAS].absolute_change == 0


# ---------------------------------------------------------------------- golden values


def rule_of(method: str, steps: int) -> list[Fraction]:
    """The exact weights of a method, most-forgotten first, from its formula."""
    last, zero = SIZE - 1, Fraction(0)
    if method == "average":
        return [Fraction(1, SIZE)] * SIZE
    if method == "shrink":
        return [zero] * last + [Fraction(0.75) ** steps]
    if method == "task-vector":
        weights = [zero] * SIZE
        weights[-1], weights[-2] = Fraction(1) + steps, Fraction(-steps)
        return weights
    if method == "tsv":  # of vectors, the mean of the task vectors
        return [Fraction(-steps, last)] * last + [Fraction(1) + steps]
    if method in ("linear", "logfit"):
        # Cramer's rule for the line through k = 0, …: its value at −steps, for each unit window.
        sums = [sum((Fraction(k**n) for k in range(SIZE)), zero) for n in range(3)]
        determinant = sums[0] * sums[2] - sums[1] ** 2
        return [
            (sums[2] - k * sums[1] - steps * (k * sums[0] - sums[1])) / determinant
            for k in range(SIZE - 1, -1, -1)
        ]
    assert method == "lstsq"
    window = [[Fraction(int(i == j)) for j in range(SIZE)] for i in range(SIZE)]
    for _ in range(steps):
        new = [
            sum(Fraction(r) * w[j] for r, w in zip(RULE, window, strict=True)) for j in range(SIZE)
        ]
        window = [*window[1:], new]  # type: ignore[list-item]
    return window[-1]


EXACT = ["average", "shrink", "task-vector", "tsv", "linear", "logfit", "lstsq"]


def combined(weights: Sequence[Fraction], window: Sequence[float]) -> tuple[Fraction, Fraction]:
    """Σ w θ as a fraction, and Σ |w θ|, of which rounding takes its share."""
    terms = [w * Fraction(value) for w, value in zip(weights, window, strict=True)]
    return sum(terms, Fraction(0)), sum(map(abs, terms), Fraction(0))


@pytest.mark.parametrize("method", EXACT)
@given(
    base=st.sampled_from([0.1, 1.0, -3e5, 1e12]),
    size=st.sampled_from([1e-3, 1e-9, 1e-14]),
    steps=st.integers(1, 3),
    seed=st.integers(0, 1 << 30),
)
@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_combinations_are_computed_in_float64(
    method: str, base: float, size: float, steps: int, seed: int, bundle: Path, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(SIZE, 30, generator=generator, dtype=torch.float64)
    states = [{"b": base * (1 + size * row)} for row in noise]
    paths = write_trajectory(tmp_path, states)
    options = {"lambda": 0.75, "of": "all"} if method == "shrink" else {}
    out, _ = predict(
        paths, tmp_path / "out", method, bundle, steps=steps, options=options,
        frozen=FrozenMode.PREDICT,
    )  # fmt: skip
    weights = rule_of(method, steps)
    for column, found in enumerate(out["b"].tolist()):
        window = [state["b"][column].item() for state in reversed(states)]
        exact, terms = combined(weights, window)
        assert abs(Fraction(found) - exact) <= 8 * EPSILON * terms


@pytest.mark.parametrize("method", ["known", "noise", "tsv"])
def test_others_add_their_change_in_float32_to_the_first_checkpoint(
    method: str, bundle: Path, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(3)
    value = torch.randn(9, 7, generator=generator, dtype=torch.float64)
    states = []
    for _ in range(SIZE):
        states.append({"w": value})
        value = value + 0.1 * torch.randn(9, 7, generator=generator, dtype=torch.float64)
    rounded = [{"w": state["w"].float()} for state in states]
    kinds = (Override("*", Kind.FC),)
    for steps in (1, 3):
        (tmp_path / "single").mkdir(exist_ok=True)
        found, _ = predict(
            write_trajectory(tmp_path / "single", rounded), tmp_path / "single" / "out", method, bundle,
            steps=steps, overrides=kinds,
        )  # fmt: skip
        out, report = predict(
            write_trajectory(tmp_path, states), tmp_path / "out", method, bundle, steps=steps,
            overrides=kinds,
        )  # fmt: skip
        changes = []
        for first, single, wrong, actual in zip(
            states[0]["w"].flatten().tolist(),
            found["w"].flatten().tolist(),
            rounded[0]["w"].flatten().tolist(),
            out["w"].flatten().tolist(),
            strict=True,
        ):
            change = Fraction(single) - Fraction(wrong)
            changes.append(abs(change))
            # One rounding of the change, and one of the sum.
            assert abs(Fraction(actual) - Fraction(first) - change) <= EPSILON * max(
                abs(Fraction(first)), abs(Fraction(actual)), abs(change)
            )
        assert min(changes) > 0
        assert report.kinds[Kind.FC].absolute_change == pytest.approx(
            float(sum(changes)), rel=1e-12
        )


def test_no_change_in_float32_leaves_every_bit(tmp_path: Path) -> None:
    """Windows whose differences float32 cannot hold have no spread to move by."""
    bundle = tmp_path / "spread"
    save_bundle(random_bundle(SIZE, preparation=Preparation.SPREAD), bundle)
    values = torch.tensor([1e30 + 1e15, -1 / 3, 7e-40, 5e-324, -0.0], dtype=torch.float64)
    tiny = torch.tensor([0.0, 0.0, 0.0, 0.0, 1e-60], dtype=torch.float64)
    states = [{"b": values * (1 + 1e-12 * k) + k * tiny} for k in range(SIZE)]
    out, report = predict(write_trajectory(tmp_path, states), tmp_path / "out", "known", bundle)
    assert same_bytes(out["b"], states[0]["b"])
    assert report.frozen == 1  # the least that there is stays it, times whatever


# ---------------------------------------------------------------------- with all else


@pytest.mark.parametrize(
    "method", [method.name for method in METHODS if method.hyper_model != "settle"]
)
def test_bytes_depend_on_nothing_but_the_inputs(method: str, bundle: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"fc.weight": (170, 201), "conv.weight": (8, 9, 3, 3), "fc.bias": (70,)}
    dtypes = {"fc.weight": torch.float64, "conv.weight": torch.float32, "fc.bias": torch.float64}
    states = [
        {name: torch.randn(shape, generator=generator).to(dtypes[name]) + 1e-12 * k
         for name, shape in shapes.items()}
        for k in range(SIZE)
    ]  # fmt: skip
    paths = write_trajectory(tmp_path, states)
    contents = set()
    wishes: dict[str, Any]
    for wishes in ({}, {"threads": 2, "max_memory": 16 << 20}):
        predict(paths, tmp_path / "out", method, bundle, steps=2, overrides=(), **wishes)
        contents.add((tmp_path / "out").read_bytes())
    assert len(contents) == 1
    weights = str(bundle) if find_method(method).reads_bundle else None
    found = verify(tmp_path / "out", paths, spans=2, seed=1, weights=weights)
    assert not found.differences


def test_a_history_in_float64_is_left_as_it_is() -> None:
    history = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    before = history.clone()
    predictor = LinearPredictor({Kind.FC: [[0.5, 0.25]]})
    out = torch.empty(2, dtype=torch.float64)
    predictor.predict(Batch(Kind.FC, (), 2).block(slice(0, 2)), 1, history, out)
    assert torch.equal(history, before)
    assert out.tolist() == [1.25, 2.0]
