"""What values over the checkpoints decide about a prediction, from files to the plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from know_cli.checkpoints import open_trajectory
from know_cli.engine import scan
from know_cli.engine.classification import classify_values
from know_cli.engine.plan import Action
from know_cli.engine.progress import Silent
from know_cli.engine.settings import FrozenMode, NormMode, Settings
from know_cli.kinds import Kind, Override
from know_cli.plots.points import measured_tensors
from know_cli.prediction.inspection import inspect_trajectory
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.predict import Prediction
from know_cli.prediction.request import Request
from tests.support.ranks import together
from tests.support.trajectories import states, write_trajectory

S = 5
FINE = Settings(norm=NormMode.COPY)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(S, *shape, generator=torch.Generator().manual_seed(seed))


def unit(size: int) -> Tensor:
    return torch.nn.functional.normalize(random(size), dim=1)


def trained(*shape: int, seed: int = 0) -> Tensor:
    """``[S, …]``, a weight that training moves a little."""
    return random(*shape, seed=seed)[:1] + 0.01 * random(*shape, seed=seed + 1)


def write(folder: Path, tensors: Mapping[str, Tensor]) -> list[Path]:
    """Checkpoints of tensors ``[S, …]``."""
    folder.mkdir(exist_ok=True)
    return write_trajectory(
        folder, [{name: t[k].clone() for name, t in tensors.items()} for k in range(S)]
    )


def opened(folder: Path, tensors: Mapping[str, Tensor], settings: Settings = FINE) -> Prediction:
    paths = write(folder, tensors)
    return open_prediction(
        Request(paths, folder / "out.safetensors", settings=settings, method="last")
    )


def decisions(prediction: Prediction) -> dict[str, tuple[Action, str]]:
    return {tensor.name: (tensor.action, tensor.reason) for tensor in prediction.plan.tensors}


NET = {"fc.weight": trained(6, 5), "fc.bias": trained(6, seed=3)}
COUNTS = torch.arange(S, 0, -1.0)[:, None] * 128 + torch.arange(4.0)
MASKS = (random(40, 8, seed=5) > 0).float()
ODD = {
    "a.left": (unit(24), "a vector of length 1"),
    "a.wide": (unit(70_000), "a vector of length 1"),  # more than one chunk
    "a.column": (unit(24)[:, :, None], "a vector of length 1"),
    "a.half": (unit(300).half(), "a vector of length 1"),
    "a.pruned": (MASKS, "only 0 and 1"),
    "a.blocked": (torch.where(MASKS > 0, 0.0, -math.inf), "only 0 and 1"),
    "a.seen": (COUNTS, "whole numbers"),
    "a.total": (random(30).abs().flip(0).cumsum(0).mul(2).flip(0), "grows in every session"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_behaves_like_no_weight_is_copied_and_told(tmp_path: Path, name: str) -> None:
    values, reason = ODD[name]
    with opened(tmp_path, {**NET, name: values}) as prediction:
        action, why = decisions(prediction)[name]
        assert action is Action.COPY
        assert why.startswith(reason)
        (notice,) = prediction.notices
        assert notice.startswith(f"'{name}' is copied: {reason}")
        assert "--kind 'PATTERN=KIND'" in notice
        report = prediction.execute()
    out = load_file(tmp_path / "out.safetensors")
    assert torch.equal(out[name], values[0])
    assert torch.equal(out["fc.weight"], NET["fc.weight"][S - 1])
    assert report.reasons == {f"copy: {why}": 1}


def test_a_notice_tells_of_a_group(tmp_path: Path) -> None:
    vectors = {f"layer{n}.left": unit(8 + n) for n in range(3)}
    with opened(tmp_path, {**NET, **vectors, "pruned": MASKS}) as prediction:
        one, two = sorted(prediction.notices)
    assert one.startswith("'pruned' is copied: only 0 and 1")
    assert two.startswith("3 tensors, 'layer0.left' and others, are copied: a vector of length 1")


def test_the_user_knows_better(tmp_path: Path) -> None:
    said = (Override("*.left", Kind.BIAS), Override("a.pruned", Kind.FC))
    tensors = {**NET, "a.left": unit(24), "a.pruned": MASKS, "a.seen": COUNTS}
    with opened(tmp_path, tensors, Settings(overrides=said)) as prediction:
        found = decisions(prediction)
        assert len(prediction.notices) == 1
    assert found["a.left"] == (Action.PREDICT, "--kind *.left=bias")
    assert found["a.pruned"][0] is Action.PREDICT
    assert found["a.seen"][0] is Action.COPY


def test_what_does_not_move_stays_frozen(tmp_path: Path) -> None:
    tensors = {**NET, "a.left": unit(24)[:1].expand(S, -1), "a.pruned": MASKS[:1].expand(S, -1, -1)}
    with opened(tmp_path, tensors) as prediction:
        assert {found for name, found in decisions(prediction).items() if name not in NET} == {
            (Action.COPY, "frozen: the same in all checkpoints")
        }
        assert not len(prediction.notices)
    with opened(tmp_path, tensors, Settings(frozen=FrozenMode.PREDICT)) as prediction:
        assert {action for action, _ in decisions(prediction).values()} == {Action.PREDICT}


def test_statistics_under_other_names_are_copied(tmp_path: Path) -> None:
    spread = 0.5 + random(8).abs()
    tensors = {
        **NET, "m.running_mean": random(8, seed=1), "m.running_var": spread + 1, "m.spread": spread,
        "n.spread": spread, "m.shift": random(8, seed=2),
    }  # fmt: skip
    with opened(tmp_path, tensors) as prediction:
        found = decisions(prediction)
    assert found["m.spread"][0] is Action.COPY
    assert found["n.spread"][0] is Action.PREDICT


def conv_bn(means: Tensor, width: int = 16) -> dict[str, Tensor]:
    return {
        "conv.weight": trained(width, 3, 3, 3),
        "conv.bias": trained(width, seed=4),
        "bn.weight": 1 + 0.1 * random(width, seed=5),
        "bn.bias": 0.1 * random(width, seed=6),
        "bn.running_mean": means,
        "bn.running_var": 0.5 + random(width, seed=7).abs(),
        "bn.num_batches_tracked": torch.arange(S),
    }


@pytest.mark.parametrize(
    ("means", "action", "reason"),
    [
        (random(16, seed=8), Action.RESCALE, "running statistics, rescaled"),
        (random(16, seed=8).abs(), Action.COPY, "running statistics; an activation follows"),
        (random(16).abs() * 3 - 0.1, Action.COPY, "running statistics; an activation follows"),
    ],
)
def test_statistics_behind_an_activation_are_not_rescaled(
    tmp_path: Path, means: Tensor, action: Action, reason: str
) -> None:
    with opened(tmp_path, conv_bn(means), Settings(norm=NormMode.RESCALE)) as prediction:
        found = decisions(prediction)
        for name in ("bn.running_mean", "bn.running_var"):
            assert found[name][0] is action
            assert found[name][1].startswith(reason)
        assert found["conv.weight"][0] is Action.PREDICT
        assert not len(prediction.notices)
        prediction.execute()
    out = load_file(tmp_path / "out.safetensors")
    assert torch.equal(out["bn.running_mean"], means[0]) is (action is Action.COPY)


@pytest.mark.parametrize("norm", [NormMode.RESCALE, NormMode.AVERAGE])
@pytest.mark.parametrize(
    "other",
    [None, torch.arange(16), torch.zeros(7), torch.zeros(16).to(torch.float8_e4m3fn)],
    ids=["none", "integers", "shorter", "float8"],
)
@pytest.mark.parametrize(("negative", "action"), [(True, Action.RESCALE), (False, Action.COPY)])
def test_a_mean_that_a_later_checkpoint_has_not_is_looked_at_in_the_others(
    tmp_path: Path, other: Tensor | None, norm: NormMode, negative: bool, action: Action
) -> None:
    means = random(16, seed=8)
    paths = write(tmp_path, conv_bn(means if negative else means.abs()))
    state = load_file(paths[2])
    del state["bn.running_mean"]
    save_file(state if other is None else {**state, "bn.running_mean": other}, paths[2])
    request = Request(
        paths, tmp_path / "out.safetensors", settings=Settings(norm=norm), method="last"
    )
    with open_prediction(request) as prediction:
        expected = action if norm is NormMode.RESCALE else Action.AVERAGE
        assert decisions(prediction)["bn.running_mean"][0] is expected
        prediction.execute()


def test_means_are_read_only_to_rescale_and_say_nothing_of_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    lengths = []
    real = scan.scan

    def watched(trajectory: Any, names: Any, wanted: Any, ranks: Any) -> scan.Scan:
        asked.append(set(wanted) - set(names))
        found = real(trajectory, names, wanted, ranks)
        lengths.append(found.step_lengths)
        return found

    monkeypatch.setattr("know_cli.engine.classification.scan", watched)
    norms = [norm for norm in NormMode if norm is not NormMode.AVERAGE]
    for norm in norms:
        opened(tmp_path, conv_bn(random(16) * 100), Settings(norm=norm)).close()
    expected = [{"bn.running_mean"} if norm is NormMode.RESCALE else set() for norm in norms]
    assert asked == expected
    assert len(set(lengths)) == 1


ORDINARY = {
    "embed.weight": torch.cat([torch.zeros(S, 2, 8), trained(20, 8)], dim=1),
    "norm.weight": 1 + 0.01 * random(8, seed=1),
    "norm.bias": torch.zeros(S, 8),
    "fc.weight": trained(8, 8),
    "fc.bias": torch.cat([torch.zeros(1, 8), 0.01 * random(8)[1:]]),
    "fc2.weight": torch.cat([torch.zeros(1, 4, 8), 0.01 * random(4, 8)[1:]]),
    "act.weight": 0.25 + 0.001 * random(8),
    "layer_scale": 0.1 + 0.001 * random(8, seed=2),
    "logit_scale": torch.arange(1.0, S + 1) * 1.5,
    "big.weight": trained(300, 200),
}


def test_ordinary_networks_are_not_affected(tmp_path: Path) -> None:
    with opened(tmp_path, ORDINARY, Settings(norm=NormMode.PREDICT)) as prediction:
        found = decisions(prediction)
        assert not len(prediction.notices)
    frozen = found.pop("norm.bias")
    assert frozen == (Action.COPY, "frozen: the same in all checkpoints")
    assert {action for action, _ in found.values()} == {Action.PREDICT}


def test_every_dtype_and_kind_of_the_small_network_is_predicted(tmp_path: Path) -> None:
    paths = write_trajectory(tmp_path, states(S))
    with open_prediction(Request(paths, tmp_path / "out", method="last")) as prediction:
        assert not len(prediction.notices)
        reasons = {reason for _, reason in decisions(prediction).values()}
    assert not any("in all checkpoints, as" in reason for reason in reasons)


def test_any_number_of_ranks_finds_the_same(tmp_path: Path) -> None:
    tensors = {**ORDINARY, **{name: values for name, (values, _) in ODD.items()}}
    tensors |= conv_bn(random(16).abs())
    paths = write(tmp_path, tensors)

    def planned(ranks: Any) -> tuple[dict[str, tuple[Action, str]], list[str]]:
        # Ranks write one output, and each number of them its own.
        size = 1 if ranks is None else ranks.size
        output = tmp_path / f"out{size}.safetensors"
        request = Request(paths, output, method="last")
        with open_prediction(request, ranks) as prediction:
            return decisions(prediction), list(prediction.notices)

    alone = planned(None)
    assert sum(action is Action.COPY for action, _ in alone[0].values()) >= len(ODD)
    for size in (2, 3, 7):
        assert together(size, planned) == [alone] * size


def test_checkpoints_of_several_dtypes_are_as_exact_as_the_coarsest(tmp_path: Path) -> None:
    values = unit(64)
    trajectory = [
        {"fc.weight": NET["fc.weight"][k].clone(), "left": values[k].to(dtype)}
        for k, dtype in enumerate([torch.float32, torch.bfloat16, *[torch.float16] * 3])
    ]
    paths = write_trajectory(tmp_path, trajectory)
    with open_prediction(Request(paths, tmp_path / "out", method="last")) as prediction:
        assert decisions(prediction)["left"][1].startswith("a vector of length 1")


# ------------------------------------------------------------------ the other commands


def test_inspect_and_pictures_judge_as_the_prediction_does(tmp_path: Path) -> None:
    """What is copied for its values counts in no distance, and is told."""
    paths = write(tmp_path, {**NET, "a.left": unit(24), "a.pruned": MASKS})
    with open_trajectory(paths) as trajectory:
        assert sorted(measured_tensors(trajectory, ())) == ["fc.bias", "fc.weight"]
        kept = measured_tensors(trajectory, (Override("a.left", Kind.BIAS),))
        assert sorted(kept) == ["a.left", "fc.bias", "fc.weight"]
        found = classify_values(trajectory)
        inspection = inspect_trajectory(trajectory, found.classes, Silent())
    assert {kind: m.tensors for kind, m in inspection.kinds.items()} == {
        Kind.FC: 1, Kind.BIAS: 1, Kind.COPY: 2
    }  # fmt: skip
    assert inspection.total.parameters == 36
    assert len(found.notices) == 2


def test_what_moves_at_its_beginning_only_is_not_frozen(tmp_path: Path) -> None:
    """A vector is read to its end for its length; the chunks that rest do not make it frozen."""
    paths = []
    for k in range(3):
        values = torch.linspace(-1.0, 1.0, 100_000)
        values[0] += k
        save_file({"fc.bias": values, "rests.bias": values[1:].clone()}, tmp_path / f"c{k}")
        paths.append(tmp_path / f"c{k}")
    with open_trajectory(paths) as trajectory:
        assert classify_values(trajectory).scan.frozen == {"rests.bias"}
