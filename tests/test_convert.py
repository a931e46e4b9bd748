"""``know convert``: pickles become safetensors files, and their code is never run."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from know_cli.checkpoints import foreign as module
from know_cli.checkpoints.foreign import convert_pickle
from know_cli.errors import (
    EXIT_CHECKPOINT,
    EXIT_DONE,
    EXIT_OUTPUT,
    EXIT_USAGE,
    CheckpointError,
    OutputError,
)
from tests.conftest import Command, network, one_line
from tests.figures import record


class Malice:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


def test_a_state_dict_becomes_what_save_file_writes(tmp_path: Path, know: Command) -> None:
    torch.save(network(), tmp_path / "in.pt")
    done = know("convert", "in.pt", "-o", "out.safetensors", cwd=tmp_path, process=True)
    assert done.returncode == EXIT_DONE, done.stderr
    assert f"wrote out.safetensors: {len(network())} tensors" in done.stdout
    save_file(network(), tmp_path / "expected.safetensors", {"format": "pt"})
    assert (tmp_path / "out.safetensors").read_bytes() == (
        tmp_path / "expected.safetensors"
    ).read_bytes()
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("key", ["", *module.NESTED])
@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "ckpt"])
def test_nested_state_dicts_are_found(key: str, suffix: str, tmp_path: Path) -> None:
    state = OrderedDict(w=torch.ones(2))
    content = {"epoch": 3, "optimizer": {"lr": 0.1}, key: state} if key else state
    torch.save(content, tmp_path / f"in.{suffix}")
    result = convert_pickle(tmp_path / f"in.{suffix}", tmp_path / "out")
    assert result.nested == key
    assert load_file(tmp_path / "out")["w"].tolist() == [1, 1]


def test_a_module_s_own_state(tmp_path: Path) -> None:
    """Parameters, what a module keeps beside tensors, and a training state around it."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    state = {**model.state_dict(), "step": 3, "names": ["a"]}
    torch.save({"model": state, "lr": 0.1}, tmp_path / "in.pt")
    result = convert_pickle(tmp_path / "in.pt", tmp_path / "out")
    assert result.left_out == ["step", "names"]
    assert "left out, since they are no tensors: 'step', 'names'" in result.notices[-1]
    model.load_state_dict(load_file(tmp_path / "out"))


def test_tensors_that_share_memory_are_each_written(tmp_path: Path, know: Command) -> None:
    tied = torch.arange(6.0).reshape(2, 3)
    torch.save({"embed": tied, "head": tied, "part": tied[1:], "t": tied.T, "own": torch.ones(1)},
               tmp_path / "in.pt")  # fmt: skip
    done = know("convert", "in.pt", "-o", "out", cwd=tmp_path)
    assert "'embed', 'head', 'part', 't' share memory; each is written in full" in done.stderr
    found = load_file(tmp_path / "out")
    assert found.keys() == {"embed", "head", "part", "t", "own"}
    assert torch.equal(found["t"], tied.T)
    assert torch.equal(found["part"], tied[1:])
    assert know("convert", "in.pt", "-o", "again", "-q", cwd=tmp_path).stderr == ""


def test_code_is_not_run(tmp_path: Path, know: Command) -> None:
    marker = tmp_path / "was-run"
    command = f"touch {marker}"
    for number, content in enumerate(
        (Malice(command), {"w": torch.ones(1), "x": Malice(command)}, {"model": Malice(command)})
    ):
        torch.save(content, tmp_path / f"evil{number}.pt")
        done = know("convert", f"evil{number}.pt", "-o", "out", cwd=tmp_path)
        assert done.returncode == EXIT_CHECKPOINT
        message = one_line(done.stderr)
        assert "holds more than tensors: loading it would run 'posix.system'" in message
        assert "refused" in message
    assert not marker.exists()
    assert not (tmp_path / "out").exists()
    with zipfile.ZipFile(tmp_path / "evil0.pt") as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        pickle.loads(archive.read(name))  # the attack works, on who lets it
    assert marker.exists()


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "in.pt")
    with pytest.raises(CheckpointError, match=r"run 'torch.nn.modules.linear.Linear'"):
        convert_pickle(tmp_path / "in.pt", tmp_path / "out")


