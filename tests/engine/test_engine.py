"""The engine: what is computed, what is copied, and that the bytes do not depend on how."""

from __future__ import annotations

import math
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

from know_cli.engine.plan import Action, Block, PlannedTensor, Stream
from know_cli.engine.report import Report
from know_cli.engine.running_statistics import ChannelSums
from know_cli.engine.scan import looks_reversed
from know_cli.engine.settings import FrozenMode, NormMode, Settings
from know_cli.errors import CheckpointError, UsageError
from know_cli.kinds import Kind, Override
from know_cli.known.bundle import load_bundle
from know_cli.methods import known
from know_cli.methods.known import KnownPredictor
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request
from tests.support.by_hand import rescaled_by_hand
from tests.support.folders import digest
from tests.support.trajectories import KINDS, network, states, write_trajectory

COPIED = [
    "bn1.weight",
    "bn1.bias",
    "bn1.num_batches_tracked",
    "frozen.weight",
    "mask",
    "empty.weight",
]


def predict(
    paths: list[Path], bundle: Path, output: Path, **wishes: Any
) -> tuple[dict[str, Tensor], Report]:
    own = {key: wishes.pop(key) for key in ("rate", "every_step", "force") if key in wishes}
    request = Request(paths, output, str(bundle), Settings(**wishes), device="cpu", **own)
    with open_prediction(request) as opened:
        report = opened.execute()
    return load_file(output), report


def reference(trajectory: list[dict[str, Tensor]], name: str, bundle: Path, steps: int) -> Tensor:
    """The reference module over a window shifted ``steps`` times, float32."""
    module = load_bundle(bundle).module(KINDS[name])
    window = [state[name].float().reshape(-1) for state in reversed(trajectory)]
    for _ in range(steps):
        with torch.no_grad():
            window = [*window[1:], module(torch.stack(window, dim=1))]
    return window[-1].reshape(trajectory[0][name].shape)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_every_tensor_is_predicted_by_its_kind_or_copied(
    trajectory_paths: list[Path], bundle_path: Path, tmp_path: Path, steps: int
) -> None:
    trajectory = states()
    out, report = predict(trajectory_paths, bundle_path, tmp_path / "out", steps=steps)
    assert out.keys() == trajectory[0].keys()
    for name in KINDS:
        expected = reference(trajectory, name, bundle_path, steps)
        assert out[name].dtype == trajectory[0][name].dtype
        assert not torch.equal(out[name], trajectory[0][name])
        if out[name].dtype in (torch.float16, torch.bfloat16):
            # One unit in the last place: the two implementations may round a tie differently.
            close = torch.isclose(out[name].float(), expected, rtol=2**-8, atol=1e-6)
            assert close.all()
        else:
            torch.testing.assert_close(out[name].float(), expected, atol=1e-6, rtol=0)
    for name in COPIED:
        assert torch.equal(out[name], trajectory[0][name]), name
    assert report.predicted == sum(trajectory[0][name].numel() for name in KINDS)


def test_halves_are_rounded_to_nearest_even(bundle_path: Path, tmp_path: Path) -> None:
    trajectory = [{"w": state["fc.weight"].clone()} for state in states()]
    exact, _ = predict(write_trajectory(tmp_path, trajectory), bundle_path, tmp_path / "a")
    trajectory[0]["w"] = trajectory[0]["w"].bfloat16()
    # The same values in float32, so that only the way out differs.
    (tmp_path / "b").mkdir()
    widened = [{"w": state["w"].float()} for state in trajectory]
    exact, _ = predict(write_trajectory(tmp_path / "b", widened), bundle_path, tmp_path / "b" / "o")
    (tmp_path / "c").mkdir()
    out, _ = predict(
        write_trajectory(tmp_path / "c", trajectory), bundle_path, tmp_path / "c" / "o"
    )
    bits = exact["w"].numpy().view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    assert np.array_equal(out["w"].view(torch.uint16).numpy(), rounded)


