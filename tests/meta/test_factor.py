"""``know train --factor``: KNOWN with a second output, from trajectories to a verified prediction."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from know_cli.errors import EXIT_DONE, EXIT_USAGE
from know_cli.forgetting import Recorder, nested_subsets
from know_cli.kinds import PREDICTED_KINDS, Kind
from know_cli.known.bundle import load_bundle, save_bundle
from know_cli.known.module import Preparation, roll
from know_cli.meta.manifest import settings_of
from know_cli.meta.settings import Residuals, Settings, Target
from know_cli.meta.training import fit, train_bundle
from know_cli.meta.windows import Collection, collect_windows, find_trajectories
from tests.support.command import Command, one_line

SHAPES = {"c.weight": (2, 3, 3, 3), "f.weight": (12, 10), "f.bias": (12,)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trajectories that fluctuate, and whose continuation is 0.8·Θ0: a factor, and no change."""
    folder = tmp_path_factory.mktemp("work")
    for seed in range(8):
        subsets = nested_subsets(100, 0.5, 5, seed)
        made = Recorder(folder / "runs" / str(seed), subsets, rate=0.5, seed=seed, before=1)
        generator = torch.Generator().manual_seed(seed)
        start = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for session in made:
            size = 0.8 if session.index < 0 else 1.0
            noise = 0.0 if session.index <= 0 else 0.02
            made.save(
                session,
                {
                    name: size * value + noise * torch.randn(value.shape, generator=generator)
                    for name, value in start.items()
                },
            )
    return folder


@pytest.fixture(scope="module")
def collection(folder: Path) -> Collection:
    found = find_trajectories([folder / "runs"])
    return collect_windows(found, target=Target.CONTINUATION, checkpoints=3)


def of(factor: bool, **others: object) -> Settings:
    return Settings(
        Target.CONTINUATION,
        checkpoints=3,
        preparation=Preparation.SPREAD,
        factor=factor,
        residuals=Residuals.SCALED,
        penalised=False,
        **{"epochs": 2, **others},  # type: ignore[arg-type]
    )


def test_settings_and_manifests_say_it_only_where_it_is(
    collection: Collection, tmp_path: Path
) -> None:
    facts = {factor: of(factor).to_json() for factor in (False, True)}
    assert "factor" not in facts[False]
    assert facts[True] == {**facts[False], "factor": True}
    for factor in (False, True):
        bundle, _ = train_bundle(collection, of(factor))
        save_bundle(bundle, tmp_path / str(factor))
        loaded = load_bundle(tmp_path / str(factor))
        assert (loaded.factor, settings_of(loaded)) == (factor, of(factor))
        assert ("factor" in loaded.manifest, "factor" in loaded.manifest["settings"]) == (factor, factor)  # fmt: skip


def test_it_learns_a_factor_that_a_change_cannot_be(collection: Collection) -> None:
    """A change is at most the spread, which is far less than what is missing of θ0 here."""
    windows = collection.windows[Kind.FC]
    numbers = range(len(collection.trajectories))
    parts = windows.of(list(numbers[2:])), windows.of(list(numbers[:2]))
    lost = {
        factor: fit(Kind.FC, *parts, of(factor, epochs=15, batch_rows=64)).losses[-1][1]
        for factor in (False, True)
    }
    # In units of the mean distance to the target.
    assert lost[False] > 0.7
    assert lost[True] < 0.3


def test_the_same_settings_give_the_same_bundle(collection: Collection) -> None:
    one, same, other = (train_bundle(collection, of(factor))[0] for factor in (True, True, False))
    assert one.digest == same.digest != other.digest


