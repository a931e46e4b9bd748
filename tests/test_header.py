"""Reading and laying out safetensors headers, against the safetensors library."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from know_cli.checkpoints.dtypes import BITS, safetensors_dtype
from know_cli.checkpoints.header import encode_header, read_header
from know_cli.errors import CheckpointError

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64,
    torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip

NAMES = st.text(
    st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), min_size=1, max_size=12
).filter(lambda name: name != "__metadata__")
TENSORS = st.dictionaries(
    NAMES, st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)), max_size=8
)


@given(TENSORS)
@settings(max_examples=150)
def test_layout_is_the_library_s_byte_for_byte(
    tensors: dict[str, tuple[torch.dtype, list[int]]],
) -> None:
    state = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in tensors.items()}
    expected = save(state, {"format": "pt"})
    start, infos = encode_header(
        [(n, safetensors_dtype(t.dtype), tuple(t.shape)) for n, t in state.items()],
        {"format": "pt"},
    )
    assert expected.startswith(start)
    assert max((info.end for info in infos.values()), default=len(start)) == len(expected)


def test_metadata_keys_are_sorted_and_left_out_when_there_are_none() -> None:
    start, _ = encode_header([], {"b": "1", "a": "2"})
    assert start[8:].startswith(b'{"__metadata__":{"a":"2","b":"1"}}')
    assert encode_header([], {})[0][8:].rstrip() == b"{}"


def test_header_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w é/ x": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)}, path, {"k": "v"})
    header = read_header(path)
    assert header.metadata == {"k": "v"}
    assert header.file_bytes == path.stat().st_size
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == header.tensors.keys()
    info = header.tensors["w é/ x"]
    assert (info.dtype, info.shape, info.elements, info.nbytes) == ("F32", (2, 3), 6, 24)
    assert struct.unpack("<6f", path.read_bytes()[info.begin : info.end]) == tuple(range(6))
    assert header.tensors["n"].elements == 1


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(
    dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


WRONG: dict[str, tuple[object, bytes, str]] = {
    "unknown dtype": ({"a": entry("F33")}, bytes(4), "unknown dtype"),
    "dtype is no string": ({"a": entry(["F32"])}, bytes(4), "unknown dtype"),
    "negative size": ({"a": entry(shape=[-1])}, bytes(4), "not a list of counts"),
    "size is a truth value": ({"a": entry(shape=[True])}, bytes(4), "not a list of counts"),
    "size is a fraction": ({"a": entry(shape=[1.0])}, bytes(4), "not a list of counts"),
    "huge shape": ({"a": entry(shape=[2**62, 2**62])}, bytes(4), "does not fill"),
    "size beyond 64 bits": ({"a": entry(shape=[2**70])}, bytes(4), "not a list of counts"),
    "too small": ({"a": entry(shape=[2])}, bytes(4), "does not fill"),
    "backwards": ({"a": entry(offsets=[4, 0])}, bytes(4), "bad data_offsets"),
    "three offsets": ({"a": entry(offsets=[0, 4, 4])}, bytes(4), "bad data_offsets"),
    "half a byte": ({"a": entry("F4", [1], [0, 1])}, bytes(1), "does not fill"),
    "missing field": ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), "needs exactly"),
    "further field": ({"a": {**entry(), "x": 1}}, bytes(4), "needs exactly"),
    "entry is no object": ({"a": 3}, b"", "needs exactly"),
    "hole at the start": ({"a": entry(offsets=[4, 8])}, bytes(8), "leaves a hole"),
    "hole": ({"a": entry(), "b": entry(offsets=[8, 12])}, bytes(12), "leaves a hole"),
    "overlap": ({"a": entry(), "b": entry(offsets=[2, 6])}, bytes(6), "overlaps"),
    "half a character": ({"a\ud800": entry()}, bytes(4), r"'a\\ud800' is not valid Unicode"),
    "half a character in metadata": (
        {"a": entry(), "__metadata__": {"k": "\udfff"}}, bytes(4), "is not valid Unicode"),
    "cut short": ({"a": entry()}, bytes(3), "cut short: .* 3. bytes by its header|cut short"),
    "too long": ({"a": entry()}, bytes(5), "too long"),
    "metadata is a list": ({"__metadata__": []}, b"", "strings to strings"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "strings to strings"),
    "list": ([], b"", "not a JSON object"),
    "duplicate name": (
        b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(4), "'a' twice",
    ),
    "duplicate metadata": (b'{"__metadata__":{"a":"1","a":"2"}}', b"", "'a' twice"),
    "no JSON": (b'{"a":', b"", "header is not valid JSON"),
    "not UTF-8": (b'{"\xff":1}', b"", "header is not valid JSON"),
    "deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"", "error|not|counts|needs"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_every_rule_is_enforced(case: str, tmp_path: Path) -> None:
    header, data, message = WRONG[case]
    path = write(tmp_path / "wrong.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "only 0 bytes"),
        (b"1234567", "only 7 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>Not found</body></html>", "web page"),
        (b"\n\n<html>" + b" " * 100, "web page"),
        (b"PK\x03\x04" + bytes(100), "pickle"),
        (b"\x80\x02}q\x00." + bytes(100), "pickle"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        (struct.pack("<Q", 5000) + b'{"a":{"dtype":"F32"', "header alone needs 5008 bytes .* 27"),
        (struct.pack("<Q", 2**63) + bytes(100), "not a safetensors file"),
        (struct.pack("<Q", 100_000_001) + b"{" + bytes(100), "not a safetensors file"),
    ],
)  # fmt: skip
def test_other_files_are_named_for_what_they_are(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_header(tmp_path / "nothing.safetensors")


def test_every_dtype_of_the_library_is_known(tmp_path: Path) -> None:
    for dtype, bits in BITS.items():
        path = write(
            tmp_path / f"{dtype}.safetensors", {"a": entry(dtype, [8], [0, bits])}, bytes(bits)
        )
        with safe_open(path, "pt") as file:
            assert file.get_slice("a").get_dtype() == dtype
        assert read_header(path).tensors["a"].nbytes == bits
