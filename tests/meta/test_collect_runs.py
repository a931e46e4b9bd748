"""``know collect --regime run``: what is drawn, what is recorded, and the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from know_cli.checkpoints import open_checkpoint
from know_cli.checkpoints.state import read_state
from know_cli.errors import CheckpointError, UsageError
from know_cli.lab.data import load
from know_cli.lab.fitting import one_thread
from know_cli.meta import run_recording, run_setup
from know_cli.meta.run_collecting import RunRequest, collect_runs, existing_runs
from know_cli.meta.run_recording import rebuild, record_run
from know_cli.meta.run_setup import RunSetup, draw_run_setup
from know_cli.meta.series import NotUsableError
from tests.support.command import Command, one_line
from tests.support.data_sets import SETS

ENDS = {f"annealed-{percent}" for percent in (5, 10, 20, 40)} | {"future-mean", "longer"}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def small(**changes: object) -> RunSetup:
    """The setup of a perceptron's short run on the digits."""
    setup = draw_run_setup(3, {"digits": load("digits")}, ["mlp"])
    settings = {
        "steps": 40, "end": 30, "checkpoints": 3, "spacing": 4, "samples": 60, "batch_size": 8,
        "warm_up": 3, "left": 1.0, "optimiser": "adam", "learning_rate": 1e-3,
    } | changes  # fmt: skip
    return replace(setup, **settings)  # type: ignore[arg-type]


@given(st.integers(0, 2**62))
@settings(max_examples=100, deadline=None)
def test_every_run_that_is_drawn_can_be_recorded(seed: int) -> None:
    setup = draw_run_setup(seed, SETS)
    assert setup == draw_run_setup(seed, SETS)
    assert 2 <= setup.checkpoints <= 5
    assert len(setup.window) == len(setup.future) == setup.checkpoints
    assert setup.window[-1] == setup.end <= setup.steps
    assert setup.window == sorted(set(setup.window))
    assert setup.window[0] >= 0.4 * setup.end - setup.checkpoints
    assert setup.warm_up < setup.window[0]
    every = [setup.rate(step) for step in range(setup.steps + 1)]
    assert 0 < min(every) <= max(every) <= 1
    if setup.left == 1:
        assert set(every[setup.warm_up :]) == {1.0}
    else:
        assert every[-1] == pytest.approx(setup.left)
    assert json.loads(json.dumps(setup.to_json()))["end"] == setup.end


def test_draws_are_varied() -> None:
    setups = [draw_run_setup(seed, SETS) for seed in range(200)]
    assert {setup.checkpoints for setup in setups} == {2, 3, 4, 5}
    assert {setup.optimiser for setup in setups} == {"adam", "sgd"}
    assert {setup.weight_decay > 0 for setup in setups if setup.optimiser == "adam"} == {True, False}  # fmt: skip
    assert 0.4 < sum(setup.left == 1 for setup in setups) / 200 < 0.8
    shares = sorted(setup.end / setup.steps for setup in setups)
    assert shares[20] < 0.35
    assert shares[-20] > 0.8


def test_a_run_is_recorded_with_what_came_after_it(tmp_path: Path) -> None:
    setup, data = small(), load("digits")
    facts = record_run(setup, data, tmp_path / "run")
    assert facts == json.loads((tmp_path / "run" / "run.json").read_text())
    files = {path.stem for path in (tmp_path / "run").glob("*.safetensors")}
    assert files == ENDS | {"checkpoint-000022", "checkpoint-000026", "checkpoint-000030"}
    assert set(facts["measured"]) == ENDS | {"last", "average"}
    for found in facts["measured"].values():
        assert set(found) == {"train_loss", "train_accuracy", "test_loss", "test_accuracy"}
    with open_checkpoint(tmp_path / "run" / "checkpoint-000026.safetensors") as checkpoint:
        assert checkpoint.metadata["know.trajectory-kind"] == "run"
        assert checkpoint.metadata["know.training-step"] == "26"
    assert set(facts["shape"]) == {"parallel", "kept"}


def test_the_network_and_its_data_are_made_again(tmp_path: Path) -> None:
    setup, data = small(left=0.5), load("digits")
    facts = record_run(setup, data, tmp_path)
    model, task = rebuild(json.loads(json.dumps(facts)), data)
    run = run_recording.Training(
        model, task.inputs, task.labels, batch_size=8, learning_rate=1e-3,
        seed=run_recording.derived_seed(setup.seed, run_recording._ORDER),
        weight_decay=setup.weight_decay,
        augmentation=run_recording.AUGMENTATIONS["image"][setup.augmentation],
    )  # fmt: skip
    future = []
    for step in (22, 26, 30, 34, 38, 42):
        run.advance(step - run.done, setup.rate)
        future.append({name: t.clone() for name, t in model.state_dict().items()})
    for name, tensor in read_state(tmp_path / "checkpoint-000022.safetensors").items():
        assert torch.equal(tensor, future[0][name])
    for name, tensor in read_state(tmp_path / "longer.safetensors").items():
        assert torch.equal(tensor, future[-1][name])
    for name, tensor in read_state(tmp_path / "future-mean.safetensors").items():
        mean = torch.stack([state[name].double() for state in future[3:]]).mean(0)
        torch.testing.assert_close(tensor.double(), mean, rtol=0, atol=1e-6)
    # The last step has 1/24 of the rate that the run had at step 30.
    falling = run_recording.falling(setup.rate(30), 30, 12)
    assert falling(41) == pytest.approx(setup.rate(30) / 24)


