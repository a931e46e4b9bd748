"""Whatever changes bytes reaches header, journal, ranks, report and verification; nothing else does."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.cli.predict import predict
from know_cli.engine.report import Report
from know_cli.engine.settings import FrozenMode, NormMode
from know_cli.kinds import Kind, Override
from know_cli.known.bundle import save_bundle
from know_cli.known.native_kernel import trouble_with_native
from know_cli.prediction import opening, together
from know_cli.prediction.opening import check_agreement
from know_cli.prediction.predict import Prediction
from know_cli.prediction.recipe import Arithmetic, Recipe
from know_cli.prediction.request import Request
from know_cli.ranks.alone import Ranks
from tests.support.bundles import random_bundle
from tests.support.command import Command
from tests.support.trajectories import states, write_trajectory

# Another value for every option of the command that changes bytes …
CHANGING: dict[str, list[str]] = {
    "checkpoints": [],  # other inputs
    "steps": ["--steps", "2"],
    "rate": ["--rate", "0.4"],
    "method": ["--method", "naive"],
    "option": ["--option", "lambda=0.5"],
    "weights": ["--weights", "{other}"],
    "kind": ["--kind", "fc.weight=copy"],
    "lora": ["--lora", "factors"],
    "norm": ["--norm", "copy"],
    "frozen": ["--frozen", "predict"],
    "allow_nonfinite": ["--allow-nonfinite"],
    "trajectory": ["--trajectory", "run"],
    **({} if trouble_with_native(5) else {"kernel": ["--kernel", "torch"]}),
}
# … and of those that change none of an output.
FREE: dict[str, list[str]] = {
    "output": [],  # another place
    "force": ["--force"],
    "threads": ["--threads", "2"],
    "max_memory": ["--max-memory", "512M"],
    "resume": ["--resume"],
    "dry_run": ["--dry-run"],
    "checksum": ["--checksum"],
    "report": ["--json", "{folder}/report.json"],
    "quiet": ["--quiet"],
    "no_progress": ["--no-progress"],
}
# Which device computes cannot be chosen here; see below. A journal's records hold every output.
# Which of a run's checkpoints are taken, two options choose. Of kernels there may be one only.
OTHERS = {"device", "every_step", "last", "every"} | ({"kernel"} - CHANGING.keys())
# Options that are hidden because another has taken their place.
HIDDEN = {"older_report"}


class Listening(Ranks):
    """Two ranks, of which one hears what the other says."""

    size = 2
    heard = ""

    def gather(self, value: Any) -> list[Any]:
        self.heard = value
        return [value, value]


def views(prediction: Prediction) -> dict[str, Any]:
    """What is derived of a prediction's recipe: the five."""
    recipe, output = prediction.recipe, prediction.outputs[-1]
    listening = Listening()
    check_agreement(listening, recipe, prediction.predictors, [output])
    back = Recipe.from_metadata(output.metadata)
    replayed = back.to_request(
        [Path("a"), Path("b")], Path("c"), weights=None, device=None, threads=1, max_memory=1 << 30
    )
    return {
        "header": dict(output.metadata),
        "journal": prediction._journal_key(),
        "agreement": listening.heard,
        "report": recipe.to_json(),
        "verification": (replayed, back.inputs, back.bundle),
    }


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    real = together.open_together

    def spy(*arguments: Any) -> together.Together:
        opened = real(*arguments)
        (prediction,) = opened.predictions
        found.append(views(prediction))
        return opened

    monkeypatch.setattr(together, "open_together", spy)
    return found


def test_every_option_is_here() -> None:
    named = CHANGING.keys() | FREE.keys() | OTHERS | HIDDEN
    assert named == set(inspect.signature(predict).parameters)
    assert not CHANGING.keys() & FREE.keys()