def test_output_has_metadata_and_provenance_and_no_more(bundle_path: Path, tmp_path: Path) -> None:
    paths = write_trajectory(tmp_path, metadata=[{"author": "me"}] * 5)
    predict(paths, bundle_path, tmp_path / "out", steps=2, rate=1 / 3)
    with safe_open(tmp_path / "out", "pt") as file:
        metadata = file.metadata()
    assert len(set(metadata["know.inputs"].split())) == 5
    assert metadata == {
        "format": "pt", "author": "me", "know.version": metadata["know.version"],
        "know.method": "known", "know.steps": "2", "know.rate": repr(1 / 3),
        "know.checkpoints": "5", "know.bundle": load_bundle(bundle_path).digest,
        "know.target": "retrodiction", "know.norm": "rescale", "know.frozen": "copy",
        "know.trajectory-kind": "forgetting", "know.device": "cpu", "know.kernel": metadata["know.kernel"], "know.inputs": metadata["know.inputs"],
    }  # fmt: skip


def test_a_prediction_takes_its_place_in_the_trajectory(bundle_path: Path, tmp_path: Path) -> None:
    recorded = [
        {"know.session": str(k), "know.fraction": str(0.5**k), "know.rate": "0.5", "know.trajectory": "t"}
        for k in range(5)
    ]  # fmt: skip
    paths = write_trajectory(tmp_path, metadata=recorded)
    predict(paths, bundle_path, tmp_path / "out", steps=2)
    with safe_open(tmp_path / "out", "pt") as file:
        metadata = file.metadata()
    assert (metadata["know.session"], metadata["know.fraction"]) == ("-2", "4.0")
    again = [tmp_path / "out", *paths[:4]]
    request = Request(again, tmp_path / "next", str(bundle_path), device="cpu")
    with open_prediction(request) as opened:
        notices = opened.trajectory.notices
    assert notices == ["sessions -2, 0, 1, 2, 3 are not equally far apart"]


def test_sessions_that_are_left_out_make_larger_steps(bundle_path: Path, tmp_path: Path) -> None:
    recorded = [
        {"know.session": str(k), "know.fraction": str(0.5**k), "know.rate": "0.5", "know.trajectory": "t"}
        for k in (0, 2, 4, 6, 8)
    ]  # fmt: skip
    paths = write_trajectory(tmp_path, metadata=recorded)
    with open_prediction(Request(paths, tmp_path / "o", str(bundle_path), device="cpu")) as p:
        assert (p.recipe.rate, p.recipe.factor) == (0.25, "x4")
        assert list(p.notices) == [
            "the checkpoints are 2 sessions apart: the sampling rate from one to the next is 0.25"
        ]
        p.execute()
    with safe_open(tmp_path / "o", "pt") as file:
        metadata = file.metadata()
    assert (metadata["know.session"], metadata["know.fraction"]) == ("-2", "4.0")


@pytest.mark.parametrize("rate", ["0.0", "1.0", "1.5", "-0.5", "nan", "inf", "half"])
def test_a_recorded_rate_that_cannot_be_tells_nothing(
    rate: str, bundle_path: Path, tmp_path: Path
) -> None:
    recorded = [
        {"know.session": str(k), "know.fraction": "1.0", "know.rate": rate, "know.trajectory": "t"}
        for k in range(5)
    ]
    paths = write_trajectory(tmp_path, metadata=recorded)
    with open_prediction(Request(paths, tmp_path / "o", str(bundle_path), device="cpu")) as p:
        assert p.recipe.rate == 0.5


@given(
    st.integers(1, 5),
    st.integers(200_000, 1_200_000),
    st.integers(1, 3),
    st.integers(0, 3),
)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_depend_on_nothing_but_the_inputs(
    big_paths: list[Path], bundle_path: Path, threads: int, memory: int, steps: int, run: int
) -> None:
    folder = big_paths[0].parent
    wishes: dict[str, Any] = {"steps": steps, "force": True}
    reference_path = folder / f"reference{steps}"
    if not reference_path.exists():
        predict(big_paths, bundle_path, reference_path, **wishes)
    least = threads * 1_500_000 + (2 << 20) + 2 * (4 * (5 + steps) + 1 + steps) * 1536
    predict(
        big_paths, bundle_path, folder / "out", threads=threads, max_memory=max(memory, least), **wishes
    )  # fmt: skip
    assert digest(folder / "out") == digest(reference_path)