def legacy() -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(1)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def zipped(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


WRONG: dict[str, tuple[bytes, str]] = {
    "old form": (legacy(), "before version 1.6"),
    "empty": (b"", "is empty"),
    "text": (b"hello", "not a file of torch.save"),
    "another zip": (zipped(readme=b"hello"), "is damaged, or no checkpoint"),
    "no pickle in it": (zipped(data=b"hello", version=b"3"), "is damaged, or no checkpoint"),
    "cut short": (saved({"w": torch.ones(1000)})[:2000], "is damaged, or no checkpoint"),
    "a tensor": (saved(torch.ones(2)), "holds a Tensor, not a state dict"),
    "a list": (saved([torch.ones(2)]), "holds a list, not a state dict"),
    "no tensors": (saved({"epoch": 3, "model": {"lr": 0.1}}), "has no tensors, nor a state dict under"),
    "names that are numbers": (saved({0: torch.ones(1)}), "has 0 where a tensor's name should be"),
    "half a character": (saved({"a": torch.ones(1), 0.5: 1}), "has 0.5 where a tensor's name"),
    "sparse": (saved({"w": torch.eye(2).to_sparse()}), "'w': is sparse"),
    "complex128": (saved({"w": torch.ones(1, dtype=torch.complex128)}), "no dtype torch.complex128"),
    "blown up": (saved({"w": torch.ones(1).expand(2**40)}), "larger than the data it is made of"),
    "without data": (saved({"w": torch.ones(3, device="meta")}), "'w': is sparse, quantised or without"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_converted(case: str, tmp_path: Path, know: Command) -> None:
    content, message = WRONG[case]
    (tmp_path / "in.pt").write_bytes(content)
    done = know("convert", "in.pt", "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT, done.stderr
    assert message in one_line(done.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n",
            "is a Git-LFS pointer",
        ),
        (b"<!doctype html><html></html>", "is a web page"),
        (b"", "is empty"),
        (bytes(600), "begins with zeros only"),
        (b"\x10\0\0\0\0\0\0\0{}              ", "looks like a safetensors file"),
        (b"GGUF0000", "is a GGUF file"),
        (b"anything", "is not a file of torch.save"),
    ],
)
def test_what_is_no_pickle_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        convert_pickle(tmp_path / "model.bin", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damage_anywhere_is_no_bug(tmp_path: Path) -> None:
    """Each byte of a small file spoilt: it converts, or is refused in one line."""
    content = saved({"w": torch.ones(2), "model": {"x": torch.ones(1)}})
    path = tmp_path / "in.pt"
    refused = 0
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
        message = ""
        try:
            read_pickle(path)
        except CheckpointError as error:
            message = str(error)
            refused += 1
        assert "\n" not in message
        assert not message or str(path) in message
    assert refused > 20
    record("pickles", spoilt=len(range(0, len(content), 3)), refused=refused)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("in.pt", EXIT_USAGE, "Missing option '-o'"),
        ("nothing.pt -o out", EXIT_CHECKPOINT, "nothing.pt: no such file"),
        ("in.pt -o no/out", EXIT_OUTPUT, "mkdir -p no"),
        ("in.pt -o in.pt --force", EXIT_OUTPUT, "is the input"),
        ("in.pt -o there", EXIT_OUTPUT, "exists already; --force replaces it"),
        ("in.pt -o folder --force", EXIT_OUTPUT, "is a folder"),
        (f"in.pt -o {'o' * 300}", EXIT_OUTPUT, "name too long"),
        (". -o out", EXIT_CHECKPOINT, "no such file"),
    ],
)
def test_errors_of_the_command(
    arguments: str, code: int, message: str, tmp_path: Path, know: Command
) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "in.pt")
    (tmp_path / "there").write_text("precious")
    (tmp_path / "folder").mkdir()
    done = know("convert", *arguments.split(), cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in one_line(done.stderr)
    assert (tmp_path / "there").read_text() == "precious"


def test_names_that_share_memory_may_need_more_room_than_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = torch.ones(1000)
    torch.save({f"w{n}": one for n in range(100)}, tmp_path / "in.pt")
    assert (tmp_path / "in.pt").stat().st_size < 50_000
    usage = type("Usage", (), {"free": 50_000})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="needs 400000 bytes, and 50000 are free"):
        convert_pickle(tmp_path / "in.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_predict_names_the_command(tmp_path: Path, know: Command) -> None:
    for k in range(2):
        torch.save({"w": torch.ones(1)}, tmp_path / f"ckpt{k}.pt")
    done = know("predict", "ckpt0.pt", "ckpt1.pt", "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT
    assert "is a PyTorch pickle" in one_line(done.stderr)
    assert "'know convert'" in done.stderr


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' own figures")
def test_tensors_stay_on_disk(tmp_path: Path) -> None:
    """Eight tensors of 16 MB: no more than a few of them are this process's own memory."""
    torch.save({f"w{n}": torch.full((4_000_000,), float(n)) for n in range(8)}, tmp_path / "in.pt")
    torch.save({"w": torch.ones(1)}, tmp_path / "small.pt")
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from know_cli.checkpoints.foreign import convert_pickle\n"
        # Pages of the mapped file can be dropped at any time, and so are not counted.
        "def own(): return sum(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon'))\n"
        "import threading, time\n"
        "convert_pickle(Path(sys.argv[3]), Path(sys.argv[2]))\n"
        "before, peak, done = own(), [0], threading.Event()\n"
        "def watch():\n"
        "    while not done.wait(0.002): peak[0] = max(peak[0], own())\n"
        "thread = threading.Thread(target=watch); thread.start()\n"
        "convert_pickle(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "done.set(); thread.join()\n"
        "print((peak[0] - before) / 1e3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "in.pt"), str(tmp_path / "out"),
         str(tmp_path / "small.pt")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(done.stdout) < 64
    assert load_file(tmp_path / "out")["w7"][-1] == 7