def test_a_run_that_diverges_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotUsableError, match="diverged"):
        record_run(small(optimiser="sgd", learning_rate=1e30), load("digits"), tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_runs_are_collected_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = RunRequest(tmp_path, 3, ["digits"], architectures=["mlp"], shard=(0, 2))
    assert request.numbers() == [0, 2]
    made = []

    def here(function, jobs, processes, folder, prepare, shared):  # type: ignore[no-untyped-def]
        prepare(*shared)
        for job in jobs:
            made.append(job)
            yield function(*job)

    monkeypatch.setattr("know_cli.meta.run_collecting.in_processes", here)
    monkeypatch.setattr(run_setup, "_STEPS", (30, 60))
    monkeypatch.setattr(run_setup, "_SAMPLES", (60, 100))
    (request.folder / ".partial-00000").mkdir()
    (request.folder / ".partial-00000" / "rest").write_text("of an interrupted call")
    found = list(collect_runs(request))
    assert [one.number for one in found] == [0, 2]
    assert not (tmp_path / "00000" / "rest").exists()
    assert [dict(one.facts) for one in existing_runs(request)] == [one.facts for one in found]
    (request.left_out(2)).write_text('{"reason": "the training diverged"}')
    assert [one.reason for one in existing_runs(request)] == ["", "the training diverged"]
    assert list(collect_runs(request)) == []
    assert made == [(0,), (2,)]
    for broken in ("[", "[]", '{"setup": [3]}'):
        (tmp_path / "00000" / "run.json").write_text(broken)
        with pytest.raises(CheckpointError, match=r"run\.json: cannot be read .*delete its folder"):
            existing_runs(request)


def test_runs_of_other_options_are_not_put_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(function, jobs, processes, folder, prepare, shared):  # type: ignore[no-untyped-def]
        prepare(*shared)
        return (function(*job) for job in jobs)

    monkeypatch.setattr("know_cli.meta.run_collecting.in_processes", here)
    monkeypatch.setattr(run_setup, "_STEPS", (30, 60))
    monkeypatch.setattr(run_setup, "_SAMPLES", (60, 100))
    request = RunRequest(tmp_path, 1, ["digits"], architectures=["mlp"], checkpoints=3)
    assert [one.number for one in collect_runs(request)] == [0]
    record = tmp_path / "00000" / "run.json"
    for changes in (
        {"architectures": ["cnn"]}, {"checkpoints": 5}, {"seed": 7}, {"brief": True},
    ):  # fmt: skip
        other = replace(request, runs=2, **changes)
        # Also where as many runs are there as are asked for.
        for runs in (1, 2):
            with pytest.raises(UsageError, match=r"run\.json: was collected with other options;"):
                list(collect_runs(replace(other, runs=runs)))
    assert not (tmp_path / "00001").exists()
    # Nor is what was left out, or a forgetting.
    (tmp_path / "00000").rename(tmp_path / "kept")
    setup = request.draw(0, {"digits": load("digits")}).to_json()
    left_out = request.left_out(0)
    left_out.write_text(json.dumps({"reason": "the training diverged", "setup": setup}))
    assert list(collect_runs(request)) == []
    with pytest.raises(
        UsageError, match=r"00000\.left-out\.json: was left out with other options;"
    ):
        list(collect_runs(replace(request, seed=7)))
    for broken in ('{"setup": {}}', '{"reason": "the training diverged", "setup": [3]}', "[]"):
        left_out.write_text(broken)
        with pytest.raises(CheckpointError, match=r"left-out\.json: cannot be read .*; delete it"):
            existing_runs(request)
    left_out.unlink()
    forgetting = tmp_path / "00000.safetensors"
    forgetting.touch()
    with pytest.raises(UsageError, match=r"00000\.safetensors: is a forgetting; for runs take an"):
        list(collect_runs(request))
    forgetting.unlink()
    (tmp_path / "kept").rename(tmp_path / "00000")
    # What was recorded before there were brief runs is gone on with, and so are all the same ones.
    facts = json.loads(record.read_text())
    assert facts["setup"].pop("brief") is False
    record.write_text(json.dumps(facts))
    before = record.read_bytes()
    assert [one.number for one in collect_runs(replace(request, runs=2, processes=2))] == [1]
    assert record.read_bytes() == before


def test_the_command_shows_what_is_there(tmp_path: Path, know: Command) -> None:
    request = RunRequest(tmp_path / "runs", 2, ["digits"], architectures=["mlp"])
    for number, share in ((0, 0.25), (1, 0.75)):
        folder = request.place(number)
        folder.mkdir(parents=True)
        measured = {name: {"test_accuracy": share} for name in ENDS | {"last", "average"}}
        setup = request.draw(number, {"digits": load("digits")}).to_json()
        facts = {"setup": setup, "measured": measured}
        (folder / "run.json").write_text(json.dumps(facts))
    arguments = (
        "collect",
        "runs",
        "--regime",
        "run",
        "--trajectories",
        "2",
        "--data-set",
        "digits",
        "--architecture",
        "mlp",
    )
    done = know(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "runs: 2 runs are already there" in done.stderr
    assert done.stdout.count("0.500") == 7
    assert "runs: 2 of 2 runs, 0 of them left out" in done.stdout
    done = know(*arguments, "--shard", "3/3", cwd=tmp_path)
    assert "--shard 3/3: there are only 2 runs" in one_line(done.stderr)
