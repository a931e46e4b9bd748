"""Where names can be given and not taken away, as in a folder of ``chattr +a``, outputs are whole."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from know_cli.checkpoints import CheckpointWriter, open_checkpoint
from know_cli.errors import EXIT_DONE, OutputError
from know_cli.files import temporary
from tests.support.command import Command

WORDS = ("predict", "c0", "c1", "--method", "linear", "--quiet", "-o", "out.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for k in range(2):
        save_file({"w": torch.full((2, 2), 1.0 - 0.1 * k)}, tmp_path / f"c{k}.safetensors")
    return tmp_path


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".know-")]


def test_an_output_is_complete_and_the_next_run_tidies_up(
    folder: Path, know: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    more = ("--resume", "--checksum", "--json", "report.json")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        done = know(*WORDS, *more, cwd=folder)
    assert done.returncode == EXIT_DONE, done.stderr
    assert load_file(folder / "out.safetensors")
    assert {"out.safetensors.sha256", "report.json"} <= {path.name for path in folder.iterdir()}
    assert len(hidden(folder)) >= 2  # a temporary and a journal, and what small files were
    before = set(hidden(folder))
    assert know(*WORDS, *more, "--force", cwd=folder).returncode == EXIT_DONE
    assert not {name for name in before & set(hidden(folder)) if name.endswith(".journal")}
    assert know("verify", "out.safetensors", "c0", "c1", cwd=folder).returncode == EXIT_DONE


def test_the_first_error_is_told_and_the_lock_let_go(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, found: os.stat_result) -> bool:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with open_checkpoint(folder / "c0.safetensors") as like:
        writer = CheckpointWriter(folder / "out", like, {})
        with pytest.raises(OutputError, match="the first"), writer:
            monkeypatch.setattr(temporary, "is_same", fail)
            raise OutputError("the first")
        monkeypatch.undo()
        with CheckpointWriter(folder / "out", like, {}) as again:  # it is not locked any more
            again.write("w", 0, memoryview(bytes(16)))
            again.commit()
    assert (load_file(folder / "out")["w"] == 0).all()
    assert not hidden(folder)
