"""What a richer hyper-model needs: each row's tensor, and how far that tensor moves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from know_cli.checkpoints import open_trajectory
from know_cli.engine.movements import measure_movements
from know_cli.engine.plan import Block
from know_cli.engine.predictor import Predictors
from know_cli.engine.settings import Settings
from know_cli.methods import naive
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request
from know_cli.ranks.alone import Ranks
from tests.support.ranks import together
from tests.support.trajectories import states, write_trajectory


class Standardising:
    """Goes on by the last movement in units of its tensor's spread: a stand-in for a hyper-model."""

    device = torch.device("cpu")
    block_rows = 64
    thread_bytes = 0

    def __init__(self) -> None:
        self.seen: set[tuple[str, str, tuple[int, ...]]] = set()

    def predict(self, block: Block, step: int, history: Tensor, out: Tensor) -> None:
        row = 0
        for segment in block.segments():
            assert segment.row == row
            row += segment.count
            tensor = segment.tensor
            self.seen.add((tensor.name, tensor.kind.value, tensor.shape))
            assert tensor.kind is block.kind
            assert tensor.movements is not None
            moved = history[-1, segment.rows] - history[-2, segment.rows]
            mean, spread = tensor.movements.mean[-1], tensor.movements.spread[-1]
            standard = (moved - mean) / (spread or 1.0)
            out[segment.rows] = history[-1, segment.rows] + 0.01 * torch.tanh(standard)
        assert row == out.shape[0]


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return write_trajectory(tmp_path)


def expected(trajectory: list[dict[str, Tensor]], name: str) -> np.ndarray:  # type: ignore[type-arg]
    """Standardised in float64, by hand."""
    newest, before = (trajectory[k][name].double().numpy() for k in (0, 1))
    moved = (newest.astype(np.float32) - before.astype(np.float32)).astype(np.float64)
    exact = newest - before
    spread = exact.std() or 1.0
    answer: np.ndarray = newest + 0.01 * np.tanh((moved - exact.mean()) / spread)  # type: ignore[type-arg]
    return answer


@pytest.mark.parametrize("memory", [1 << 30, 3 << 20])
def test_a_predictor_that_standardises_each_tensor(
    memory: int, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Standardising()
    monkeypatch.setattr(naive, "predictors", lambda _: Predictors(model, reads_movements=True))
    request = Request(paths, tmp_path / "out", method="naive", settings=Settings(max_memory=memory))
    with open_prediction(request) as prediction:
        prediction.execute()
        planned = {(t.name, t.kind.value, t.shape) for t in prediction.plan.tensors}
    written, trajectory = load_file(tmp_path / "out"), states()
    assert model.seen <= planned
    for name, _, _ in model.seen:
        # Half precision has three digits.
        np.testing.assert_allclose(
            written[name].double().numpy(), expected(trajectory, name), atol=2e-3, rtol=8e-3
        )
    assert {name for name, _, _ in model.seen} >= {"conv1.weight", "fc.weight", "brain.weight"}


def test_movements_are_asked_for_or_not_there(paths: list[Path], tmp_path: Path) -> None:
    with open_prediction(Request(paths, tmp_path / "out", method="naive")) as prediction:
        assert all(tensor.movements is None for tensor in prediction.plan.tensors)


def test_movements_by_hand_and_for_any_number_of_ranks(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    trajectory = [
        {
            "long": 1e6 + torch.randn(100_003, generator=generator, dtype=torch.float64),
            "half": torch.randn(7, 5, generator=generator).half(),
            "odd": torch.tensor([1.0, torch.nan, 3.0 + k, torch.inf]),
            "none": torch.empty(0, 3),
        }
        for k in range(4)
    ]
    paths = write_trajectory(tmp_path, trajectory)
    names = list(trajectory[0])

    def measure(ranks: Ranks) -> object:
        with open_trajectory(paths) as opened:
            return measure_movements(opened, names, ranks)

    alone = measure(Ranks())
    assert all(found == alone for size in (2, 3) for found in together(size, measure))
    assert isinstance(alone, dict)
    for name in ("long", "half"):
        values = np.stack([state[name].double().numpy().ravel() for state in trajectory[::-1]])
        moved = np.diff(values, axis=0)
        assert alone[name].count == moved.shape[1]
        np.testing.assert_allclose(alone[name].mean, moved.mean(axis=1), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(alone[name].spread, moved.std(axis=1), rtol=1e-9)
    assert alone["odd"].count == 2
    np.testing.assert_allclose(alone["odd"].mean, [-0.5] * 3)
    assert alone["none"].count == 0
    assert alone["none"].spread == (0.0, 0.0, 0.0)
