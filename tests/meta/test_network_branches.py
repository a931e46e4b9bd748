"""``know train --objective network`` on branches: which are read, what is learned, what is gained."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.checkpoints.state import read_state
from know_cli.cli.train_network import network_markdown
from know_cli.errors import EXIT_CHECKPOINT, CheckpointError, UsageError
from know_cli.lab.averaging import combine
from know_cli.lab.data import load
from know_cli.lab.fitting import one_thread
from know_cli.meta.branch_recording import BRANCH_RECORD, branch_file, record_branches
from know_cli.meta.branch_setup import BranchSetup, draw_branch_setup
from know_cli.meta.network_branches import NetworkBranches
from know_cli.meta.network_bundle import measure_bundle, split_runs, teach_bundle
from know_cli.meta.network_data import NetworkRun, OtherTask
from know_cli.meta.network_gains import HeldOut, gains, measure
from know_cli.meta.network_loading import load_networks
from know_cli.meta.network_models import NetworkModel, SettleModel, new_model, save_bundle, settled
from know_cli.meta.network_settings import HyperModel, NetworkSettings
from know_cli.meta.network_training import _distance, teach
from know_cli.meta.recording import Task, unseen_samples
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request
from know_cli.settle.bundle import load_bundle
from know_cli.settle.module import Settle
from tests.support.command import Command, one_line

S, K = 4, 4
#: Small ones, by architecture and seed; the last one has BatchNorm.
NETWORKS = (("mlp", 40), ("mlp", 41), ("mlp", 42), ("cnn", 66))
SETTINGS = NetworkSettings(checkpoints=S, hidden=4, steps=4, runs=2, batch=16)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def setup(architecture: str, seed: int) -> BranchSetup:
    drawn = draw_branch_setup(seed, {"digits": load("digits")}, [architecture], checkpoints=K + 1)
    return replace(
        drawn, end=20, steps=5, samples=60, batch_size=8, warm_up=2, classes=(0, 1, 2, 3, 4),
        design=replace(drawn.design, classes=5), fraction=(0.5, 1.0)[seed % 2],
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The branches of four small networks on the digits, one of them with BatchNorm."""
    made = tmp_path_factory.mktemp("branches")
    with one_thread():
        for number, (architecture, seed) in enumerate(NETWORKS):
            record_branches(setup(architecture, seed), load("digits"), made / f"{number:05d}")
    return made


@pytest.fixture(scope="module")
def branches(folder: Path) -> list[NetworkRun]:
    return load_networks([folder], S, None)[0]


def taught(width: int, *, roles: bool = False) -> Settle:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = Settle(S, 4, width, roles=roles, branches=True)
        torch.nn.init.normal_(made.gate.weight, 0, 0.5)
        if width:
            torch.nn.init.normal_(made.last.weight, 0, 0.3)
    return made.requires_grad_(False)


def test_branches_are_read_with_what_they_have_not_seen(
    branches: list[NetworkRun], folder: Path
) -> None:
    data = load("digits")
    for number, one in enumerate(branches):
        assert isinstance(one, NetworkBranches)
        assert one.trajectory is TrajectoryKind.BRANCHES
        assert one.name == f"{number:05d}-{one.setup.seed % 16**8:08x}"
        assert len(one.states) == K + 1
        names = [branch_file(index) for index in (1, 2, 3, 4, 0)]
        for name, state in zip(names, one.states, strict=True):
            stored = read_state(folder / f"{number:05d}" / name)
            assert all(torch.equal(stored[key], state[key]) for key in stored)
        assert list(one.ends) == ["longer", "annealed"]
        assert one.ends["annealed"] is one.annealed
        assert torch.equal(one.labels, unseen_samples(one.setup, data, 2000)[1])
        trained = {row.numpy().tobytes() for row in Task(one.setup, data).inputs}
        assert sum(row.numpy().tobytes() in trained for row in one.inputs) <= 2


def test_windows_are_all_choices_of_branches_and_the_start(branches: list[NetworkRun]) -> None:
    one = branches[0]
    assert one.windows(S) == [(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)]
    assert one.measured(S) == [(0, 1, 2), (1, 2, 3)]
    assert one.windows(K + 1) == one.measured(K + 1) == [(0, 1, 2, 3)]
    window = one.window(S, 0, 2, 3)
    for state, position in zip(window.states, (0, 2, 3, 4), strict=True):
        assert state is one.states[position]
    assert window.target is one.annealed


def test_an_untaught_one_predicts_the_mean_of_the_branches(branches: list[NetworkRun]) -> None:
    for one in branches:
        window = one.window(S, 0, 1, 3)
        model = new_model(SETTINGS, TrajectoryKind.BRANCHES)
        assert isinstance(model, SettleModel)
        weights, coefficients = settled(model.module, window)
        assert coefficients.tolist() == pytest.approx([1 / 3] * 3 + [0])
        mean = combine(window.states[:-1], [1 / 3] * 3)
        assert weights
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, mean[name], rtol=1e-5, atol=1e-6)
    assert any("running_var" in name for name in weights)