@pytest.fixture(scope="module")
def big_paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A trajectory of several blocks, with tensors that cross their borders."""
    folder = tmp_path_factory.mktemp("big")
    generator = torch.Generator().manual_seed(0)
    state = {
        "stem.conv1.weight": torch.randn(100, 30, 3, 3, generator=generator) * 0.1,
        "stem.conv1.bias": torch.randn(100, generator=generator) * 0.1,
        "stem.bn1.weight": torch.ones(100),
        "stem.bn1.bias": torch.zeros(100),
        "stem.bn1.running_mean": torch.randn(100, generator=generator),
        "stem.bn1.running_var": torch.rand(100, generator=generator) + 0.5,
        "fc.weight": torch.randn(130, 101, generator=generator) * 0.1,
        "half.weight": torch.randn(90, 33, generator=generator).half(),
    }
    trajectory = [state]
    for k in range(1, 5):
        moved = {}
        for name, tensor in trajectory[-1].items():
            noise = torch.randn(tensor.shape, generator=generator) * 0.02 * 0.5**k
            moved[name] = (tensor.float() + noise).to(tensor.dtype)
        trajectory.append(moved)
    return write_trajectory(folder, trajectory)


def test_every_step_writes_what_single_runs_write(
    trajectory_paths: list[Path], bundle_path: Path, tmp_path: Path
) -> None:
    predict(trajectory_paths, bundle_path, tmp_path / "out.safetensors", steps=3, every_step=True)
    for step, name in (
        (1, "out.x2.safetensors"),
        (2, "out.x4.safetensors"),
        (3, "out.safetensors"),
    ):
        predict(trajectory_paths, bundle_path, tmp_path / "single", steps=step, force=True)
        assert digest(tmp_path / name) == digest(tmp_path / "single")


# ---------------------------------------------------------------------- normalisation


@pytest.mark.parametrize("steps", [1, 3])
def test_rescale_follows_the_formula(
    trajectory_paths: list[Path], bundle_path: Path, tmp_path: Path, steps: int
) -> None:
    out, report = predict(trajectory_paths, bundle_path, tmp_path / "out", steps=steps)
    mean, variance = rescaled_by_hand(network(), out)
    torch.testing.assert_close(out["bn1.running_mean"], mean)
    torch.testing.assert_close(out["bn1.running_var"], variance)
    assert any("rescaled to the change of the layer before" in reason for reason in report.reasons)


def test_rescale_keeps_the_output_of_a_scaled_layer() -> None:
    """Doubling a filter and its bias leaves what comes after the normalisation the same."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=generator).double()
    bias, mean = torch.randn(2, 4, generator=generator).double()
    variance = torch.rand(4, generator=generator).double() + 0.5
    sums = ChannelSums(4, 6, 8)
    sums.add(0, *sums.measured(0, 0, weight.reshape(-1).numpy(), 2 * weight.reshape(-1).numpy()))
    new_mean, new_variance = sums.mean_and_variance(
        mean.numpy(), variance.numpy(), bias.numpy(), 2 * bias.numpy()
    )
    x = torch.randn(10, 6, generator=generator).double()
    before = (x @ weight.T + bias - mean) / variance.sqrt()
    after = (x @ (2 * weight).T + 2 * bias - torch.from_numpy(new_mean)) / torch.from_numpy(
        new_variance
    ).sqrt()
    torch.testing.assert_close(before, after)


def test_a_channel_of_zeros_keeps_its_variance() -> None:
    sums = ChannelSums(2, 2, 8)
    sums.add(
        0, *sums.measured(0, 0, np.array([0.0, 0.0, 1.0, 1.0]), np.array([0.5, 0.5, 2.0, 2.0]))
    )
    mean, variance = sums.mean_and_variance(np.ones(2), np.ones(2), np.zeros(2), np.zeros(2))
    assert mean.tolist() == [1.0, 2.0]
    assert variance.tolist() == [1.0, 4.0]


@given(st.integers(1, 7), st.integers(1, 50), st.lists(st.integers(1, 40), min_size=1, max_size=8))
@settings(max_examples=60)
def test_channel_sums_do_not_depend_on_the_cuts(
    channels: int, channel_size: int, cuts: list[int]
) -> None:
    generator = np.random.default_rng(channels * 100 + channel_size)
    before = generator.normal(size=channels * channel_size)
    after = generator.normal(size=channels * channel_size)
    whole = ChannelSums(channels, channel_size, 1 << 20)
    whole.add(0, *whole.measured(0, 0, before, after))
    pieces, start = ChannelSums(channels, channel_size, 1 << 20), 0
    for size in [*cuts, len(before)]:
        stop = min(start + size, len(before))
        if stop > start:
            pieces.add(start, *pieces.measured(start, start, before[start:stop], after[start:stop]))
        start = stop
    np.testing.assert_allclose(pieces.sums, whole.sums, rtol=1e-12, atol=1e-12)
    rows = before.reshape(channels, channel_size)
    np.testing.assert_allclose(whole.sums[0], (rows * rows).sum(axis=1))


