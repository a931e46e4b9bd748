"""Ranges of checkpoints on a command line, and numbers in names that go up and down."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from know_cli.checkpoints import open_trajectory
from know_cli.checkpoints.metadata import Session
from know_cli.checkpoints.paths import expand_arguments, step_path
from know_cli.errors import EXIT_CHECKPOINT, EXIT_DONE, EXIT_USAGE, CheckpointError
from tests.support.command import Command, one_line

STEPS = [f"checkpoint-{n}.safetensors" for n in (100, 200, 300, 400, 500)]
EPOCHS = [f"epoch_{n:02d}.safetensors" for n in (8, 9, 10, 11, 12)]


def touch(*paths: str) -> None:
    for path in paths:
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()


RANGES: dict[str, tuple[list[str], list[str]]] = {
    # argument: (what there is, what it stands for)
    "checkpoint-100..checkpoint-500": (STEPS, STEPS),
    "checkpoint-500..checkpoint-100": (STEPS, STEPS[::-1]),
    "checkpoint-500..100": (STEPS, STEPS[::-1]),
    "checkpoint-400..checkpoint-200": (STEPS, STEPS[3:0:-1]),
    "epoch_12..epoch_08": (EPOCHS, EPOCHS[::-1]),
    "epoch_08..12": (EPOCHS, EPOCHS),
    "s098..s101": ([f"s{n:03d}" for n in range(98, 102)], [f"s{n:03d}" for n in range(98, 102)]),
    "c8..c11": ([f"c{n}" for n in range(8, 12)], [f"c{n}" for n in range(8, 12)]),
    "a0.safetensors..a2.safetensors": (
        [f"a{n}.safetensors" for n in range(3)], [f"a{n}.safetensors" for n in range(3)]
    ),
    "a0.safetensors..a2": (
        [f"a{n}.safetensors" for n in range(3)], [f"a{n}.safetensors" for n in range(3)]
    ),
    "run/1/w.safetensors..run/3/w.safetensors": (
        [f"run/{n}/w.safetensors" for n in range(1, 4)], [f"run/{n}/w.safetensors" for n in range(1, 4)]
    ),
    "run/1..3/w": (
        [f"run/{n}/w.safetensors" for n in range(1, 4)], [f"run/{n}/w.safetensors" for n in range(1, 4)]
    ),
    "step1000-v2..step3000-v2": (
        [f"step{n}-v2" for n in (1000, 2000, 3000)], [f"step{n}-v2" for n in (1000, 2000, 3000)]
    ),
    "v2/step10..step30": ([f"v2/step{n}" for n in (10, 20, 30)], [f"v2/step{n}" for n in (10, 20, 30)]),
    "v2/step10..v2/step30": ([f"v2/step{n}" for n in (10, 20, 30)], [f"v2/step{n}" for n in (10, 20, 30)]),
    # Others beside them, which are not of the range.
    "x1..x3": (["x1", "x2", "x3", "x4", "y2", "x2b", "x02"], ["x1", "x2", "x3"]),
    "x(1..x(3": (["x(1", "x(2", "x(3"], ["x(1", "x(2", "x(3"]),
}  # fmt: skip


@pytest.mark.parametrize("argument", RANGES)
def test_a_range(argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    there, members = RANGES[argument]
    touch(*there)
    told: list[str] = []
    assert [str(path) for path in expand_arguments([argument], told.append)] == members
    assert [str(path) for path in expand_arguments([f"{tmp_path}/{argument}"])] == [
        f"{tmp_path}/{member}" for member in members
    ]
    assert told == []


def test_ranges_mix_with_other_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    touch("final.safetensors", *STEPS, "e1", "e2")
    found = expand_arguments(["final", "checkpoint-500..checkpoint-300", "e1..e2"])
    assert [str(path) for path in found] == ["final.safetensors", *STEPS[:1:-1], "e1", "e2"]


@settings(max_examples=25)
@given(
    numbers=st.sets(st.integers(0, 9999), min_size=2, max_size=8),
    width=st.sampled_from([0, 4]),
    falls=st.booleans(),
)
def test_a_range_has_exactly_what_lies_between(
    numbers: set[int], width: int, falls: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("range")
    for number in numbers:
        (folder / f"c{number:0{width}d}.safetensors").touch()
    ordered = sorted(numbers, reverse=falls)
    for first in range(len(ordered) - 1):
        inside = ordered[first:]
        ends = (f"c{inside[0]:0{width}d}", f"c{inside[-1]:0{width}d}")
        found = expand_arguments([f"{folder}/{ends[0]}..{ends[1]}"])
        assert found == [folder / f"c{number:0{width}d}.safetensors" for number in inside]


@pytest.mark.parametrize(
    ("there", "argument", "listing"),
    [(["a0", "a1", "a3"], "a0..a3", "0, 1, 3"), (["b10", "b40", "b50"], "b50..b10", "50, 40, 10")],
)
def test_what_a_range_lacks_is_told(
    there: list[str], argument: str, listing: str, tmp_path: Path, know: Command
) -> None:
    for k, name in enumerate(there):
        save_file({"w": torch.full((2, 2), float(k))}, tmp_path / f"{name}.safetensors")
    done = know("predict", argument, "-o", "out", "--method", "naive", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert f"warning: {argument}: takes the numbers that there are, {listing}" in done.stderr
    for command in (("verify", "out", argument), ("inspect", argument)):
        assert f"that there are, {listing}" in know(*command, cwd=tmp_path).stderr


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("a0..a9", ("a9 should be there but is not", "there are numbers 0, 1, 2")),
        ("no0..no4", ("no0 and no4 should be there",)),
        ("gone/a0..a2", ("gone/a0 and gone/a2 should be there",)),
        ("a0..b2", ("nor a range, whose ends differ in one number only",)),
        ("a..b", ("nor a range",)),
        ("a0-1..a2-3", ("nor a range",)),
        ("../a9", ("check the path",)),
    ],
)
def test_a_range_that_fails_is_called_one(
    argument: str, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    touch("a0.safetensors", "a1.safetensors", "a2.safetensors")
    with pytest.raises(CheckpointError, match="no such file or folder") as caught:
        expand_arguments([argument])
    assert str(caught.value).startswith(argument)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_range_of_too_many(tmp_path: Path, know: Command) -> None:
    for k in range(40):
        (tmp_path / f"c{k}").touch()
    done = know("predict", "c0..c39", "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_USAGE
    assert "got 40 checkpoints: give 2 to 16" in one_line(done.stderr)


# ------------------------------------------------------------------------- files and folders


@pytest.mark.parametrize("name", ["ckpt0", "step-000100", "epoch=3"])
def test_a_folder_of_logs_does_not_hide_the_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    touch(f"{name}.safetensors", f"{name}/events.out", f"{name}/optimizer.pt")
    assert expand_arguments([name]) == [Path(f"{name}.safetensors")]
    # One that ends with a slash is meant to be a folder, and one with a model is a checkpoint.
    assert expand_arguments([f"{name}/"]) == [Path(name)]
    touch(f"{name}/model.safetensors")
    assert expand_arguments([name]) == [Path(name)]


def test_folders_of_logs_beside_a_range(tmp_path: Path, know: Command) -> None:
    for k in range(3):
        save_file({"w": torch.full((2, 2), float(k))}, tmp_path / f"ckpt{k}.safetensors")
        (tmp_path / f"ckpt{k}").mkdir()
        (tmp_path / f"ckpt{k}" / "log.txt").write_text("loss")
    done = know("predict", "ckpt0..ckpt2", "-o", "out", "--method", "naive", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert (tmp_path / "out").is_file()


# ------------------------------------------------------------------------- numbers in names


def trajectory(folder: Path, names: list[str], sessions: list[int] | None = None) -> list[Path]:
    paths = []
    for k, name in enumerate(names):
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        session = (
            {}
            if sessions is None
            else Session(sessions[k], 0.5 ** sessions[k], 0.5, "t").to_metadata()
        )
        save_file({"w": torch.full((2,), float(k))}, path, {"format": "pt", **session})
        paths.append(path)
    return paths  # fmt: skip


@pytest.mark.parametrize(
    ("names", "listing"),
    [
        (["step1000", "step200", "step400"], "1000, 200, 400"),
        (["c1", "c3", "c2"], "1, 3, 2"),
        (["run/10/w", "run/30/w", "run/20/w"], "10, 30, 20"),
        (["e1-s100", "e2-s50", "e1-s200"], "1-100, 2-50, 1-200"),
    ],
)
def test_numbers_that_go_up_and_down_get_a_warning(
    names: list[str], listing: str, tmp_path: Path
) -> None:
    with open_trajectory(trajectory(tmp_path, names)) as opened:
        (notice,) = opened.notices
        assert f"the numbers in the checkpoints' names ({listing}) neither rise nor fall" in notice
        assert [checkpoint.path.stem for checkpoint in opened.checkpoints] == [
            Path(name).name for name in names
        ]


@pytest.mark.parametrize(
    "names",
    [
        ["c1", "c2", "c3"],
        ["c30", "c20", "c10"],
        ["c9", "c10", "c11"],
        ["e1-s100", "e1-s200", "e2-s50"],
        ["first3", "second1", "third2"],
        ["a", "b", "c"],
        ["c2", "c1"],
        ["c01", "c001", "c2"],
    ],
)
def test_other_names_get_none(names: list[str], tmp_path: Path) -> None:
    with open_trajectory(trajectory(tmp_path, names)) as opened:
        assert opened.notices == []


def test_recorded_sessions_know_better_than_names(tmp_path: Path) -> None:
    with open_trajectory(trajectory(tmp_path, ["c5", "c9", "c7"], [0, 1, 2])) as opened:
        assert opened.notices == []


# ------------------------------------------------------------------------- names of steps


@pytest.mark.parametrize(
    ("output", "step"),
    [
        ("model.v1.5", "model.v1.5.x2"),
        ("net-0.3", "net-0.3.x2"),
        ("run.2024", "run.2024.x2"),
        ("model.fp16", "model.fp16.x2"),
        ("model.v1.5.safetensors", "model.v1.5.x2.safetensors"),
        ("out.SAFETENSORS", "out.x2.SAFETENSORS"),
        ("out.pt", "out.x2.pt"),
        ("out", "out.x2"),
    ],
)
def test_names_of_steps(output: str, step: str, tmp_path: Path, know: Command) -> None:
    assert step_path(Path("d") / output, 0.5, 1, is_folder=False) == Path("d") / step
    trajectory(tmp_path, ["c0", "c1"])
    done = know(
        "predict", "c0..c1", "-o", output, "--steps", 2, "--every-step", "--method", "naive", cwd=tmp_path
    )  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        "c0.safetensors", "c1.safetensors", output, step,
    }  # fmt: skip


def test_missing_ends_end_with_the_code_of_checkpoints(tmp_path: Path, know: Command) -> None:
    trajectory(tmp_path, ["c0", "c1"])
    done = know("predict", "c0", "c1..c4", "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT
    assert "read as a range, c4 should be there" in one_line(done.stderr)
