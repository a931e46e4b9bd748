"""``know convert`` of one file: a pickle becomes a safetensors file, and its code is never run."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
import tempfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from know_cli.checkpoints import pickle_data, torch_files
from know_cli.checkpoints import pickles as module
from know_cli.checkpoints.pickles import convert_pickle
from know_cli.checkpoints.state_search import USUAL
from know_cli.errors import (
    EXIT_CHECKPOINT,
    EXIT_DONE,
    EXIT_OUTPUT,
    EXIT_USAGE,
    CheckpointError,
    OutputError,
)
from know_cli.known.bundle import load_bundle
from tests.support.bundles import random_bundle
from tests.support.command import Command, one_line
from tests.support.keras import same, write_keras
from tests.support.pickles import Malice, legacy, read, repacked, saved
from tests.support.trajectories import network


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
    assert done.stderr == ""
    done = know("convert", "in.pt", "-o", "out.bin", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert done.stderr == (
        "warning: out.bin: will be a safetensors file, and no PyTorch pickle as its name says\n"
    )


@pytest.mark.parametrize("key", ["", *USUAL])
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


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("in.pt", EXIT_USAGE, "Missing option '-o'"),
        ("nothing.pt -o out", EXIT_CHECKPOINT, "nothing.pt: no such file"),
        ("in.pt -o no/out", EXIT_OUTPUT, "mkdir -p no"),
        ("in.pt -o in.pt --force", EXIT_OUTPUT, "is the input"),
        ("in.pt -o there", EXIT_OUTPUT, "exists already; --force replaces it"),
        ("in.pt -o folder --force", EXIT_OUTPUT, "is a folder"),
        ("in.pt -o new/", EXIT_OUTPUT, "new/: is named as a folder, but a file becomes a file"),
        (
            "in.pt -o out --key nowhere",
            EXIT_CHECKPOINT,
            "--key nowhere: there is no such key; state dicts are '.' (1 tensor)",
        ),
        (f"in.pt -o {'o' * 300}", EXIT_OUTPUT, "name too long"),
        (
            "folder -o out",
            EXIT_CHECKPOINT,
            "folder: has no pytorch_model.bin or the like; give a file",
        ),
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
    monkeypatch.setattr(module, "free_bytes", lambda _: 50_000)
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


def own_megabytes(path: Path, folder: Path) -> float:
    """What a conversion takes of this kind of memory at its peak, beside what a tiny one does."""
    torch.save({"w": torch.ones(1)}, folder / "small.pt")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from know_cli.checkpoints.pickles import convert_pickle\n"
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
        [sys.executable, "-c", code, str(path), str(folder / "out"), str(folder / "small.pt")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout)


_READS_PROC = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads Linux' own figures"
)


@_READS_PROC
def test_tensors_stay_on_disk(tmp_path: Path) -> None:
    """Eight tensors of 12 MB: not even one of them is this process's own memory."""
    torch.save({f"w{n}": torch.full((3_000_000,), float(n)) for n in range(8)}, tmp_path / "in.pt")
    assert own_megabytes(tmp_path / "in.pt", tmp_path) < 24
    assert load_file(tmp_path / "out")["w7"][-1] == 7


@_READS_PROC
def test_of_strided_tensors_only_what_is_used_is_held(tmp_path: Path) -> None:
    """Of a storage of 128 MB, which a file of an eighth of a megabyte can have."""
    zeros = torch.zeros(1 << 25)
    views = {"few": zeros[::2][:8], "half": zeros[::2], "turned": zeros[-64:].view(8, 8).T}
    (tmp_path / "in.pt").write_bytes(repacked(saved(views), zipfile.ZIP_DEFLATED))
    assert (tmp_path / "in.pt").stat().st_size < 1 << 18
    assert own_megabytes(tmp_path / "in.pt", tmp_path) < 48
    found = load_file(tmp_path / "out")
    assert all(torch.equal(found[name], view) for name, view in views.items())


@st.composite
def strided_views(draw: st.DrawFn) -> torch.Tensor:
    """A view of a storage that may be turned, spread, repeated and behind something else."""
    shape = draw(st.lists(st.integers(1, 5), max_size=4))
    strides = draw(st.lists(st.integers(0, 70), min_size=len(shape), max_size=len(shape)))
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    offset = draw(st.integers(0, 100))
    # Refused is what is larger than its storage.
    elements = max(offset + span + draw(st.integers(0, 40)), math.prod(shape))
    dtype = draw(st.sampled_from([torch.int64, torch.int32, torch.int16]))
    return torch.arange(elements, dtype=dtype).as_strided(shape, strides, offset)


@given(views=st.lists(strided_views(), min_size=1, max_size=3), block=st.integers(1, 400),
       piece=st.integers(1, 999))  # fmt: skip
