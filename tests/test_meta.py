"""Windows from hand-made trajectories, the figures, and meta-training on synthetic laws."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from know_cli.checkpoints import save_checkpoint
from know_cli.errors import CheckpointError, UsageError
from know_cli.forgetting import Recorder, nested_subsets
from know_cli.hypermodel import Known, Preparation, load_bundle, save_bundle
from know_cli.kinds import Kind
from know_cli.meta import (
    Settings,
    Target,
    Windows,
    collect_windows,
    find_trajectories,
    train_bundle,
)
from know_cli.meta.figures import best_factor, l1_ratio, l2_ratio, least_squares, measure
from know_cli.meta.training import Loss, Residuals, predict, split

State = Mapping[str, torch.Tensor]


def record(
    folder: Path, state_of: Callable[[int], State], *, seed: int, sessions: int = 7, before: int = 0
) -> str:
    """A trajectory whose checkpoints are a function of the session's index."""
    subsets = nested_subsets(1000, 0.5, sessions + before, seed)
    made = Recorder(folder, subsets, rate=0.5, seed=seed, before=before, function="hand-made")
    for session in made:
        made.save(session, state_of(session.index))
    return made.trajectory


def counting(index: int) -> State:
    """Values that tell where they are from: 100 × tensor + 10 × index + element."""
    return {
        "conv.weight": (100 + 10 * index + torch.arange(2.0)).view(1, 2, 1, 1),
        "head.weight": (200 + 10 * index + torch.arange(4.0)).view(2, 2),
        "head.bias": 300 + 10 * index + torch.arange(2.0),
        "norm.weight": 400 + 10.0 * index + torch.zeros(1),
        "norm.bias": 500 + 10.0 * index + torch.zeros(1),
        "norm.running_mean": 600 + 10.0 * index + torch.zeros(1),
        "norm.running_var": 700 + 10.0 * index + torch.zeros(1),
        "norm.num_batches_tracked": torch.tensor(index),
        "frozen.bias": torch.ones(3),
    }


class TestWindows:
    def test_retrodiction_slides_along_the_sessions(self, tmp_path: Path) -> None:
        record(tmp_path, counting, seed=1)
        found = collect_windows([tmp_path], target=Target.RETRODICTION)
        conv = found.windows[Kind.CONV]
        assert conv.windows.dtype == np.float32
        # j = 1: sessions 5 … 1, target 0; j = 2: sessions 6 … 2, target 1.
        first, second = [150, 140, 130, 120, 110], [160, 150, 140, 130, 120]
        assert conv.windows.tolist() == [
            first,
            [value + 1 for value in first],
            second,
            [value + 1 for value in second],
        ]
        assert conv.targets.tolist() == [100, 101, 110, 111]

    def test_continuation_starts_at_session_0(self, tmp_path: Path) -> None:
        record(tmp_path, counting, seed=1, before=2)
        found = collect_windows([tmp_path], target=Target.CONTINUATION)
        fc = found.windows[Kind.FC]
        assert fc.windows[0].tolist() == [240, 230, 220, 210, 200]
        assert fc.targets.tolist() == [190, 191, 192, 193]

    def test_kinds(self, tmp_path: Path) -> None:
        record(tmp_path, counting, seed=1, sessions=3)
        found = collect_windows([tmp_path], target=Target.RETRODICTION, checkpoints=2)
        newest = sorted(found.windows[Kind.BIAS].windows[:, -1].tolist())
        # Weight and bias of the normalisation, no statistics, no counter, nothing frozen.
        assert newest == [310, 311, 410, 510]
        assert {kind: len(table) for kind, table in found.windows.items()} == {
            Kind.CONV: 2,
            Kind.FC: 4,
            Kind.BIAS: 4,
        }

    def test_rows_are_drawn_from_large_tensors(self, tmp_path: Path) -> None:
        def large(index: int) -> State:
            return {"weight": torch.arange(1000.0).view(10, 100) + 0.25 * index}

        record(tmp_path, large, seed=1)
        one, same, other = (
            collect_windows(
                [tmp_path], target=Target.RETRODICTION, rows_per_tensor=50, seed=seed
            ).windows[Kind.FC]
            for seed in (3, 3, 4)
        )
        assert len(one) == 100
        assert np.array_equal(one.windows, same.windows)
        assert not np.array_equal(one.windows, other.windows)
        assert (np.diff(one.windows, axis=1) == -0.25).all()
        assert (one.windows[:, -1] - one.targets == 0.25).all()
        assert len(np.unique(one.targets[:50])) == 50

    def test_half_precision_is_read_as_float32(self, tmp_path: Path) -> None:
        def half(index: int) -> State:
            return {"weight": torch.full((2, 2), 1.5 + index, dtype=torch.bfloat16)}

        record(tmp_path, half, seed=1)
        table = collect_windows([tmp_path], target=Target.RETRODICTION).windows[Kind.FC]
        assert table.windows[0].tolist() == [6.5, 5.5, 4.5, 3.5, 2.5]

    def test_trajectories_are_numbered_and_what_is_left_out_is_told(self, tmp_path: Path) -> None:
        def diverged(index: int) -> State:
            return {"weight": torch.full((2, 2), float("nan"))}

        record(tmp_path / "a", counting, seed=1)
        record(tmp_path / "b", diverged, seed=2)
        record(tmp_path / "c", counting, seed=3, sessions=5)
        record(tmp_path / "d", counting, seed=4)
        record(tmp_path / "e", counting, seed=5)
        (tmp_path / "e" / "ckpt3.safetensors").unlink()
        folders = find_trajectories([tmp_path, tmp_path / "d"])
        assert [folder.name for folder in folders] == ["a", "b", "c", "d", "e"]
        found = collect_windows(folders, target=Target.RETRODICTION)
        assert [trajectory.folder.name for trajectory in found.trajectories] == ["a", "d"]
        assert found.windows[Kind.CONV].trajectory.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
        assert len(found.windows[Kind.CONV].of([1])) == 4
        texts = ["'weight' is not finite", "has 5 sessions, 6 are needed", "ckpt3.safetensors"]
        for reason, text in zip(found.skipped, texts, strict=True):
            assert text in reason
        with pytest.raises(UsageError, match="7 sessions and 0 continuations"):
            collect_windows(folders[:1], target=Target.CONTINUATION)

    def test_errors_name_file_and_tensor(self, tmp_path: Path) -> None:
        record(tmp_path, counting, seed=1)
        save_checkpoint(tmp_path / "ckpt2.safetensors", {"conv.weight": torch.ones(3)}, {})
        with pytest.raises(CheckpointError, match=r"ckpt2.safetensors: tensor 'conv.weight' is of"):
            collect_windows([tmp_path], target=Target.RETRODICTION)
        with pytest.raises(UsageError, match=r"holds no trajectory.json"):
            find_trajectories([tmp_path / "elsewhere"])


