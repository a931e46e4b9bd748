"""What pictures show: the plane of checkpoints, combinations in it, curves, places of labels."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from know_cli.checkpoints import open_checkpoint, open_trajectory, reading
from know_cli.checkpoints.reading import CHUNK_ROWS
from know_cli.engine.progress import Silent
from know_cli.errors import CheckpointError, UsageError
from know_cli.evaluation import results
from know_cli.evaluation.anchors import ANCHORS
from know_cli.evaluation.statistics import Status
from know_cli.evaluation.variants import VARIANTS
from know_cli.kinds import parse_override
from know_cli.plots import curves as of_curves
from know_cli.plots import grid as landscape
from know_cli.plots import labels, picture, plane, points
from know_cli.plots.labels import Box
from know_cli.plots.results import draw_results
from tests.support.trajectories import PREDICTED, Values, flat, states, write_trajectory

RESULTS = Path(results.__file__).parents[2] / "docs" / "results" / "downstream.json"


def products_of(vectors: Values) -> Values:
    moved = vectors - vectors[0]
    found: Values = moved @ moved.T
    return found


def vectors(seed: int, count: int, length: int, rank: int | None = None) -> Values:
    generator = np.random.default_rng(seed)
    found: Values = generator.normal(size=(count, length))
    if rank is not None:
        found = generator.normal(size=(count, rank)) @ generator.normal(size=(rank, length))
    return found + 10 * generator.normal(size=length)


def between(coordinates: Values) -> Values:
    found: Values = np.linalg.norm(coordinates[:, None] - coordinates[None], axis=-1)
    return found


# --- inner products ----------------------------------------------------------------------------


def test_inner_products_are_those_of_the_flattened_parameters(tmp_path: Path) -> None:
    paths = write_trajectory(tmp_path)
    expected = products_of(np.stack([flat(state) for state in states()]))
    with points.open_points(paths) as opened:
        names = points.measured_tensors(opened.trajectory, ())
        assert set(names) == {*PREDICTED, "empty.weight"}
        for rows in (CHUNK_ROWS, 1, 7, 100):
            found = plane.inner_products(opened.checkpoints, names, Silent(), rows)
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)
            assert not found[0].any()
            assert not found[:, 0].any()


def test_kinds_that_are_copied_do_not_count(tmp_path: Path) -> None:
    paths = write_trajectory(tmp_path)
    with open_trajectory(paths) as trajectory:
        names = points.measured_tensors(trajectory, (parse_override("bn1.*=copy"),))
        assert not [name for name in names if name.startswith("bn1")]
        with pytest.raises(UsageError, match="no parameters of kinds conv, fc or bias"):
            points.measured_tensors(trajectory, (parse_override("*=copy"),))


def test_reading_is_bounded_whatever_the_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = [{"w": torch.randn(3 * CHUNK_ROWS + 5) + k} for k in range(3)]
    paths = write_trajectory(tmp_path, large)
    read = []

    def counted(*arguments: Any) -> Tensor:
        values = reading.read_elements(*arguments)
        read.append(values.numel())
        return values

    monkeypatch.setattr(plane, "read_elements", counted)
    monkeypatch.setattr(landscape, "read_elements", counted)
    with points.open_points(paths) as opened:
        plane.inner_products(opened.checkpoints, ["w"], Silent())
        assert sum(read) == 3 * large[0]["w"].numel()
        landscape.combine(opened.checkpoints, ["w"], np.array([0.5, 0.25, 0.25]))
    assert max(read) == CHUNK_ROWS


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    trajectory = states(3)
    trajectory[1]["fc.weight"][3, 4] = float("nan")
    paths = write_trajectory(tmp_path, trajectory)
    with points.open_points(paths) as opened:
        names = points.measured_tensors(opened.trajectory, ())
        with pytest.raises(CheckpointError, match=r"ckpt1.*'fc.weight'.*--kind 'fc.weight=copy'"):
            plane.inner_products(opened.checkpoints, names, Silent())


def test_values_whose_distances_are_no_numbers_are_refused(tmp_path: Path) -> None:
    trajectory = [{"fc.weight": torch.eye(4, dtype=torch.float64) * 1e200 * k} for k in range(3)]
    with (
        points.open_points(write_trajectory(tmp_path, trajectory)) as opened,
        pytest.raises(CheckpointError, match=r"'fc.weight' has values that are too large"),
    ):
        plane.inner_products(opened.checkpoints, ["fc.weight"], Silent())


# --- principal axes ----------------------------------------------------------------------------

# Nine vectors of nine numbers may be so flat (those of 493) that inner products, in which an axis'
# length is squared, do not have the last axis to six digits.
SIZES = st.tuples(st.integers(0, 10_000), st.integers(3, 9), st.integers(12, 60))


@given(SIZES)
@settings(max_examples=60)
def test_axes_are_those_of_the_stacked_vectors(sizes: tuple[int, int, int]) -> None:
    stacked = vectors(*sizes)
    found = plane.principal_axes(products_of(stacked), len(stacked) - 1)
    left, lengths, right = np.linalg.svd(stacked - stacked.mean(0), full_matrices=False)
    count = len(stacked) - 1  # the last is zero
    assert found.coordinates.shape == (len(stacked), count)
    np.testing.assert_allclose(
        np.abs(found.coordinates), np.abs(left * lengths)[:, :count], rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(found.shares, (lengths**2 / sum(lengths**2))[:count], atol=1e-9)
    # The axes in the space of parameters, of length 1 and orthogonal.
    axes = found.combinations.T @ stacked
    np.testing.assert_allclose(axes @ axes.T, np.eye(count), atol=1e-6)
    np.testing.assert_allclose(np.abs(axes), np.abs(right)[:count], atol=1e-6)
    np.testing.assert_allclose(found.combinations.sum(0), 0, atol=1e-9)


@given(SIZES)
@settings(max_examples=60)
def test_the_plane_shortens_distances(sizes: tuple[int, int, int]) -> None:
    stacked = vectors(*sizes)
    found = plane.principal_axes(products_of(stacked), len(stacked) - 1)
    np.testing.assert_allclose(found.distances, between(stacked), atol=1e-6)
    shown = between(found.coordinates[:, :2])
    assert (shown <= found.distances + 1e-6).all()
    np.testing.assert_allclose(between(found.coordinates), found.distances, atol=1e-6)
    share = np.square(shown).sum() / np.square(found.distances).sum()
    assert share == pytest.approx(found.shares[:2].sum())
    outside = np.linalg.norm(found.coordinates[:, 2:], axis=1)
    np.testing.assert_allclose(found.off_plane, outside, atol=1e-5)


@given(st.integers(0, 10_000), st.integers(3, 6))
def test_three_checkpoints_or_any_in_a_plane_are_shown_exactly(seed: int, count: int) -> None:
    stacked = vectors(seed, count, 20, rank=2)
    found = plane.principal_axes(products_of(stacked), count - 1)
    assert found.coordinates.shape[1] == 2
    np.testing.assert_allclose(between(found.coordinates), between(stacked), atol=1e-6)
    np.testing.assert_allclose(found.off_plane, 0, atol=1e-4)
    assert found.shares.sum() == pytest.approx(1)


@given(SIZES, st.randoms())
@settings(max_examples=40)
def test_the_order_changes_nothing_but_the_order(sizes: tuple[int, int, int], random: Any) -> None:
    stacked = vectors(*sizes)
    order = list(range(len(stacked)))
    random.shuffle(order)
    one = plane.principal_axes(products_of(stacked), len(stacked) - 1)
    two = plane.principal_axes(products_of(stacked[order]), len(stacked) - 1)
    np.testing.assert_allclose(
        np.abs(one.coordinates[order]), np.abs(two.coordinates), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(one.shares, two.shares, atol=1e-9)


@given(SIZES)
@settings(max_examples=40)
def test_the_last_session_is_right_of_and_above_the_first(sizes: tuple[int, int, int]) -> None:
    stacked = vectors(*sizes)
    found = plane.principal_axes(products_of(stacked), 2)
    assert (found.coordinates[2] >= found.coordinates[0] - 1e-6).all()


def test_on_a_line_there_is_one_axis_and_no_plane() -> None:
    direction = np.random.default_rng(0).normal(size=30)
    found = plane.principal_axes(products_of(np.outer([0.0, 1.0, 3.0], direction)), 2)
    assert found.is_line
    coordinates, shares = found.first_two
    assert coordinates.shape == (3, 2)
    assert shares.tolist() == [1.0, 0.0]
    np.testing.assert_allclose(
        coordinates[:, 0], np.array([-4, -1, 5]) / 3 * np.linalg.norm(direction)
    )
    for use in (lambda: found.coefficients(0, 0), lambda: landscape.grid_around(found, 5, 0.1)):
        with pytest.raises(UsageError, match="on one line"):
            use()


def test_the_same_weights_have_no_axes() -> None:
    with pytest.raises(UsageError, match="the same weights"):
        plane.principal_axes(np.zeros((3, 3)), 2)


# --- combinations ------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 2])
def test_at_its_own_place_a_checkpoint_comes_back(tmp_path: Path, count: int) -> None:
    trajectory = states(3)
    with points.open_points(write_trajectory(tmp_path, trajectory)) as opened:
        names = points.measured_tensors(opened.trajectory, ())
        products = plane.inner_products(opened.checkpoints, names, Silent())
        found = plane.principal_axes(products, 2)
        for k in range(count):
            x, y = found.coordinates[k, :2]
            coefficients = found.coefficients(x, y)
            np.testing.assert_allclose(coefficients, np.eye(3)[k], atol=1e-9)
            state = landscape.combine(opened.checkpoints, names, coefficients)
            assert list(state) == list(opened.trajectory.first.tensors)
            for name, tensor in state.items():
                # What is not predicted is the first checkpoint's.
                expected = trajectory[k if name in PREDICTED else 0][name]
                assert tensor.dtype == expected.dtype
                assert tensor.shape == expected.shape
                torch.testing.assert_close(tensor, expected)


def test_combinations_are_those_of_the_tensors(tmp_path: Path) -> None:
    trajectory = states(4)
    coefficients = np.array([1.5, -2.0, 0.75, 0.75])
    with points.open_points(write_trajectory(tmp_path, trajectory)) as opened:
        state = landscape.combine(opened.checkpoints, ["fc.weight", "half.weight"], coefficients)
        again = landscape.combine(opened.checkpoints, ["fc.weight", "half.weight"], coefficients)
    for name in ("fc.weight", "half.weight"):
        parts = [c * s[name].double() for c, s in zip(coefficients, trajectory, strict=True)]
        expected = torch.stack(parts).sum(0).to(trajectory[0][name].dtype)
        torch.testing.assert_close(state[name], expected)
    assert torch.equal(state["conv1.weight"], trajectory[0]["conv1.weight"])
    # What the user's function does with a state dict does not reach the next one.
    for tensor in state.values():
        tensor.zero_()
    assert torch.equal(again["mask"], trajectory[0]["mask"])


@given(SIZES, st.integers(3, 20), st.floats(0, 2))
@settings(max_examples=40)
def test_a_grid_holds_all_checkpoints(
    sizes: tuple[int, int, int], size: int, margin: float
) -> None:
    stacked = vectors(*sizes)
    found = plane.principal_axes(products_of(stacked), len(stacked) - 1)
    grid = landscape.grid_around(found, size, margin)
    for axis, values in enumerate((grid.x, grid.y)):
        assert len(values) == size
        assert values[0] <= found.coordinates[:, axis].min() + 1e-9
        assert values[-1] >= found.coordinates[:, axis].max() - 1e-9
        np.testing.assert_allclose(np.diff(values), values[1] - values[0])
    assert np.ptp(grid.y) >= 0.59 * np.ptp(grid.x)


def test_an_evaluation_must_be_a_finite_number() -> None:
    for good in (3, 0.5, np.float32(2), torch.tensor(1.5), torch.tensor([2.0]), True):
        assert landscape.Evaluation("f", lambda s, g=good: g)({}) == float(good)
    for bad, words in (
        (None, "returned a NoneType, not a number"),
        ("high", "returned a str, not a number"),
        (torch.ones(2), "returned a Tensor, not a number"),
        ({"accuracy": 1}, "returned a dict, not a number"),
        (float("nan"), "returned nan, not a finite number"),
        (torch.tensor(float("inf")), "returned inf, not a finite number"),
    ):
        with pytest.raises(UsageError, match=f"m:f: {words}"):
            landscape.Evaluation("m:f", lambda s, b=bad: b)({})


# --- points ------------------------------------------------------------------------------------


def save(path: Path, **metadata: str) -> Path:
    save_file(states(1)[0], path, {name.replace("_", "."): v for name, v in metadata.items()})
    return path


def predicted(steps: int, **more: str) -> dict[str, str]:
    return {
        "know_session": str(-steps), "know_fraction": str(2.0**steps), "know_rate": "0.5",
        "know_trajectory": "t", "know_steps": str(steps), **more,
    }  # fmt: skip


def test_predictions_are_named_by_what_made_them(tmp_path: Path) -> None:
    paths = write_trajectory(tmp_path)
    made = [
        save(tmp_path / "a.safetensors", **predicted(2, know_method="known", know_target="continuation")),
        save(tmp_path / "b.safetensors", **predicted(1, know_method="shrink", know_options='{"lambda": 0.9}')),
        save(tmp_path / "c.safetensors", **predicted(1, know_method="known", know_target="continuation")),
        save(tmp_path / "d.safetensors", know_method="average", know_steps="3"),
        save(tmp_path / "e.safetensors"),
        save(tmp_path / "f.safetensors", know_method="linear", know_steps="1", know_options="["),
    ]  # fmt: skip
    others = {"more data": save(tmp_path / "m.safetensors")}
    with points.open_points(paths, [*((None, path) for path in made), ("mine", made[0])], others) as opened:  # fmt: skip
        found = [(p.name, p.label, p.series, p.role.value) for p in opened.points]
    assert found[:2] == [("Θ0", "Θ0", "sessions", "session"), ("Θ1", "Θ1", "sessions", "session")]
    # Predictions of one method stand together, in the order of their steps.
    assert found[5:] == [
        ("continuation ×2", "×2", "continuation", "prediction"),
        ("continuation ×4", "×4", "continuation", "prediction"),
        ("shrink lambda=0.9 ×2", "×2", "shrink lambda=0.9", "prediction"),
        ("average", "average", "average", "prediction"),
        ("e", "e", "e", "prediction"),
        ("linear step 1", "step 1", "linear", "prediction"),
        ("mine", "mine", "mine", "prediction"),
        ("more data", "more data", "more data", "other"),
    ]


def test_two_predictions_of_one_method_go_by_their_files(tmp_path: Path) -> None:
    paths = write_trajectory(tmp_path)
    facts = predicted(1, know_method="known", know_target="retrodiction")
    made = [save(tmp_path / f"{name}.safetensors", **facts) for name in ("one", "two")]
    with points.open_points(paths, [(None, path) for path in made]) as opened:
        assert [p.name for p in opened.points[5:]] == ["one", "two"]


def test_points_must_have_their_own_names_and_one_model(tmp_path: Path) -> None:
    paths = write_trajectory(tmp_path)
    with (
        pytest.raises(UsageError, match=r"also named 'Θ0'; name one yourself"),
        points.open_points(paths, [("Θ0", paths[1])]),
    ):
        pass
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    with (
        pytest.raises(CheckpointError, match="not of one model"),
        points.open_points(paths, [], {"x": tmp_path / "x.safetensors"}),
    ):
        pass


def test_a_folder_of_shards_is_a_checkpoint_like_any(tmp_path: Path) -> None:
    trajectory = states(3)
    paths: list[Path] = write_trajectory(tmp_path, trajectory)
    folder = tmp_path / "folder"
    folder.mkdir()
    names = sorted(trajectory[1])
    weight_map = {name: f"model-{1 + k % 2}-of-2.safetensors" for k, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({n: trajectory[1][n] for n in names if weight_map[n] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = []
    for chosen in (paths, [paths[0], folder, paths[2]], [folder, paths[0], paths[2]]):
        with points.open_points(chosen) as opened:
            measured = points.measured_tensors(opened.trajectory, ())
            products = plane.inner_products(opened.checkpoints, measured, Silent())
            state = landscape.combine(opened.checkpoints, measured, np.array([0.0, 0.5, 0.5]))
            found.append((products, state))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-12)
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in names)
    assert torch.equal(found[2][1]["bn1.running_mean"], trajectory[1]["bn1.running_mean"])


# --- labels ------------------------------------------------------------------------------------

FRAME = Box(0, 0, 1000, 800)


@given(
    st.lists(st.tuples(st.floats(20, 980), st.floats(20, 780)), min_size=1, max_size=12),
    st.floats(10, 80),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_labels_cover_neither_each_other_nor_points(
    spots: list[tuple[float, float]], width: float
) -> None:
    place = np.array(spots)
    obstacles = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
    found = labels.place_labels(place, [(width, 12.0)] * len(spots), obstacles, [], FRAME)
    assert len(found) == len(spots)
    for box in found:
        assert box.right - box.left == pytest.approx(width)
        assert FRAME.overlap(box) == pytest.approx(box.area)
    for one, other in itertools.combinations(found, 2):
        assert one.overlap(other) < 0.02 * one.area
    # A point has its label near it.
    for box, (x, y) in zip(found, spots, strict=True):
        distance = np.hypot((box.left + box.right) / 2 - x, (box.bottom + box.top) / 2 - y)
        assert distance < 6 * 12 + width


def test_labels_of_one_place_stand_around_it() -> None:
    place = np.full((8, 2), 400.0)
    boxes = labels.place_labels(place, [(40.0, 12.0)] * 8, [Box(395, 395, 405, 405)], [], FRAME)
    for one, other in itertools.combinations(boxes, 2):
        assert one.overlap(other) < 0.02 * one.area


def test_labels_keep_off_lines() -> None:
    place = np.array([[400.0, 400.0]])
    free = labels.place_labels(place, [(40.0, 12.0)], [], [], FRAME)[0]
    line = (np.array([400.0, 400.0]), np.array([600.0, 500.0]))
    (moved,) = labels.place_labels(place, [(40.0, 12.0)], [], [line], FRAME)
    assert free.length_inside(*line) > 0
    assert moved.length_inside(*line) == 0


@pytest.mark.filterwarnings("error")
@given(*[st.floats(-2, 3)] * 4)
@example(0.0, -1.0, 5e-324, 2.0)
@example(0.5, 0.5, 0.5, 0.5 + 2**-53)
def test_length_inside_is_that_of_the_samples(a: float, b: float, c: float, d: float) -> None:
    start, end = np.array([a, b]), np.array([c, d])
    steps = np.linspace(0, 1, 2001)[:, None]
    samples = start + steps * (end - start)
    inside = ((samples >= 0) & (samples <= 1)).all(1).mean()
    expected = inside * float(np.hypot(*(end - start)))
    assert Box(0, 0, 1, 1).length_inside(start, end) == pytest.approx(expected, abs=0.01)


# --- results -----------------------------------------------------------------------------------


def student(count: int) -> float:
    """The 97.5 % quantile of Student's t for the mean of so many values."""
    from scipy.stats import t

    return float(t.ppf(0.975, count - 1))


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return results.read_results(RESULTS)


