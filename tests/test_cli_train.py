"""``know train`` as a user runs it, and the bundles that it made for us."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from know_cli.bundles import shipped, weights_folder
from know_cli.forgetting import Recorder, nested_subsets
from know_cli.hypermodel import load_bundle
from tests.conftest import Command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    for seed in range(6):
        subsets = nested_subsets(100, 0.5, 5, seed)
        made = Recorder(folder / "runs" / str(seed), subsets, rate=0.5, seed=seed, before=1)
        generator = torch.Generator().manual_seed(seed)
        state = {
            name: torch.randn(shape, generator=generator)
            for name, shape in {
                "c.weight": (2, 3, 3, 3),
                "f.weight": (4, 5),
                "f.bias": (4,),
            }.items()
        }
        for session in made:
            made.save(session, {name: value * 0.9**session.index for name, value in state.items()})
    return folder


def test_trains_a_bundle_and_refuses_to_replace_it(folder: Path, know: Command) -> None:
    arguments = ("runs", "-o", "known", "--checkpoints", "3", "--epochs", "3", "--threads", "1")
    done = know("train", *arguments, "--target", "continuation", cwd=folder, process=True)
    assert done.returncode == 0, done.stderr
    assert "6 trajectories" in done.stderr
    assert "epoch   3 of 3" in done.stderr
    assert "held-out" in done.stdout
    bundle = load_bundle(folder / "known")
    assert (bundle.checkpoints, bundle.target, bundle.preparation.value) == (
        3,
        "continuation",
        "spread",
    )
    manifest = json.loads((folder / "known" / "manifest.json").read_text())
    assert manifest["command"].startswith("know train runs -o known --target continuation")
    refused = know("train", *arguments, cwd=folder)
    assert refused.returncode == 4
    assert "--force" in refused.stderr
    before = bundle.digest
    command = manifest["command"].split()[2:]
    again = know("train", *command, "--force", "--quiet", cwd=folder)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert load_bundle(folder / "known").digest == before


def test_says_what_is_missing(folder: Path, know: Command) -> None:
    nothing = know("train", "nowhere", "-o", "other", cwd=folder)
    assert nothing.returncode == 2
    assert "trajectory.json" in nothing.stderr
    short = know("train", "runs", "-o", "other", "--checkpoints", "5", cwd=folder)
    assert short.returncode == 2
    assert "6 are needed" in short.stderr
    assert not (folder / "other").exists()


@pytest.mark.parametrize("target", ["retrodiction", "continuation"])
def test_the_shipped_bundles_are_what_their_manifests_say(target: str) -> None:
    bundle = load_bundle(shipped()[target][5])
    assert bundle.target == target
    assert bundle.checkpoints == 5
    assert sum(tensor.numel() for tensor in next(iter(bundle.states.values())).values()) == 9425
    assert bundle.manifest["command"].startswith("know train ")
    assert set(bundle.manifest["figures"]) == {"conv", "fc", "bias"}


def test_the_model_card_has_the_figures_of_the_manifests() -> None:
    card = (weights_folder() / "README.md").read_text(encoding="utf-8")
    for target, sizes in shipped().items():
        for checkpoints, folder in sizes.items():
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            assert checkpoints == 5
            for kind, found in manifest["figures"].items():
                assert (
                    f"| {target} | {kind} | {found['rows']:,} | **{found['known']:.3f}** |" in card
                )
