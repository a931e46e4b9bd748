"""Windows from hand-made trajectories, the scores, and meta-training on synthetic laws."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from know_cli.checkpoints import save_checkpoint
from know_cli.errors import CheckpointError, UsageError
from know_cli.kinds import PREDICTED_KINDS, Kind
from know_cli.known.bundle import load_bundle, save_bundle
from know_cli.known.module import Known, Preparation
from know_cli.meta.held_out import evaluate
from know_cli.meta.manifest import settings_of, split_of
from know_cli.meta.scores import (
    best_factor,
    l1_ratio,
    l2_ratio,
    least_squares,
    measure,
    predict,
)
from know_cli.meta.settings import Loss, Residuals, Settings, Target
from know_cli.meta.split import (
    ARCHITECTURES,
    DATA_SETS,
    REGIMES,
    TRAJECTORIES,
    split,
    split_collection,
)
from know_cli.meta.training import train_bundle
from know_cli.meta.windows import (
    Collection,
    RecordedTrajectory,
    Windows,
    collect_windows,
    find_trajectories,
    is_data_limited,
)
from tests.support.recorded import State, counting, geometric, record


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
        assert conv.targets.tolist() == [[100], [101], [110], [111]]

    def test_continuation_starts_at_session_0(self, tmp_path: Path) -> None:
        record(tmp_path, counting, seed=1, before=2)
        found = collect_windows([tmp_path], target=Target.CONTINUATION)
        fc = found.windows[Kind.FC]
        assert fc.windows[0].tolist() == [240, 230, 220, 210, 200]
        assert fc.targets.tolist() == [[190], [191], [192], [193]]

    def test_later_targets_are_nan_where_nothing_was_recorded(self, tmp_path: Path) -> None:
        record(tmp_path, counting, seed=1, before=2)
        back = collect_windows([tmp_path], target=Target.RETRODICTION, steps=3).windows[Kind.CONV]
        assert back.targets.shape == (4, 3)
        # j = 1 can only go back to session 0, j = 2 to sessions 1 and 0.
        assert np.isnan(back.targets[:2, 1:]).all()
        assert back.targets[2:, :2].tolist() == [[110, 100], [111, 101]]
        assert np.isnan(back.targets[2:, 2]).all()
        on = collect_windows([tmp_path], target=Target.CONTINUATION, steps=3).windows[Kind.CONV]
        assert on.targets[:, :2].tolist() == [[90, 80], [91, 81]]
        assert np.isnan(on.targets[:, 2]).all()
        assert on.has_target(2).all()
        assert not on.has_target(3).any()
        assert on.with_target(2).targets.tolist() == [[80], [81]]
        assert len(on.with_target(3)) == 0

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

    def test_what_stays_in_a_tensor_that_moves_is_taken_too(self, tmp_path: Path) -> None:
        def partly(index: int) -> State:
            return {"weight": torch.tensor([[1.0, 2.0], [3.0, 4.0 + index]])}

        record(tmp_path, partly, seed=1)
        table = collect_windows([tmp_path], target=Target.RETRODICTION).windows[Kind.FC]
        assert table.windows[:4, -1].tolist() == [1, 2, 3, 5]

    def test_what_is_still_being_collected_is_not_found(self, tmp_path: Path) -> None:
        record(tmp_path / "done", counting, seed=1)
        record(tmp_path / ".partial-00001", counting, seed=2)
        assert find_trajectories([tmp_path]) == [tmp_path / "done"]

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
        assert (one.windows[:, -1:] - one.targets == 0.25).all()
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
        assert [path.name for path in found.skipped] == ["b", "c", "e"]
        for reason, text in zip(found.skipped.values(), texts, strict=True):
            assert text in reason
        with pytest.raises(UsageError, match="7 sessions and 0 continuations"):
            collect_windows(folders[:1], target=Target.CONTINUATION)

    def test_one_trajectory_counts_once(self, tmp_path: Path) -> None:
        """Else it could be on both sides of a split."""
        record(tmp_path / "a", counting, seed=1)
        (tmp_path / "copy").mkdir()
        for file in (tmp_path / "a").iterdir():
            (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
        found = collect_windows(find_trajectories([tmp_path]), target=Target.RETRODICTION)
        assert len(found.trajectories) == 1
        assert found.skipped == {tmp_path / "copy": f"is the same trajectory as {tmp_path / 'a'}"}

    def test_errors_name_file_and_tensor(self, tmp_path: Path) -> None:
        record(tmp_path, counting, seed=1)
        save_checkpoint(tmp_path / "ckpt2.safetensors", {"conv.weight": torch.ones(3)}, {})
        with pytest.raises(CheckpointError, match=r"ckpt2.safetensors: tensor 'conv.weight' is of"):
            collect_windows([tmp_path], target=Target.RETRODICTION)
        with pytest.raises(UsageError, match=r"holds no trajectory.json"):
            find_trajectories([tmp_path / "elsewhere"])


def table(windows: list[list[float]], targets: list[float], trajectory: list[int]) -> Windows:
    return Windows(
        np.array(windows, np.float32),
        np.array(targets, np.float32)[:, None],
        np.array(trajectory, np.int32),
    )


class TestScores:
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
        made = Windows(windows, (windows @ law)[:, None], np.zeros(500, np.int32))
        assert least_squares(made) == pytest.approx(law, abs=1e-4)

    def test_rules_that_are_right_have_no_error(self) -> None:
        newest = np.array([1.0, 2.0, 4.0], np.float32)
        windows = np.stack([newest * 0.5, newest * 0.75, newest], axis=1)
        shrunk = Windows(windows, (newest * 0.5)[:, None], np.array([0, 0, 1], np.int32))
        rule = least_squares(shrunk)
        scores = measure(newest, shrunk, rule, {"right": newest * 0.5})
        assert scores.known == scores.median == 1.0
        assert scores.others == {"right": 0.0}
        assert scores.multiplier == pytest.approx(0, abs=1e-6)
        assert scores.multiplier_value == pytest.approx(0.5)
        assert scores.extrapolation == pytest.approx(0, abs=1e-6)
        assert scores.extrapolation_value == pytest.approx(-2)
        assert scores.least_squares == pytest.approx(0, abs=1e-5)
        assert (scores.rows, scores.trajectories, scores.better) == (3, 2, 0.0)
        assert measure(newest * 0.9, shrunk, rule).better == 1.0

    def test_each_trajectory_counts_once_in_median_and_improved(self) -> None:
        windows = table([[0, 1], [0, 1], [0, 1], [0, 1]], [2, 2, 2, 5], [0, 0, 1, 2])
        # Ratios 0.5 (of two rows), 2 and 1: neither better nor worse.
        answers = np.array([1.5, 1.5, 4, 1], np.float32)
        scores = measure(answers, windows, np.array([0, 1], np.float32))
        assert scores.median == pytest.approx(1)
        assert scores.better == pytest.approx(1 / 3)

    def test_iterating_puts_the_answer_into_the_window(self) -> None:
        known = Known(3)
        windows = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            first = known(windows)
            second = known(torch.stack([windows[:, 1], windows[:, 2], first], dim=1))
        answers = predict(known, windows.numpy(), 2)
        assert answers == pytest.approx(torch.stack([first, second], dim=1).numpy(), abs=1e-6)


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
    @pytest.mark.parametrize(
        ("target", "preparation"),
        [
            (Target.RETRODICTION, Preparation.RAW),
            (Target.CONTINUATION, Preparation.SPREAD),
            pytest.param(Target.RETRODICTION, Preparation.SPREAD, marks=pytest.mark.slow),
            pytest.param(Target.CONTINUATION, Preparation.RAW, marks=pytest.mark.slow),
        ],
    )
    def test_learns_a_law(
        self, trajectories: Path, target: Target, preparation: Preparation
    ) -> None:
        folders = find_trajectories([trajectories])
        settings = Settings(
            target=target,
            preparation=preparation,
            penalised=False,
            residuals=Residuals.SCALED,
            # There are half as many windows for continuation.
            epochs=4 if target is Target.RETRODICTION else 8,
            batch_rows=128,
        )
        bundle, found = train_bundle(collect_windows(folders, target=target), settings)
        assert bundle.target == target.value
        for steps in found[TRAJECTORIES].values():
            assert steps[1].known < 0.4
            assert steps[1].known < steps[1].multiplier
            assert steps[1].better == 1.0

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
        held_out = manifest["data"]["held_out"]["trajectories"]
        assert len(held_out) == 3
        assert not set(manifest["data"]["training"]) & set(held_out)
        assert settings_of(read) == settings
        assert len(manifest["losses"]["conv"]["training"]) == 2

    def test_the_paper_s_penalty_and_a_falling_learning_rate(
        self, trajectories: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from know_cli.meta import training

        collection = collect_windows(find_trajectories([trajectories]), target=Target.RETRODICTION)
        rates: list[float] = []
        step = torch.optim.Adam.step

        def watched(adam: torch.optim.Adam) -> None:
            rates.append(adam.param_groups[0]["lr"])
            step(adam)

        monkeypatch.setattr(training.torch.optim.Adam, "step", watched)
        biases = {}
        for penalised in (False, True):
            rates.clear()
            settings = Settings(
                target=Target.RETRODICTION, penalised=penalised, epochs=3, batch_rows=256
            )
            bundle, _ = train_bundle(collection, settings)
            biases[penalised] = sum(
                float(tensor.abs().sum())
                for state in bundle.states.values()
                for name, tensor in state.items()
                if name.endswith(("input.bias", "output.bias"))
            )
            first = rates[: len(rates) // 3]
            assert first[0] == 1e-3
            assert rates[-1] < 2e-5
        assert biases[True] < 0.5 * biases[False]

    def test_reports_every_epoch(self, trajectories: Path) -> None:
        collection = collect_windows(find_trajectories([trajectories]), target=Target.CONTINUATION)
        told: list[tuple[Kind, int, float, float]] = []
        settings = Settings(target=Target.CONTINUATION, epochs=3, loss=Loss.L2)
        bundle, _ = train_bundle(collection, settings, lambda *epoch: told.append(epoch))
        assert [(kind, epoch) for kind, epoch, *_ in told] == [
            (kind, epoch) for kind in PREDICTED_KINDS for epoch in (1, 2, 3)
        ]
        for kind in PREDICTED_KINDS:
            losses = [float(f"{loss:.5g}") for one, _, _, loss in told if one is kind]
            assert bundle.manifest["losses"][kind.value]["held_out"] == losses

    def test_trained_through_steps_it_is_better_at_them(self, trajectories: Path) -> None:
        """The law's continuations are a step of 1, 2 and 3 times its own movement."""

        def jumps(seed: int) -> Callable[[int], State]:
            law = geometric(seed)

            def state(index: int) -> State:
                # Going on as before would be right for one step only.
                known, before = law(max(index, 0)), law(1)
                size = max(-index, 0) ** 3
                # What is looked at are matrices; of the others there is little to be learned.
                rows = {"conv.weight": 1, "head.weight": 10, "head.bias": 1}
                return {
                    name: (known[name] + size * (known[name] - before[name]))[:count]
                    for name, count in rows.items()
                }

            return state

        folder = trajectories.parent / "jumps"
        for seed in range(10):
            record(folder / str(seed), jumps(seed), seed=seed, before=3)
        found = find_trajectories([folder])
        collection = collect_windows(found, target=Target.CONTINUATION, steps=3)
        third = {}
        for steps in (1, 3):
            settings = Settings(
                target=Target.CONTINUATION,
                preparation=Preparation.SPREAD,
                residuals=Residuals.SCALED,
                penalised=False,
                steps=steps,
                epochs=6,
                batch_rows=64,
            )
            table = train_bundle(collection, settings)[1]
            third[steps] = table[TRAJECTORIES][Kind.FC][3].known
        assert third[3] < third[1]

    def test_an_average_of_the_weights_can_be_kept(self, trajectories: Path) -> None:
        collection = collect_windows(find_trajectories([trajectories]), target=Target.CONTINUATION)
        bundles = [
            train_bundle(
                collection,
                Settings(target=Target.CONTINUATION, epochs=1, batch_rows=64, averaging=decay),
            )[0]
            for decay in (0.0, 1e-9, 1.0)
        ]
        weight = [bundle.states[Kind.FC]["head.weight"] for bundle in bundles]
        assert torch.allclose(weight[0], weight[1], atol=1e-7)
        # A decay of 1 keeps the weights after the first step for ever.
        assert not torch.allclose(weight[0], weight[2], atol=1e-4)

    def test_goes_on_with_the_kind_it_was_interrupted_at(
        self, trajectories: Path, tmp_path: Path
    ) -> None:
        collection = collect_windows(find_trajectories([trajectories]), target=Target.CONTINUATION)
        settings = Settings(target=Target.CONTINUATION, epochs=2)
        whole, _ = train_bundle(collection, settings)

        def interrupt(kind: Kind, epoch: int, training: float, held_out: float) -> None:
            if kind is Kind.FC:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train_bundle(collection, settings, interrupt, partial=tmp_path)
        told: list[Kind] = []
        resumed, _ = train_bundle(
            collection, settings, lambda kind, *_: told.append(kind), partial=tmp_path
        )
        assert told == [Kind.FC] * 2 + [Kind.BIAS] * 2
        assert resumed.digest == whole.digest
        assert resumed.manifest["losses"] == whole.manifest["losses"]
        # What was trained otherwise is not used.
        told.clear()
        other = Settings(target=Target.CONTINUATION, epochs=1)
        train_bundle(collection, other, lambda kind, *_: told.append(kind), partial=tmp_path)
        assert told == list(PREDICTED_KINDS)

    def test_residuals_are_counted_in_their_unit(self) -> None:
        from know_cli.meta.training import _tensors

        windows = table([[1, 2], [1, 4], [1, 1]], [3, 7, 1], [0, 0, 1])
        wanted = {
            Residuals.RAW: [1, 1, 1],
            Residuals.SCALED: [0.5, 0.5, 0.0],
            Residuals.SPREAD: [1, 1 / 3, 0],
        }
        for residuals, weights in wanted.items():
            settings = Settings(target=Target.RETRODICTION, residuals=residuals)
            assert _tensors(windows, settings)[2][:, 0].tolist() == pytest.approx(weights)

    def test_leaps_count_as_two_spreads_at_most(self) -> None:
        from know_cli.meta.training import _tensors

        windows = table([[1, 2], [1, 2], [3, 2]], [9, 3.5, -9], [0, 0, 1])
        wanted = {
            Residuals.RAW: [9, 3.5, -9],
            Residuals.SCALED: [9, 3.5, -9],
            Residuals.SPREAD: [4, 3.5, 0],
        }
        for residuals, targets in wanted.items():
            settings = Settings(target=Target.RETRODICTION, residuals=residuals)
            assert _tensors(windows, settings)[1][:, 0].tolist() == targets

    def test_steps_without_a_target_count_nothing(self) -> None:
        from know_cli.meta.training import _mean, _tensors

        nan = float("nan")
        windows = Windows(
            np.array([[1, 2], [1, 4]], np.float32),
            np.array([[3, nan], [7, 9]], np.float32),
            np.zeros(2, np.int32),
        )
        settings = Settings(target=Target.CONTINUATION, steps=2)
        _, targets, weights = _tensors(windows, settings)
        answers = torch.tensor([[2.0, 100.0], [4.0, 6.0]])
        means = {Loss.L1: 7 / 3, Loss.L2: 19 / 3, Loss.HUBER: (0.5 + 2.5 + 2.5) / 3}
        for loss, mean in means.items():
            assert float(_mean(answers, targets, weights, loss)) == pytest.approx(mean)

    def test_a_kind_without_windows_is_an_error(self, tmp_path: Path) -> None:
        for seed in range(4):
            record(tmp_path / str(seed), lambda k: {"weight": torch.ones(2, 2) * k}, seed=seed)
        collection = collect_windows(find_trajectories([tmp_path]), target=Target.RETRODICTION)
        with pytest.raises(UsageError, match="no windows of kind conv"):
            train_bundle(collection, Settings(target=Target.RETRODICTION, holdout=0.5))


