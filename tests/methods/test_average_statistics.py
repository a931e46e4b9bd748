"""Running statistics of an average: the closed form, its limits, and what it is worth."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from know_cli.engine.report import Report
from know_cli.engine.settings import NormMode, Settings
from know_cli.errors import CheckpointError
from know_cli.kinds import Kind, Override
from know_cli.lab.digits import load_digits
from know_cli.lab.fitting import accuracy, fit, one_thread
from know_cli.lab.zoo import Design, Inputs, build
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request
from tests.support.by_hand import rescaled_by_hand
from tests.support.trajectories import network, states, write_trajectory

MEAN, VARIANCE, COUNT = "bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked"


def average(
    paths: list[Path], output: Path, options: dict[str, float | str] | None = None, **wishes: Any
) -> tuple[dict[str, Tensor], Report]:
    request = Request(
        paths, output, settings=Settings(**wishes), method="average", options=options or {},
        device="cpu", force=True,
    )  # fmt: skip
    with open_prediction(request) as prediction:
        report = prediction.execute()
    return load_file(output), report


def mixed(trajectory: list[dict[str, Tensor]], shares: list[float]) -> tuple[Any, Any]:
    """Mean and variance of the mixture of the checkpoints' distributions, by its moments."""
    means = np.stack([state[MEAN].double().numpy() for state in trajectory])
    variances = np.stack([state[VARIANCE].double().numpy() for state in trajectory])
    mean = np.average(means, axis=0, weights=shares)
    second = np.average(variances + means**2, axis=0, weights=shares)
    return mean, second - mean**2


