"""Files of other formats where a checkpoint should be: named, with what to do."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from know_cli.errors import EXIT_CHECKPOINT
from tests.support.command import Command, one_line


def keras() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in ("metadata.json", "config.json", "model.weights.h5"):
            archive.writestr(name, "{}")
    return content.getvalue()


@pytest.mark.parametrize("suffix", ["", ".safetensors"], ids=["its own suffix", "another suffix"])
@pytest.mark.parametrize(
    ("own", "content", "words"),
    [
        (".keras", keras(), "is a Keras file, not a safetensors file"),
        (".onnx", b"\x08\x08\x12\x07pytorch" + b"x" * 200, "is an ONNX file"),
        (".msgpack", b"\x81\xa6params\x81\xa5dense" + b"y" * 200, "is a msgpack file, as Flax"),
        (".h5", b"\x89HDF\r\n\x1a\n" + bytes(200), "is an HDF5 file"),
        (".gguf", b"GGUF\x03" + bytes(200), "is a GGUF file"),
    ],
)
def test_the_format_is_named(
    own: str, content: bytes, words: str, suffix: str, tmp_path: Path, know: Command
) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "b.safetensors")
    name = f"a{suffix or own}"
    (tmp_path / name).write_bytes(content)
    for order in ((name, "b"), ("b", name)):
        done = know("predict", *order, "-o", "out", "--method", "naive", cwd=tmp_path)
        assert done.returncode == EXIT_CHECKPOINT
        assert f"{name}: {words}" in one_line(done.stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x08\x08\x12\x07pytorch" + b"x" * 200, "is an ONNX file"),
        (b"\x81\xa6params\x81\xa5dense" + b"y" * 200, "is a msgpack file, as Flax writes it"),
        (b"\x89HDF\r\n\x1a\n" + bytes(200), "is an HDF5 file"),
        (b"GGUF\x03" + bytes(200), "is a GGUF file"),
        (b"\x93NUMPY\x01\0" + bytes(200), "is a NumPy file"),
        (keras(), "is a Keras file"),
    ],
)
def test_what_cannot_be_converted_is_told_what_can(
    content: bytes, words: str, tmp_path: Path, know: Command
) -> None:
    (tmp_path / "a").write_bytes(content)
    done = know("convert", "a", "-o", "out.safetensors", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT
    assert f"a: {words}, not a file of torch.save; nothing was read" in one_line(done.stderr)
