"""The hyper-model settle for branches: their order says nothing, and what not all have is averaged."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from know_cli.checkpoints import open_trajectory, save_checkpoint
from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.engine.movements import Course, course_of, measure_movements
from know_cli.errors import CheckpointError
from know_cli.kinds import Kind
from know_cli.lab.averaging import combine
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request
from know_cli.prediction.verify import verify
from know_cli.ranks.alone import Ranks
from know_cli.settle.bundle import SettleBundle, load_bundle, save_bundle
from know_cli.settle.course import features, without_order
from know_cli.settle.module import Settle, shares
from tests.support.ranks import together

S = 4
BRANCHES = TrajectoryKind.BRANCHES
KINDS = {
    "conv.weight": Kind.CONV, "bn.weight": Kind.BIAS, "bn.bias": Kind.BIAS, "fc.weight": Kind.FC,
}  # fmt: skip


def model(width: int, *, taught: bool = True) -> Settle:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = Settle(S, 6, width, branches=True)
        if taught:
            torch.nn.init.normal_(made.gate.weight, 0, 0.5)
            if width:
                torch.nn.init.normal_(made.last.weight, 0, 0.3)
    return made.requires_grad_(False)


def some_branches() -> list[dict[str, Tensor]]:
    """Θ0 and its branches, which all go some way together; with statistics, and what stays."""
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    start = {
        "conv.weight": drawn(6, 3, 3, 3), "bn.weight": 1 + 0.1 * drawn(6), "bn.bias": drawn(6),
        "bn.running_mean": drawn(6), "bn.running_var": 1 + drawn(6).square(),
        "fc.weight": drawn(400, 50), "still.weight": torch.ones(3, 3), "head.weight": drawn(5, 6),
    }  # fmt: skip
    common = {name: 0.1 * drawn(*tensor.shape) for name, tensor in start.items()}
    states = [start]
    for _ in range(S - 1):
        branch = {}
        for name, tensor in start.items():
            moved = tensor + common[name] + 0.1 * drawn(*tensor.shape)
            branch[name] = tensor.clone() if name == "still.weight" else moved
        branch["bn.running_var"] = start["bn.running_var"] * (1 + 0.1 * drawn(6).abs())
        states.append(branch)
    return states


def write(folder: Path, states: Sequence[dict[str, Tensor]]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{'base' if k == 0 else f'task{k}'}.safetensors" for k in range(len(states))]
    for path, state in zip(paths, states, strict=True):
        save_checkpoint(path, state, {"format": "pt"})
    return paths


def predict(paths: Sequence[Path], output: Path, bundle: Path | None) -> dict[str, Tensor]:
    method = "average" if bundle is None else "settle"
    weights = None if bundle is None else str(bundle.absolute())
    request = Request(
        list(paths), output, weights, method=method, trajectory=BRANCHES, force=True
    )  # fmt: skip
    with open_prediction(request) as prediction:
        prediction.execute()
    return load_file(output)


def saved(made: Settle, folder: Path) -> Path:
    save_bundle(SettleBundle.of(made, {}, BRANCHES), folder)
    return folder


def by_hand(made: Settle, names: Sequence[str]) -> dict[str, Tensor]:
    """What the docstring of the module says, by numpy but for the correction's two layers."""
    start, *others = some_branches()

    def numbers(name: str) -> tuple[float, float, float, int]:
        """Mean square of movements, mean product of their pairs, size of Θ0, and elements."""
        first = start[name].double().numpy().ravel()
        moved = np.stack([one[name].double().numpy().ravel() - first for one in others])
        gram = moved @ moved.T / first.size
        pairs = gram[~np.eye(S - 1, dtype=bool)].mean()
        return float(np.diag(gram).mean()), float(pairs), float(np.sqrt((first**2).mean())), first.size  # fmt: skip

    count = sum(numbers(name)[3] for name in names)
    square, pair = (sum(numbers(n)[k] * numbers(n)[3] for n in names) / count for k in (0, 1))
    size = math.sqrt(sum(numbers(n)[2] ** 2 * numbers(n)[3] for n in names) / count)
    run = (square, pair, size, count)

    def of_course(square: float, pair: float, size: float, _: int) -> list[float]:
        return [*[pair / square] * (S - 2), 0.0, math.log10(math.sqrt(square) / size) / 3 + 0.5]

    weights = {name: tensor.double().numpy() for name, tensor in made.state_dict().items()}

    def gates(of: tuple[float, float, float, int], kind: Kind | None) -> np.ndarray:  # type: ignore[type-arg]
        read = [*of_course(*run), *of_course(*of)]
        read += [float(kind is one) for one in (Kind.CONV, Kind.FC, Kind.BIAS)]
        read.append(math.log10(of[3]) / 6)
        hidden = np.tanh(weights["read.weight"] @ read + weights["read.bias"])
        found: np.ndarray = weights["gate.weight"] @ hidden  # type: ignore[type-arg]
        return found

    def coefficients(gates: np.ndarray) -> tuple[float, float]:  # type: ignore[type-arg]
        mean = gates[: S - 1].mean()
        zero = gates[S - 1] - (gates[S - 1] + (S - 1) * mean) / S
        return float(zero), float((1 - zero) / (S - 1))

    found = {}
    for name in names:
        of, kind = numbers(name), KINDS.get(name, Kind.FC)
        gated = gates(of, kind)
        zero, share = coefficients(gated)
        first = start[name].double()
        values = zero * first + share * torch.stack([one[name].double() for one in others]).sum(0)
        if made.width:
            length = math.sqrt(of[0])
            ordered = np.sort([one[name].double().numpy().ravel() for one in others], axis=0)
            window = np.vstack([ordered, first.numpy().ravel()])
            inputs = np.vstack([(window - window.mean(0)) / length, window[-1] / of[2]])
            inputs = inputs.clip(-8, 8).T
            hidden = inputs @ weights["first.weight"].T + weights["first.bias"] + gated[S:]
            hidden = hidden.clip(0) @ weights["second.weight"].T + weights["second.bias"]
            added = hidden.clip(0) @ weights["last.weight"][0] * length
            values = values + torch.from_numpy(added).view_as(values)
        found[name] = values
    zero, share = coefficients(gates(run, None))
    parts = [max(zero, 0.0), *[max(share, 0.0)] * (S - 1)]
    parts = [one / sum(parts) for one in parts]
    means = [state["bn.running_mean"].double() for state in (start, *others)]
    mean = sum(p * one for p, one in zip(parts, means, strict=True))
    assert isinstance(mean, Tensor)
    found["bn.running_mean"] = mean
    found["bn.running_var"] = sum(  # type: ignore[assignment]
        p * (state["bn.running_var"].double() + (one - mean).square())
        for p, state, one in zip(parts, (start, *others), means, strict=True)
    )
    return found


