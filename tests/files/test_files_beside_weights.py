"""What is copied beside weights is what was there when the writing began, or the run fails."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from know_cli.checkpoints import CheckpointWriter, open_checkpoint
from know_cli.errors import CheckpointError

#: More than is copied at once.
LONG = b"word " * 500_000


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    save_file({"w": torch.ones(2, 2)}, folder / "model.safetensors")
    (folder / "sub" / "vocab.txt").write_bytes(LONG)
    return folder


def remove(path: Path) -> None:
    path.unlink()


def swap(path: Path) -> None:
    path.rename(path.with_name(".old"))
    path.write_bytes(LONG)


def write(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(2_000_000)
        file.write(b"WORD")


def cut(path: Path) -> None:
    os.truncate(path, 1_500_000)


def write_model(model: Path, output: Path, before: Callable[[], object]) -> None:
    with open_checkpoint(model) as like, CheckpointWriter(output, like, {}) as writer:
        writer.write("w", 0, memoryview(bytes(16)))
        before()
        writer.commit()


@pytest.mark.parametrize("change", [remove, swap, write, cut])
def test_a_file_that_changes_during_the_run(change: Callable[[Path], None], model: Path) -> None:
    path = model / "sub" / "vocab.txt"
    with pytest.raises(CheckpointError, match="vocab.txt: (has changed|no such file|.*No such)"):
        write_model(model, model.parent / "out", lambda: change(path))
    assert [one.name for one in model.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("change", [write, cut])
def test_a_file_that_changes_while_it_is_copied(
    change: Callable[[Path], None], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the copy would be of before, and half of after."""
    pread = os.pread
    read: list[int] = []

    def changing(descriptor: int, count: int, position: int) -> bytes:
        if position and not read:
            read.append(position)
            change(model / "sub" / "vocab.txt")
        return pread(descriptor, count, position)

    monkeypatch.setattr(os, "pread", changing)
    with pytest.raises(CheckpointError, match="vocab.txt: has changed while it was read"):
        write_model(model, model.parent / "out", lambda: None)
    assert read
    assert [one.name for one in model.parent.iterdir()] == ["model"]


def test_a_file_that_comes_during_the_run_is_not_copied(model: Path) -> None:
    out, late = model.parent / "out", model / "late.txt"
    write_model(model, out, lambda: late.write_text("late"))
    assert {one.name for one in out.iterdir()} == {"model.safetensors", "sub"}
    assert (out / "sub" / "vocab.txt").read_bytes() == LONG
