"""KNOWN's rivals: golden values from float64 numpy, invariants, options, whole tensors, errors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from know_cli.engine.report import Report
from know_cli.engine.settings import FrozenMode, NormMode, Settings
from know_cli.errors import CheckpointError, UsageError
from know_cli.kinds import Kind, Override
from know_cli.known.bundle import Bundle, load_bundle, save_bundle
from know_cli.methods.inputs import Inputs
from know_cli.methods.lstsq import iterate
from know_cli.methods.registry import (
    METHODS,
    complete_options,
    describe_methods,
    find_method,
    parse_options,
)
from know_cli.methods.tsv import SingularPredictor, decomposition_nbytes, matrices, merge
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request
from tests.support.bundles import random_bundle
from tests.support.by_hand import by_hand, rescaled_by_hand
from tests.support.command import Command
from tests.support.folders import digest, shards
from tests.support.trajectories import KINDS, network, states, write_trajectory

Array = np.ndarray[Any, np.dtype[np.float64]]
RULE = {
    "conv": [0.1, -0.2, 0.05, -0.75, 1.8],
    "fc": [0.0, 0.3, -0.4, -0.5, 1.59],
    "bias": [-0.1, 0.2, -0.3, -1.0, 2.2],
}
WITHOUT_BUNDLE = [method.name for method in METHODS if not method.reads_bundle]


@pytest.fixture(scope="module")
def ruled_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bundle whose manifest has a linear rule."""
    path = tmp_path_factory.mktemp("ruled") / "known"
    save_bundle(random_bundle(), path, {"rule": RULE})
    return path


def predict(
    paths: list[Path],
    output: Path,
    method: str,
    options: Mapping[str, float | str] | None = None,
    **wishes: Any,
) -> tuple[dict[str, Tensor], Report]:
    own = {key: wishes.pop(key) for key in ("weights", "rate", "every_step") if key in wishes}
    request = Request(
        paths, output, settings=Settings(**wishes), device="cpu", force=True, method=method,
        options=options or {}, **own,
    )  # fmt: skip
    with open_prediction(request) as opened:
        report = opened.execute()
    return load_file(output), report


def window_of(trajectory: list[dict[str, Tensor]], name: str) -> Array:
    """``[S, …]`` float64 from what is float32 to the program, most-forgotten first."""
    stacked: Array = np.stack([s[name].float().double().numpy() for s in reversed(trajectory)])
    return stacked


# ---------------------------------------------------------------------- golden values


def fitted(x: Array, window: Array, at: float) -> Array:
    """The least-squares line of every element through numpy's own fit."""
    flat = window.reshape(len(window), -1)
    slope, intercept = np.polyfit(x, flat, 1)
    value: Array = (slope * at + intercept).reshape(window.shape[1:])
    return value


def merged_by_hand(window: Array) -> Array:
    """TSV-Merge of one matrix, as the paper writes it; the task vectors must be in general position."""
    tasks = len(window) - 1
    kept = min(window.shape[1:]) // tasks
    parts = [np.linalg.svd(window[k] - window[-1], full_matrices=False) for k in range(tasks)]
    u = np.concatenate([part[0][:, :kept] for part in parts], axis=1)
    s = np.concatenate([part[1][:kept] for part in parts])
    v = np.concatenate([part[2][:kept].T for part in parts], axis=1)
    (p, _, q), (x, _, y) = (np.linalg.svd(m, full_matrices=False) for m in (u, v))
    merged: Array = (p @ q) @ np.diag(s) @ (x @ y).T
    return merged