def test_curves_are_the_paired_differences(committed: dict[str, Any]) -> None:
    found = of_curves.curves_of(committed, ["fashion-classes-cnn"], ["shrink-0.9", "average"])
    (panel,) = found.tasks
    assert found.names == ("shrink-0.9", "average")
    assert found.summary is None
    task = committed["tasks"]["fashion-classes-cnn"]
    means = {
        (start["method"], start["step"]): np.mean(list(start["values"].values()), axis=0)
        for start in task["starts"]
    }
    shrink, average = panel.curves
    assert list(shrink.estimates) == [0, 1, 2, 3]
    assert list(average.estimates) == [0, 1]
    assert vars(shrink.estimates[0]) == {"value": 0.0, "low": 0.0, "high": 0.0}
    differences = 100 * (means["shrink-0.9", 2] - means["naive", 0])
    estimate = shrink.estimates[2]
    assert estimate.value == pytest.approx(differences.mean())
    half = student(len(differences)) * differences.std(ddof=1) / len(differences) ** 0.5
    assert (estimate.low, estimate.high) == pytest.approx(
        (differences.mean() - half, differences.mean() + half)
    )
    oracle = 100 * (means["oracle", 0] - means["naive", 0]).mean()
    assert panel.levels["oracle"].value == pytest.approx(oracle)
    assert set(panel.levels) == {"longer", "oracle"}
    assert panel.quantity == "accuracy\nabove naive, points"
    assert panel.worth == results.comparisons(task)["all"].status.value


