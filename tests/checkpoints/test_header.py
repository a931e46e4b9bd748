"""Reading and laying out safetensors headers, against the safetensors library."""

from __future__ import annotations

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
from tests.support.hostile import entry, safetensors_file

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


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_header(tmp_path / "nothing.safetensors")


def test_every_dtype_of_the_library_is_known(tmp_path: Path) -> None:
    for dtype, bits in BITS.items():
        path = tmp_path / f"{dtype}.safetensors"
        path.write_bytes(safetensors_file({"a": entry(dtype, [8], [0, bits])}, bytes(bits)))
        with safe_open(path, "pt") as file:
            assert file.get_slice("a").get_dtype() == dtype
        assert read_header(path).tensors["a"].nbytes == bits
