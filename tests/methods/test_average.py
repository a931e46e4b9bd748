"""Averages along a run: coefficients of every shape against explicit decays, rounding, the command."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import know_cli
from know_cli.engine.settings import FrozenMode, NormMode, Settings
from know_cli.errors import UsageError
from know_cli.kinds import PREDICTED_KINDS, Kind
from know_cli.methods.combination import LinearPredictor
from know_cli.methods.decay import SHAPE_MEANS, SHAPES, decay_coefficients, moving_mean
from know_cli.methods.registry import describe_methods, find_method, parse_options
from know_cli.passes.numbers import round_to_odd
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request
from know_cli.prediction.verify import verify
from tests.support.command import Command, one_line
from tests.support.plans import batch_of
from tests.support.trajectories import KINDS, network, states, write_trajectory

Array = np.ndarray[Any, np.dtype[np.float64]]
Function = Callable[[float], float]

# ------------------------------------------------------------------------------ by hand
# Antiderivatives of the decays, for the mean over a stretch as the textbook has it.

ANTIDERIVATIVES: dict[str, Function] = {
    "linear": lambda x: x - x**2 / 2,
    "sqrt": lambda x: x - 2 / 3 * x**1.5,
    "cosine": lambda x: x / 2 + math.sin(math.pi * x) / (2 * math.pi),
}


def moving_antiderivative(rate: float) -> Function:
    """Of (1 − e^(−rate·(1 − x))) / (1 − e^(−rate))."""
    return lambda x: (x - math.exp(-rate * (1 - x)) / rate) / (1 - math.exp(-rate))


def annealed(times: list[float], weights: Array, begin: float, integral: Function) -> Array:
    """The start of the decay, and each movement times the mean of the decay in it, spelled out."""
    span = times[-1] - begin
    path = [np.interp(begin, times, weights[:, n]) for n in range(weights.shape[1])]
    total: Array = np.array(path)
    for k in range(1, len(times)):
        low, high = max(times[k - 1], begin), times[k]
        if high <= begin:
            continue
        a, b = (low - begin) / span, (high - begin) / span
        mean = (integral(b) - integral(a)) / (b - a)
        movement = (weights[k] - weights[k - 1]) * (high - low) / (times[k] - times[k - 1])
        total = total + mean * movement
    return total


RUNS = st.lists(st.integers(0, 100_000), min_size=2, max_size=16, unique=True).map(sorted)


def weights_of(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((count, 7))


# ------------------------------------------------------------------------- coefficients


@given(RUNS, st.sampled_from(sorted(SHAPE_MEANS)), st.floats(0, 0.999))
@settings(max_examples=60)
def test_an_average_is_the_sum_of_the_decayed_movements(
    run: list[int], shape: str, start: float
) -> None:
    times = [float(step) for step in run]
    begin = start * times[-1]
    found = decay_coefficients(times, begin, SHAPE_MEANS[shape])
    assert all(coefficient >= 0 for coefficient in found)
    assert math.fsum(found) == pytest.approx(1, abs=1e-14)
    weights = weights_of(len(times))
    expected = annealed(times, weights, begin, ANTIDERIVATIVES[shape])
    np.testing.assert_allclose(np.array(found) @ weights, expected, rtol=0, atol=1e-7)


@given(RUNS, st.floats(0.01, 50))
@settings(max_examples=40)
def test_a_moving_average_is_the_mean_over_the_path_with_its_weights(
    run: list[int], half_lives: float
) -> None:
    times = [float(step) for step in run]
    found = decay_coefficients(times, times[0], moving_mean(half_lives))
    assert all(coefficient >= 0 for coefficient in found)
    assert math.fsum(found) == pytest.approx(1, abs=1e-14)
    weights = weights_of(len(times))
    integral = moving_antiderivative(half_lives * math.log(2))
    expected = annealed(times, weights, times[0], integral)
    np.testing.assert_allclose(np.array(found) @ weights, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("shape", "decay"), [
    ("linear", lambda x: 1 - x), ("sqrt", lambda x: 1 - np.sqrt(x)),
    ("cosine", lambda x: (1 + np.cos(np.pi * x)) / 2),
])  # fmt: skip
def test_a_trainer_s_own_decay_step_by_step(shape: str, decay: Callable[[Array], Array]) -> None:
    """A run whose movements are even between checkpoints, with its rate multiplied each step."""
    times, begin = [0.0, 4000.0, 5000.0, 9000.0, 10_000.0], 4400.0
    weights = weights_of(5)
    steps = np.arange(1, 10_001)
    path = np.stack([np.interp(np.arange(10_001), times, column) for column in weights.T], axis=1)
    multiplier = np.where(steps <= begin, 1.0, decay(np.maximum(steps - 0.5 - begin, 0) / 5600))
    expected = path[0] + (multiplier[:, None] * np.diff(path, axis=0)).sum(axis=0)
    found = np.array(decay_coefficients(times, begin, SHAPE_MEANS[shape])) @ weights
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert decay_coefficients(times, begin, SHAPE_MEANS[shape])[0] == 0


def test_a_trainer_s_own_moving_average_step_by_step() -> None:
    times, half_life = [2000.0, 4000.0, 4500.0, 8000.0], 1500
    weights = weights_of(4)
    path = np.stack([np.interp(np.arange(2000, 8001), times, c) for c in weights.T], axis=1)
    factor = 0.5 ** (1 / half_life)
    shares = factor ** np.arange(6000, -1, -1)
    expected = (shares[:, None] * path).sum(axis=0) / shares.sum()
    found = np.array(decay_coefficients(times, times[0], moving_mean(4))) @ weights
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


def test_coefficients_at_their_edges() -> None:
    linear = SHAPE_MEANS["linear"]
    # The mean over the path: ends count half.
    assert decay_coefficients([0, 1, 2, 3, 4], 0, linear) == pytest.approx(
        [1 / 8, *[1 / 4] * 3, 1 / 8]
    )
    # Checkpoints before the beginning count only as far as it lies between them.
    assert decay_coefficients([0, 10, 20, 30], 20, linear) == [0, 0, 0.5, 0.5]
    assert decay_coefficients([0, 10, 20, 30], 15, linear) == pytest.approx(
        [0, 1 / 12, 7 / 12, 1 / 3]
    )
    # A decay that begins at all but the latest checkpoint, and before the oldest.
    assert decay_coefficients([0, 10], 9.999, linear) == pytest.approx([0.00005, 0.99995])
    assert decay_coefficients([30, 40], 0, linear) == pytest.approx([7 / 8, 1 / 8])
    # However near to each other: nothing cancels.
    for shape in SHAPE_MEANS:
        near = decay_coefficients([10**6 - 1, 10**6], 0, SHAPE_MEANS[shape])[1]
        assert 0 < near < 1e-6
    assert moving_mean(1e-9)(0.2, 0.5) == pytest.approx(linear(0.2, 0.5), rel=1e-9)
    assert moving_mean(1e9)(0, 1) == pytest.approx(1)
    assert decay_coefficients([0, 5, 10], 0, moving_mean(1e30)) == [0, 0, 1]


# ------------------------------------------------------------------------------ the run


def options(*texts: str) -> dict[str, Any]:
    return parse_options(find_method("average"), list(texts))


def write_run(folder: Path, steps: list[int]) -> list[Path]:
    """A run's checkpoints as a trainer names them, latest first."""
    paths = []
    for step, path in zip(steps, write_trajectory(folder, states(len(steps))), strict=True):
        paths.append(path.rename(folder / f"checkpoint-{step}.safetensors"))
    return paths