def test_the_summary_is_the_mean_over_data_limited_tasks(committed: dict[str, Any]) -> None:
    found = of_curves.curves_of(committed, ["*"], ["continuation", "shrink-0.9", "average"])
    assert [panel.title for panel in found.tasks] == list(committed["tasks"])
    compared = {name: results.comparisons(task)["all"] for name, task in committed["tasks"].items()}
    limited = [found for found in compared.values() if found.status is Status.DATA_LIMITED]
    assert len(limited) > 1
    assert found.summary is not None
    assert [curve.name for curve in found.summary.curves] == list(found.names)
    for curve in found.summary.curves:
        assert list(curve.estimates) == ([0, 1] if curve.name == "average" else [0, 1, 2, 3])
        for step, estimate in curve.estimates.items():
            name = "naive" if step == 0 else f"{curve.name} ×{2**step}"
            gains = [comparison.gains[name].value for comparison in limited]
            half = student(len(gains)) * np.std(gains, ddof=1) / len(gains) ** 0.5
            assert estimate.value == pytest.approx(np.mean(gains))
            assert estimate.half_width == pytest.approx(half)
    assert found.summary.levels["oracle"].value == pytest.approx(1)
    assert found.summary.worth == f"over {len(limited)} data-limited tasks"


def test_usually_known_families_simple_rivals_and_bundles_are_drawn(
    committed: dict[str, Any],
) -> None:
    changed = copy.deepcopy(committed)
    usual = {variant.label for variant in VARIANTS}
    for task in changed["tasks"].values():
        task["starts"] = [s for s in task["starts"] if s["step"] == 0 or s["method"] in usual]
        task["starts"] += [
            {**s, "method": "mine"} for s in task["starts"] if s["method"] == "retrodiction"
        ]
    found = of_curves.curves_of(changed, ["*"])
    assert found.names == ("continuation", "retrodiction", "shrink-0.9", "average", "mine")


