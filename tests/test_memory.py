"""Peak resident memory of a run, mapped pages counted, measured from outside."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from know_cli.checkpoints import open_checkpoint, open_trajectory
from know_cli.engine.settings import Settings
from know_cli.errors import EXIT_DONE
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request
from tests.support.forkserver import ForkServer
from tests.support.trajectories import write_trajectory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak as Linux tells it")
MIB = 1 << 20
_ROW_BYTES = 4096


def write_sparse(path: Path, rows: Sequence[int], value: float) -> None:
    """A checkpoint with float32 tensors of ``[rows, 1024]`` zeros, but for the first of all."""
    header, position = {}, 0
    for number, count in enumerate(rows):
        end = position + count * _ROW_BYTES
        offsets = [position, end]
        header[f"w{number}"] = {"dtype": "F32", "shape": [count, 1024], "data_offsets": offsets}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + struct.pack("<f", value))
        file.truncate(8 + len(text) + position)


def predicted_peak(server: ForkServer, folder: Path, rows: Sequence[int], memory: int) -> int:
    """Peak resident bytes of a prediction from five checkpoints of ``rows``, at ``folder/out…``."""
    paths = [folder / f"ckpt{k}.safetensors" for k in range(5)]
    for k, path in enumerate(paths):
        write_sparse(path, rows, 0.1 + 0.01 * k)
    child = server.start(
        "predict", *paths, "-o", folder / "out.safetensors", "--force",
        "--max-memory", memory, "--threads", 2, "--quiet",
        # Only the first tensor moves at all.
        "--frozen", "predict", cwd=folder.parent,
    )  # fmt: skip
    code, used = server.wait_for_peak(child)
    assert code == EXIT_DONE, (folder.parent / "stderr.txt").read_text()
    return used


def made(folder: Path) -> Path:
    inside = folder / "inside"
    inside.mkdir()
    return inside


def within_bounds(server: ForkServer, folder: Path, rows: Sequence[int], memory: int) -> None:
    try:
        # What the program takes whatever it reads: Torch, its own modules, its libraries' tables.
        alone = predicted_peak(server, folder, [1], memory)
        used = predicted_peak(server, folder, rows, memory)
        with (folder / "out.safetensors").open("rb") as file:
            file.seek(-sum(rows) * _ROW_BYTES, os.SEEK_END)
            (first,) = struct.unpack("<f", file.read(4))
        assert 0.05 < first < 0.15
        assert first != np.float32(0.1)
    finally:
        for path in folder.iterdir():
            path.unlink()
    print(f"{alone / MIB:.0f} MiB for one row, {used / MIB:.0f} MiB at most, bound {memory}")
    assert used < (alone + memory) * 1.05, (alone / MIB, used / MIB)


def test_a_tensor_larger_than_the_memory_stays_within_it(
    server: ForkServer, tmp_path: Path
) -> None:
    within_bounds(server, made(tmp_path), [3 << 10], 8 * MIB)


@pytest.mark.slow
def test_checkpoints_of_gigabytes_stay_within_the_memory(
    server: ForkServer, tmp_path: Path
) -> None:
    """Five of 10 GiB, of which one tensor has 4 GiB."""
    within_bounds(server, made(tmp_path), [1 << 20, 512 << 10, 512 << 10, 512 << 10], 512 * MIB)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no such advice here")
@pytest.mark.parametrize("memory", [4 * MIB, 1 << 30])
def test_what_was_read_is_dropped_from_the_page_cache_if_it_is_more_than_the_memory(
    tmp_path: Path, bundle_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    paths = [tmp_path / f"ckpt{k}.safetensors" for k in range(5)]
    for k, path in enumerate(paths):
        write_sparse(path, [300], 0.1 + 0.01 * k)
    dropped: list[tuple[int, int, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda file, start, size, advice: dropped.append((start, size, advice))
    )
    request = Request(
        paths, tmp_path / "out", str(bundle_path), Settings(max_memory=memory), device="cpu"
    )
    with open_prediction(request) as opened:
        opened.execute()
    if memory > 4 * MIB:
        assert not dropped
        return
    assert all(advice == os.POSIX_FADV_DONTNEED for _, _, advice in dropped)
    with open_trajectory(paths) as trajectory:
        begin = trajectory.first.tensors["w0"].info.begin
    assert sum(size for _, size, _ in dropped) == 5 * 300 * 4096
    assert {start for start, _, _ in dropped} >= {begin}


def test_a_file_system_that_takes_no_advice_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "posix_fadvise", refuse, raising=False)
    (path, *_) = write_trajectory(tmp_path)
    with open_checkpoint(path) as checkpoint:
        entry = checkpoint.tensors["fc.weight"]
        checkpoint.drop_cached(entry, 0, 100)
        buffer = bytearray(4)
        checkpoint.read_into(entry, 0, memoryview(buffer))
    assert struct.unpack("<f", buffer)[0] == load_file(path)["fc.weight"][0, 0]
