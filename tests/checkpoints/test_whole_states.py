"""A whole state is what the safetensors library reads, from files of any name, and never mapped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from know_cli.checkpoints import reading
from know_cli.checkpoints.checkpoint import Checkpoint, TensorEntry
from know_cli.checkpoints.dtypes import TORCH_NAMES
from know_cli.checkpoints.state import read_state
from know_cli.errors import EXIT_DONE, CheckpointError
from tests.support.command import Command
from tests.support.hostile import entry, safetensors_file


def state() -> dict[str, torch.Tensor]:
    """A tensor of every dtype, a scalar and an empty one."""

    def bytes_of() -> torch.Tensor:
        return torch.arange(48, dtype=torch.uint8)

    found = {
        name: (bytes_of() % 2 if name == "BOOL" else bytes_of())
        .view(getattr(torch, of))
        .reshape(2, -1)
        for name, of in TORCH_NAMES.items()
        if name != "F4"
    }
    return {**found, "scalar": torch.tensor(3.5), "empty": torch.empty(0, 4)}


def test_it_is_what_the_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(state(), path)
    found, wanted = read_state(path), load_file(path)
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert reading.as_bytes(found[name]) == reading.as_bytes(tensor)


def test_a_name_that_is_no_text(tmp_path: Path, know: Command) -> None:
    """The library cannot open such files."""
    (tmp_path / "f.py").write_text(
        "import torch\ndef f(session):\n    return {'w': torch.ones(2) * session.index}\n"
    )
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").rename(tmp_path / "a\udcff.safetensors")
    words = ("forget", "f.py:f", "runs\udcfe", "--size", "8", "--sessions", "2")
    for more in ((), ("--start", "a\udcff.safetensors")):
        done = know(*words[:2], f"runs\udcfe{len(more)}", *words[3:], *more, cwd=tmp_path)
        assert done.returncode == EXIT_DONE, done.stderr


def test_a_dtype_that_torch_has_not(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_file({"a": entry("F6_E2M3", [4], [0, 3])}, bytes(3)))
    with pytest.raises(CheckpointError, match="'a': is F6_E2M3, for which PyTorch"):
        read_state(path)


def test_a_file_that_is_cut_off_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it was mapped, the system would end the process."""
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(4000), "b": torch.ones(4000)}, path)
    read = reading.read_tensor

    def cutting(checkpoint: Checkpoint, one: TensorEntry) -> torch.Tensor:
        found = read(checkpoint, one)
        os.truncate(path, 1000)
        return found

    monkeypatch.setattr(reading, "read_tensor", cutting)
    with pytest.raises(CheckpointError, match="has become shorter"):
        read_state(path)