def test_other_settings_are_curves_of_their_own(committed: dict[str, Any]) -> None:
    changed = copy.deepcopy(committed)
    for task in changed["tasks"].values():
        for start in list(task["starts"]):
            if start["method"] == "average":
                task["starts"].append({**start, "norm": "copy"})
                task["starts"].append({**start, "sessions": 3})
    every = of_curves.curves_of(changed, ["text-lora"], ["average*"])
    assert every.names == ("average", "average, norm copy", "average, S = 3")
    assert len({curve.estimates[1] for curve in every.tasks[0].curves}) == 1
    assert of_curves.curves_of(changed, ["text-lora"], ["average"]).names == ("average",)
    # Where a run has only another setting, that is the usual one.
    for task in changed["tasks"].values():
        anchors = [s for s in task["starts"] if s["method"] in ANCHORS]
        task["starts"] = anchors + [s for s in task["starts"] if s["norm"] == "copy"]
    assert of_curves.curves_of(changed, ["text-lora"]).names == ("average, norm copy",)


@pytest.mark.parametrize(
    ("tasks", "methods", "message"),
    [
        (["fashion-shoes"], None, "--task fashion-shoes: matches none of fashion-classes-cnn, "),
        (["*"], ["best"], "--method best: matches none of continuation, retrodiction, "),
    ],
)
def test_patterns_must_match(
    committed: dict[str, Any], tasks: list[str], methods: list[str] | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        of_curves.curves_of(committed, tasks, methods)


def test_results_without_predictions_have_no_curves(committed: dict[str, Any]) -> None:
    for kept, message in (
        ([], "no predictions"),
        (["noise"], "choose one, such as --method noise"),
    ):
        changed = copy.deepcopy(committed)
        for task in changed["tasks"].values():
            task["starts"] = [s for s in task["starts"] if s["step"] == 0 or s["method"] in kept]
        with pytest.raises(UsageError, match=message):
            of_curves.curves_of(changed, ["*"])


def test_a_task_without_the_method_has_an_empty_panel(committed: dict[str, Any]) -> None:
    changed = copy.deepcopy(committed)
    task = changed["tasks"]["text-lora"]
    task["starts"] = [s for s in task["starts"] if s["method"] != "noise"]
    found = of_curves.curves_of(changed, ["text*"], ["noise"])
    assert [len(panel.curves) for panel in found.tasks] == [1, 0]
    assert draw_results(found, ".svg").startswith(b"<?xml")


def test_a_single_seed_has_no_interval_but_a_picture(committed: dict[str, Any]) -> None:
    changed = copy.deepcopy(committed)
    for task in changed["tasks"].values():
        task["seeds"] = task["seeds"][:1]
        for start in task["starts"]:
            start["values"] = {cell: values[:1] for cell, values in start["values"].items()}
    found = of_curves.curves_of(changed, ["text-lora"])
    assert np.isnan(found.tasks[0].curves[0].estimates[1].low)
    assert found.tasks[0].worth == "too few seeds"
    assert draw_results(found, ".png").startswith(b"\x89PNG")


@pytest.mark.parametrize("suffix", [".png", pytest.param(".svg", marks=pytest.mark.slow)])
def test_many_curves_are_drawn_the_same_twice(committed: dict[str, Any], suffix: str) -> None:
    found = of_curves.curves_of(committed, ["text*"], ["*"])
    one, two = draw_results(found, suffix), draw_results(found, suffix)
    assert one == two
    assert one.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    assert b"dc:date" not in one


def test_drawing_leaves_the_settings_of_matplotlib_alone(committed: dict[str, Any]) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 33}):
        before = dict(matplotlib.rcParams)
        one = draw_results(of_curves.curves_of(committed, ["text-lora"]), ".svg")
        assert dict(matplotlib.rcParams) == before
    assert one == draw_results(of_curves.curves_of(committed, ["text-lora"]), ".svg")