def average(
    paths: list[Path], output: Path, *texts: str, **wishes: Any
) -> tuple[dict[str, Tensor], tuple[float, ...], list[str]]:
    """The output, the coefficients and the notices."""
    request = Request(
        paths, output, settings=Settings(**wishes), method="average", options=options(*texts),
        device="cpu", force=True,
    )  # fmt: skip
    with open_prediction(request) as prediction:
        prediction.execute()
        assert prediction.recipe.coefficients is not None
        return load_file(output), prediction.recipe.coefficients, list(prediction.notices)


STEPS = [1000, 900, 700, 400]
RUN_CASES: list[tuple[list[str], list[float]]] = [
    ([], [0.25] * 4),
    (["last=2"], [0.5, 0.5, 0, 0]),
    (["last=4"], [0.25, 0.25, 0.25, 0.25]),
    (["last=1"], [1, 0, 0, 0]),
    (["shape=uniform", "over=0.3"], [1 / 3, 1 / 3, 1 / 3, 0]),
    (["shape=uniform", "over=0.05"], [1, 0, 0, 0]),
    (["shape=linear"], [1 / 12, 1 / 4, 5 / 12, 1 / 4]),
    (["shape=linear", "last=3"], [1 / 6, 1 / 2, 1 / 3, 0]),
    (["shape=linear", "over=0.3"], [1 / 6, 1 / 2, 1 / 3, 0]),
    (["shape=linear", "over=0.2"], [1 / 4, 5 / 8, 1 / 8, 0]),
    (["shape=linear", "over=0.05"], [3 / 4, 1 / 4, 0, 0]),
    (["shape=linear", "over=1e-10"], [1, 0, 0, 0]),
    (["shape=cosine", "over=1e-300"], [1, 0, 0, 0]),
    (["shape=linear", "over=0.9", "last=2"], [1 / 18, 17 / 18, 0, 0]),
    (["shape=sqrt", "last=2"], [1 / 3, 2 / 3, 0, 0]),
    (["shape=cosine", "last=2"], [1 / 2, 1 / 2, 0, 0]),
    (["shape=ema", "half-life=100", "last=2"], [2 - 1 / math.log(2), 1 / math.log(2) - 1, 0, 0]),
    (["shape=ema", "half-life=1000", "last=1"], [1, 0, 0, 0]),
    (["shape=ema", "half-life=1e-320"], [1, 0, 0, 0]),
    (["shape=exponential", "last=3"], [4 / 7, 2 / 7, 1 / 7, 0]),
    (["shape=exponential", "over=0.1"], [4 / 5, 1 / 5, 0, 0]),
    (["shape=exponential", "last=1"], [1, 0, 0, 0]),
    (["forgotten=1"], [0, 0, 0, 1]),
    (["forgotten=3"], [0, 1 / 3, 1 / 3, 1 / 3]),
    (["forgotten=4"], [1 / 4, 1 / 4, 1 / 4, 1 / 4]),
]


