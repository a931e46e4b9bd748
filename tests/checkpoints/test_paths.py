"""Checkpoint arguments, step names."""

from __future__ import annotations

from pathlib import Path

import pytest

from know_cli.checkpoints.paths import expand_arguments, factor_name, search_path, step_path
from know_cli.errors import CheckpointError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


RANGES = {
    "ckpt0..ckpt4.safetensors": [f"ckpt{k}.safetensors" for k in range(5)],
    "ckpt0..ckpt4": [f"ckpt{k}.safetensors" for k in range(5)],
    "ckpt0..4": [f"ckpt{k}.safetensors" for k in range(5)],
    "ckpt0..4.safetensors": [f"ckpt{k}.safetensors" for k in range(5)],
    "ckpt4..ckpt0": [f"ckpt{k}.safetensors" for k in range(4, -1, -1)],
    "run1/s08..s11": [f"run1/s{k:02d}.safetensors" for k in range(8, 12)],
    "run1/s08..run1/s11": [f"run1/s{k:02d}.safetensors" for k in range(8, 12)],
}


@pytest.mark.parametrize("argument", RANGES)
def test_ranges(argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, *RANGES[argument])
    assert expand_arguments([argument]) == [Path(name) for name in RANGES[argument]]


def test_range_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for k in range(3):
        (tmp_path / f"session{k}").mkdir()
    assert expand_arguments(["session0..session2"]) == [Path(f"session{k}") for k in range(3)]


def test_absolute_range(tmp_path: Path) -> None:
    touch(tmp_path, "a0.safetensors", "a1.safetensors")
    assert expand_arguments([f"{tmp_path}/a0..a1"]) == [
        tmp_path / "a0.safetensors", tmp_path / "a1.safetensors",
    ]  # fmt: skip


def test_an_existing_file_is_never_a_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "ckpt0..ckpt4.safetensors", "ckpt0.safetensors")
    assert expand_arguments(["ckpt0..ckpt4"]) == [Path("ckpt0..ckpt4.safetensors")]


def test_missing_suffix_is_added_only_where_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "a.safetensors", "b")
    assert expand_arguments(["a", "b"]) == [Path("a.safetensors"), Path("b")]


@pytest.mark.parametrize(
    "arguments", [["no"], ["no0..no4"], ["a0..b4"], ["a0..a9999"], ["x", "a0..a2"]]
)
def test_what_is_not_there(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "x", "a0.safetensors", "a1.safetensors")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        expand_arguments(arguments)


@pytest.mark.parametrize(
    ("rate", "steps", "name"),
    [(0.5, 1, "x2"), (0.5, 3, "x8"), (0.5, 8, "x256"), (1 / 3, 2, "x9"), (1 / 3, 3, "x27"),
     (0.33, 1, "x3.03"), (0.7, 2, "x2.04"), (0.1, 4, "x10000"), (0.1, 3, "x1000"),
     (0.01, 8, "x10000000000000000"), (0.999, 1, "x1.001")],
)  # fmt: skip
def test_factor_names(rate: float, steps: int, name: str) -> None:
    assert factor_name(rate, steps) == name


def test_a_name_too_long_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="name too long"):
        expand_arguments(["x" * 300])


def test_search_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert search_path(Path("d/out.safetensors")) == Path("d/out.safetensors.search")
    monkeypatch.chdir(tmp_path)
    beside = tmp_path.with_name(f"{tmp_path.name}.search")
    assert search_path(Path()) == search_path(Path("below/..")) == beside


def test_step_paths() -> None:
    assert step_path(Path("d/out.safetensors"), 0.5, 2, False) == Path("d/out.x4.safetensors")
    assert step_path(Path("d/out"), 0.5, 1, False) == Path("d/out.x2")
    assert step_path(Path("d/out.v1"), 1 / 3, 1, True) == Path("d/out.v1.x3")
