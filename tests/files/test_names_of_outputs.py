"""Names of outputs that cannot be: told before the work, and never as a bug."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from know_cli.errors import EXIT_DONE, EXIT_OUTPUT, EXIT_USAGE
from know_cli.files import temporary
from tests.support.command import Command, one_line

STEPS = ("--every-step", "--steps", "2")
METHODS = ("--method", "shrink")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for k in range(2):
        save_file({"w": torch.full((2, 2), 1.0 - 0.1 * k)}, tmp_path / f"c{k}.safetensors")
    return tmp_path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"c0.safetensors", "c1.safetensors"}


@pytest.mark.parametrize("more", [(), STEPS, METHODS, ("--checksum", "--resume")])
@pytest.mark.parametrize("force", [(), ("--force",)])
def test_the_root(
    more: tuple[str, ...], force: tuple[str, ...], folder: Path, know: Command
) -> None:
    done = know("predict", "c0", "c1", "-o", "/", "--method", "linear", *more, *force, cwd=folder)
    assert done.returncode == EXIT_OUTPUT
    assert one_line(done.stderr).startswith("know: error: /")


@pytest.mark.parametrize("more", [(), STEPS, ("--force",)])
def test_a_name_that_leaves_no_room_for_the_digest(
    more: tuple[str, ...], folder: Path, know: Command
) -> None:
    """Before the work: the output would be there, and the run have failed."""
    command = ("predict", "c0", "c1", "--method", "linear", "--checksum", *more)
    done = know(*command, "-o", "o" * 250, cwd=folder)
    assert done.returncode == EXIT_OUTPUT
    assert "--checksum cannot write it: File name too long" in one_line(done.stderr)
    assert not names(folder)
    assert know(*command, "-o", "o" * 245, cwd=folder).returncode == EXIT_DONE


@pytest.mark.parametrize("more", [STEPS, METHODS])
@pytest.mark.parametrize("locks", [True, False])
def test_two_names_of_one_output(
    more: tuple[str, ...],
    locks: bool,
    folder: Path,
    know: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both would be written to one place, and only the last would be there."""
    if not locks:
        monkeypatch.setattr(temporary, "lock", lambda descriptor, operation: False)
    for name in ("out", "out.x2", "out.linear", "out.shrink"):
        (folder / name).symlink_to("real")
    before = names(folder)
    done = know(
        "predict", "c0", "c1", "-o", "out", "--method", "linear", *more, "--force", cwd=folder
    )
    assert done.returncode == EXIT_USAGE
    assert "would be written by 2 of the methods or steps" in one_line(done.stderr)
    assert names(folder) == before


def test_a_record_with_a_negative_identity(folder: Path, know: Command) -> None:
    record = {
        "format": 1,
        "trajectory": "-1f",
        "sessions": 2,
        "continuations": 0,
        "rate": 0.5,
        "recorded": {},
    }
    (folder / "all").mkdir()
    (folder / "all" / "trajectory.json").write_text(json.dumps(record))
    for k in range(2):
        (folder / f"c{k}.safetensors").rename(folder / "all" / f"ckpt{k}.safetensors")
    done = know("train", "all", "-o", "bundle", "--epochs", "1", "--checkpoints", "2", cwd=folder)
    assert done.returncode == EXIT_USAGE
    assert "identity" in one_line(done.stderr)
