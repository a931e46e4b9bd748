"""``know train`` as a user runs it, and the bundles that it made for us."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from know_cli.checkpoints import save_checkpoint
from know_cli.errors import EXIT_OUTPUT, EXIT_USAGE, OutputError
from know_cli.forgetting import Recorder, nested_subsets
from know_cli.kinds import PREDICTED_KINDS
from know_cli.known.bundle import load_bundle
from know_cli.known.shipped import shipped, weights_folder
from tests.support.command import Command, one_line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    for seed in range(8):
        kind, sessions = ("runs", 5) if seed < 6 else ("short", 4)
        subsets = nested_subsets(100, 0.5, sessions, seed)
        made = Recorder(folder / kind / str(seed), subsets, rate=0.5, seed=seed, before=1)
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
    assert manifest["threads"] == 1
    refused = know("train", *arguments, cwd=folder)
    assert refused.returncode == 4
    assert "--force" in refused.stderr
    before = bundle.digest
    same = (*arguments, "--target", "continuation")
    again = know("train", *same, "--force", "--quiet", cwd=folder)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert load_bundle(folder / "known").digest == before


@pytest.mark.parametrize("what", ["folder", "kind", "file", "link"])
def test_what_lies_where_it_keeps_what_it_learned_stays(
    what: str, folder: Path, know: Command, tmp_path: Path
) -> None:
    partial = tmp_path / "bundle.partial"
    place = tmp_path / "elsewhere" if what == "link" else partial
    if what == "file":
        place.write_text("precious")
    else:
        place.mkdir()
    if what == "link":
        partial.symlink_to(place)
    elif what == "folder":
        (place / "notes.txt").write_text("precious")
    elif what == "kind":
        save_checkpoint(place / "conv.safetensors", {"precious": torch.ones(1)}, {})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    arguments = ("-o", tmp_path / "bundle", "--checkpoints", "3", "--epochs", "1", "--force")
    done = know("train", "runs", *arguments, cwd=folder)
    assert done.returncode == EXIT_OUTPUT
    named = {"folder": partial / "notes.txt", "kind": partial / "conv.safetensors"}
    assert f"{named.get(what, partial)}: is where the training keeps" in one_line(done.stderr)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert partial.exists()


def test_only_what_it_has_kept_is_removed(
    folder: Path, know: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / "bundle.partial"
    arguments = (
        "train", "runs", "-o", tmp_path / "bundle", "--checkpoints", "3", "--epochs", "1",
        "--threads", "1",
    )  # fmt: skip

    def refuse(*_: object, **__: object) -> None:
        raise OutputError("no space")

    with monkeypatch.context() as patch:
        patch.setattr("know_cli.known.bundle.save_bundle", refuse)
        assert know(*arguments, cwd=folder).returncode == EXIT_OUTPUT
    kept = {f"{kind.value}.safetensors" for kind in PREDICTED_KINDS}
    assert {path.name for path in partial.iterdir()} == kept
    (partial / ".know-0123456789abcdef.tmp").write_bytes(b"of one that was killed")
    done = know(*arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "epoch" not in done.stderr  # it went on with what was kept
    assert {path.name for path in partial.iterdir()} == {".know-0123456789abcdef.tmp"}
    (partial / ".know-0123456789abcdef.tmp").unlink()
    done = know(*arguments, "--force", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert not partial.exists()


def test_a_bundle_goes_into_the_folder_that_one_is_in(
    folder: Path, know: Command, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    arguments = ("--checkpoints", "3", "--epochs", "1", "--threads", "1")
    done = know("train", folder / "runs", "-o", ".", *arguments, cwd=tmp_path / "here")
    assert done.returncode == 0, done.stderr
    assert load_bundle(tmp_path / "here").checkpoints == 3
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_measures_what_it_has_trained(folder: Path, know: Command) -> None:
    arguments = [
        "runs",
        "-o",
        "measured",
        "--checkpoints",
        "3",
        "--epochs",
        "1",
        "--holdout",
        "0.5",
    ]
    done = know("train", *arguments, "--target", "continuation", "--threads", "1", cwd=folder)
    assert done.returncode == 0, done.stderr
    done = know(
        "train", "runs", "--evaluate", "./measured", "--compare", "itself=./measured", "--threads", "1",
        "--json", "scores.json", "--table", "scores.md", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (scores,) = json.loads((folder / "scores.json").read_text()).values()
    manifest = json.loads((folder / "measured" / "manifest.json").read_text())
    assert manifest["figures"]["trajectories"].keys() == {kind.value for kind in PREDICTED_KINDS}
    for kind, steps in manifest["figures"]["trajectories"].items():
        for step, known in steps.items():
            one = scores["trajectories"][kind][step]
            assert one["others"] == {"itself": one["known"]}
            assert {key: one[key] for key in known} == pytest.approx(known, nan_ok=True)
    table = (folder / "scores.md").read_text()
    assert "| KNOWN | improved | itself | λ·θ0 (λ) |" in table
    known = [f"{one['known']:.3f}" for one in scores["trajectories"]["conv"].values()]
    assert f"| {' / '.join(known)} |" in table


def test_says_what_is_missing(folder: Path, know: Command) -> None:
    nothing = know("train", "nowhere", "-o", "other", cwd=folder)
    assert nothing.returncode == 2
    assert "trajectory.json" in nothing.stderr
    short = know("train", "runs", "-o", "other", "--checkpoints", "5", cwd=folder)
    assert short.returncode == 2
    assert "6 are needed" in short.stderr
    assert not (folder / "other").exists()


def test_says_once_why_trajectories_are_left_out(folder: Path, know: Command) -> None:
    done = know(
        "train", "runs", "short", "-o", "some", "--checkpoints", "3", "--epochs", "1", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "left out" in line]
    assert warnings == [
        f"warning: left out {Path('short', '6')} and 1 more: has 3 sessions, 4 are needed; "
        "record with --sessions"
    ]


SHIPPED = [(family, size) for family, sizes in shipped().items() for size in sizes]


def test_both_families_are_shipped_for_two_to_five_checkpoints() -> None:
    assert sorted(SHIPPED) == [
        (family, size) for family in ("continuation", "retrodiction") for size in (2, 3, 4, 5)
    ]


@pytest.mark.parametrize(("family", "size"), SHIPPED)
def test_the_shipped_bundles_are_what_their_manifests_say(family: str, size: int) -> None:
    bundle = load_bundle(shipped()[family][size])
    assert (bundle.target, bundle.checkpoints) == (family, size)
    for state in bundle.states.values():
        assert sum(tensor.numel() for tensor in state.values()) == 128 * size + 8785
    manifest = bundle.manifest
    assert manifest["command"].startswith("know train ")
    assert f"weights/{family}/checkpoints-{size} " in manifest["command"]
    assert {kind: len(rule) for kind, rule in manifest["rule"].items()} == {
        kind.value: size for kind in PREDICTED_KINDS
    }
    data = manifest["data"]
    assert set(data["held_out"]) == {"trajectories", "architectures", "data sets", "regimes"}
    assert not set(data["architectures"]) & set(manifest["settings"]["held_out_architectures"])
    assert not set(data["data_sets"]) & set(manifest["settings"]["held_out_data_sets"])
    assert set(data["regimes"]) == {"chain"}


@pytest.mark.parametrize(("family", "size"), SHIPPED)
def test_the_model_card_has_the_scores_of_the_manifests(family: str, size: int) -> None:
    """Its tables are those of ``know train --evaluate``, which measures once more."""
    bundle = load_bundle(shipped()[family][size])
    tables = (weights_folder().parent / "docs" / "results" / "held-out.md").read_text(
        encoding="utf-8"
    )
    section = tables.split(f"### {family}, {size} checkpoints, {bundle.digest}\n")[1]
    rows = {
        tuple(cell.strip() for cell in line.strip("| ").split("|")[:2]): line
        for line in section.split("###")[0].splitlines()
        if line.startswith("| ")
    }
    for group, kinds in bundle.manifest["figures"].items():
        for kind, steps in kinds.items():
            cells = [cell.strip() for cell in rows[group, kind].strip("| ").split("|")]
            expected = [found["known"] for found in steps.values()]
            # Rounded to four digits there, and to three here.
            known = [float(score) for score in cells[4].split(" / ")]
            assert known == pytest.approx(expected, abs=6e-4), (group, kind)
    card = (weights_folder() / "README.md").read_text(encoding="utf-8")
    assert bundle.digest in card
    if size == 5:
        for kind in PREDICTED_KINDS:
            assert rows["trajectories", kind.value] in card


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["-o", "made", "--objective", "network", "--hold-out-data-set", "digits"],
            "--hold-out-data-set: has no effect with --objective network",
        ),
        (
            ["-o", "made", "--objective", "network", "--epochs", 3],
            "--epochs: has no effect with --objective network",
        ),
        (["-o", "made", "--meta-steps", 9], "--meta-steps: has no effect with --objective weights"),
        (["-o", "made", "--data-folder", "."], "--data-folder: has no effect with --objective wei"),
        (["--evaluate", "./made", "--steps", 2], "--steps: has no effect with --evaluate"),
        (["--evaluate", "./made", "--holdout", 0.5], "--holdout: has no effect with --evaluate"),
        (
            ["--evaluate", "./made", "--objective", "network", "--checkpoints", 5],
            "--checkpoints: has no effect with --evaluate",
        ),
        (
            ["--evaluate", "./made", "--objective", "network", "--calibrate"],
            "--calibrate: has no effect with --evaluate",
        ),
    ],
)
def test_options_that_would_have_no_effect_are_refused(
    arguments: list[object], words: str, know: Command, tmp_path: Path
) -> None:
    """Also what was given as it is without: who gives it believes that it counts."""
    done = know("train", "runs", *arguments, cwd=tmp_path)
    assert done.returncode == EXIT_USAGE
    assert words in one_line(done.stderr)
