"""Aligning and ordering checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from know_cli.checkpoints import open_trajectory
from know_cli.checkpoints.metadata import Continuation, Session
from know_cli.errors import CheckpointError, UsageError


def session(index: int, trajectory: str = "t", rate: float = 0.5) -> dict[str, str]:
    return Session(index, rate**index, rate, trajectory).to_metadata()


def write(folder: Path, *metadata: dict[str, str]) -> list[Path]:
    paths = []
    for k, entries in enumerate(metadata):
        paths.append(folder / f"file{k}.safetensors")
        save_file({"w": torch.full((2,), float(k))}, paths[-1], {"format": "pt", **entries})
    return paths


def order(paths: list[Path]) -> tuple[list[str], list[str]]:
    with open_trajectory(paths) as trajectory:
        return [c.path.name for c in trajectory.checkpoints], trajectory.notices


def test_session_metadata_survives_a_round_trip() -> None:
    one = Session(3, 1 / 27, 1 / 3, "run")
    assert Session.from_metadata(one.to_metadata()) == one
    assert Session.from_metadata({}) is None
    assert Session.from_metadata({**one.to_metadata(), "know.session": "x"}) is None


def test_recorded_order_is_kept_without_a_word(tmp_path: Path) -> None:
    paths = write(tmp_path, session(0), session(1), session(2))
    assert order(paths) == ([path.name for path in paths], [])
    with open_trajectory(paths) as trajectory:
        assert trajectory.rate == 0.5


def test_wrong_order_is_put_right_with_a_notice(tmp_path: Path) -> None:
    paths = write(tmp_path, session(2), session(0), session(1))
    names, notices = order(paths)
    assert names == ["file1.safetensors", "file2.safetensors", "file0.safetensors"]
    assert notices == ["checkpoints were given in session order 2, 0, 1; put right to 0, 1, 2"]


def test_predicted_sessions_come_before_the_first(tmp_path: Path) -> None:
    paths = write(tmp_path, session(0), session(-1), session(1))
    assert order(paths)[0][0] == "file1.safetensors"


def test_a_prediction_does_not_tell_the_rate_of_the_sessions(tmp_path: Path) -> None:
    """Made from every second session, it has the rate from one of those to the next."""
    predicted = session(-2) | {"know.rate": "0.25", "know.method": "linear"}
    with open_trajectory(write(tmp_path, predicted, session(0), session(2))) as trajectory:
        assert (trajectory.stride, trajectory.rate) == (2, 0.25)
    alone = [session(k) | {"know.method": "known"} for k in (-2, -1)]
    with open_trajectory(write(tmp_path, *alone)) as trajectory:
        assert trajectory.rate == 0.5


def test_gap_is_noticed(tmp_path: Path) -> None:
    paths = write(tmp_path, session(0), session(1), session(3))
    assert order(paths)[1] == ["sessions 0, 1, 3 are not equally far apart"]


def test_one_session_twice_is_refused(tmp_path: Path) -> None:
    paths = write(tmp_path, session(0), session(1), session(1))
    with pytest.raises(CheckpointError, match="file1.*file2.*same session 1"):
        open_trajectory(paths)


def test_two_trajectories_are_refused(tmp_path: Path) -> None:
    paths = write(tmp_path, session(0), session(1, "other"))
    with pytest.raises(CheckpointError, match="file1.*another trajectory"):
        open_trajectory(paths)


def test_partly_recorded_order(tmp_path: Path) -> None:
    paths = write(tmp_path, session(0), {}, session(2))
    assert order(paths)[0] == [path.name for path in paths]
    paths = write(tmp_path, session(2), {}, session(0))
    with pytest.raises(CheckpointError, match="file1.*no recorded session"):
        open_trajectory(paths)


def test_without_metadata_the_order_is_the_user_s(tmp_path: Path) -> None:
    paths = write(tmp_path, {}, {}, {})
    assert order(paths) == ([path.name for path in paths], [])
    with open_trajectory(paths) as trajectory:
        assert trajectory.rate is None


def test_rates_that_differ_are_no_rate(tmp_path: Path) -> None:
    with open_trajectory(write(tmp_path, session(0), session(1, rate=0.4))) as trajectory:
        assert trajectory.rate is None


@pytest.mark.parametrize("count", [1, 17])
def test_number_of_checkpoints(tmp_path: Path, count: int) -> None:
    paths = write(tmp_path, *({} for _ in range(count)))
    with pytest.raises(UsageError, match=f"got {count} checkpoint.*2 to 16"):
        open_trajectory(paths)


def test_same_path_twice(tmp_path: Path) -> None:
    (path,) = write(tmp_path, {})
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "hard").hardlink_to(path)
    with pytest.raises(UsageError, match="hard: given twice"):
        open_trajectory([path, tmp_path / "hard"])
    with pytest.raises(UsageError, match="given twice"):
        open_trajectory([path, tmp_path / "link"])


def test_differences_are_listed_with_their_files(tmp_path: Path) -> None:
    one, two = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"x": torch.ones(2), "y": torch.ones(2, 3), "z": torch.ones(1)}, one)
    save_file({"y": torch.ones(3, 2), "z": torch.ones(1).int(), "new": torch.ones(1)}, two)
    with pytest.raises(CheckpointError) as caught:
        open_trajectory([one, two])
    text = str(caught.value)
    assert f"'x' is missing in {two}" in text
    assert f"'y' is 2x3 but 3x2 in {two}" in text
    assert f"'z' is F32 but I32 in {two}" in text
    assert f"'new' is only in {two}" in text


def test_at_most_ten_differences_are_listed(tmp_path: Path) -> None:
    one, two = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({f"t{k:02d}": torch.ones(1) for k in range(25)}, one)
    save_file({f"t{k:02d}": torch.ones(2) for k in range(25)}, two)
    with pytest.raises(CheckpointError) as caught:
        open_trajectory([one, two])
    assert str(caught.value).count(" but ") == 10
    assert "'t09'" in str(caught.value)
    assert "and 15 more" in str(caught.value)


def test_float_dtypes_may_differ(tmp_path: Path) -> None:
    one, two = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"x": torch.ones(2)}, one)
    save_file({"x": torch.ones(2).bfloat16()}, two)
    with open_trajectory([one, two]) as trajectory:
        assert [entry.dtype for entry in trajectory.entries("x")] == ["F32", "BF16"]


def test_a_continuation_is_no_session(tmp_path: Path) -> None:
    continued = Continuation(1, 2.0, 0.5, "t").to_metadata()
    paths = write(tmp_path, session(0), continued)
    with pytest.raises(CheckpointError, match="file1.*no session of the forgetting"):
        open_trajectory(paths)


def test_files_are_closed_when_opening_fails(tmp_path: Path) -> None:
    (good,) = write(tmp_path, {})
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"short")
    with pytest.raises(CheckpointError, match="bad.safetensors"):
        open_trajectory([good, bad])