@settings(max_examples=60)
def test_strided_tensors_are_what_torch_makes_of_them(
    views: list[torch.Tensor], block: int, piece: int
) -> None:
    """However they are cut, several of one storage as well."""
    state = {f"{n}": view for n, view in enumerate(views)}
    for n, view in enumerate(views):
        state[f"{n}.turned"] = view.permute(list(reversed(range(view.dim()))))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pickle_data, "_BLOCK_BYTES", block)
        patch.setattr(torch_files, "_READ_BYTES", piece)
        path = Path(folder) / "in.pt"
        torch.save(state, path)
        found = read(path)
    for name, view in state.items():
        assert found[name] == view.contiguous().numpy().tobytes(), name


def test_torch_is_not_even_imported(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.arange(6.0).reshape(2, 3).T}}, tmp_path / "in.pt")
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "sys.argv = ['know', 'convert', 'in.pt', '-o', 'out']\n"
        "from know_cli.cli.main import know\n"
        "know()\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    assert load_file(tmp_path / "out")["w"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_every_dtype_and_view_as_safetensors_writes_it(tmp_path: Path) -> None:
    names = (
        "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool "
        "complex64 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
    )
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (60 * 8,), dtype=torch.uint8, generator=generator)
    state: dict[str, torch.Tensor] = {}
    for name in names.split():
        dtype = getattr(torch, name)
        data = noise % (2 if name == "bool" else 251)
        values = data.view(dtype)[:60].reshape(3, 4, 5)
        state |= {
            name: values, f"{name}.part": values[1], f"{name}.turned": values.permute(2, 0, 1),
            f"{name}.steps": values[:, ::2, 1], f"{name}.one": values[2, 3, 4],
            f"{name}.none": values[:0], f"{name}.line": values[:, :1].transpose(1, 2),
        }  # fmt: skip
    state["parameter"] = torch.nn.Parameter(torch.ones(2))
    state["nan"] = torch.tensor([torch.nan, -torch.inf, -0.0])
    expected = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    save_file(expected, tmp_path / "expected", {"format": "pt"})
    for number, content in enumerate((saved(state), legacy(state))):
        (tmp_path / "in.pt").write_bytes(content)
        convert_pickle(tmp_path / "in.pt", tmp_path / f"out{number}")
        assert (tmp_path / f"out{number}").read_bytes() == (tmp_path / "expected").read_bytes()


def test_inputs_that_change_meanwhile_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "in.pt")
    real = module.copy_data

    def copy_and_change(*arguments: Any) -> None:
        real(*arguments)
        torch.save({"w": torch.zeros(3)}, tmp_path / "in.pt")

    monkeypatch.setattr(module, "copy_data", copy_and_change)
    with pytest.raises(CheckpointError, match="has changed while it was read"):
        convert_pickle(tmp_path / "in.pt", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


def test_an_output_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "in.pt")
    (tmp_path / "out").write_text("old")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "copy_data", fail)
        with pytest.raises(CheckpointError, match="No space left"):
            convert_pickle(tmp_path / "in.pt", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pt", "out"]
    assert (tmp_path / "out").read_text() == "old"
    convert_pickle(tmp_path / "in.pt", tmp_path / "out")
    assert load_file(tmp_path / "out")["w"].tolist() == [1, 1, 1]


def test_a_known_of_keras_becomes_a_bundle(tmp_path: Path, know: Command) -> None:
    bundle = random_bundle()
    write_keras(bundle, tmp_path / "keras")
    done = know("convert", "keras", "-o", "ours", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert same(load_bundle(tmp_path / "ours"), bundle)
    assert f"KNOWN for 5 checkpoints, digest {bundle.digest}" in done.stdout
    done = know("convert", "keras", "-o", "ours", cwd=tmp_path)
    assert done.returncode == EXIT_OUTPUT
    assert "--force replaces it" in one_line(done.stderr)
    assert know("convert", "keras", "-o", "ours", "--force", "-q", cwd=tmp_path).stdout == ""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("keras -o keras", EXIT_OUTPUT, "is the input"),
        ("keras -o no/x", EXIT_OUTPUT, "mkdir -p no"),
        ("keras -o x --key model", EXIT_USAGE, "a folder with KNOWN_*.h5 has no keys"),
        ("keras/KNOWN_FC.h5 -o x", EXIT_CHECKPOINT, "is an HDF5 file"),
    ],
)
def test_a_known_of_keras_is_refused(
    arguments: str, code: int, message: str, tmp_path: Path, know: Command
) -> None:
    write_keras(random_bundle(), tmp_path / "keras")
    done = know("convert", *arguments.split(), cwd=tmp_path)
    assert done.returncode == code
    assert message in one_line(done.stderr)
    assert not (tmp_path / "x").exists()
