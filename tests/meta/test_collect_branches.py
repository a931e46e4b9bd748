"""``know collect --regime branches``: what is drawn, what is recorded, and the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from know_cli.checkpoints import open_checkpoint, open_trajectory
from know_cli.checkpoints.metadata import Branch, TrajectoryKind
from know_cli.checkpoints.state import read_state
from know_cli.errors import UsageError
from know_cli.forgetting.recorder import derived_seed
from know_cli.lab.data import AUGMENTATIONS, load
from know_cli.lab.fitting import one_thread
from know_cli.lab.stepping import Training
from know_cli.lab.zoo import build
from know_cli.meta import branch_recording, run_recording, run_setup
from know_cli.meta.branch_collecting import BranchRequest
from know_cli.meta.branch_recording import record_branches
from know_cli.meta.branch_setup import BranchSetup, draw_branch_setup
from know_cli.meta.recording import Task
from know_cli.meta.run_collecting import RunRequest, collect_runs, existing_runs
from know_cli.meta.run_setup import draw_run_setup
from know_cli.meta.series import NotUsableError
from tests.support.command import Command, one_line
from tests.support.data_sets import SETS

MEASURED = {"naive", "branch", "average", "longer", "annealed"}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def small(**changes: object) -> BranchSetup:
    """The setup of a perceptron's short branches on the digits."""
    setup = draw_branch_setup(3, {"digits": load("digits")}, ["mlp"], checkpoints=4)
    settings = {
        "end": 12, "steps": 3, "samples": 60, "batch_size": 8, "warm_up": 3, "optimiser": "adam",
        "learning_rate": 1e-3, "fraction": 0.5,
    } | changes  # fmt: skip
    return replace(setup, **settings)  # type: ignore[arg-type]


@given(st.integers(0, 2**62))
@settings(max_examples=50, deadline=None)
def test_all_that_is_drawn_can_be_recorded(seed: int) -> None:
    setup = draw_branch_setup(seed, SETS)
    assert setup == draw_branch_setup(seed, SETS)
    assert setup == BranchSetup.from_json(json.loads(json.dumps(setup.to_json())))
    assert replace(draw_branch_setup(seed, SETS, checkpoints=9), checkpoints=6) == setup
    assert (setup.checkpoints, setup.branches) == (6, 5)
    assert 1 <= setup.steps <= 0.5 * setup.end + 1
    assert setup.every_step == 5 * setup.steps
    assert setup.warm_up < setup.end
    assert setup.fraction in (0.5, 1.0)
    rates = [setup.rate(step) for step in range(setup.end)]
    assert rates == sorted(rates)
    assert rates[0] > 0
    assert setup.rate(setup.end) == 1
    run = draw_run_setup(seed, SETS)
    assert (setup.design, setup.end, setup.classes) == (run.design, run.end, run.classes)


def test_draws_are_varied() -> None:
    setups = [draw_branch_setup(seed, SETS) for seed in range(200)]
    assert 0.4 < sum(setup.fraction == 1 for setup in setups) / 200 < 0.6
    shares = sorted(setup.steps / setup.end for setup in setups)
    assert shares[0] < 0.07
    assert shares[-1] > 0.4
    # As many below as above the middle of the logarithms.
    assert 0.12 < shares[100] < 0.2


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_branches_go_on_from_one_start(fraction: float, tmp_path: Path) -> None:
    setup, data = small(fraction=fraction), load("digits")
    facts = record_branches(setup, data, tmp_path)
    assert facts == json.loads((tmp_path / "branched.json").read_text())
    assert set(facts["measured"]) == MEASURED
    for found in facts["measured"].values():
        assert set(found) == {"train_loss", "train_accuracy", "test_loss", "test_accuracy"}
    files = {path.stem for path in tmp_path.glob("*.safetensors")}
    assert files == {"ckpt0", "branch1", "branch2", "branch3", "longer", "annealed"}

    task = Task(setup, data)

    def trained(*parts: tuple[int, int | None, object, object]) -> dict[str, torch.Tensor]:
        """By hand: steps with a seed, samples and a rate each."""
        run = Training(
            build(setup.design, derived_seed(setup.seed, run_recording._INITIAL)),
            task.inputs, task.labels, batch_size=8, learning_rate=1e-3,
            seed=derived_seed(setup.seed, run_recording._ORDER), weight_decay=setup.weight_decay,
            augmentation=AUGMENTATIONS["image"][setup.augmentation],
        )  # fmt: skip
        for steps, seed, chosen, rate in parts:
            run = run.branch(seed, chosen)  # type: ignore[arg-type]
            run.advance(steps, rate)  # type: ignore[arg-type]
        return run.model.state_dict()

    def rising(step: int) -> float:
        return min((step + 1) / 4, 1.0)

    start = (12, None, None, rising)
    wanted = {
        "ckpt0": trained(start),
        "longer": trained((21, None, None, rising)),
        "annealed": trained(start, (9, None, None, lambda step: 1 - (step - 12 + 0.5) / 9)),
    }
    for number in (1, 2, 3):
        chosen = None
        if fraction < 1:
            generator = torch.Generator().manual_seed(derived_seed(setup.seed, 83, number))
            chosen = torch.randperm(60, generator=generator)[:30]
        seed = derived_seed(setup.seed, branch_recording._BRANCH, number)
        wanted[f"branch{number}"] = trained(start, (3, seed, chosen, lambda step: 1.0))
    for name, state in wanted.items():
        for key, tensor in read_state(tmp_path / f"{name}.safetensors").items():
            assert torch.equal(tensor, state[key]), (name, key)
    mean = [facts["measured"][name]["test_loss"] for name in ("branch", "average")]
    assert mean[0] != mean[1]
    paths = [tmp_path / f"{name}.safetensors" for name in ("branch2", "branch1", "ckpt0")]
    with open_trajectory(paths) as opened:
        assert opened.kind is TrajectoryKind.BRANCHES
        assert [one.path.stem for one in opened.checkpoints] == ["ckpt0", "branch1", "branch2"]
    with open_checkpoint(paths[0]) as checkpoint:
        branch = Branch.from_metadata(checkpoint.metadata)
    assert branch is not None
    assert (branch.index, branch.fraction) == (2, fraction)