def golden(method: str, name: str, window: Array, step: int, options: dict[str, Any]) -> Array:
    """What a method predicts for a tensor of :func:`~tests.support.trajectories.network`, float64."""
    newest, size = window[-1], len(window)
    alpha = options.get("alpha", 1.0)
    if method == "naive":
        return newest
    if method == "last":
        return window[0]
    if method == "average":
        return window.mean(axis=0)
    if method == "shrink":
        kept = KINDS[name] is Kind.BIAS and options.get("of") != "all"
        return newest if kept else options.get("lambda", 0.97) ** step * newest
    if method == "task-vector":
        other = window[0] if options.get("range") == "full" else window[-2]
        return newest + step * alpha * (newest - other)
    if method == "linear":
        return fitted(np.arange(size - 1, -1, -1), window, -step)
    if method == "logfit" and options.get("of") == "position":
        return fitted(np.log(np.arange(1, size + 1)), window, math.log(size + step))
    if method == "logfit":
        x = np.log(0.5 ** np.arange(size - 1, -1, -1))
        return fitted(x, window, step * math.log(2))
    if method == "lstsq":
        for _ in range(step):
            rule = np.array(RULE[KINDS[name].value])
            window = np.concatenate([window[1:], np.tensordot(rule, window, 1)[None]])
        return window[-1]
    assert method == "tsv"
    if newest.ndim < 2:
        return newest - step * alpha * (window[:-1] - newest).mean(axis=0)
    flat = window.reshape(size, len(newest), -1)
    return newest - step * alpha * merged_by_hand(flat).reshape(newest.shape)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("naive", {}), ("last", {}), ("average", {}), ("shrink", {}), ("shrink", {"lambda": 0.9, "of": "all"}),
    ("task-vector", {}), ("task-vector", {"alpha": -0.4}), ("task-vector", {"alpha": 0.3, "range": "full"}),
    ("linear", {}), ("logfit", {}), ("logfit", {"of": "position"}), ("lstsq", {}), ("tsv", {}),
    ("tsv", {"alpha": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("method", "options"), CASES)
def test_golden_values(
    method: str, options: dict[str, Any], steps: int, trajectory_paths: list[Path],
    ruled_bundle: Path, tmp_path: Path,
) -> None:  # fmt: skip
    wishes = {"weights": str(ruled_bundle)} if method == "lstsq" else {}
    out, report = predict(
        trajectory_paths, tmp_path / "out", method, options, steps=steps, **wishes
    )
    trajectory = states()
    for name in KINDS:
        expected = torch.from_numpy(
            np.asarray(golden(method, name, window_of(trajectory, name), steps, options))
        )
        dtype = trajectory[0][name].dtype
        assert out[name].dtype == dtype
        unit = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        torch.testing.assert_close(out[name].double(), expected, rtol=unit, atol=1e-8, msg=name)
    predicted = {*KINDS, *(("bn1.weight", "bn1.bias") if method in ("average", "last") else ())}
    assert report.predicted == sum(trajectory[0][name].numel() for name in predicted)


def test_the_last_checkpoint_comes_with_its_normalisation_layers(
    trajectory_paths: list[Path], tmp_path: Path
) -> None:
    out, _ = predict(trajectory_paths, tmp_path / "out", "last")
    first, last = states()[0], states()[-1]
    moved = [name for name in last if not torch.equal(first[name], last[name])]
    assert {"bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"} <= set(moved)
    assert [name for name in moved if not torch.equal(out[name], last[name])] == []


@pytest.mark.parametrize("bad", ["absent", "shorter", "not finite"])
def test_the_last_checkpoint_comes_with_statistics_that_another_has_not(
    bad: str, tmp_path: Path
) -> None:
    trajectory = states()
    name = "bn1.running_mean"
    trajectory[-1][name][0] = -0.0
    if bad == "absent":
        del trajectory[1][name]
    elif bad == "shorter":
        trajectory[1][name] = trajectory[1][name][:3].clone()
    else:
        trajectory[1][name][0] = math.inf
    out, _ = predict(write_trajectory(tmp_path, trajectory), tmp_path / "out", "last")
    last = trajectory[-1]
    for statistic in (name, "bn1.running_var"):
        assert torch.equal(out[statistic].view(torch.int32), last[statistic].view(torch.int32))


def test_every_method_has_golden_values() -> None:
    # That for runs has its own in tests/settle.
    assert {name for name, _ in CASES} | {"known", "noise", "settle"} == {m.name for m in METHODS}


def coin(bits: list[int]) -> int:
    """The sign of a window, in Python's own integers."""
    mask, state = (1 << 64) - 1, 0
    for value in bits:
        state = (state + 0x9E3779B97F4A7C15 + value) & mask
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return -1 if state >> 63 else 1


@pytest.mark.parametrize("steps", [1, 3])
def test_noise_has_known_s_sizes_and_its_own_signs(
    trajectory_paths: list[Path], bundle_path: Path, tmp_path: Path, steps: int
) -> None:
    out, _ = predict(
        trajectory_paths, tmp_path / "out", "noise", steps=steps, weights=str(bundle_path)
    )
    bundle = load_bundle(bundle_path)
    for name in ("conv1.weight", "fc.weight", "fc.bias", "scale"):
        window = window_of(states(), name).reshape(5, -1)
        shifted = window
        for _ in range(steps):
            known = by_hand(bundle.states[KINDS[name]], shifted.T, bundle.preparation)
            shifted = np.concatenate([shifted[1:], known[None]])
        bits = window.astype(np.float32).view(np.uint32).T.tolist()
        signs = np.array([coin(row) for row in bits])
        expected = window[-1] + signs * np.abs(shifted[-1] - window[-1])
        np.testing.assert_allclose(out[name].numpy().ravel(), expected, rtol=0, atol=1e-6)
        if len(signs) > 100:
            assert abs(signs.mean()) < 4 / math.sqrt(len(signs))


# ---------------------------------------------------------------------- invariants

NUMBERS = st.floats(-1000, 1000, width=32)


@pytest.mark.parametrize(
    "method", ["naive", "last", "average", "linear", "logfit", "task-vector", "tsv"]
)
@given(
    values=st.lists(NUMBERS, min_size=1, max_size=40),
    size=st.integers(2, 7),
    steps=st.integers(1, 8),
)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_constant_history_stays_bit_by_bit(
    method: str, values: list[float], size: int, steps: int, tmp_path: Path
) -> None:
    row = torch.tensor(values)
    state = {"w": row.outer(torch.linspace(0.5, 2, 9)), "b": row}
    out, _ = predict(
        write_trajectory(tmp_path, [state] * size), tmp_path / "out", method, steps=steps,
        frozen=FrozenMode.PREDICT,
    )  # fmt: skip
    assert all(torch.equal(out[name], tensor) for name, tensor in state.items())


@given(
    values=st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=30),
    size=st.integers(3, 16),
    steps=st.integers(1, 8),
)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lines_are_extrapolated_exactly(
    values: list[tuple[float, float]], size: int, steps: int, tmp_path: Path
) -> None:
    start, slope = torch.tensor(values, dtype=torch.float64).T
    largest = float(start.abs().max() + 16 * slope.abs().max())
    for method, options, position in (
        ("linear", {}, lambda k: -k),
        ("task-vector", {}, lambda k: -k),
        ("logfit", {}, lambda k: -k),
        ("logfit", {"of": "position"}, lambda k: math.log(size - k)),
    ):
        line = {k: start + slope * position(k) for k in range(-steps, size)}
        paths = write_trajectory(tmp_path, [{"b": line[k].float()} for k in range(size)])
        out, _ = predict(
            paths, tmp_path / "out", method, options, steps=steps, frozen=FrozenMode.PREDICT,
            # Whole numbers that grow would be taken for counters.
            overrides=(Override("b", Kind.BIAS),),
        )  # fmt: skip
        # What float32 rounds off the inputs is all that is lost; a step of 8 magnifies it.
        error = (out["b"].double() - line[-steps]).abs().max()
        assert error <= 20 * 2**-24 * (largest + 1e-30)


