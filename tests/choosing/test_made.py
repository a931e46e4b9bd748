"""The record of what a search has made in its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from know_cli.choosing.made import RECORD, Made, check_places
from know_cli.errors import OutputError, UsageError


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path, "inputs")


def test_what_was_made_of_other_inputs_is_own_and_not_taken(made: Made) -> None:
    path = made.folder / "a"
    with made.writing(path):
        assert not made.has(path)
        path.write_text("of the inputs")
    assert made.has(path)
    other = Made(made.folder, "others")
    assert not other.has(path)
    other.check([path])
    other.remove([path])
    assert not path.exists()
    assert made.paths() == []


def test_an_interrupted_writing_notes_what_it_had_written(made: Made) -> None:
    old, new, never = (made.folder / name for name in ("old", "new", "never"))
    with made.writing(old):
        old.write_text("of the inputs")
    other = Made(made.folder, "others")
    with pytest.raises(KeyboardInterrupt), other.writing(old, new, never):
        new.write_text("of the others")
        raise KeyboardInterrupt
    assert (made.has(old), other.has(old)) == (True, False)
    assert (made.has(new), other.has(new)) == (False, True)
    never.write_text("of nobody")
    with pytest.raises(
        OutputError, match="never: is where this search writes, but made.json does not"
    ):
        made.check([old, new, never])
    with pytest.raises(OutputError, match="never: is in the way"), made.writing(new, never):
        raise AssertionError("not begun")


def test_what_a_killed_run_was_making_is_made_again(made: Made) -> None:
    path = made.folder / "a"
    with made.writing(path):
        record = (made.folder / RECORD).read_bytes()
        path.write_text("whole, or not there")
    (made.folder / RECORD).write_bytes(record)
    made.check([path])
    assert not made.has(path)
    made.remove([path])  # of what is not noted as whole nothing is removed
    assert path.exists()
    with made.writing(path):
        pass
    assert made.has(path)


def test_a_link_in_a_candidates_place_is_not_written_through(made: Made) -> None:
    path, mine = made.folder / "a", made.folder / "mine"
    mine.write_text("precious")
    with made.writing(path):
        path.write_text("made")
    path.unlink()
    path.symlink_to(mine)
    with pytest.raises(OutputError, match="does not say that one made it"):
        made.check([path])
    with pytest.raises(OutputError, match="in the way"), made.writing(path):
        raise AssertionError("not begun")
    made.remove([path])
    assert path.is_symlink()


@pytest.mark.parametrize(
    "content",
    [
        "notes",
        "[]",
        '{"format": 2, "made": {}}',
        '{"format": 1, "made": {"a": {"files": null}}}',
        '{"format": 1, "made": {"a": {"inputs": "b", "files": {".": 1}}}}',
        '{"format": 1, "made": {"../a": {"inputs": "b", "files": null}}}',
        '{"format": 1, "made": {"/a": {"inputs": "b", "files": null}}}',
        '{"format": 1, "made": {"a": {"inputs": "b", "files": {"../c": [1, 2]}}}}',
    ],
)
def test_what_is_no_record_or_leads_out_of_the_folder_is_refused(content: str, made: Made) -> None:
    (made.folder / RECORD).write_text(content)
    with pytest.raises(OutputError, match="is not the record of what a search has made"):
        made.check([])
    assert (made.folder / RECORD).read_text() == content


def test_a_record_has_no_paths_of_its_folder(made: Made) -> None:
    path = made.folder / "candidates" / "a"
    path.parent.mkdir()
    with made.writing(path):
        path.write_text("made")
    assert list(json.loads((made.folder / RECORD).read_text())["made"]) == ["candidates/a"]
    moved = made.folder.rename(made.folder.with_name("moved"))
    assert Made(moved, "inputs").has(moved / "candidates" / "a")


@pytest.mark.parametrize(
    "output", ["search/out", "search/candidates/out", "link/out", "search/away", "into", "search"]
)
def test_no_output_in_the_searchs_folder(output: str, tmp_path: Path) -> None:
    (tmp_path / "search").mkdir()
    (tmp_path / "link").symlink_to("search")
    (tmp_path / "search" / "away").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "into").symlink_to("search/out")
    with pytest.raises(UsageError, match="lies in the search's own folder"):
        check_places(tmp_path / output, tmp_path / "search")
    check_places(tmp_path / "search.out", tmp_path / "search")
    with pytest.raises(UsageError, match="lies in the output"):
        check_places(tmp_path, tmp_path / "search")