def test_norm_copy_predict_reset(
    trajectory_paths: list[Path], bundle_path: Path, tmp_path: Path
) -> None:
    first = network()
    out, _ = predict(trajectory_paths, bundle_path, tmp_path / "a", norm=NormMode.COPY)
    for name in first:
        if name.startswith("bn1"):
            assert torch.equal(out[name], first[name])
    out, _ = predict(trajectory_paths, bundle_path, tmp_path / "b", norm=NormMode.PREDICT)
    module = load_bundle(bundle_path).module(Kind.BIAS)
    for name in ("bn1.weight", "bn1.bias"):
        window = torch.stack([state[name] for state in reversed(states())], dim=1)
        with torch.no_grad():
            torch.testing.assert_close(out[name], module(window), atol=1e-6, rtol=0)
    assert torch.equal(out["bn1.running_mean"], first["bn1.running_mean"])
    out, _ = predict(trajectory_paths, bundle_path, tmp_path / "c", norm=NormMode.RESET)
    assert out["bn1.weight"].tolist() == out["bn1.running_var"].tolist() == [1.0] * 8
    assert out["bn1.bias"].tolist() == out["bn1.running_mean"].tolist() == [0.0] * 8
    assert out["bn1.num_batches_tracked"].item() == 0


def test_where_names_do_not_tell_statistics_are_copied(bundle_path: Path, tmp_path: Path) -> None:
    renamed = [
        {name.replace("conv1", "something"): tensor for name, tensor in state.items()}
        for state in states()
    ]
    out, report = predict(write_trajectory(tmp_path, renamed), bundle_path, tmp_path / "out")
    assert torch.equal(out["bn1.running_var"], renamed[0]["bn1.running_var"])
    assert any("names do not tell" in reason for reason in report.reasons)


# ---------------------------------------------------------------------- frozen and overrides


def test_frozen_tensors_are_copied_unless_wanted(
    trajectory_paths: list[Path], bundle_path: Path, tmp_path: Path
) -> None:
    first = network()["frozen.weight"]
    out, report = predict(trajectory_paths, bundle_path, tmp_path / "a")
    assert torch.equal(out["frozen.weight"], first)
    # The other one has no elements, and so none that changes.
    assert report.reasons["copy: frozen: the same in all checkpoints"] == 2
    out, _ = predict(trajectory_paths, bundle_path, tmp_path / "b", frozen=FrozenMode.PREDICT)
    assert not torch.equal(out["frozen.weight"], first)


def test_a_tensor_that_differs_only_at_its_end_is_not_frozen(
    bundle_path: Path, tmp_path: Path
) -> None:
    long = torch.randn(70_000, 2) * 0.1
    trajectory = [{"w": long.clone()} for _ in range(5)]
    trajectory[4]["w"][-1, -1] += 0.01
    out, report = predict(write_trajectory(tmp_path, trajectory), bundle_path, tmp_path / "out")
    assert report.predicted == 140_000
    assert not torch.equal(out["w"], long)


def test_overrides_change_the_kind(
    trajectory_paths: list[Path], bundle_path: Path, tmp_path: Path
) -> None:
    overrides = (
        Override("fc.*", Kind.COPY),
        Override("half.weight", Kind.BIAS),
        Override("bn1.weight", Kind.FC),
    )
    out, _ = predict(trajectory_paths, bundle_path, tmp_path / "out", overrides=overrides)
    assert torch.equal(out["fc.weight"], network()["fc.weight"])
    assert torch.equal(out["fc.bias"], network()["fc.bias"])
    assert not torch.equal(out["bn1.weight"], network()["bn1.weight"])
    module = load_bundle(bundle_path).module(Kind.BIAS)
    window = torch.stack([s["half.weight"].float().reshape(-1) for s in reversed(states())], dim=1)
    with torch.no_grad():
        expected = module(window).half().reshape(16, 10)
    torch.testing.assert_close(out["half.weight"], expected, atol=1e-3, rtol=1e-2)