def test_movements_of_branches_are_those_from_the_start(tmp_path: Path) -> None:
    states = some_branches()
    paths = write(tmp_path, states)
    names = ["conv.weight", "fc.weight"]

    def measure(ranks: Ranks) -> object:
        with open_trajectory(paths, kind=BRANCHES) as opened:
            return measure_movements(opened, names, ranks)

    alone = measure(Ranks())
    assert all(found == alone for found in together(2, measure))
    assert isinstance(alone, dict)
    for name in names:
        first, *others = (state[name].double().numpy().ravel() for state in states)
        moved = np.stack([one - first for one in others[::-1]])
        np.testing.assert_allclose(alone[name].mean, moved.mean(1), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(alone[name].spread, moved.std(1), rtol=1e-9)
        products = alone[name].course.products
        np.testing.assert_allclose(products, moved @ moved.T / first.size, rtol=1e-9)
        window = torch.from_numpy(np.stack([*others[::-1], first]))
        np.testing.assert_allclose(course_of(window, BRANCHES).products, products, rtol=1e-9)


def test_a_course_without_order_has_one_length_and_one_product() -> None:
    products = ((1.0, 0.5, 0.25), (0.5, 4.0, -0.75), (0.25, -0.75, 7.0))
    found = without_order(Course(9, products, 2.0))
    assert found.products == ((4.0, 0.0, 0.0), (0.0, 4.0, 0.0), (0.0, 0.0, 4.0))
    assert (found.count, found.size) == (9, 2.0)
    assert found.length == pytest.approx(Course(9, products, 2.0).length)
    assert without_order(Course(9, ((3.0,),), 2.0)).products == ((3.0,),)


_NUMBERS = st.lists(st.floats(-1e3, 1e3, width=32), min_size=5, max_size=5)


@given(st.lists(_NUMBERS, min_size=S, max_size=S), st.permutations(range(S - 1)))
@settings(deadline=None)
def test_the_order_of_branches_says_nothing(values: list[list[float]], order: list[int]) -> None:
    window = torch.tensor(values, dtype=torch.float64)
    other = torch.cat([window[order], window[-1:]])
    made, found = model(3).double(), []
    for one in (window, other):
        course = course_of(one, BRANCHES)
        row = made.features(Course.together([course, course]), course, Kind.FC, None)
        assert all(math.isfinite(number) and abs(number) <= 4 for number in row)
        coefficients, conditions = made.gates(torch.tensor([row], dtype=torch.float64))
        length, size = (torch.tensor(v, dtype=torch.float64) for v in (course.length, course.size))
        added = made.correction(one, conditions[0], length, size)
        found.append((row, coefficients[0], coefficients[0] @ one + added))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    assert float(found[0][1].sum()) == pytest.approx(1, abs=1e-12)
    assert len(set(found[0][1][:-1].tolist())) == 1
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-6, atol=1e-6 * 1e3)
    assert float(shares(found[0][1]).min()) >= 0


