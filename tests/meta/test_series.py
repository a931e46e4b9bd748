"""Compact files of trajectories: the same windows as from the folders they are taken from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from know_cli.errors import CheckpointError
from know_cli.kinds import PREDICTED_KINDS, Kind
from know_cli.meta.series import (
    NotUsableError,
    is_series,
    load_series,
    read_trajectory,
    save_series,
)
from know_cli.meta.settings import Target
from know_cli.meta.windows import collect_windows, find_trajectories
from tests.support.recorded import counting, record


def collected(folder: Path, rows_per_tensor: int = 1000) -> Path:
    path = folder.with_suffix(".safetensors")
    save_series(read_trajectory(folder, rows_per_tensor=rows_per_tensor, seed=0), path)
    return path


def test_a_series_survives_a_round_trip(tmp_path: Path) -> None:
    record(tmp_path / "a", counting, seed=1, before=2)
    series = read_trajectory(tmp_path / "a", rows_per_tensor=1000, seed=0)
    save_series(series, tmp_path / "a.safetensors")
    loaded = load_series(tmp_path / "a.safetensors")
    assert loaded.indices == series.indices == (0, 1, 2, 3, 4, 5, 6, -1, -2)
    assert loaded.names == series.names == (
        "conv.weight", "head.bias", "head.weight", "norm.bias", "norm.weight",
    )  # fmt: skip
    assert loaded.facts == series.facts
    assert loaded.identity == loaded.facts["trajectory"]
    for kind in PREDICTED_KINDS:
        assert np.array_equal(loaded.values[kind], series.values[kind])
        assert np.array_equal(loaded.tensors[kind], series.tensors[kind])
    assert loaded.values[Kind.CONV][1].tolist() == [101, 111, 121, 131, 141, 151, 161, 91, 81]
    assert loaded.tensors[Kind.BIAS].tolist() == [1, 1, 3, 4]


@pytest.mark.parametrize("target", list(Target))
@pytest.mark.parametrize("checkpoints", [2, 3, 5])
def test_windows_are_those_of_the_folder(tmp_path: Path, target: Target, checkpoints: int) -> None:
    record(tmp_path / "a", counting, seed=1, before=2)
    wishes = {"target": target, "checkpoints": checkpoints}
    folder = collect_windows([tmp_path / "a"], **wishes)
    file = collect_windows([collected(tmp_path / "a")], **wishes)
    for kind in PREDICTED_KINDS:
        one, other = folder.windows[kind], file.windows[kind]
        assert one.windows.dtype == other.windows.dtype == np.float32
        key = np.lexsort(one.windows.T), np.lexsort(other.windows.T)
        assert np.array_equal(one.windows[key[0]], other.windows[key[1]])
        assert np.array_equal(one.targets[key[0]], other.targets[key[1]])
    assert file.trajectories[0].identity == folder.trajectories[0].identity
    assert file.trajectories[0].rate == 0.5


@given(st.integers(1, 400), st.integers(0, 50))
@settings(max_examples=15)
def test_the_same_rows_are_drawn_in_every_checkpoint(rows: int, seed: int) -> None:
    import tempfile

    def large(index: int) -> dict[str, torch.Tensor]:
        return {"weight": torch.arange(300.0).view(10, 30) + 0.25 * index}

    with tempfile.TemporaryDirectory() as folder:
        record(Path(folder) / "a", large, seed=1)
        series = read_trajectory(Path(folder) / "a", rows_per_tensor=rows, seed=seed)
    values = series.values[Kind.FC]
    assert values.shape == (min(rows, 300), 7)
    assert (np.diff(values, axis=1) == 0.25).all()
    assert len(np.unique(values[:, 0])) == len(values)


@given(st.integers(1, 60), st.integers(0, 50))
@settings(max_examples=15)
def test_of_a_file_s_tensors_at_most_so_many_rows_are_taken(rows: int, seed: int) -> None:
    """A file has more than is asked for; each tensor and position gets its own draw."""
    import tempfile

    def two(index: int) -> dict[str, torch.Tensor]:
        values = torch.arange(40.0).view(4, 10)
        return {"a.weight": values + index / 64, "b.weight": 100 + values + index / 64}

    with tempfile.TemporaryDirectory() as folder:
        record(Path(folder) / "a", two, seed=1)
        file = collected(Path(folder) / "a")
        found, again, other = (
            collect_windows([file], target=Target.RETRODICTION, rows_per_tensor=rows, seed=of)
            for of in (seed, seed, seed + 1)
        )
    newest = found.windows[Kind.FC].windows[:, -1]
    for low, high in ((0, 50), (100, 150)):
        taken = newest[(newest >= low) & (newest < high)]
        assert len(np.unique(taken)) == len(taken) == 2 * min(rows, 40)  # of two positions
    assert np.array_equal(newest, again.windows[Kind.FC].windows[:, -1])
    if 5 <= rows <= 35:  # of fewer or more, two draws may be the same
        assert not np.array_equal(newest, other.windows[Kind.FC].windows[:, -1])


def test_tensors_that_rest_within_a_window_are_left_out_of_it(tmp_path: Path) -> None:
    def early(index: int) -> dict[str, torch.Tensor]:
        """One tensor moves only up to session 1."""
        return {
            "moves.weight": torch.full((2, 2), float(index)),
            "rests.weight": torch.full((2, 2), 9.0 + (index == 0)),
        }

    record(tmp_path / "a", early, seed=1)
    found = collect_windows([collected(tmp_path / "a")], target=Target.RETRODICTION)
    assert len(found.windows[Kind.FC]) == 8
    assert found.windows[Kind.FC].windows.max() <= 6


def test_files_and_folders_are_found_together(tmp_path: Path) -> None:
    record(tmp_path / "a", counting, seed=1)
    record(tmp_path / "b", counting, seed=2)
    file = collected(tmp_path / "a")
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_text("x")
    assert find_trajectories([tmp_path]) == [tmp_path / "a", tmp_path / "b", file]
    assert find_trajectories([file]) == [file]
    assert is_series(file)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    record(tmp_path / "a", counting, seed=1)
    file = collected(tmp_path / "a")
    tensors = load_file(file)
    save_file(tensors, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="plain.safetensors: is not a collected trajectory"):
        load_series(tmp_path / "plain.safetensors")
    (tmp_path / "a" / "ckpt3.safetensors").unlink()
    with pytest.raises(NotUsableError, match="ckpt3.safetensors is not recorded yet"):
        read_trajectory(tmp_path / "a", rows_per_tensor=10, seed=0)

    def diverged(index: int) -> dict[str, torch.Tensor]:
        return {"weight": torch.full((2, 2), float("nan"))}

    record(tmp_path / "b", diverged, seed=2)
    with pytest.raises(NotUsableError, match="'weight' is not finite"):
        read_trajectory(tmp_path / "b", rows_per_tensor=10, seed=0)


def test_a_table_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    from safetensors import safe_open

    record(tmp_path / "a", counting, seed=1)
    file = collected(tmp_path / "a")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors["fc.tensor"] = tensors["fc.tensor"][:-1].clone()
    save_file(tensors, tmp_path / "cut.safetensors", metadata)
    with pytest.raises(CheckpointError, match="its tables do not match"):
        load_series(tmp_path / "cut.safetensors")