@pytest.mark.parametrize(("texts", "expected"), RUN_CASES, ids=lambda c: " ".join(map(str, c)))
def test_what_the_options_give(texts: list[str], expected: list[float], tmp_path: Path) -> None:
    out, found, _ = average(write_run(tmp_path, STEPS), tmp_path / "out", *texts)
    assert found == pytest.approx(expected)
    trajectory = states(4)
    for name in (*KINDS, "bn1.weight", "bn1.bias"):
        dtype = trajectory[0][name].dtype
        sums = np.zeros(tuple(trajectory[0][name].shape))
        for coefficient, state in zip(expected, trajectory, strict=True):
            sums = sums + coefficient * state[name].float().double().numpy()
        unit = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        wanted = torch.from_numpy(np.asarray(sums))
        torch.testing.assert_close(out[name].double(), wanted, rtol=unit, atol=1e-7, msg=name)
    for name in ("bn1.num_batches_tracked", "mask", "frozen.weight", "empty.weight"):
        assert torch.equal(out[name], trajectory[0][name])


def test_the_page_s_table_has_the_coefficients(tmp_path: Path) -> None:
    text = (Path(know_cli.__file__).parent.parent / "docs/methods.md").read_text(encoding="utf-8")
    table = [line.strip("| \n").split(" | ") for line in text.splitlines() if line[:1] == "|"]
    paths = write_run(tmp_path, [1000, 900, 800, 700, 600])
    found = [row for row in table if len(row) == 6 and re.fullmatch(r"[\d.]+", row[1])]
    for names, *printed in [row for row in found if row[0] != "`--option`"]:
        texts = re.findall(r"`([^`]+)`", names)
        _, coefficients, _ = average(paths, tmp_path / "out", *texts)
        assert [float(number) for number in printed] == pytest.approx(coefficients, abs=6e-4)
    assert len(found) == 10


def test_a_single_checkpoint_is_passed_on_bit_by_bit(tmp_path: Path) -> None:
    out, _, _ = average(write_run(tmp_path, STEPS), tmp_path / "out", "last=1")
    for name, tensor in network().items():
        assert torch.equal(
            out[name], tensor.float().double() if name == "double.weight" else tensor
        )