def test_branches_that_diverge_are_left_out(tmp_path: Path) -> None:
    with pytest.raises(NotUsableError, match="diverged"):
        record_branches(
            small(optimiser="sgd", learning_rate=1e30), load("digits"), tmp_path / "branches"
        )
    assert not list((tmp_path / "branches").iterdir())


def test_branches_are_collected_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(function, jobs, processes, folder, prepare, shared):  # type: ignore[no-untyped-def]
        prepare(*shared)
        return (function(*job) for job in jobs)

    monkeypatch.setattr("know_cli.meta.run_collecting.in_processes", here)
    monkeypatch.setattr(run_setup, "_STEPS", (30, 60))
    monkeypatch.setattr(run_setup, "_SAMPLES", (60, 100))
    request = BranchRequest(tmp_path, 3, ["digits"], architectures=["mlp"], checkpoints=3)
    found = list(collect_runs(replace(request, shard=(0, 2))))
    assert [one.number for one in found] == [0, 2]
    assert [one.number for one in collect_runs(request)] == [1]
    assert [dict(one.facts) for one in existing_runs(request)][::2] == [one.facts for one in found]
    assert list(collect_runs(request)) == []
    with pytest.raises(UsageError, match=r"branched\.json: was collected with other options;"):
        list(collect_runs(replace(request, checkpoints=4)))
    # Runs are no branches.
    runs = RunRequest(tmp_path, 3, ["digits"], architectures=["mlp"])
    for call in (existing_runs, collect_runs):
        with pytest.raises(
            UsageError, match=r"00000: has no run\.json, as collected runs have; ta"
        ):
            list(call(runs))


def test_the_command_shows_what_is_there(tmp_path: Path, know: Command) -> None:
    request = BranchRequest(tmp_path / "branches", 2, ["digits"], architectures=["mlp"])
    for number, share in ((0, 0.25), (1, 0.75)):
        folder = request.place(number)
        folder.mkdir(parents=True)
        measured = {name: {"test_accuracy": share} for name in MEASURED}
        setup = request.draw(number, {"digits": load("digits")}).to_json()
        (folder / "branched.json").write_text(json.dumps({"setup": setup, "measured": measured}))
    arguments = (
        "collect", "branches", "--trajectories", "2", "--data-set", "digits",
        "--architecture", "mlp", "--regime",
    )  # fmt: skip
    done = know(*arguments, "branches", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "branches: 2 sets of branches are already there" in done.stderr
    assert done.stdout.count("0.500") == 5
    assert "branches: 2 of 2 sets of branches, 0 of them left out" in done.stdout
    done = know(*arguments, "branches", "--shard", "3/3", cwd=tmp_path)
    assert "--shard 3/3: there are only 2 sets of branches" in one_line(done.stderr)
    done = know(*arguments, "run", cwd=tmp_path)
    assert done.returncode == 2
    assert "00000: has no run.json, as collected runs have" in one_line(done.stderr)