@pytest.mark.parametrize(("width", "roles"), [(0, False), (3, True)])
def test_it_is_taught_with_what_know_predict_makes(
    width: int, roles: bool, branches: list[NetworkRun], folder: Path, tmp_path: Path
) -> None:
    model = SettleModel(taught(width, roles=roles))
    save_bundle(model.bundle({}, TrajectoryKind.BRANCHES), tmp_path / "mine", replace=False)
    for number in (0, 3):
        one = branches[number]
        made = [settled(model.module, one.window(S, *choice))[0] for choice in ((0, 1, 3), (3, 0, 1))]  # fmt: skip
        paths = [folder / f"{number:05d}" / branch_file(index) for index in (0, 4, 2, 1)]
        request = Request(
            paths, tmp_path / "out.safetensors", str(tmp_path / "mine"), method="settle", force=True
        )
        with open_prediction(request) as prediction:
            prediction.execute()
        found = read_state(request.output)
        moved = 0
        for name, tensor in made[0].items():
            torch.testing.assert_close(tensor, made[1][name], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
            moved += not torch.equal(tensor, one.states[-1][name])
        assert moved >= 4


@pytest.mark.parametrize(
    "changes",
    [{}, {"width": 3, "distance": 0.5, "calibrated": True, "roles": True, "downstream": 0.5}],
)
def test_an_interrupted_training_ends_as_a_whole_one(
    changes: dict[str, float], branches: list[NetworkRun], tmp_path: Path
) -> None:
    settings = replace(SETTINGS, **changes, downstream_steps=2, downstream_examples=(40,))  # type: ignore[arg-type]
    others = [replace(one, others=(OtherTask(one.inputs, one.labels, 5),)) for one in branches]
    assert all(isinstance(one, NetworkBranches) and one.longer is not None for one in others)
    made, _ = teach(others, settings, every=2)
    whole = made.module.state_dict()

    def interrupt(step: int, loss: float, model: NetworkModel) -> str:
        assert math.isfinite(loss)
        if step == 4:
            raise KeyboardInterrupt
        return f"first {step}"

    partial = tmp_path / "partial"
    with pytest.raises(KeyboardInterrupt):
        teach(others, settings, interrupt, every=2, partial=partial)
    again, told = teach(
        others, settings, lambda step, loss, model: f"then {step}", every=2, partial=partial
    )
    assert told == ["first 2", "then 4"]
    assert all(torch.equal(again.module.state_dict()[name], whole[name]) for name in whole)
    assert float(whole["gate.weight"].abs().max()) > 0


def test_it_learns_to_lower_the_loss(branches: list[NetworkRun]) -> None:
    settings = replace(SETTINGS, steps=25, runs=1, batch=400, learning_rate=0.03)
    _, told = teach(branches[:1], settings, lambda step, loss, model: loss, every=5)
    assert told[-1] < told[0] - 1e-3


def test_the_distance_is_a_share_of_that_of_the_mean(branches: list[NetworkRun]) -> None:
    one = branches[0]
    window = one.window(S, 1, 2, 3)
    assert one.annealed is not None
    assert window.target is not None
    parts = {name: 0.5 * one.annealed[name] for name in one.kinds}
    far = near = 0.0
    for name in one.kinds:
        wanted = one.annealed[name].double().numpy()
        mean = np.mean([one.states[k][name].double().numpy() for k in (1, 2, 3)], axis=0)
        near += float(((0.5 * wanted - wanted) ** 2).sum())
        far += float(((mean - wanted) ** 2).sum())
    assert float(_distance(parts, window, window.target)) == pytest.approx(near / far, rel=1e-4)


def test_gains_are_over_the_start(branches: list[NetworkRun]) -> None:
    model = SettleModel(taught(0))
    found = HeldOut(branches[:2], S).measured(model)
    assert [entry["run"] for entry in found] == [one.name for one in branches[:2] for _ in "ab"]
    for entry, choice in zip(found[:2], ((0, 1, 2), (1, 2, 3)), strict=True):
        one, measured = branches[0], entry["measured"]
        assert list(measured) == ["naive", "branch", "longer", "annealed", "average-3", "settle"]
        assert measured["naive"] == measure(one, one.states[-1])
        assert measured["annealed"] == measure(one, one.ends["annealed"])
        single = [measure(one, state) for state in one.states[:-1]]
        assert measured["branch"].loss == pytest.approx(np.mean([s.loss for s in single]))
        assert measured["branch"].accuracy == pytest.approx(np.mean([s.accuracy for s in single]))
        mean = combine([one.states[k] for k in choice], [1 / 3] * 3)
        assert measured["average-3"] == measure(one, mean)
    table = gains(found, "settle")
    assert (table.runs, next(iter(table.ahead))) == (2, "naive")
    assert table.accuracy["naive"].mean == 0


def test_a_bundle_is_measured_on_what_it_was_not_taught_on(branches: list[NetworkRun]) -> None:
    bundle = teach_bundle(split_runs(branches, 0.3, 0), SETTINGS, {})
    assert bundle.trajectory is TrajectoryKind.BRANCHES
    again = measure_bundle(bundle, branches)
    assert again["gains"] == bundle.manifest["gains"]
    with pytest.raises(UsageError, match="4 sets of branches cannot be split .*--regime branches"):
        split_runs(branches, 0.0, 3)


def test_what_cannot_be_taught_on_is_said(
    know: Command, branches: list[NetworkRun], folder: Path, tmp_path: Path
) -> None:
    found, left_out = load_networks([folder], K + 2, None)
    assert (found, set(left_out.values())) == ([], {"fewer than 5 branches"})
    with pytest.raises(UsageError, match="00000-.* is there more than once; give different"):
        load_networks([folder, folder / "00000"], S, None)
    none = tmp_path / "none"
    none.mkdir()
    with pytest.raises(UsageError, match="holds no collected forgettings, runs or branches; recor"):
        load_networks([none], S, None)
    for paths in ([folder, none], [none, folder]):
        with pytest.raises(UsageError, match="holds branches and .*none does not; teach on one"):
            load_networks(paths, S, None)
    both = tmp_path / "both"
    for number, record in enumerate(("run.json", BRANCH_RECORD)):
        (both / f"{number:05d}").mkdir(parents=True)
        (both / f"{number:05d}" / record).write_text("{}")
    with pytest.raises(UsageError, match="both: holds runs and branches; teach on one kind of"):
        load_networks([both], S, None)
    with pytest.raises(UsageError, match="both/00000 holds runs and .*00001 does not; teach on"):
        load_networks([both / "00000", both / "00001"], S, None)
    with pytest.raises(
        CheckpointError, match=r"branched\.json: cannot be read .*delete its folder"
    ):
        load_networks([both / "00001"], S, None)
    told = know("train", both / "00001", "-o", tmp_path / "made", "--objective", "network")
    assert told.returncode == EXIT_CHECKPOINT
    assert "branched.json: cannot be read" in one_line(told.stderr)
    known = replace(SETTINGS, model=HyperModel.KNOWN)
    with pytest.raises(UsageError, match="--model known: reads checkpoints in their order, and"):
        teach(branches, known)


def test_what_has_too_few_unseen_samples_is_left_out(folder: Path, tmp_path: Path) -> None:
    facts = json.loads((folder / "00000" / BRANCH_RECORD).read_text())
    facts["setup"]["samples"] = 10_000
    copy = tmp_path / "00000"
    copy.mkdir()
    (copy / BRANCH_RECORD).write_text(json.dumps(facts))
    left_out = load_networks([tmp_path], S, None)[1]
    assert left_out == {copy: "fewer than 200 samples that no branch has seen"}


def test_the_commands_collect_teach_and_predict(
    know: Command, folder: Path, tmp_path: Path
) -> None:
    done = know(
        "collect", tmp_path / "more", "--regime", "branches", "--trajectories", 1,
        "--data-set", "digits", "--architecture", "mlp", "--checkpoints", 4, "--processes", 1,
        "--seed", 134,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "00000 mlp on digits, 3 branches of" in done.stderr
    assert "1 of 1 set of branches, 0 of them left out" in done.stdout
    network = ("train", folder, "--objective", "network")
    arguments = [
        *network, "-o", tmp_path / "mine", "--checkpoints", S, "--meta-steps", 3,
        "--runs-per-step", 2, "--holdout", 0.3, "--seed", 0, "--calibrate", "--distance", 0.1,
        "--json", tmp_path / "gains.json", "--table", tmp_path / "gains.md",
    ]  # fmt: skip
    done = know(*arguments)
    assert done.returncode == 0, done.stderr
    assert " sets of branches held out: " in done.stderr
    assert " points over naive, " in done.stderr
    assert "over Θ0, on samples that the sets of branches have not seen" in " ".join(
        done.stdout.split()
    )
    bundle = load_bundle(tmp_path / "mine")
    assert (bundle.checkpoints, bundle.trajectory.value) == (S, "branches")
    kept = json.loads((tmp_path / "gains.json").read_text())
    assert kept["gains"] == bundle.manifest["gains"]
    page = (tmp_path / "gains.md").read_text()
    assert page == network_markdown(kept)
    assert page.startswith("# The hyper-model for sets of branches, taught through the networks")
    assert "| average-3 |" in page
    done = know(*network, "--evaluate", tmp_path / "mine", "--json", tmp_path / "again.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "again.json").read_text())["gains"] == kept["gains"]
    # Recorded branches say what they are, in whatever order they are given.
    names = [tmp_path / "more" / "00000" / branch_file(index) for index in (2, 0, 3, 1)]
    output = tmp_path / "out.safetensors"
    done = know("predict", *names, "-o", output, "--weights", tmp_path / "mine")
    assert done.returncode == 0, done.stderr
    start = read_state(names[1])
    assert read_state(output).keys() == start.keys()
    found = know(*arguments, "--force", "--model", "known")
    assert found.returncode == 2
    assert "--model known: reads checkpoints in their order" in one_line(found.stderr)
    found = know(
        "train", tmp_path, "-o", tmp_path / "b", "--objective", "network", "--checkpoints", 2
    )
    assert found.returncode == 2
    assert "--checkpoints 2: settle reads at least 3, of branches Θ0 and" in one_line(found.stderr)