def test_what_a_share_of_the_run_cannot_be_is_told(tmp_path: Path) -> None:
    paths = write_run(tmp_path, STEPS)

    def told(*texts: str) -> str:
        return " | ".join(average(paths, tmp_path / "out", *texts)[2])

    assert "over" not in told("shape=linear", "over=0.5")
    assert "over" not in told("over=0.1")  # begins at the step of the one before the latest
    before = "--option over=0.7: that share of the run begins at step 300, before the oldest"
    assert before in told("shape=sqrt", "over=0.7")
    assert "of step 400, which stands for the weights at its beginning" in told(
        "shape=sqrt", "over=0.7"
    )
    assert told("over=0.7").endswith("of step 400")
    only = told("shape=linear", "over=0.05")
    assert "begins at step 950, after all but the latest checkpoint, which is averaged with" in only
    assert "which is all that is taken" in told("over=0.05")
    assert "half-life=1e+06 is in training steps" not in told("shape=ema", "half-life=1e6")
    assert "--option half-life=1000000 is in training steps" in told("shape=ema", "half-life=1e6")


def test_without_training_steps_checkpoints_are_equally_far_apart(tmp_path: Path) -> None:
    paths = write_trajectory(tmp_path, states(4))  # ckpt0 … ckpt3: numbers that rise
    _, found, notices = average(paths, tmp_path / "out", "shape=linear")
    assert found == pytest.approx([1 / 6, 1 / 3, 1 / 3, 1 / 6])
    assert any("equally far apart, the latest first" in notice for notice in notices)
    _, found, notices = average(paths, tmp_path / "out", "shape=ema", "half-life=1", "last=2")
    assert found == pytest.approx([2 - 1 / math.log(2), 1 / math.log(2) - 1, 0, 0])
    assert "--option half-life=1 is in checkpoints" in notices
    _, found, notices = average(paths, tmp_path / "out", "shape=exponential", "last=3")
    assert found == pytest.approx([4 / 7, 2 / 7, 1 / 7, 0])
    assert any("taken for a run's, the latest first" in notice for notice in notices)
    _, found, notices = average(paths, tmp_path / "out")
    assert found == (0.25,) * 4
    assert notices == []  # of the plain mean there is nothing to say
    with pytest.raises(UsageError, match="over=0.2: the checkpoints do not tell after how many"):
        average(paths, tmp_path / "out", "shape=linear", "over=0.2")