def trajectory(identity: str, architecture: str = "", data_set: str = "") -> RecordedTrajectory:
    return RecordedTrajectory(Path(), identity, "", 0.5, architecture, data_set)


class TestSplit:
    def test_is_by_trajectory(self) -> None:
        some = [trajectory(str(number)) for number in range(10)]
        parts = split(some, 0.2, seed=0)
        assert list(parts.held_out) == [TRAJECTORIES]
        assert len(parts.all_held_out) == 2
        assert sorted(parts.training + parts.all_held_out) == list(range(10))
        assert split(some, 0.2, seed=0) == parts
        assert any(split(some, 0.2, seed=seed) != parts for seed in range(1, 5))
        for count, share in ((1, 0.5), (10, 0.0), (10, 1.0)):
            with pytest.raises(UsageError, match="cannot be split"):
                split(some[:count], share, seed=0)

    def test_whole_architectures_and_data_sets_are_held_out(self) -> None:
        some = [
            trajectory(f"{a}{d}{n}", a, d)
            for a in ("cnn", "vit", "mlp")
            for d in ("digits", "mnist")
            for n in range(5)
        ]
        parts = split(some, 0.2, 0, architectures=["vit"], data_sets=["digits"])
        groups = {
            name: {(some[n].architecture, some[n].data_set) for n in numbers}
            for name, numbers in parts.held_out.items()
        }
        assert groups[ARCHITECTURES] == {("vit", "mnist")}
        assert groups[DATA_SETS] == {("cnn", "digits"), ("vit", "digits"), ("mlp", "digits")}
        assert len(parts.held_out[TRAJECTORIES]) == 2
        trained = {(some[n].architecture, some[n].data_set) for n in parts.training}
        assert trained == {("cnn", "mnist"), ("mlp", "mnist")}
        assert len(parts.training) + len(parts.all_held_out) == len(some)
        with pytest.raises(UsageError, match="cannot hold out architecture 'resnet': .* cnn, mlp"):
            split(some, 0.2, 0, architectures=["resnet"])
        with pytest.raises(UsageError, match="data set 'text'"):
            split(some, 0.2, 0, data_sets=["text"])

    def test_a_regime_is_held_out(self) -> None:
        some = [
            replace(trajectory(f"{n}", "vit" if n % 3 else "cnn", "digits"), regime=regime)
            for n, regime in enumerate(["chain", "common-start"] * 10)
        ]
        parts = split(some, 0.2, 0, architectures=["vit"], regimes=["common-start"])
        assert parts.held_out[REGIMES] == list(range(1, 20, 2))
        assert all(n % 2 == 0 and n % 3 for n in parts.held_out[ARCHITECTURES])
        assert all(n % 6 == 0 for n in parts.training + parts.held_out[TRAJECTORIES])
        with pytest.raises(UsageError, match="cannot hold out regime 'common-start'"):
            split(some[::2], 0.2, 0, regimes=["common-start"])

    def test_a_missing_trajectory_changes_little(self) -> None:
        some = [trajectory(f"{number:x}") for number in range(100)]
        whole = {some[n].identity for n in split(some, 0.2, 0).all_held_out}
        fewer = {some[1:][n].identity for n in split(some[1:], 0.2, 0).all_held_out}
        assert len(whole & fewer) >= 18