@pytest.mark.parametrize("method", [*WITHOUT_BUNDLE, "lstsq", "noise"])
def test_bytes_depend_on_nothing_but_the_inputs(
    method: str, tmp_path: Path, ruled_bundle: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    trajectory = []
    for _ in range(5):
        shapes = {"conv1.weight": (60, 30, 3, 3), "fc.weight": (130, 101), "fc.bias": (40_000,)}
        trajectory.append({n: torch.randn(s, generator=generator) for n, s in shapes.items()})
    paths = write_trajectory(tmp_path, trajectory)
    wishes: dict[str, Any] = {"steps": 2}
    if find_method(method).reads_bundle:
        wishes["weights"] = str(ruled_bundle)
    predict(paths, tmp_path / "one", method, **wishes)
    predict(paths, tmp_path / "two", method, threads=3, max_memory=32 << 20, **wishes)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_noise_does_not_depend_on_what_is_beside(tmp_path: Path, bundle_path: Path) -> None:
    trajectory = states()
    out, _ = predict(
        write_trajectory(tmp_path, trajectory), tmp_path / "out", "noise", weights=str(bundle_path)
    )
    for state in trajectory:
        del state["double.weight"], state["half.weight"]
    paths = write_trajectory(tmp_path, trajectory)
    alone, _ = predict(paths, tmp_path / "alone", "noise", weights=str(bundle_path))
    assert all(torch.equal(out[name], tensor) for name, tensor in alone.items())


def test_naive_writes_the_first_checkpoint_with_other_metadata(
    trajectory_paths: list[Path], tmp_path: Path
) -> None:
    out, _ = predict(trajectory_paths, tmp_path / "out", "naive", steps=3)
    for name, tensor in network().items():
        assert torch.equal(out[name], tensor), name


@pytest.mark.parametrize("steps", [1, 4])
def test_every_step_writes_what_single_runs_write(
    steps: int, trajectory_paths: list[Path], tmp_path: Path, ruled_bundle: Path
) -> None:
    for method in ("tsv", "linear", "noise"):
        wishes = {"weights": str(ruled_bundle)} if method == "noise" else {}
        predict(
            trajectory_paths, tmp_path / "out.safetensors", method, steps=5, every_step=True, **wishes
        )  # fmt: skip
        predict(trajectory_paths, tmp_path / "single", method, steps=steps, **wishes)
        assert digest(tmp_path / f"out.x{2**steps}.safetensors") == digest(tmp_path / "single")


def test_iterating_a_rule_that_is_a_line_stays_on_the_line() -> None:
    assert iterate([0.0, -1.0, 2.0], 3) == [[0, -1, 2], [0, -2, 3], [0, -3, 4]]


def test_linear_and_logfit_differ_where_sizes_are_not_geometric(tmp_path: Path) -> None:
    fractions = [1.0, 0.5, 0.2, 0.1, 0.01]
    recorded = [
        {"know.session": str(k), "know.fraction": repr(f), "know.rate": "0.5", "know.trajectory": "t"}
        for k, f in enumerate(fractions)
    ]  # fmt: skip
    paths = write_trajectory(tmp_path, metadata=recorded)
    out, _ = predict(paths, tmp_path / "out", "logfit", steps=2)
    window = window_of(states(), "fc.weight")
    expected = fitted(np.log(fractions[::-1]), window, 2 * math.log(2))
    np.testing.assert_allclose(out["fc.weight"].numpy(), expected, rtol=1e-6, atol=1e-8)
    line, _ = predict(paths, tmp_path / "line", "linear", steps=2)
    assert not torch.allclose(line["fc.weight"], out["fc.weight"], atol=1e-4)


@pytest.mark.parametrize(
    ("sessions", "positions"), [((0, 2, 4), (0, 1, 2)), ((1, 2, 4), (0, 1, 3))]
)
def test_linear_takes_recorded_sessions(
    sessions: tuple[int, ...], positions: tuple[float, ...], tmp_path: Path
) -> None:
    recorded = [
        {"know.session": str(k), "know.fraction": repr(0.5**k), "know.rate": "0.5", "know.trajectory": "t"}
        for k in sessions
    ]  # fmt: skip
    paths = write_trajectory(tmp_path, states(3), metadata=recorded)
    out, _ = predict(paths, tmp_path / "out", "linear")
    expected = fitted(np.array(positions[::-1]), window_of(states(3), "fc.weight"), -1)
    np.testing.assert_allclose(out["fc.weight"].numpy(), expected, rtol=1e-6, atol=1e-8)


# ---------------------------------------------------------------------- whole tensors


def test_tsv_of_one_task_is_the_task_vector(tmp_path: Path) -> None:
    paths = write_trajectory(tmp_path, states(2))
    out, _ = predict(paths, tmp_path / "out", "tsv", {"alpha": 0.7}, steps=2)
    plain, _ = predict(paths, tmp_path / "plain", "task-vector", {"alpha": 0.7}, steps=2)
    for name in KINDS:
        torch.testing.assert_close(out[name], plain[name], rtol=1e-5, atol=1e-7)


def test_tsv_adds_tasks_that_have_nothing_in_common_and_averages_equal_ones() -> None:
    """Orthogonal singular vectors are left alone; shared ones leave the mean of the tasks."""
    newest = torch.randn(12, 10, generator=torch.Generator().manual_seed(0)).double()
    one, two = torch.zeros(2, 12, 10).double()
    one[0, 0], one[1, 1], two[5, 5], two[7, 6] = 3.0, 2.0, 1.0, 4.0
    torch.testing.assert_close(merge(torch.stack([newest + two, newest + one, newest])), one + two)
    rank_one = torch.outer(torch.arange(12.0), torch.arange(10.0)).double()
    shared = torch.stack([newest + 3 * rank_one, newest + rank_one, newest])
    torch.testing.assert_close(merge(shared), 2 * rank_one)


@given(st.integers(2, 6), st.integers(5, 14), st.integers(5, 14))
@settings(max_examples=20)
def test_tsv_of_the_transposed_is_the_transpose(size: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(size + 100 * rows + 10_000 * columns)
    window = torch.randn(size, rows, columns, generator=generator)
    torch.testing.assert_close(merge(window.mT), merge(window).T)


def test_what_is_a_matrix_to_tsv() -> None:
    predictor = SingularPredictor(1.0, 5)
    assert predictor.takes(Kind.CONV, (8, 3, 3, 3))
    assert predictor.takes(Kind.FC, (4, 4))
    assert predictor.takes(Kind.FC, (2, 9, 8))
    for kind, shape in (
        (Kind.FC, (3, 100)), (Kind.CONV, (3, 3, 3, 3)), (Kind.FC, (0, 4)), (Kind.FC, (0, 9, 9)),
        (Kind.FC, (1, 1, 768)), (Kind.BIAS, (9, 9)), (Kind.BIAS, (9,)), (Kind.FC, ()),
    ):  # fmt: skip
        assert not predictor.takes(kind, shape)
    assert matrices(Kind.CONV, (8, 3, 3, 3)) == (1, 8, 27)


def test_tsv_takes_stacked_matrices_one_by_one(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    trajectory = [{"mlp.experts.w": torch.randn(3, 9, 8, generator=generator)} for _ in range(5)]
    out, _ = predict(write_trajectory(tmp_path, trajectory), tmp_path / "out", "tsv")
    window = window_of(trajectory, "mlp.experts.w")
    for k in range(3):
        expected = window[-1, k] - merged_by_hand(window[:, k])
        np.testing.assert_allclose(out["mlp.experts.w"][k].numpy(), expected, atol=1e-5)


def test_a_matrix_beyond_the_memory_is_refused_by_name(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    trajectory = [{"fc.weight": torch.randn(400, 300, generator=generator)} for _ in range(5)]
    paths = write_trajectory(tmp_path, trajectory)
    history = 400 * 300 * (4 * (5 + 1) + 1 + 1)
    stretch = 64 * 16_384  # as it is cast and written: no rows are predicted in longer batches
    needed = history + decomposition_nbytes(Kind.FC, (400, 300)) + stretch
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match=f"tensor 'fc.weight' whole, which takes {needed} bytes"):
        predict(paths, tmp_path / "out", "tsv", max_memory=needed - 1)
    assert sorted(tmp_path.iterdir()) == before
    request = Request(paths, tmp_path / "out", settings=Settings(max_memory=needed), method="tsv")
    with open_prediction(request) as opened:
        assert opened.plan.memory == needed
        assert [batch.rows for batch in opened.plan.whole_tensors()] == [120_000]
        assert list(opened.plan.batches()) == []
    # The same checkpoints in less memory, with that tensor left alone.
    overrides = (Override("fc.weight", Kind.COPY),)
    out, _ = predict(paths, tmp_path / "out", "tsv", max_memory=8 << 20, overrides=overrides)
    assert torch.equal(out["fc.weight"], trajectory[0]["fc.weight"])


def test_values_of_a_whole_tensor_that_are_not_finite(tmp_path: Path) -> None:
    trajectory = states()
    trajectory[2]["fc.weight"][3, 4] = math.nan
    paths = write_trajectory(tmp_path, trajectory)
    with pytest.raises(CheckpointError, match=r"ckpt2.safetensors: tensor 'fc.weight'.*not finite"):
        predict(paths, tmp_path / "out", "tsv")
    out, report = predict(paths, tmp_path / "out", "tsv", allow_nonfinite=True)
    assert report.nonfinite == 1
    assert out["fc.weight"][3, 4] == trajectory[0]["fc.weight"][3, 4]
    window = window_of(trajectory, "fc.weight")
    window[:, 3, 4] = 0
    expected = window[-1] - merged_by_hand(window)
    expected[3, 4] = trajectory[0]["fc.weight"][3, 4]
    np.testing.assert_allclose(out["fc.weight"].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("method", ["tsv", "task-vector"])
def test_predictions_that_are_not_finite_are_replaced_where_allowed(
    method: str, tmp_path: Path
) -> None:
    trajectory = [{"w": torch.eye(6) * 0.1} for _ in range(3)]
    for k, state in enumerate(trajectory):
        state["w"][0, 0] = 3e38 * (1 - 1.5 * (k > 0))
    paths = write_trajectory(tmp_path, trajectory)
    out, report = predict(paths, tmp_path / "out", method, steps=2, allow_nonfinite=True)
    assert torch.equal(out["w"], trajectory[0]["w"])
    assert report.replaced == 1


# ---------------------------------------------------------------------- with all else


@pytest.mark.parametrize("method", [n for n in WITHOUT_BUNDLE if n not in ("average", "last")])
def test_normalisation_and_frozen_tensors_are_as_with_known(
    method: str, trajectory_paths: list[Path], tmp_path: Path
) -> None:
    out, report = predict(trajectory_paths, tmp_path / "a", method)
    mean, variance = rescaled_by_hand(network(), out)
    torch.testing.assert_close(out["bn1.running_mean"], mean)
    torch.testing.assert_close(out["bn1.running_var"], variance)
    assert report.reasons["copy: frozen: the same in all checkpoints"] == 2
    assert torch.equal(out["frozen.weight"], network()["frozen.weight"])
    for mode in (NormMode.COPY, NormMode.RESET):
        out, _ = predict(trajectory_paths, tmp_path / "b", method, norm=mode)
        expected = network()["bn1.weight"] if mode is NormMode.COPY else torch.ones(8)
        assert torch.equal(out["bn1.weight"], expected)
    out, _ = predict(trajectory_paths, tmp_path / "c", method, norm=NormMode.PREDICT)
    if method not in ("naive", "shrink"):
        assert not torch.equal(out["bn1.weight"], network()["bn1.weight"])


@pytest.mark.parametrize("size", [2, 3, 16])
@pytest.mark.parametrize("method", WITHOUT_BUNDLE)
def test_any_number_of_checkpoints(method: str, size: int, tmp_path: Path) -> None:
    out, _ = predict(write_trajectory(tmp_path, states(size)), tmp_path / "out", method)
    assert out.keys() == network().keys()
    for name in KINDS:
        assert torch.isfinite(out[name]).all()


def test_metadata_and_description_tell_the_method(
    trajectory_paths: list[Path], ruled_bundle: Path, tmp_path: Path
) -> None:
    predict(trajectory_paths, tmp_path / "ruled", "lstsq", weights=str(ruled_bundle))
    # Θ0 is a prediction, with a bundle that the next one has not.
    paths = [tmp_path / "ruled", *trajectory_paths[1:]]
    request = Request(
        paths, tmp_path / "out", method="task-vector", options={"alpha": 0.5}, device="cpu"
    )
    with open_prediction(request) as opened:
        described = opened.describe()
        opened.execute()
    assert described["method"] == "task-vector"
    assert described["options"] == {"alpha": 0.5, "range": "session"}
    assert described["device"] == "cpu"
    assert not described.keys() & {"bundle", "target"}
    found = {}
    for name in ("ruled", "out"):
        with safe_open(tmp_path / name, "pt") as file:
            found[name] = file.metadata()
    assert found["ruled"]["know.method"] == "lstsq"
    assert found["ruled"]["know.bundle"] == load_bundle(ruled_bundle).digest
    assert "know.options" not in found["ruled"]
    assert found["out"]["know.method"] == "task-vector"
    assert json.loads(found["out"]["know.options"]) == described["options"]
    assert not found["out"].keys() & {"know.bundle", "know.target"}


# ---------------------------------------------------------------------- errors


def test_names_and_options_that_are_wrong() -> None:
    task_vector = find_method("task-vector")
    for text, message in (
        ("beta=1", "--option beta: --method task-vector takes alpha and range"),
        ("alpha", "--option alpha: write NAME=VALUE; --method task-vector takes alpha and range"),
        ("alpha=much", "--option alpha=much: is not a number"),
        ("alpha=inf", "--option alpha=inf: is not a finite number"),
        ("range=half", "--option range=half: is none of session, full"),
    ):
        with pytest.raises(UsageError) as caught:
            parse_options(task_vector, [text])
        assert str(caught.value) == message
    with pytest.raises(UsageError, match="--option alpha: --method linear takes no options"):
        complete_options(find_method("linear"), {"alpha": 1.0})
    with pytest.raises(UsageError, match="--method best: is none of known, naive, last"):
        find_method("best")
    assert parse_options(task_vector, ["alpha=1", "alpha=2"]) == {"alpha": 2.0}


def test_the_library_refuses_what_the_command_line_does(
    trajectory_paths: list[Path], bundle_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--method linear reads no KNOWN.*known, lstsq, noise"):
        predict(trajectory_paths, tmp_path / "out", "linear", weights=str(bundle_path))
    with pytest.raises(UsageError, match="is not a finite number"):
        predict(trajectory_paths, tmp_path / "out", "shrink", {"lambda": math.nan})
    with pytest.raises(UsageError, match="--method best"):
        predict(trajectory_paths, tmp_path / "out", "best")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (None, "has no 'rule' in a manifest.json, which --method lstsq applies"),
        ({"conv": [1.0] * 5, "fc": [1.0] * 5}, "must have 5 finite numbers for bias"),
        ({**RULE, "fc": [1.0] * 4}, "must have 5 finite numbers for fc"),
        ({**RULE, "conv": [1.0] * 4 + ["1"]}, "must have 5 finite numbers for conv"),
        ({**RULE, "conv": [1.0] * 4 + [math.nan]}, "must have 5 finite numbers for conv"),
        ([1.0] * 5, "must have 5 finite numbers for conv"),
    ],
)
def test_a_bundle_without_a_rule(
    rule: Any, message: str, trajectory_paths: list[Path], tmp_path: Path
) -> None:
    details = {} if rule is None else {"rule": rule}
    save_bundle(random_bundle(), tmp_path / "bundle", details)
    with pytest.raises(CheckpointError, match=message):
        predict(trajectory_paths, tmp_path / "out", "lstsq", weights=str(tmp_path / "bundle"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["lstsq", "noise"])
def test_a_bundle_of_another_length(method: str, ruled_bundle: Path, tmp_path: Path) -> None:
    paths = write_trajectory(tmp_path, states(4))
    with pytest.raises(CheckpointError, match="this KNOWN reads 5 checkpoints, 4 were given"):
        predict(paths, tmp_path / "out", method, weights=str(ruled_bundle))


def test_logfit_needs_sizes_that_differ(tmp_path: Path) -> None:
    recorded = [
        {"know.session": str(k), "know.fraction": "1.0", "know.rate": "0.5", "know.trajectory": "t"}
        for k in range(5)
    ]
    paths = write_trajectory(tmp_path, metadata=recorded)
    with pytest.raises(CheckpointError, match="the same share of the data"):
        predict(paths, tmp_path / "out", "logfit")
    predict(paths, tmp_path / "out", "logfit", {"of": "position"})


def test_a_bundle_is_only_for_methods_that_are_registered_with_one(
    trajectory_paths: list[Path], tmp_path: Path
) -> None:
    with open_prediction(Request(trajectory_paths, tmp_path / "out", method="naive")) as opened:
        inputs = Inputs(opened.trajectory, 1, 0.5, (torch.device("cpu"),), {})
        with pytest.raises(ValueError, match="not registered"):
            inputs.bundle_of(Bundle)


# ---------------------------------------------------------------------- the command line


def test_the_command_line_has_every_method(know: Command) -> None:
    text = know("predict", "--help").stdout
    for line in describe_methods().splitlines():
        assert f"  {line}\n" in text
        assert len(line) <= 78


@pytest.mark.parametrize(
    "method", [method.name for method in METHODS if method.hyper_model != "settle"]
)
def test_methods_through_the_command_line(
    method: str, tmp_path: Path, know: Command, ruled_bundle: Path
) -> None:
    write_trajectory(tmp_path)
    weights = ["--weights", ruled_bundle] if find_method(method).reads_bundle else []
    done = know("predict", "ckpt0..ckpt4", "-o", "out", "--method", method, *weights, "--json", "r.json", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["method"] == method
    if method != "known":
        assert f"rate 0.5, {method}" in done.stdout


def test_a_rival_as_users_run_it_on_folders(tmp_path: Path, know: Command) -> None:
    """A process of its own; sharded folders in and out, to the same values as files."""
    trajectory = [{n: s[n] for n in ("fc.weight", "conv1.weight", "fc.bias")} for s in states()]
    write_trajectory(tmp_path, trajectory)
    for k, state in enumerate(trajectory):
        folder = shards(tmp_path / f"session{k}")
        names = {"fc.weight": 0, "conv1.weight": 1, "fc.bias": 1}
        for number in range(2):
            part = {name: state[name] for name, shard in names.items() if shard == number}
            save_file(part, folder / f"model-{number + 1:05d}-of-00002.safetensors")
        weight_map = {n: f"model-{s + 1:05d}-of-00002.safetensors" for n, s in names.items()}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    arguments = ["--method", "tsv", "--option", "alpha=0.5", "--steps", 2]
    done = know("predict", "session0..session4", "-o", "out", *arguments, cwd=tmp_path, process=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "5 checkpoints at rate 0.5, tsv alpha=0.5" in done.stdout
    out = {}
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        out.update(load_file(file))
    single = know("predict", "ckpt0..ckpt4", "-o", "single", *arguments, cwd=tmp_path)
    assert single.returncode == 0, single.stderr
    expected = load_file(tmp_path / "single")
    assert out.keys() == expected.keys()
    assert all(torch.equal(out[name], tensor) for name, tensor in expected.items())