@pytest.mark.parametrize(
    ("options", "shares"),
    [({}, [1 / 5] * 5), ({"last": 2}, [0.5, 0.5, 0, 0, 0]),
     ({"shape": "linear"}, [1 / 8, 1 / 4, 1 / 4, 1 / 4, 1 / 8])],
)  # fmt: skip
def test_statistics_are_those_of_the_averaged_distributions(
    options: dict[str, float | str], shares: list[float], trajectory_paths: list[Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    out, report = average(trajectory_paths, tmp_path / "out", options)
    mean, variance = mixed(states(), shares)
    np.testing.assert_allclose(out[MEAN].numpy(), mean, rtol=1e-6)
    np.testing.assert_allclose(out[VARIANCE].numpy(), variance, rtol=1e-6)
    assert torch.equal(out[COUNT], network()[COUNT])
    assert report.reasons["average: running statistics, those of the averaged distributions"] == 2


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0.1, 9)), min_size=2, max_size=6))
@settings(max_examples=15)
def test_they_are_the_moments_of_all_data_together(
    tmp_path_factory: pytest.TempPathFactory, moments: list[tuple[float, float]]
) -> None:
    folder = tmp_path_factory.mktemp("moments")
    trajectory = states(len(moments))
    for (mean, variance), state in zip(moments, trajectory, strict=True):
        state[MEAN], state[VARIANCE] = torch.full((8,), mean), torch.full((8,), variance)
    out, _ = average(write_trajectory(folder, trajectory), folder / "out")
    mean, variance = mixed(trajectory, [1.0] * len(moments))
    np.testing.assert_allclose(out[MEAN].numpy(), mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(out[VARIANCE].numpy(), variance, rtol=1e-5)


def test_statistics_that_do_not_move_stay_bit_by_bit(tmp_path: Path) -> None:
    trajectory = states()
    for state in trajectory:
        state[MEAN], state[VARIANCE] = trajectory[0][MEAN], trajectory[0][VARIANCE]
    out, _ = average(write_trajectory(tmp_path, trajectory), tmp_path / "out", {"shape": "cosine"})
    assert torch.equal(out[MEAN], trajectory[0][MEAN])
    assert torch.equal(out[VARIANCE], trajectory[0][VARIANCE])


def test_other_treatments_are_what_they_were(trajectory_paths: list[Path], tmp_path: Path) -> None:
    out, _ = average(trajectory_paths, tmp_path / "out", norm=NormMode.RESCALE)
    mean, variance = rescaled_by_hand(network(), out)
    torch.testing.assert_close(out[MEAN], mean)
    torch.testing.assert_close(out[VARIANCE], variance)
    assert torch.equal(out["bn1.weight"], network()["bn1.weight"])
    out, _ = average(trajectory_paths, tmp_path / "out", norm=NormMode.PREDICT)
    assert torch.equal(out[MEAN], network()[MEAN])
    assert not torch.equal(out["bn1.weight"], network()["bn1.weight"])
    out, _ = average(trajectory_paths, tmp_path / "out", norm=NormMode.RESET)
    assert torch.equal(out[VARIANCE], torch.ones(8))
    overrides = (Override("bn1.running_*", Kind.COPY),)
    out, _ = average(trajectory_paths, tmp_path / "out", overrides=overrides)
    assert torch.equal(out[MEAN], network()[MEAN])


def test_statistics_that_not_all_checkpoints_have_are_copied(tmp_path: Path) -> None:
    trajectory = states()
    del trajectory[3][VARIANCE]
    out, report = average(write_trajectory(tmp_path, trajectory), tmp_path / "out")
    assert torch.equal(out[MEAN], trajectory[0][MEAN])
    assert torch.equal(out[VARIANCE], trajectory[0][VARIANCE])
    assert report.reasons["copy: running statistics, not in all checkpoints"] == 2


def test_statistics_that_are_not_of_floats_are_copied(tmp_path: Path) -> None:
    trajectory = states()
    for state in trajectory:
        state[MEAN] = torch.arange(8)
    out, report = average(write_trajectory(tmp_path, trajectory), tmp_path / "out")
    assert torch.equal(out[VARIANCE], trajectory[0][VARIANCE])
    assert report.reasons["copy: running statistics, not of floats"] == 2


@pytest.mark.parametrize(("name", "k"), [(MEAN, 0), (VARIANCE, 3)])
def test_statistics_that_are_not_finite(name: str, k: int, tmp_path: Path) -> None:
    trajectory = states()
    trajectory[k][name][2] = math.nan
    paths = write_trajectory(tmp_path, trajectory)
    with pytest.raises(CheckpointError, match=f"ckpt{k}.safetensors: tensor '{name}': has values"):
        average(paths, tmp_path / "out")
    out, report = average(paths, tmp_path / "out", allow_nonfinite=True)
    mean, variance = mixed(trajectory, [1.0] * 5)
    kept = np.arange(8) != 2
    np.testing.assert_allclose(out[MEAN].numpy()[kept], mean[kept], rtol=1e-6)
    np.testing.assert_allclose(out[VARIANCE].numpy()[kept], variance[kept], rtol=1e-6)
    assert torch.equal(out[name][2:3].isnan(), trajectory[0][name][2:3].isnan())
    assert report.nonfinite == 1


# ------------------------------------------------------------------------- what it is worth

IMAGES = Inputs("image", (1, 8, 8))
BATCHES, CHECKPOINTS = 100, 5


def estimated(model: nn.Module, inputs: Tensor) -> nn.Module:
    """The model with its BatchNorms' statistics estimated on data, as update_bn does."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    with torch.no_grad():
        for part in torch.split(inputs, BATCHES):
            model(part)
    return model.eval()


def scores(design: Design, seed: int, folder: Path) -> dict[str, tuple[float, float]]:
    """Accuracy in percent, and loss, on digits that were not trained on, a treatment each."""
    parts = [load_digits(part) for part in ("meta", "demo")]
    inputs, labels = (torch.cat(of) for of in zip(*parts, strict=True))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    train, test = order[:600], order[600:]
    model = build(design, seed=seed)
    rate = {"learning_rate": 5e-3, "least_batch": 2}
    fit(model, inputs[train], labels[train], epochs=12, seed=seed, **rate)
    paths: list[Path] = []
    for k in range(1, CHECKPOINTS + 1):
        fit(model, inputs[train], labels[train], epochs=2, seed=100 * seed + k, **rate)
        paths.insert(0, folder / f"checkpoint-{k}.safetensors")
        save_file(model.state_dict(), paths[0])

    def score(found: nn.Module) -> tuple[float, float]:
        found.eval()
        with torch.no_grad():
            loss = nn.functional.cross_entropy(found(inputs[test]), labels[test])
        return 100 * accuracy(found, inputs[test], labels[test]), float(loss)

    result = {"latest": score(model)}
    for norm in (NormMode.AVERAGE, NormMode.PREDICT, NormMode.RESCALE):
        state, _ = average(paths, folder / "out", norm=norm)
        model.load_state_dict(state)
        result[norm.value] = score(model)
        if norm is NormMode.AVERAGE:
            result["estimated"] = score(estimated(model, inputs[train]))
    return result


@pytest.mark.slow
@one_thread()
def test_averaged_statistics_are_worth_nearly_what_estimated_ones_are(tmp_path: Path) -> None:
    """The numbers of docs/methods.md: ``pytest -n 0 -s -m slow`` with this test's name."""
    found = []
    for name in ("cnn", "resnet", "mobilenetv2", "densenet"):
        for seed in range(3):
            found.append(scores(Design(name, IMAGES, 10, {"norm": "batch"}), seed, tmp_path))
            print(name, seed, {k: (round(a, 2), round(b, 4)) for k, (a, b) in found[-1].items()})
    means = {key: np.mean([one[key] for one in found], axis=0) for key in found[0]}
    for key, (right, loss) in means.items():
        print(f"{key:10} {right:.2f} % {loss:.4f}")
    assert means["average"][0] > means["estimated"][0] - 0.5
    assert means["average"][0] > means["predict"][0] + 1
    assert means["average"][0] > means["latest"][0] + 1