def test_goes_on_with_what_was_kept_of_the_same_form(
    collection: Collection, tmp_path: Path
) -> None:
    whole, _ = train_bundle(collection, of(True))

    def interrupt(kind: Kind, *_: object) -> None:
        if kind is Kind.FC:
            raise KeyboardInterrupt

    told: list[Kind] = []
    for factor in (False, True):  # what was kept of the one form is not taken for the other
        with pytest.raises(KeyboardInterrupt):
            train_bundle(collection, of(factor), interrupt, partial=tmp_path)
    resumed, _ = train_bundle(
        collection, of(True), lambda kind, *_: told.append(kind), partial=tmp_path
    )
    assert told == [Kind.FC] * 2 + [Kind.BIAS] * 2
    assert resumed.digest == whole.digest
    told.clear()
    train_bundle(collection, of(False), lambda kind, *_: told.append(kind), partial=tmp_path)
    assert set(told) == set(PREDICTED_KINDS)


def test_an_average_of_the_weights_has_it_too(collection: Collection) -> None:
    bundle, _ = train_bundle(collection, of(True, averaging=0.9, steps=1, batch_rows=64))
    assert bundle.states[Kind.FC]["head.weight"].shape == (2, 64)
    assert bundle.states[Kind.FC]["head.weight"][1].any()


def test_from_the_command_to_a_verified_prediction(
    folder: Path, know: Command, tmp_path: Path
) -> None:
    common = (
        "train", "runs", "--target", "continuation", "--checkpoints", 3, "--epochs", 2, "--threads", 1,
    )  # fmt: skip
    done = know(*common, "-o", folder / "known", "--factor", cwd=folder, process=True)
    assert done.returncode == EXIT_DONE, done.stderr
    bundle = load_bundle(folder / "known")
    assert bundle.factor
    assert bundle.manifest["parameters"] == 128 * 3 + 8850
    assert (
        json.loads((folder / "known" / "manifest.json").read_text())["settings"]["factor"] is True
    )
    done = know(*common, "-o", tmp_path / "plain", cwd=folder)
    assert done.returncode == EXIT_DONE, done.stderr
    assert not load_bundle(tmp_path / "plain").factor
    # It is measured as others are, and beside them.
    done = know(
        "train", "runs", "--evaluate", "./known", "--compare", f"plain={tmp_path / 'plain'}",
        "--threads", 1, "--json", tmp_path / "s.json", cwd=folder,
    )  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    assert bundle.digest in next(iter(json.loads((tmp_path / "s.json").read_text())))

    command = ("runs/0/ckpt0..ckpt2", "--weights", "./known")
    out = tmp_path / "out.safetensors"
    done = know("predict", *command, "-o", out, cwd=folder)
    assert done.returncode == EXIT_DONE, done.stderr
    states = [load_file(folder / f"runs/0/ckpt{k}.safetensors") for k in (2, 1, 0)]
    for name, kind in zip(SHAPES, (Kind.CONV, Kind.FC, Kind.BIAS), strict=True):
        window = torch.stack([state[name].flatten() for state in states], dim=1)
        with torch.no_grad():
            expected = roll(bundle.module(kind), window, 1)[:, 0]
        torch.testing.assert_close(load_file(out)[name].flatten(), expected, atol=1e-5, rtol=1e-5)
    for method in ("lstsq", "noise"):
        done = know("predict", *command, "-o", tmp_path / method, "--method", method, cwd=folder)
        assert done.returncode == EXIT_DONE, done.stderr
    for path in (out, tmp_path / "lstsq", tmp_path / "noise"):
        done = know("verify", path, *command, "--full", cwd=folder)
        assert done.returncode == EXIT_DONE, done.stdout + done.stderr
    done = know("verify", out, "runs/0/ckpt0..ckpt2", "--weights", tmp_path / "plain", cwd=folder)
    assert done.returncode != EXIT_DONE
    assert "was made with a hyper-model of digest" in one_line(done.stderr)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("-o", "other", "--objective", "network"),
            "--factor: with --objective network is known's; give --model known as well",
        ),
        (("--evaluate", "continuation"), "--factor: is for -o BUNDLE; leave it out"),
    ],
)
def test_it_is_for_teaching_known(
    arguments: tuple[str, ...], words: str, folder: Path, know: Command
) -> None:
    done = know("train", "runs", "--factor", *arguments, cwd=folder)
    assert done.returncode == EXIT_USAGE
    assert one_line(done.stderr).endswith(words)
    assert not (folder / "other").exists()