class TestEvaluation:
    def test_figures_of_every_group_kind_and_step(self, trajectories: Path) -> None:
        found = collect_windows(
            find_trajectories([trajectories]), target=Target.RETRODICTION, steps=3
        )
        regimes = [
            RecordedTrajectory(one.folder, one.identity, "", 0.5, "cnn", "x", n % 2 == 0)
            for n, one in enumerate(found.trajectories)
        ]
        collection = Collection(found.windows, regimes, {})
        settings = Settings(target=Target.RETRODICTION, epochs=1, holdout=0.5)
        bundle, table = train_bundle(collection, settings)
        assert list(table) == [TRAJECTORIES, "data-limited", "not data-limited"]
        for kinds in table.values():
            # Seven sessions have a window with two targets, none with three.
            assert {kind: list(steps) for kind, steps in kinds.items()} == {
                kind: [1, 2] for kind in PREDICTED_KINDS
            }
        both = [table[name][Kind.FC][1] for name in ("data-limited", "not data-limited")]
        whole = table[TRAJECTORIES][Kind.FC][1]
        assert whole.rows == sum(one.rows for one in both)
        assert whole.trajectories == sum(one.trajectories for one in both) == 8
        again = evaluate(
            bundle, collection, split_collection(collection, settings), {"same": bundle}
        )
        for kind in PREDICTED_KINDS:
            one = again[TRAJECTORIES][kind][2]
            assert one.others == {"same": one.known}

    def test_the_manifest_has_the_linear_rule(self, trajectories: Path) -> None:
        found = collect_windows(find_trajectories([trajectories]), target=Target.RETRODICTION)
        settings = Settings(target=Target.RETRODICTION, epochs=1)
        bundle, table = train_bundle(found, settings)
        parts = split_collection(found, settings)
        for kind in PREDICTED_KINDS:
            rule = np.array(json.loads(json.dumps(bundle.manifest))["rule"][kind.value])
            held_out = found.windows[kind].of(parts.all_held_out)
            error = np.abs(held_out.windows.astype(np.float64) @ rule - held_out.targets[:, 0])
            nothing = np.abs(held_out.windows[:, -1] - held_out.targets[:, 0])
            expected = error.mean() / nothing.mean()
            assert table[TRAJECTORIES][kind][1].least_squares == pytest.approx(expected, abs=1e-3)

    def test_a_bundle_is_measured_on_what_it_was_not_trained_on(self, trajectories: Path) -> None:
        found = collect_windows(find_trajectories([trajectories]), target=Target.RETRODICTION)
        settings = Settings(target=Target.RETRODICTION, epochs=1)
        bundle, _ = train_bundle(found, settings)
        parts = split_collection(found, settings)
        assert split_of(bundle, found) == parts
        # Other trajectories beside them, in another order, change nothing.
        order = list(range(len(found.trajectories)))[::-1]
        mixed = Collection(
            found.windows, [trajectory("abc"), *(found.trajectories[n] for n in order)], {}
        )
        again = split_of(bundle, mixed)
        assert {mixed.trajectories[n].identity for n in again.all_held_out} == {
            found.trajectories[n].identity for n in parts.all_held_out
        }
        assert 0 not in again.training + again.all_held_out
        # The first manifests had a list of them.
        old = copy.deepcopy(bundle)
        old.manifest["data"]["held_out"] = bundle.manifest["data"]["held_out"][TRAJECTORIES]
        assert split_of(old, found) == parts
        with pytest.raises(UsageError, match="none of the trajectories held out"):
            split_of(bundle, Collection(found.windows, [trajectory("abc")], {}))
        del old.manifest["data"]
        with pytest.raises(UsageError, match="does not say what was held out"):
            split_of(old, found)

    @pytest.mark.parametrize(
        ("test", "longer", "more_data", "limited"),
        [(0.8, 0.8, 0.85, True), (0.8, 0.85, 0.85, False), (0.8, 0.7, 0.8, False)],
    )
    def test_regimes(self, test: float, longer: float, more_data: float, limited: bool) -> None:
        session = {"test_accuracy": test, "longer_test_accuracy": longer}
        recorded = {
            "0": {"measurements": session},
            "-1": {"measurements": {"test_accuracy": more_data}},
        }
        assert is_data_limited({"recorded": recorded}) is limited
        assert is_data_limited({"recorded": {"0": {"measurements": {}}}}) is None