def table(windows: list[list[float]], targets: list[float], trajectory: list[int]) -> Windows:
    return Windows(
        np.array(windows, np.float32), np.array(targets, np.float32), np.array(trajectory)
    )


class TestFigures:
    def test_ratios(self) -> None:
        windows = table([[0, 1], [0, 2]], [2, 5], [0, 0])
        assert l1_ratio(np.array([2, 4], np.float32), windows) == pytest.approx(1 / 4)
        assert l2_ratio(np.array([2, 4], np.float32), windows) == pytest.approx((1 / 10) ** 0.5)
        assert np.isnan(l1_ratio(np.array([1], np.float32), table([[0, 1]], [1], [0])))

    def test_best_factor_has_the_least_absolute_error(self) -> None:
        generator = np.random.default_rng(0)
        values, targets = generator.normal(size=(2, 201)).astype(np.float32)
        grid = np.linspace(-3, 3, 6001)
        errors = [np.abs(factor * values - targets).sum() for factor in grid]
        assert best_factor(values, targets) == pytest.approx(grid[np.argmin(errors)], abs=2e-3)
        assert best_factor(np.zeros(3), np.ones(3)) == 1.0

    def test_least_squares_finds_a_linear_law(self) -> None:
        generator = np.random.default_rng(1)
        windows = (1 + 0.1 * generator.normal(size=(500, 4))).astype(np.float32)
        law = np.array([0.1, -0.3, 0.5, 0.75], np.float32)
        made = Windows(windows, windows @ law, np.zeros(500, np.int64))
        assert least_squares(made) == pytest.approx(law, abs=1e-4)

    def test_rules_that_are_right_have_no_error(self) -> None:
        newest = np.array([1.0, 2.0, 4.0], np.float32)
        windows = np.stack([newest * 0.5, newest * 0.75, newest], axis=1)
        shrunk = Windows(windows, newest * 0.5, np.array([0, 0, 1]))
        figures = measure(newest, shrunk, shrunk)
        assert figures.known == 1.0
        assert figures.multiplier == pytest.approx(0, abs=1e-6)
        assert figures.multiplier_value == pytest.approx(0.5)
        assert figures.extrapolation == pytest.approx(0, abs=1e-6)
        assert figures.extrapolation_value == pytest.approx(-2)
        assert figures.better == 0.0
        assert measure(newest * 0.9, shrunk, shrunk).better == 1.0


