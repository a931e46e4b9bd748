"""``know convert`` of what is damaged, compressed, or something else: refused, or read right."""

from __future__ import annotations

import argparse
import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from know_cli.checkpoints.pickles import convert_pickle
from know_cli.errors import (
    EXIT_CHECKPOINT,
    CheckpointError,
)
from tests.support.command import Command, one_line
from tests.support.pickles import Malice, legacy, program, read, repacked, saved, tensor, zipped


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
    "a class of their own": (saved({"w": torch.ones(1), "m": Metered()}), "loading it would run 'tests.checkpoints.test_convert_damage.Metered'"),
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