@pytest.mark.parametrize("option", [*CHANGING, *FREE])
def test_an_option_reaches_all_or_nothing(
    option: str, know: Command, tmp_path: Path, seen: list[dict[str, Any]]
) -> None:
    bundle, other = tmp_path / "bundle", tmp_path / "other"
    for seed, path in enumerate((bundle, other)):
        save_bundle(random_bundle(seed=seed), path)
    paths: list[list[Path]] = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        paths.append(write_trajectory(folder, states(seed=seed)))
    # The method of the option 'option' is one that has options, and one is for all trajectories.
    usual = ["--weights", str(bundle)]
    if option in ("option", "trajectory"):
        usual = ["--method", "shrink"]
    if option == "lora":  # the one that takes it
        usual = ["--method", "average"]
    changed = [text.format(other=other, folder=tmp_path) for text in (CHANGING | FREE)[option]]
    if option in ("weights", "method"):
        first, second = ["--weights", str(bundle)], changed
    else:
        first, second = usual, [*usual, *changed]
    every = [paths[0], paths[1] if option == "checkpoints" else paths[0]]
    outputs = ["out", "elsewhere" if option == "output" else "out"]
    for arguments, given, output in zip((first, second), every, outputs, strict=True):
        (tmp_path / output).unlink(missing_ok=True)
        done = know("predict", *given, "-o", tmp_path / output, *arguments, "--device", "cpu")
        assert done.returncode == 0, done.stderr
    before, after = seen
    for name in before:
        if option in CHANGING:
            assert before[name] != after[name], name
        else:
            assert before[name] == after[name], name


def a_recipe() -> Recipe:
    return Recipe(
        version="1.0", method="known", options={"a": 1.0, "b": "word"}, bundle="digest", target="t",
        steps=2, rate=1 / 3, trajectory=TrajectoryKind.FORGETTING, norm=NormMode.RESET, frozen=FrozenMode.PREDICT,
        overrides=(Override("head.*=x", Kind.COPY),), allow_nonfinite=True, checkpoints=3,
        inputs=("a", "b", "c"), device="cuda", kernel="triton", coefficients=(0.5, 1 / 3, 1 / 6),
    )  # fmt: skip


def test_a_header_is_read_back() -> None:
    recipe = a_recipe()
    assert Recipe.from_metadata(recipe.to_metadata(2)) == recipe
    assert Recipe.from_metadata(recipe.to_metadata(1)) == replace(recipe, steps=1)


OTHER_VALUES: dict[str, Any] = {
    "version": "2.0", "method": "noise", "options": {"a": 2.0, "b": "word"}, "bundle": "other",
    "target": "u", "steps": 3, "rate": 0.5, "trajectory": TrajectoryKind.RUN, "norm": NormMode.COPY, "frozen": FrozenMode.COPY,
    "overrides": (), "allow_nonfinite": False, "checkpoints": 4, "inputs": ("b", "a", "c"),
    "device": "cpu", "kernel": "torch", "coefficients": (1 / 3, 1 / 6, 0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in fields(Recipe)])
def test_every_field_reaches_header_and_identity(name: str) -> None:
    """A field that is added without an entry here, or that is not derived, fails."""
    recipe, arithmetic = a_recipe(), Arithmetic("2", ("cpu",), 8)
    other = replace(recipe, **{name: OTHER_VALUES[name]})
    assert other.to_metadata(other.steps) != recipe.to_metadata(recipe.steps)
    if name != "checkpoints":  # there are as many fingerprints
        assert other.identity(arithmetic) != recipe.identity(arithmetic)
    assert recipe.identity(arithmetic) != recipe.identity(replace(arithmetic, torch="3"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("know.steps", "9"), ("know.steps", "x"), ("know.rate", "1.0"), ("know.norm", "?"),
     ("know.options", "[]"), ("know.options", "{"), ("know.kinds", "{}"), ("know.kinds", '["x"]'),
     ("know.checkpoints", None), ("know.coefficients", "1"), ("know.coefficients", '["x"]'),
      ("know.trajectory-kind", "stroll")],
)  # fmt: skip
def test_a_header_that_cannot_be_is_refused(key: str, value: str | None) -> None:
    metadata = a_recipe().to_metadata(2)
    metadata.pop(key)
    if value is not None:
        metadata[key] = value
    with pytest.raises(ValueError, match=r"."):
        Recipe.from_metadata(metadata)


def test_a_json_report_has_the_recipe_and_the_numbers(know: Command, tmp_path: Path) -> None:
    """Neither takes the place of the other's entries."""
    paths, report = write_trajectory(tmp_path), tmp_path / "report.json"
    done = know(
        "predict", *paths, "-o", tmp_path / "out", "--json", report,
        "--method", "naive", "--kind", "fc.*=copy", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads(report.read_text(encoding="utf-8"))
    assert content["overrides"] == ["fc.*=copy"]
    assert content["kinds"]["fc"]["tensors"] > 0
    request = Request(paths, tmp_path / "other", method="naive", device="cpu")
    with opening.open_prediction(request) as prediction:
        described = prediction.describe()
    assert not described.keys() & Report().to_json().keys()
