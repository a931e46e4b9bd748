"""``know plot trial``: the landscape around a trial of either regime."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from know_cli.errors import UsageError
from know_cli.evaluation import hindsight
from know_cli.evaluation.landscape import find_trial, measured, pictured
from know_cli.evaluation.landscape_measure import LandscapeMeasure
from know_cli.evaluation.place import Place
from know_cli.evaluation.precision import Precision
from know_cli.evaluation.release.plan import RELEASE_TASKS
from know_cli.evaluation.release.trial import ReleaseTrial
from know_cli.evaluation.runs.averages import re_estimate
from know_cli.evaluation.tasks import TASKS, Downstream
from know_cli.evaluation.trial import Trial
from know_cli.evaluation.variants import find_variants
from tests.support.command import Command, one_line

NAME = "text-language-model"
RELEASED = "release-cifar10-resnet"


@pytest.fixture(autouse=True)
def _little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks with little data; that of the release regime is on glyphs."""
    task = TASKS[NAME]
    tiny = replace(
        task,
        samples=34,
        recipe=replace(task.recipe, epochs=1, batch_size=16),
        downstream=(Downstream(8, 1, repetitions=1),),
        tested=40,
    )
    monkeypatch.setitem(TASKS, NAME, tiny)
    released = RELEASE_TASKS[RELEASED]
    base = replace(
        released.base, source="glyphs-greek", target="glyphs-greek", samples=80, tested=40
    )  # type: ignore[call-arg]
    monkeypatch.setitem(RELEASE_TASKS, RELEASED, replace(released, base=base))
    monkeypatch.setattr(hindsight, "_ITERATIONS", 2)


def run(name: str, work: Path) -> None:
    """A trial with its checkpoints."""
    if name in TASKS:
        Trial(TASKS[name], 0, work, None).checkpoints()
    else:
        ReleaseTrial(RELEASE_TASKS[name], 0, work, None).checkpoints()


def test_trials_of_both_regimes_are_found_if_they_were_run(tmp_path: Path) -> None:
    for name, sort in ((NAME, Trial), (RELEASED, ReleaseTrial)):
        with pytest.raises(UsageError, match=f"no such trial of task {name} with seed 0; run it"):
            find_trial(name, 0, tmp_path, None)
        run(name, tmp_path)
        assert isinstance(find_trial(name, 0, tmp_path, None), sort)
        with pytest.raises(UsageError, match="no such trial"):  # not one in float32
            find_trial(name, 0, tmp_path, None, Place(precision=Precision.BFLOAT16))
    with pytest.raises(UsageError, match=f"--from: task {NAME} is not of the release regime"):
        find_trial(NAME, 0, tmp_path, None, first=tmp_path / "a.safetensors")


def test_what_is_drawn_of_a_trial(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    run(NAME, tmp_path / "work")
    trial = find_trial(NAME, 0, tmp_path / "work", None)
    drawn = pictured(trial, find_variants(["continuation", "average"]), tmp_path / "made")
    assert [path.name for path in drawn.sessions] == [f"ckpt{k}.safetensors" for k in range(5)]
    assert [path.stem for path in drawn.predictions] == ["0-1", "0-2", "0-3", "1-1"]
    assert list(drawn.others) == ["longer", "more data"]
    first, *others = (load_file(path) for path in drawn.sessions)
    mean = load_file(drawn.predictions[-1])
    name = "blocks.0.fc1.weight"
    expected = sum((state[name] for state in others), first[name]) / 5
    torch.testing.assert_close(mean[name], expected)


def test_the_measures_are_those_of_the_pre_training_s_test(tmp_path: Path) -> None:
    run(RELEASED, tmp_path / "work")
    trial = find_trial(RELEASED, 0, tmp_path / "work", None)
    state = load_file(trial.checkpoints()[0])
    model = trial.problem.build(0)
    model.load_state_dict(state)
    re_estimate(model, trial.problem.pool)
    test = trial.problem.test
    with torch.inference_mode():
        outputs = model(test.inputs)
    loss, name = measured(trial, LandscapeMeasure.LOSS)
    assert name == "loss"
    assert loss(state) == pytest.approx(
        float(nn.functional.cross_entropy(outputs, test.targets)), rel=1e-5
    )
    score, name = measured(trial, LandscapeMeasure.SCORE)
    assert name == "accuracy (points)"
    right = (outputs.argmax(1) == test.targets).float().mean()
    assert score(state) == pytest.approx(100 * float(right), rel=1e-5)


def test_the_command_draws_a_trial(tmp_path: Path, know: Command) -> None:
    run(NAME, tmp_path / "out" / "work")
    arguments = (
        "plot", "trial", "out", "--task", NAME, "-o", "a.png", "--grid", "3",
        "--method", "continuation", "--json", "a.json",
    )  # fmt: skip
    done = know(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "a.json").read_text())
    names = [point["name"] for point in found["points"]]
    assert names == [
        *(f"Θ{k}" for k in range(5)),
        *(f"continuation ×{factor}" for factor in (2, 4, 8)),
        "longer",
        "more data",
    ]
    # Predictions were files for as long as it drew; all else is still there.
    paths = {point["name"]: point["path"] for point in found["points"]}
    assert all((path is None) == name.startswith("continuation") for name, path in paths.items())
    assert all((tmp_path / path).exists() for path in paths.values() if path is not None)
    values = np.array(found["grid"]["values"])
    assert values.shape == (3, 3)
    assert (values > 0).all()
    assert f"loss: {values.min():.4g} to {values.max():.4g}" in done.stdout
    before = (tmp_path / "a.png").read_bytes()
    again = know(*arguments[:-2], "--force", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "a.png").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere", "--task", NAME), "nowhere: no such folder; name the one that 'know eval' wr"),
        ((".", "--task", "no-task"), "--task no-task: there is none; choose from fashion-classes"),
        ((".", "--task", NAME, "--method", "no"), "unknown method 'no'; choose from continuation"),
        ((".", "--task", "release-cifar10-cnn"), "data set 'cifar10': nothing in"),
        ((".", "--task", NAME), "there is no such trial of task text-language-model with seed 0"),
        ((".", "--task", NAME, "--bundle", "average=x"), "--bundle average=…: is already the name"),
        ((".", "--task", NAME, "--device", "cuda:99"), "--device cuda:99: torch sees"),
    ],
)
def test_usage_errors(
    arguments: tuple[str, ...], words: str, tmp_path: Path, know: Command
) -> None:
    done = know("plot", "trial", *arguments, "-o", "a.png", cwd=tmp_path)
    assert done.returncode == 2
    assert words in one_line(done.stderr)
    assert not list(tmp_path.iterdir())


def test_a_picture_that_exists_is_kept(tmp_path: Path, know: Command) -> None:
    (tmp_path / "a.png").write_text("mine")
    done = know("plot", "trial", ".", "--task", NAME, "-o", "a.png", cwd=tmp_path, process=True)
    assert done.returncode == 4
    assert (tmp_path / "a.png").read_text() == "mine"
    (tmp_path / "a.json").write_text("mine")  # told before anything is computed
    done = know(
        "plot", "trial", ".", "--task", NAME, "-o", "b.png", "--json", "a.json", cwd=tmp_path
    )
    assert done.returncode == 4
    assert (tmp_path / "a.json").read_text() == "mine"