def test_series_look_different_in_grey() -> None:
    def grey(colour: str) -> float:
        red, green, blue = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
        return (0.299 * red + 0.587 * green + 0.114 * blue) / 255

    greys = sorted(map(grey, picture.COLOURS))
    assert min(np.diff(greys)) > 0.12
    looks = {json.dumps(picture.look(number)) for number in range(42)}
    assert len(looks) == 42


BROKEN: dict[str, Any] = {
    "no JSON": "{",
    "a list": [],
    "other format": {"format": 99, "tasks": {}},
    "no tasks": {"format": 1, "tasks": {}},
    "task without starts": {"format": 1, "tasks": {"t": {}}},
}


@pytest.mark.parametrize("case", BROKEN)
def test_results_that_are_none_are_refused(tmp_path: Path, case: str) -> None:
    path = tmp_path / "r.json"
    content = BROKEN[case]
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UsageError, match=r"r\.json: is not a result of 'know eval'"):
        results.read_results(path)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("anchor", "no oracle"),
        ("cells", "has other cells"),
        ("seeds", "no number for each seed"),
        ("nan", "no number for each seed"),
        ("scale", "is not a result"),
        ("rate", "is not a result"),
    ],
)
def test_results_that_lack_something_are_refused(
    tmp_path: Path, committed: dict[str, Any], what: str, words: str
) -> None:
    changed = copy.deepcopy(committed)
    task = changed["tasks"]["text-lora"]
    start = task["starts"][-1]
    if what == "anchor":
        task["starts"] = [s for s in task["starts"] if s["method"] != "oracle"]
    elif what == "cells":
        start["values"].popitem()
    elif what == "seeds":
        next(iter(start["values"].values())).pop()
    elif what == "nan":
        next(iter(start["values"].values()))[0] = float("nan")
    elif what == "scale":
        task["measure"]["scale"] = "large"
    else:
        changed["settings"]["rate"] = 2
    (tmp_path / "r.json").write_text(json.dumps(changed))
    with pytest.raises(UsageError, match=words):
        results.read_results(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("release", "--regime release"),
        ("runs", "--trajectory run"),
        ("branches", "--trajectory branches"),
    ],
)
def test_results_of_another_evaluation_are_called_so(name: str, option: str) -> None:
    path = RESULTS.with_name(f"{name}.json")
    with pytest.raises(UsageError, match=f"is a result of 'know eval {option}'; give one without"):
        results.read_results(path)


def test_missing_results(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        results.read_results(tmp_path / "r.json")


def test_checkpoints_are_closed(tmp_path: Path) -> None:
    paths = write_trajectory(tmp_path)
    with points.open_points(paths) as opened:
        names = points.measured_tensors(opened.trajectory, ())
        plane.inner_products(opened.checkpoints, names, Silent())
        assert all(checkpoint._files for checkpoint in opened.checkpoints)
    assert not any(checkpoint._files for checkpoint in opened.checkpoints)
    with open_checkpoint(paths[0]) as again:
        assert again.tensors