def test_steps_in_the_metadata_count(tmp_path: Path) -> None:
    recorded = [{"know.training-step": str(step)} for step in STEPS]
    paths = write_trajectory(tmp_path, states(4), metadata=recorded)
    _, found, _ = average(paths, tmp_path / "out", "shape=linear")
    assert found == pytest.approx([1 / 12, 1 / 4, 5 / 12, 1 / 4])
    recorded[1] = recorded[0]  # two of the same step: no spacing
    paths = write_trajectory(tmp_path, states(4), metadata=recorded)
    _, found, notices = average(paths, tmp_path / "out", "shape=linear")
    assert found == pytest.approx([1 / 6, 1 / 3, 1 / 3, 1 / 6])
    assert any("tell no training steps that fall" in notice for notice in notices)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["shape=ema"], "--option shape=ema: give the half-life, too"),
        (["half-life=5"], "--option half-life=5: is for --option shape=ema, not for shape=uniform"),
        (["half-life=5", "shape=exponential"], "shape=ema, not for shape=exponential"),
        (["shape=ema", "half-life=5", "over=0.2"], "over=0.2: a moving average has no beginning"),
        (["last=5"], "--option last=5: only 4 checkpoints were given"),
        (["last=0"], "--option last=0: must be more than 0"),
        (["last=1.5"], "--option last=1.5: is not a whole number"),
        (["over=0"], "--option over=0: must be more than 0"),
        (["over=1.1"], "--option over=1.1: must be at most 1"),
        (["shape=ema", "half-life=-1"], "--option half-life=-1: must be more than 0"),
        (["shape=round"], "--option shape=round: is none of uniform, linear, sqrt, cosine, exponential, "
                          "ema"),
        (["forgotten=5"], "--option forgotten=5: only 4 checkpoints were given"),
        (["forgotten=0"], "--option forgotten=0: must be more than 0"),
        (["forgotten=2", "last=3"], "forgotten=2: is a plain mean of so many checkpoints, and "
                                    "--option last=3 asks for another average"),
        (["over=0.5", "forgotten=2"], "--option over=0.5 asks for another average"),
        (["shape=cosine", "forgotten=2"], "--option shape=cosine asks for another average"),
        (["decay=1"], "takes shape, last, forgotten, over, half-life and lora"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(
    texts: list[str], message: str, tmp_path: Path, know: Command
) -> None:
    paths = write_run(tmp_path, STEPS)
    given = [part for text in texts for part in ("--option", text)]
    done = know("predict", *paths, "-o", tmp_path / "out", "--method", "average", *given)
    assert done.returncode == 2
    assert message in one_line(done.stderr)
    assert not (tmp_path / "out").exists()


def test_the_most_forgotten_are_those_of_a_forgetting(tmp_path: Path, know: Command) -> None:
    paths = write_run(tmp_path, STEPS)
    option = ("--method", "average", "--option", "forgotten=2")
    for kind, text in (("run", "a run"), ("branches", "branches")):
        done = know("predict", *paths, "-o", tmp_path / "out", "--trajectory", kind, *option)
        assert done.returncode == 2
        message = one_line(done.stderr)
        assert "--option forgotten=2: is for a forgetting" in message
        assert f"are of {text}" in message
        assert not (tmp_path / "out").exists()
    # In one spelling with the method, beside another.
    spelled = ("--method", "average,forgotten=2", "--method", "naive")
    done = know("predict", *paths, "-o", tmp_path / "out.safetensors", *spelled)
    assert done.returncode == 0, done.stderr
    out = load_file(tmp_path / "out.average-forgotten-2.safetensors")
    name = next(iter(KINDS))
    trajectory = states(4)
    assert torch.equal(
        out[name], ((trajectory[2][name].double() + trajectory[3][name]) / 2).float()
    )


def test_normalisation_of_averages_is_for_averages(tmp_path: Path, know: Command) -> None:
    paths = write_run(tmp_path, STEPS)
    for arguments, message in (
        (["--method", "linear", "--norm", "average"], "--method linear takes no average"),
        (["--method", "linear", "--lora", "exact"], "--method linear takes no options"),
    ):
        done = know("predict", *paths, "-o", tmp_path / "out", *arguments)
        assert done.returncode == 2
        assert message in one_line(done.stderr)
    # And the others are there for averages.
    out, _, _ = average(paths, tmp_path / "out", norm=NormMode.COPY)
    for name in ("bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"):
        assert torch.equal(out[name], network()[name])


def test_coefficients_are_told_and_recorded_and_verified(tmp_path: Path, know: Command) -> None:
    paths = write_run(tmp_path, STEPS)
    arguments = ["--method", "average", "--option", "shape=linear", "--option", "over=0.2"]
    expected = [0.25, 0.625, 0.125, 0]
    line = "average: 0.25 · checkpoint-1000.safetensors + 0.625 · checkpoint-900.safetensors + "
    for more in (["--dry-run"], ["--json", tmp_path / "report.json"]):
        done = know("predict", *paths, "-o", tmp_path / "out", *arguments, *more)
        assert done.returncode == 0, done.stderr
        assert f"{line}0.125 · checkpoint-700.safetensors\n" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["coefficients"] == pytest.approx(expected)
    assert report["options"] == {"shape": "linear", "over": 0.2, "lora": "exact"}
    assert report["norm"] == "average"
    with safe_open(tmp_path / "out", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["know.coefficients"]) == report["coefficients"]
    assert json.loads(metadata["know.options"]) == report["options"]
    for spans in (None, 3):
        found = verify(tmp_path / "out", paths, spans=spans)
        found.check(tmp_path / "out")
    # Steps that come from names have to be there again.
    renamed = [path.rename(path.with_name(f"{k}.safetensors")) for k, path in enumerate(paths)]
    done = know("verify", tmp_path / "out", *renamed)
    assert done.returncode == 3
    assert "training steps" in one_line(done.stderr)


def test_names_that_are_the_same_are_told_with_their_folders(tmp_path: Path, know: Command) -> None:
    for k, state in enumerate(states(2)):
        folder = tmp_path / f"run{k}"
        folder.mkdir()
        write_trajectory(folder, [state])
    done = know("predict", "run0/ckpt0.safetensors", "run1/ckpt0.safetensors", "-o", "out",
                "--method", "average", cwd=tmp_path)  # fmt: skip
    assert "average: 0.5 · run0/ckpt0.safetensors + 0.5 · run1/ckpt0.safetensors\n" in done.stdout


def test_the_help_has_every_shape(know: Command) -> None:
    (line,) = [text for text in describe_methods().split("\n") if text.startswith("average ")]
    assert "shape=uniform|linear|sqrt|cosine|exponential|ema" in line + describe_methods()
    for name in ("last=…", "forgotten=…", "over=…", "half-life=…", "lora=exact|factors"):
        assert name in describe_methods()
    assert "|".join(SHAPES) in know("predict", "--help").stdout


# ------------------------------------------------------------------------------ rounding

NUMBERS = st.floats(-1e30, 1e30, allow_nan=False).map(lambda x: x if abs(x) > 1e-30 else 0.0)


def to_bfloat16(values: Array) -> Array:
    """Round float64 to bfloat16 once, to nearest and even, in integers; for normal numbers."""
    bits = values.view(np.uint64)
    half, last = np.uint64((1 << 44) - 1), (bits >> np.uint64(45)) & np.uint64(1)
    kept: Array = ((bits + half + last) & ~np.uint64((1 << 45) - 1)).view(np.float64)
    return kept


@given(st.lists(NUMBERS, min_size=1, max_size=20), st.integers(-2, 2))
def test_rounding_to_odd_and_then_to_sixteen_bits_is_rounding_once(
    values: list[float], away: int
) -> None:
    exact = np.array(values)
    # Near ties of bfloat16, where rounding twice goes wrong.
    ties = to_bfloat16(exact) * (1 + 2.0**-8) * (1 + away * 2.0**-50)
    for sums in (exact, ties):
        rounded = round_to_odd(torch.from_numpy(sums.copy())).float()
        found = rounded.bfloat16().double().numpy()
        np.testing.assert_array_equal(found, to_bfloat16(sums))


@given(
    st.lists(
        st.lists(st.floats(-10, 10, width=16), min_size=5, max_size=5), min_size=1, max_size=9
    ),
    st.lists(st.floats(0, 1), min_size=5, max_size=5).filter(lambda c: sum(c) > 0.1),
    st.permutations(range(5)),
)
@settings(max_examples=30)
def test_sums_do_not_depend_on_the_order_of_checkpoints(
    rows: list[list[float]], shares: list[float], order: list[int]
) -> None:
    window = torch.tensor(rows).T.contiguous()
    coefficients = [share / sum(shares) for share in shares]
    results = []
    for which in (range(5), order):
        weights = [[coefficients[k] for k in which]]
        out = torch.empty(window.shape[1])
        predictor = LinearPredictor(dict.fromkeys(PREDICTED_KINDS, weights))
        block = batch_of(Kind.FC, len(rows)).block(slice(0, len(rows)))
        predictor.predict(block, 1, window[list(which)], out)
        results.append(out)
    torch.testing.assert_close(*results, rtol=2e-7, atol=1e-14)


def test_sixteen_bit_averages_are_rounded_once(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    dtypes = {"a.weight": torch.bfloat16, "b.weight": torch.float32, "c.weight": torch.bfloat16}
    trajectory = [
        {
            name: torch.randn(30_000, 2, generator=generator).to(dtype)
            for name, dtype in dtypes.items()
        }
        for _ in range(3)
    ]
    paths = write_trajectory(tmp_path, trajectory)
    out, found, _ = average(paths, tmp_path / "out", "shape=linear")
    for name, dtype in dtypes.items():
        sums = np.zeros((30_000, 2))
        for coefficient, state in zip(found[::-1], trajectory[::-1], strict=True):
            sums += coefficient * state[name].double().numpy()
        expected = to_bfloat16(sums) if dtype is torch.bfloat16 else sums.astype(np.float32)
        np.testing.assert_array_equal(out[name].double().numpy(), expected.astype(np.float64))


@pytest.mark.parametrize("texts", [["shape=cosine"], ["shape=ema", "half-life=70"], ["shape=sqrt"]])
def test_what_does_not_move_stays(texts: list[str], tmp_path: Path) -> None:
    for k, path in enumerate(write_trajectory(tmp_path, [network()] * 4)):
        path.rename(tmp_path / f"checkpoint-{STEPS[k]}.safetensors")
    paths = [tmp_path / f"checkpoint-{step}.safetensors" for step in STEPS]
    out, _, _ = average(paths, tmp_path / "out", *texts, frozen=FrozenMode.PREDICT)
    for name, tensor in network().items():
        if name != "double.weight":
            assert torch.equal(out[name], tensor), name
