"""An interruption in the moment in which the system makes a temporary: nothing is left of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from know_cli.files.names import own_name
from know_cli.files.temporary import Temporary


@pytest.fixture(params=[False, True], ids=["file", "folder"])
def is_folder(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def interrupted_after(monkeypatch: pytest.MonkeyPatch, *, is_folder: bool) -> None:
    """Python tells of a signal when the system has made it, and before its result is bound."""
    if is_folder:
        make = Path.mkdir

        def mkdir(self: Path, *arguments: Any, **options: Any) -> None:
            make(self, *arguments, **options)
            raise KeyboardInterrupt

        monkeypatch.setattr(Path, "mkdir", mkdir)
        return
    opening = os.open

    def open_(path: Any, flags: int, *arguments: Any) -> int:
        descriptor = opening(path, flags, *arguments)
        if flags & os.O_EXCL:
            os.close(descriptor)
            raise KeyboardInterrupt
        return descriptor

    monkeypatch.setattr(os, "open", open_)


def test_what_was_just_made_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_folder: bool
) -> None:
    interrupted_after(monkeypatch, is_folder=is_folder)
    with pytest.raises(KeyboardInterrupt):
        Temporary(tmp_path / "out", is_folder=is_folder)
    assert not list(tmp_path.iterdir())


def test_what_another_run_has_taken_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_folder: bool
) -> None:
    """Interrupted before anything is made, while another run has made it."""
    place = tmp_path / own_name("out", ".tmp")
    others = []

    def takes(*arguments: Any, **options: Any) -> None:
        monkeypatch.undo()
        others.append(Temporary(tmp_path / "out", is_folder=is_folder))
        raise KeyboardInterrupt

    if is_folder:
        monkeypatch.setattr(Path, "mkdir", takes)
    else:
        monkeypatch.setattr(os, "open", takes)
    with pytest.raises(KeyboardInterrupt):
        Temporary(tmp_path / "out", is_folder=is_folder)
    assert place.exists()
    others[0].discard()
    assert not list(tmp_path.iterdir())


def test_what_another_run_has_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, it has no lock any more; the next run decides about what it left."""
    place = tmp_path / own_name("out", ".tmp")

    def writes(*arguments: Any, **options: Any) -> None:
        monkeypatch.undo()
        place.write_bytes(b"begun")
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "open", writes)
    with pytest.raises(KeyboardInterrupt):
        Temporary(tmp_path / "out", is_folder=False)
    assert place.read_bytes() == b"begun"