def test_an_override_that_matches_nothing_is_an_error(
    trajectory_paths: list[Path], bundle_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"nothing.\*"):
        predict(
            trajectory_paths,
            bundle_path,
            tmp_path / "out",
            overrides=(Override("nothing.*", Kind.FC),),
        )


# ---------------------------------------------------------------------- numbers that are none


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("checkpoint", [0, 3])
@pytest.mark.parametrize("name", ["fc.weight", "half.weight", "brain.weight", "double.weight"])
def test_inputs_that_are_not_finite_are_refused_by_name(
    bundle_path: Path, tmp_path: Path, value: float, checkpoint: int, name: str
) -> None:
    trajectory = states()
    trajectory[checkpoint][name][1, 1] = value
    paths = write_trajectory(tmp_path, trajectory)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(
        CheckpointError, match=f"ckpt{checkpoint}.safetensors: tensor '{name}'.*not finite"
    ):
        predict(paths, bundle_path, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_double_too_large_for_float32_is_refused(bundle_path: Path, tmp_path: Path) -> None:
    trajectory = states()
    trajectory[2]["double.weight"][0, 0] = 1e300
    with pytest.raises(CheckpointError, match=r"'double.weight'.*not finite in float32"):
        predict(write_trajectory(tmp_path, trajectory), bundle_path, tmp_path / "out")


def test_the_first_of_many_small_tensors_that_are_not_finite_is_named(
    tmp_path: Path, bundle_path: Path
) -> None:
    """All are checked together; the one named is the first by its place, in its first file."""
    trajectory = [
        {f"t{n}.weight": torch.full((2, 3), 1 + k / 8) for n in range(9)} for k in range(5)
    ]
    trajectory[1]["t6.weight"][0, 0] = torch.nan
    for k in (4, 3):
        trajectory[k]["t5.weight"][1, 2] = torch.inf
    paths = write_trajectory(tmp_path, trajectory)
    with pytest.raises(CheckpointError, match=r"ckpt3.safetensors: tensor 't5.weight'.*not finite"):
        predict(paths, bundle_path, tmp_path / "out")
    out, report = predict(paths, bundle_path, tmp_path / "out", allow_nonfinite=True)
    assert report.nonfinite == 2
    for name, place in (("t5.weight", (1, 2)), ("t6.weight", (0, 0))):
        assert out[name][place] == trajectory[0][name][place]
        assert (out[name] != trajectory[0][name]).sum() == 5


def test_allow_nonfinite_copies_those_values_from_the_first(
    bundle_path: Path, tmp_path: Path
) -> None:
    clean, _ = predict(write_trajectory(tmp_path, states()), bundle_path, tmp_path / "clean")
    trajectory = states()
    trajectory[3]["fc.weight"][2, 5] = math.nan
    trajectory[0]["double.weight"][0, 0] = 1e300
    trajectory[0]["half.weight"][0, 0] = math.inf
    out, report = predict(
        write_trajectory(tmp_path, trajectory), bundle_path, tmp_path / "out", allow_nonfinite=True
    )
    assert report.nonfinite == 3
    assert out["fc.weight"][2, 5] == trajectory[0]["fc.weight"][2, 5]
    assert out["double.weight"][0, 0] == 1e300
    assert out["half.weight"][0, 0] == math.inf
    for name, row, column in (("fc.weight", 2, 5), ("double.weight", 0, 0), ("half.weight", 0, 0)):
        out[name][row, column] = clean[name][row, column] = 0
        assert torch.equal(out[name], clean[name]), name


def test_statistics_that_are_not_finite(bundle_path: Path, tmp_path: Path) -> None:
    trajectory = states()
    trajectory[0]["bn1.running_var"][3] = math.inf
    paths = write_trajectory(tmp_path, trajectory)
    with pytest.raises(CheckpointError, match="'bn1.running_var'.*not finite"):
        predict(paths, bundle_path, tmp_path / "out")
    out, _ = predict(paths, bundle_path, tmp_path / "out", allow_nonfinite=True)
    assert out["bn1.running_var"][3] == math.inf
    assert torch.isfinite(out["bn1.running_var"]).sum() == 7


@pytest.mark.parametrize("name", ["frozen.weight", "bn1.weight", "bn1.running_mean"])
def test_what_is_copied_need_not_be_finite(name: str, bundle_path: Path, tmp_path: Path) -> None:
    trajectory = states()
    for state in trajectory:
        state[name].view(-1)[0] = -math.inf
    paths = write_trajectory(tmp_path, trajectory)
    out, report = predict(paths, bundle_path, tmp_path / "out", norm=NormMode.COPY)
    assert out[name].view(-1)[0] == -math.inf
    assert any(f"'{name}' is copied with 1 value that is" in notice for notice in report.notices)


def test_buffers_may_be_infinite_but_it_is_said(bundle_path: Path, tmp_path: Path) -> None:
    """A mask of attention is, for one."""
    trajectory = [{**state, "inv_freq": torch.tensor([1.0, math.inf])} for state in states()]
    out, report = predict(write_trajectory(tmp_path, trajectory), bundle_path, tmp_path / "out")
    assert out["inv_freq"].tolist() == [1.0, math.inf]
    assert any("'inv_freq' is copied with 1 value that is" in notice for notice in report.notices)


def test_overrides_hold_for_running_statistics(bundle_path: Path, tmp_path: Path) -> None:
    paths = write_trajectory(tmp_path)
    rescaled, _ = predict(paths, bundle_path, tmp_path / "rescaled")
    wishes = {"overrides": (Override("*running_mean", Kind.COPY),)}
    out, _ = predict(paths, bundle_path, tmp_path / "out", **wishes)
    assert torch.equal(out["bn1.running_mean"], network()["bn1.running_mean"])
    assert not torch.equal(rescaled["bn1.running_mean"], network()["bn1.running_mean"])
    assert torch.equal(out["bn1.running_var"], rescaled["bn1.running_var"])
    wishes = {"overrides": (Override("*running_var", Kind.BIAS),)}
    out, _ = predict(paths, bundle_path, tmp_path / "predicted", **wishes)
    window = torch.stack([state["bn1.running_var"] for state in states()[::-1]], dim=1)
    with torch.no_grad():
        expected = load_bundle(bundle_path).module(Kind.BIAS)(window)
    torch.testing.assert_close(out["bn1.running_var"], expected, atol=1e-6, rtol=0)


def test_predictions_beyond_the_output_s_dtype_are_replaced_and_counted_where_allowed(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = 65504.0
    trajectory = []
    for k in range(5):
        values = torch.full((3, 4), 0.1 + k / 100).half()
        values[0, 0] = largest - 32 * k
        trajectory.append({"w": values})

    class Doubling(KnownPredictor):
        """Predicts twice the newest value, beyond float16 for the largest."""

        def predict(self, block: Block, step: int, history: Tensor, out: Tensor) -> None:
            torch.mul(history[-1], 2, out=out)

    monkeypatch.setattr(known, "KnownPredictor", Doubling)
    paths = write_trajectory(tmp_path, trajectory)
    out, report = predict(paths, bundle_path, tmp_path / "out", allow_nonfinite=True)
    assert out["w"][0, 0] == largest
    assert (out["w"].view(-1)[1:] == 2 * trajectory[0]["w"].view(-1)[1:]).all()
    assert report.replaced == 1


def test_a_prediction_that_is_not_finite_is_replaced_where_allowed(
    tmp_path: Path, bundle_path: Path
) -> None:
    trajectory = [{"w": torch.tensor([[0.1, 3e38], [0.2, 0.3]]) * (1 - 0.01 * k)} for k in range(5)]
    for steps in (1, 3):
        out, report = predict(
            write_trajectory(tmp_path, trajectory), bundle_path, tmp_path / "out", steps=steps, force=True,
            allow_nonfinite=True,
        )  # fmt: skip
        assert torch.isfinite(out["w"]).all()
        assert out["w"][0, 1] == trajectory[0]["w"][0, 1]
        assert report.replaced == 1
        assert not torch.equal(out["w"][1], trajectory[0]["w"][1])


# ---------------------------------------------------------------------- plan and scan


@given(st.lists(st.integers(0, 60), max_size=12), st.integers(1, 25))
def test_batches_hold_every_element_once_in_order(sizes: list[int], rows: int) -> None:
    tensors = [
        PlannedTensor(f"t{k}", Kind.FC, Action.PREDICT, "", "F32", (size,), size, 4 * size)
        for k, size in enumerate(sizes)
    ]
    batches = list(Stream.of(Kind.FC, tuple(tensors)).batches(rows))
    assert all(batch.rows == rows for batch in batches[:-1])
    seen = []
    for batch in batches:
        position = 0
        for segment in batch.segments:
            assert segment.row == position
            assert segment.count > 0
            position += segment.count
            seen += [(segment.tensor.name, segment.start + i) for i in range(segment.count)]
        assert position == batch.rows
    assert seen == [(f"t{k}", i) for k, size in enumerate(sizes) for i in range(size)]


def test_memory_that_is_too_small_is_refused(
    trajectory_paths: list[Path], bundle_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--max-memory 1000 is too small: one block needs"):
        predict(trajectory_paths, bundle_path, tmp_path / "out", max_memory=1000)


def test_memory_bounds_the_batches(
    big_paths: list[Path], bundle_path: Path, tmp_path: Path
) -> None:
    for memory in (6 << 20, 9 << 20, 1 << 30):
        request = Request(
            big_paths, tmp_path / "out", str(bundle_path), Settings(max_memory=memory), device="cpu"
        )
        with open_prediction(request) as opened:
            assert opened.plan.memory <= memory
            assert all(b.rows <= opened.plan.batch_rows for b in opened.plan.batches())


def test_a_reversed_order_is_suspected() -> None:
    assert looks_reversed([1.0, 2.0, 4.0, 8.0])
    assert not looks_reversed([8.0, 4.0, 2.0, 1.0])
    assert not looks_reversed([1.0, 1.1, 1.05, 3.0])
    assert not looks_reversed([1.0, 1.05, 1.1])
    assert not looks_reversed([3.0])


def test_a_reversed_trajectory_is_warned_about_but_followed(
    bundle_path: Path, tmp_path: Path
) -> None:
    paths = write_trajectory(tmp_path)
    request = Request(paths[::-1], tmp_path / "out", str(bundle_path), device="cpu")
    with open_prediction(request) as opened:
        assert any("given in reverse" in notice for notice in opened.notices)
        assert opened.trajectory.first.path == paths[-1]
    request = Request(paths, tmp_path / "out", str(bundle_path), device="cpu")
    with open_prediction(request) as opened:
        assert not list(opened.notices)
    # Where sessions are recorded the order is known, whatever the distances are.
    recorded = [
        {"know.session": str(k), "know.fraction": str(0.5**k), "know.rate": "0.5", "know.trajectory": "t"}
        for k in range(5)
    ]  # fmt: skip
    paths = write_trajectory(tmp_path, states()[::-1], metadata=recorded)
    request = Request(paths, tmp_path / "out", str(bundle_path), device="cpu")
    with open_prediction(request) as opened:
        assert not list(opened.notices)


def test_checkpoints_that_are_all_the_same(bundle_path: Path, tmp_path: Path) -> None:
    paths = write_trajectory(tmp_path, [network() for _ in range(5)])
    out, report = predict(paths, bundle_path, tmp_path / "out", norm=NormMode.COPY)
    assert all(torch.equal(out[name], tensor) for name, tensor in network().items())
    assert any("no tensor is predicted" in notice for notice in report.notices)


def test_two_checkpoints_of_mixed_dtype(tmp_path: Path) -> None:
    from know_cli.known.bundle import save_bundle
    from tests.support.bundles import random_bundle

    save_bundle(random_bundle(2), tmp_path / "two")
    one, two = states(2)
    save_file({"w": one["fc.weight"]}, tmp_path / "a.safetensors")
    save_file({"w": two["fc.weight"].bfloat16()}, tmp_path / "b.safetensors")
    out, _ = predict(
        [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tmp_path / "two", tmp_path / "out"
    )
    window = torch.stack([two["fc.weight"].bfloat16().float(), one["fc.weight"]]).reshape(2, -1).T
    with torch.no_grad():
        expected = random_bundle(2).module(Kind.FC)(window.contiguous()).reshape(20, 33)
    torch.testing.assert_close(out["w"], expected, atol=1e-6, rtol=0)


def test_rate_of_the_metadata_is_the_default(bundle_path: Path, tmp_path: Path) -> None:
    recorded = [
        {"know.session": str(k), "know.fraction": str(3.0**-k), "know.rate": str(1 / 3), "know.trajectory": "t"}
        for k in range(5)
    ]  # fmt: skip
    paths = write_trajectory(tmp_path, metadata=recorded)
    with open_prediction(Request(paths, tmp_path / "o", str(bundle_path), device="cpu")) as p:
        assert (p.recipe.factor, list(p.notices)) == ("x3", [])
    with open_prediction(
        Request(paths, tmp_path / "o", str(bundle_path), rate=0.5, device="cpu")
    ) as p:
        assert p.recipe.factor == "x2"
        assert any("recorded at 0.333" in notice for notice in p.notices)


# ---------------------------------------------------------------------- the report


def test_the_report_s_figures_are_those_of_the_output(
    trajectory_paths: list[Path], bundle_path: Path, tmp_path: Path
) -> None:
    out, report = predict(trajectory_paths, bundle_path, tmp_path / "out", steps=2)
    before = network()
    for kind, names in (
        (Kind.CONV, ["conv1.weight"]),
        (Kind.FC, ["fc.weight", "half.weight", "brain.weight", "double.weight"]),
    ):
        changes = torch.cat([(out[n].double() - before[n].double()).flatten() for n in names])
        norm = torch.cat([before[n].double().flatten() for n in names]).norm()
        numbers = report.kinds[kind]
        assert numbers.mean_change == pytest.approx(float(changes.abs().mean()))
        assert numbers.relative_change == pytest.approx(float(changes.norm() / norm))
    fc = report.kinds[Kind.FC]
    # frozen.weight (25) and empty.weight (0) are of the kind fc, too.
    assert (fc.tensors, fc.parameters) == (6, 20 * 33 + 2 * 160 + 30 + 25)
    assert fc.share_copied == pytest.approx(25 / fc.parameters)
    assert report.kinds[Kind.CONV].share_copied == 0
    seconds = report.seconds
    assert all(seconds[what] > 0 for what in ("reading", "computing", "writing"))
    assert seconds["total"] >= seconds["writing"]


def test_values_that_are_copied_have_not_changed(bundle_path: Path, tmp_path: Path) -> None:
    trajectory = states()
    trajectory[0]["fc.weight"][2, 3] = 100.0
    trajectory[3]["fc.weight"][2, 3] = math.nan
    paths = write_trajectory(tmp_path, trajectory)
    out, report = predict(paths, bundle_path, tmp_path / "out", allow_nonfinite=True)
    assert out["fc.weight"][2, 3] == 100
    names = ["fc.weight", "half.weight", "brain.weight", "double.weight"]
    changes = [(out[n].double() - trajectory[0][n].double()).abs().sum() for n in names]
    assert report.kinds[Kind.FC].absolute_change == pytest.approx(float(sum(changes)))
    assert report.nonfinite == 1


def test_a_copied_weight_does_not_disturb_the_rescaling(bundle_path: Path, tmp_path: Path) -> None:
    """A NaN in an old checkpoint means: this weight stays, and counts as it is."""
    trajectory = states()
    trajectory[3]["conv1.weight"][0, 1, 1, 1] = math.nan
    paths = write_trajectory(tmp_path, trajectory)
    out, _ = predict(paths, bundle_path, tmp_path / "out", allow_nonfinite=True)
    first = trajectory[0]
    old, new = first["conv1.weight"].double(), out["conv1.weight"].double()
    growth = new.flatten(1).square().sum(1) / old.flatten(1).square().sum(1)
    expected = first["bn1.running_var"].double() * growth
    torch.testing.assert_close(out["bn1.running_var"].double(), expected, rtol=1e-5, atol=0)


def test_reset_is_for_layers_with_statistics_only(bundle_path: Path, tmp_path: Path) -> None:
    trajectory = [
        {**state, "ln.weight": torch.full((4,), 3.0 + k), "ln.bias": torch.full((4,), 2.0)}
        for k, state in enumerate(states())
    ]
    paths = write_trajectory(tmp_path, trajectory)
    out, _ = predict(paths, bundle_path, tmp_path / "out", norm=NormMode.RESET)
    assert out["ln.weight"].tolist() == [3.0] * 4
    assert out["bn1.weight"].tolist() == [1.0] * 8


def test_integer_statistics_are_copied(bundle_path: Path, tmp_path: Path) -> None:
    trajectory = [
        {**state, "bn1.running_mean": torch.arange(8, dtype=torch.int32)} for state in states()
    ]
    paths = write_trajectory(tmp_path, trajectory)
    out, report = predict(paths, bundle_path, tmp_path / "out")
    assert torch.equal(out["bn1.running_var"], trajectory[0]["bn1.running_var"])
    assert any("not of floats" in reason for reason in report.reasons)