@pytest.mark.parametrize("width", [0, 5])
def test_untaught_it_is_the_mean_of_the_branches(width: int, tmp_path: Path) -> None:
    bundle = saved(model(width, taught=False), tmp_path / "bundle")
    paths = write(tmp_path / "branches", some_branches())
    mean = predict(paths, tmp_path / "mean.safetensors", None)
    found = predict(paths, tmp_path / "found.safetensors", bundle)
    assert found.keys() == mean.keys()
    for name in mean:
        torch.testing.assert_close(found[name], mean[name], rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("width", [0, 5])
def test_a_prediction_is_what_the_formula_says_in_any_order(width: int, tmp_path: Path) -> None:
    made = model(width)
    bundle = saved(made, tmp_path / "bundle")
    start, *others = write(tmp_path / "branches", some_branches())
    output = tmp_path / "found.safetensors"
    wanted = by_hand(made, [*KINDS, "head.weight"])
    for order in permutations(others):
        found = predict([start, *order], output, bundle)
        for name, values in wanted.items():
            torch.testing.assert_close(found[name].double(), values, rtol=1e-5, atol=2e-6)
        assert torch.equal(found["still.weight"], torch.ones(3, 3))
    weights = str(bundle.absolute())
    request = [start, *others]
    predict(request, output, bundle)
    assert not verify(output, request, spans=2, seed=1, weights=weights).differences


def test_what_not_all_branches_have_is_the_mean_of_those_that_have_it(tmp_path: Path) -> None:
    made = model(5)
    bundle = saved(made, tmp_path / "bundle")
    states = some_branches()
    for k in (1, 3):
        del states[k]["head.weight"]
    for k in (1, 2, 3):
        del states[k]["bn.running_mean"]
    states[3]["conv.weight"] = torch.zeros(2, 2)
    paths = write(tmp_path / "branches", states)
    found = predict(paths, tmp_path / "found.safetensors", bundle)
    torch.testing.assert_close(found["head.weight"], states[2]["head.weight"])
    of_two = combine([{"w": states[k]["conv.weight"]} for k in (1, 2)], [0.5, 0.5])["w"]
    torch.testing.assert_close(found["conv.weight"], of_two)
    # Nor does what they have say how the others went.
    wanted = by_hand(made, ["bn.weight", "bn.bias", "fc.weight"])
    for name in ("bn.weight", "bn.bias", "fc.weight"):
        torch.testing.assert_close(found[name].double(), wanted[name], rtol=1e-5, atol=2e-6)
    assert torch.equal(found["bn.running_mean"], states[0]["bn.running_mean"])


def test_a_bundle_says_what_it_reads(tmp_path: Path) -> None:
    made = model(2)
    bundle = load_bundle(saved(made, tmp_path / "bundle"))
    assert (bundle.trajectory, bundle.of_branches) == (BRANCHES, True)
    assert bundle.module().branches
    row = torch.zeros(1, len(features(*[course_of(torch.zeros(S, 2))] * 2, None)))
    assert torch.equal(bundle.module().gates(row)[0], made.gates(row)[0])
    # The same weights make something else of a run, which the digest tells.
    manifest = tmp_path / "bundle" / "manifest.json"
    facts = json.loads(manifest.read_text())
    assert facts["trajectory"] == "branches"
    assert not SettleBundle.of(made, {}).module().branches
    assert SettleBundle.of(made, {}).digest != bundle.digest
    manifest.write_text(json.dumps({**facts, "trajectory": "run"}))
    with pytest.raises(CheckpointError, match="do not belong together"):
        load_bundle(tmp_path / "bundle")


def test_bundles_of_other_trajectories_are_refused(tmp_path: Path) -> None:
    paths = write(tmp_path / "branches", some_branches())
    save_bundle(SettleBundle.of(Settle(S), {}), tmp_path / "bundle")
    words = "this hyper-model was taught on runs, and these checkpoints are of branches; name"
    with pytest.raises(CheckpointError, match=words):
        predict(paths, tmp_path / "out.safetensors", tmp_path / "bundle")
    bundle = saved(model(0), tmp_path / "of-branches")
    with pytest.raises(CheckpointError, match="reads 4 checkpoints, 3 were given"):
        predict(paths[:3], tmp_path / "out.safetensors", bundle)
    request = Request(paths, tmp_path / "out.safetensors", str(bundle), method="settle")
    with pytest.raises(CheckpointError, match="was taught on branches, and these checkpoints are"):
        open_prediction(request)
