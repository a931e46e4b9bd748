"""``know convert`` of one file: a pickle becomes a safetensors file, and its code is never run."""

from __future__ import annotations

import argparse
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
from know_cli.checkpoints.pickle_data import copy_data, problem_of
from know_cli.checkpoints.state_search import USUAL, find_state
from know_cli.checkpoints.torch_files import open_torch_file
from know_cli.errors import (
    EXIT_CHECKPOINT,
    EXIT_DONE,
    EXIT_OUTPUT,
    EXIT_USAGE,
    CheckpointError,
    OutputError,
)
from know_cli.hypermodel import load_bundle
from tests.conftest import Command, network, one_line, random_bundle
from tests.figures import record
from tests.test_bundle import same, write_keras


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


def legacy(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def zipped(root: str = "archive/", /, **files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(root + name, content)
    return buffer.getvalue()


def repacked(content: bytes, compression: int = zipfile.ZIP_STORED, **changed: bytes) -> bytes:
    """A zip archive written again, with records added or replaced by the ends of their names."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(buffer, "w", compression) as new,
    ):
        for name in old.namelist():
            end = name.rpartition("/")[2].replace(".", "_")
            new.writestr(name, changed.pop(end) if end in changed else old.read(name))
        for end, data in changed.items():
            new.writestr(f"archive/{end.replace('_', '.')}", data)
    return buffer.getvalue()


def program(*steps: bytes) -> bytes:
    """A file of torch.save whose pickle was written by hand."""
    return repacked(saved({"w": torch.ones(2)}), data_pkl=b"\x80\x02" + b"".join(steps) + b".")


def tensor(**changed: object) -> bytes:
    """{"w": a tensor of four elements} with something else in its description."""
    items = {"elements": 4, "offset": 0, "shape": (4,), "strides": (1,), "key": "0", **changed}
    content = saved({"w": torch.arange(4.0)})
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        pickled = archive.read("archive/data.pkl")
    # ('storage', FloatStorage, '0', 'cpu', 4), 0, (4,), (1,), …
    at = pickled.index(b"X\x01\x00\x00\x000")
    end = pickled.index(b"K\x01\x85") + 3
    flat = {key: pickle.dumps(value, 2)[2:-1] for key, value in items.items()}
    head, _, _ = pickled.partition(pickled[at:end])
    middle = flat["key"] + b"X\x03\0\0\0cpu" + flat["elements"] + b"tQ"
    rest = flat["offset"] + flat["shape"] + flat["strides"]
    return repacked(content, data_pkl=head + middle + rest + pickled[end:])


class Metered(dict[str, int]):
    """A class of somebody's own that is a dict."""


WRONG: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "text": (b"hello", "not a file of torch.save"),
    "another zip": (zipped(readme=b"hello"), "is damaged, or no checkpoint: a zip archive without the one pickle"),
    "no pickle in it": (zipped(data=b"hello", version=b"3"), "is damaged, or no checkpoint"),
    "two pickles": (zipped("", **{"a/data.pkl": b"", "b/data.pkl": b""}), "a zip archive without the one pickle of torch.save"),
    "cut short": (saved({"w": torch.ones(1000)})[:2000], "is damaged, or no checkpoint"),
    "a tensor": (saved(torch.ones(2)), "holds a tensor, not a state dict"),
    "a list": (saved([torch.ones(2)]), "holds a list, not a state dict"),
    "a number": (saved(7), "holds a number, not a state dict"),
    "settings": (saved(argparse.Namespace()), "holds an object of 'argparse.Namespace', not a state dict"),
    "no tensors": (saved({"epoch": 3, "model": {"lr": 0.1}}), "holds no state dict, no mapping with a model's tensors; its keys are 'epoch' (a number), 'model' (a mapping)"),
    "nothing": (saved({}), "with a model's tensors; it is empty"),
    "names that are numbers": (saved({0: torch.ones(1)}), "has 0 where a tensor's name should be"),
    "half a character": (saved({"a": torch.ones(1), "\ud800": torch.ones(1)}), "has '\\ud800' where a tensor's name"),
    "names that are fractions": (saved({"a": torch.ones(1), 0.5: 1}), "has 0.5 where a tensor's name"),
    "sparse": (saved({"w": torch.eye(2).to_sparse()}), "'w': is sparse"),
    "quantised": (saved({"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}), "'w': is sparse, quantised"),
    "conjugate": (saved({"w": torch.ones(2, dtype=torch.complex64).conj()}), "'w': is a conjugate or negative view"),
    "complex128": (saved({"w": torch.ones(1, dtype=torch.complex128)}), "no dtype torch.complex128"),
    "blown up": (saved({"w": torch.ones(1).expand(2**40)}), "larger than the data it is made of"),
    "without data": (saved({"w": torch.ones(3, device="meta")}), "'w': is sparse, quantised or without"),
    "a module not built yet": (saved(torch.nn.LazyLinear(2).state_dict()), "is sparse, quantised or without"),
    "called __metadata__": (saved({"w": torch.ones(1), "__metadata__": torch.ones(1)}), "a tensor called '__metadata__', the one name"),
    "claims more": (tensor(elements=8, shape=(8,)), "'w': its storage claims 32 bytes, and the record of it has 16"),
    "claims less": (tensor(elements=3, shape=(3,)), "its storage claims 12 bytes, and the record of it has 16"),
    "claims no end": (tensor(elements=2**62, shape=(2**62,)), "larger than can be counted"),
    "begins too late": (tensor(offset=1), "lies outside of its storage"),
    "steps too far": (tensor(shape=(2,), strides=(4,)), "lies outside of its storage"),
    "steps back": (tensor(strides=(-1,)), "-1 is no size of a tensor"),
    "empty and huge": (tensor(shape=(2**40, 2**40, 0), strides=(0, 0, 0)), "larger than can be counted"),
    "dimensions without strides": (tensor(shape=(2, 2)), "not as many strides as dimensions"),
    "a shape that is a text": (tensor(shape="4"), "the shape of a tensor is no list of numbers"),
    "another record": (tensor(key="1"), "'w': its data, record '1', are not in the file"),
    "a record outside": (tensor(key="../data.pkl"), "its data, record '../data.pkl', are not in the file"),
    "a key that is a number": (tensor(key=0), "refers to its data in an unknown way"),
    "the other order of bytes": (repacked(saved({"w": torch.ones(1)}), byteorder=b"big"), "the other order of bytes"),
    "TorchScript": (repacked(saved({"w": torch.ones(1)}), constants_pkl=b""), "is a TorchScript archive, which is a program"),
    "a class of their own": (saved({"w": torch.ones(1), "m": Metered()}), "loading it would run 'tests.test_convert.Metered'"),
    "Keras": (zipped("", **{"config.json": b"{}", "model.weights.h5": b""}), "is a Keras file"),
    "NumPy's archive": (zipped("", **{"w.npy": b"", "v.npy": b""}), "is a NumPy archive"),
    "an extension": (program(b"\x82\x01"), "no pickle of torch.save has EXT1"),
    "ends too early": (program()[:-1], "is damaged"),
    "an empty stack": (program(b"R"), "is damaged"),
    "calls a number": (program(b"K\x01)R"), "calls what is no function"),
    "a dict as a key": (program(b"}}K\x01s"), "a dict has a container as a key"),
    "a number with keys": (program(b"K\x01K\x01K\x01s"), "sets a key of what is no dict"),
    "a number with an end": (program(b"K\x01K\x01a"), "appends to what is no list"),
    "state of a number": (program(b"K\x01K\x01b"), "sets the state of what has none"),
    "a pickle that was kept nowhere": (program(b"h\x07"), "is damaged"),
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
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
        (b"\x08\x08\x12\x07pytorch", "is an ONNX file"),
        (b"\x81\xa6params\x81\xa5dense", "is a msgpack file, as Flax writes it"),
        (pickle.dumps({"w": 1}), "is a pickle, but none of torch.save"),
        (b"\x80\x04" + bytes(9), "is damaged"),
        (b"anything", "is not a file of torch.save"),
    ],
)
def test_what_is_no_pickle_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        convert_pickle(tmp_path / "model.bin", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def read(path: Path) -> dict[str, bytes]:
    """The data of the tensors that would be converted, without a file being written."""
    found: dict[str, bytearray] = {}

    class Sink:
        def write(self, name: str, offset: int, data: memoryview) -> None:
            found.setdefault(name, bytearray())[offset : offset + data.nbytes] = data

    with open_torch_file(path) as file:
        tensors = find_state(path, file.content()).tensors
        for problem in filter(None, (problem_of(file, tensor) for tensor in tensors.values())):
            raise CheckpointError(f"{path}: {problem}")
        copy_data(file, tensors, Sink())
    return {name: bytes(data) for name, data in found.items()}


def test_damage_anywhere_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    """Each byte of a small file spoilt: it is read as it was, or refused in one line."""
    content = saved({"w": torch.ones(2), "model": {"x": torch.arange(4.0)}})
    path, expected = tmp_path / "in.pt", torch.arange(4.0).numpy().tobytes()
    refused: list[str] = []
    for place in range(0, len(content), 5):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
        try:
            assert read(path)["x"] == expected
        except CheckpointError as error:
            refused.append(str(error))
    # The others are of padding, times, and names that nothing refers to.
    assert len(refused) > 90
    assert all(text.startswith(str(path)) and "\n" not in text for text in refused)
    record("pickles", spoilt=len(range(0, len(content), 5)), refused=len(refused))


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
    """Eight tensors of 12 MB: not even one of them is this process's own memory."""
    torch.save({f"w{n}": torch.full((3_000_000,), float(n)) for n in range(8)}, tmp_path / "in.pt")
    torch.save({"w": torch.ones(1)}, tmp_path / "small.pt")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from know_cli.checkpoints.foreign import convert_pickle\n"
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
    assert float(done.stdout) < 24
    assert load_file(tmp_path / "out")["w7"][-1] == 7


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


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_records_are_inflated(compression: int, tmp_path: Path) -> None:
    """PyTorch's own mapped loading takes the compressed bytes for the values."""
    state = {
        "w": torch.arange(1000.0),
        "b": torch.zeros(1000),
        "t": torch.arange(6).reshape(2, 3).T,
    }
    (tmp_path / "in.pt").write_bytes(repacked(saved(state), compression))
    assert (tmp_path / "in.pt").stat().st_size < 6000
    convert_pickle(tmp_path / "in.pt", tmp_path / "out")
    found = load_file(tmp_path / "out")
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_a_record_that_says_to_be_longer_than_it_is(tmp_path: Path) -> None:
    """The size in the archive's directory is the claimed one, and less comes out of the record."""
    content = bytearray(repacked(saved({"w": torch.zeros(1000)}), zipfile.ZIP_DEFLATED))
    directory = content.index(b"PK\x01\x02")
    at = content.index(b"archive/data/0", directory) - 46
    content[at + 24 : at + 28] = (8000).to_bytes(4, "little")
    longer = repacked(saved({"w": torch.zeros(2000)}), zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(io.BytesIO(longer)) as archive:
        pickled = archive.read("archive/data.pkl")
    with zipfile.ZipFile(io.BytesIO(saved({"w": torch.zeros(1000)}))) as archive:
        assert len(pickled) == len(archive.read("archive/data.pkl"))
    (tmp_path / "in.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="claims 4000 bytes, and the record of it has 8000"):
        convert_pickle(tmp_path / "in.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_data_that_are_not_those_that_were_written(tmp_path: Path, know: Command) -> None:
    """The archive's checksum of a record, which PyTorch does not compare."""
    content = bytearray(saved({"w": torch.full((1000,), 3.0)}))
    at = content.index(torch.full((1000,), 3.0).numpy().tobytes())
    content[at + 1000] ^= 1
    (tmp_path / "in.pt").write_bytes(content)
    assert torch.load(tmp_path / "in.pt", weights_only=True)["w"][250] != 3
    done = know("convert", "in.pt", "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT
    assert "Bad CRC-32 for file 'archive/data/0'" in one_line(done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


@pytest.mark.skipif(
    not hasattr(torch.serialization, "set_crc32_options"), reason="torch always writes checksums"
)
def test_archives_without_checksums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(5)}, tmp_path / "in.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    convert_pickle(tmp_path / "in.pt", tmp_path / "out")
    assert load_file(tmp_path / "out")["w"].tolist() == [0, 1, 2, 3, 4]


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


@pytest.mark.parametrize("place", [100, 500, -30, -5, -1])
def test_the_form_before_1_6_cut_short(place: int, tmp_path: Path) -> None:
    (tmp_path / "in.pt").write_bytes(legacy({"w": torch.ones(20), "v": torch.ones(3)})[:place])
    with pytest.raises(CheckpointError, match=r"in\.pt: is (damaged|cut short)"):
        convert_pickle(tmp_path / "in.pt", tmp_path / "out")


def test_the_form_before_1_6_spoilt_anywhere(tmp_path: Path) -> None:
    """It has no checksums; but whatever a spoilt byte does, nothing is read outside of the data."""
    content = legacy({"w": torch.ones(2), "b": torch.zeros(3)})
    path = tmp_path / "in.pt"
    refused: list[str] = []
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
        try:
            assert sum(map(len, read(path).values())) <= 20
        except CheckpointError as error:
            refused.append(str(error))
    assert len(refused) > len(content) / 6
    assert all(text.startswith(str(path)) and "\n" not in text for text in refused)


def test_the_form_before_1_6_runs_no_code(tmp_path: Path, know: Command) -> None:
    (tmp_path / "in.pt").write_bytes(legacy({"w": torch.ones(1), "x": Malice("touch was-run")}))
    done = know("convert", "in.pt", "-o", "out", cwd=tmp_path)
    assert "loading it would run 'posix.system'" in one_line(done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


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