def geometric(seed: int) -> Callable[[int], State]:
    """A law: every parameter decays towards a value of its own by a factor of its trajectory."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv.weight": (4, 3, 3, 3), "head.weight": (10, 12), "head.bias": (40,)}
    limits = {n: 0.3 * torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    sizes = {n: 0.1 * torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    decay = 0.6 + 0.3 * float(torch.rand((), generator=generator))
    return lambda index: {name: limits[name] + sizes[name] * decay**index for name in shapes}


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trajectories")
    for seed in range(16):
        record(folder / f"{seed:02d}", geometric(seed), seed=seed, before=1)
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class TestTraining:
    @pytest.mark.parametrize("target", list(Target))
    @pytest.mark.parametrize("preparation", list(Preparation))
    def test_learns_a_law(
        self, trajectories: Path, target: Target, preparation: Preparation
    ) -> None:
        folders = find_trajectories([trajectories])
        settings = Settings(
            target=target,
            preparation=preparation,
            penalised=False,
            residuals=Residuals.SCALED,
            epochs=40,
            batch_rows=256,
        )
        bundle, figures = train_bundle(collect_windows(folders, target=target), settings)
        assert bundle.target == target.value
        for found in figures.values():
            assert found.known < 0.4
            assert found.known < found.multiplier
            assert found.better == 1.0

    def test_is_deterministic_for_a_seed(self, trajectories: Path, tmp_path: Path) -> None:
        folders = find_trajectories([trajectories])
        collection = collect_windows(folders, target=Target.RETRODICTION)
        settings = Settings(target=Target.RETRODICTION, epochs=2, seed=3)
        one, same = (train_bundle(collection, settings)[0] for _ in range(2))
        other = train_bundle(collection, Settings(target=Target.RETRODICTION, epochs=2, seed=4))[0]
        assert one.digest == same.digest
        assert one.digest != other.digest
        save_bundle(one, tmp_path)
        read = load_bundle(tmp_path)
        assert read.digest == one.digest
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        assert manifest["target"] == "retrodiction"
        assert manifest["data"]["functions"] == ["hand-made"]
        assert len(manifest["data"]["training"]) == 13
        assert not set(manifest["data"]["training"]) & set(manifest["data"]["held_out"])
        assert len(manifest["losses"]["conv"]["training"]) == 2

    def test_keeps_the_best_epoch_and_reports_all(self, trajectories: Path) -> None:
        collection = collect_windows(find_trajectories([trajectories]), target=Target.CONTINUATION)
        told: list[tuple[Kind, int, float, float]] = []
        settings = Settings(target=Target.CONTINUATION, epochs=3, loss=Loss.L2)
        bundle, _ = train_bundle(collection, settings, lambda *epoch: told.append(epoch))
        assert [(kind, epoch) for kind, epoch, *_ in told] == [
            (kind, epoch) for kind in (Kind.CONV, Kind.FC, Kind.BIAS) for epoch in (1, 2, 3)
        ]
        for kind in (Kind.CONV, Kind.FC, Kind.BIAS):
            held_out = [loss for one, _, _, loss in told if one is kind]
            losses = bundle.manifest["losses"][kind.value]
            assert losses["best_epoch"] == 1 + int(np.argmin(held_out))

    def test_scaled_residuals_count_trajectories_alike(self) -> None:
        from know_cli.meta.training import _tensors

        windows = table([[1, 2], [1, 4], [1, 1]], [3, 7, 1], [0, 0, 1])
        settings = Settings(target=Target.RETRODICTION, residuals=Residuals.SCALED)
        weights = _tensors(windows, settings)[2]
        assert weights.tolist() == [0.5, 0.5, 0.0]

    def test_split_is_by_trajectory(self) -> None:
        training, held_out = split(10, 0.2, seed=0)
        assert len(held_out) == 2
        assert sorted(training + held_out) == list(range(10))
        assert split(10, 0.2, seed=0) == (training, held_out)
        for count, share in ((1, 0.5), (10, 0.0), (10, 1.0)):
            with pytest.raises(UsageError, match="cannot be split"):
                split(count, share, seed=0)

    def test_a_kind_without_windows_is_an_error(self, tmp_path: Path) -> None:
        for seed in range(4):
            record(tmp_path / str(seed), lambda k: {"weight": torch.ones(2, 2) * k}, seed=seed)
        collection = collect_windows(find_trajectories([tmp_path]), target=Target.RETRODICTION)
        with pytest.raises(UsageError, match="no windows of kind conv"):
            train_bundle(collection, Settings(target=Target.RETRODICTION, holdout=0.5))

    def test_predict_is_the_module(self) -> None:
        known = Known(5)
        windows = torch.randn(7, 5)
        assert predict(known, windows.numpy()) == pytest.approx(known(windows).detach().numpy())
