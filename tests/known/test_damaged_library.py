"""A compiled kernel that is cut off, another library or no file at all: torch's kernel computes."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from know_cli.known import native_kernel
from know_cli.known.native_kernel import trouble_with_native

#: An ELF file whose table of sections lies where it says, without any section.
ELF = b"\x7fELF\x02\x01".ljust(40, b"\0") + struct.pack("<Q10xHH2x", 64, 64, 1) + bytes(64)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the kernel is looked for."""
    path = tmp_path / "_native.so"
    monkeypatch.setattr(native_kernel, "LIBRARY", path)
    native_kernel._library.cache_clear()
    yield path
    native_kernel._library.cache_clear()


@pytest.mark.parametrize("content", [b"", b"no library", ELF, ELF[:-1], ELF[:64]])
def test_what_is_no_library(library: Path, content: bytes) -> None:
    library.write_bytes(content)
    assert "is damaged" in str(trouble_with_native(5))


def test_a_library_that_is_cut_off_is_not_loaded(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system would end the process with SIGBUS."""
    loaded: list[str] = []

    def load(name: str) -> object:
        loaded.append(name)
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", load)
    for end in range(64, len(ELF)):
        library.write_bytes(ELF[:end])
        native_kernel._library.cache_clear()
        assert "is damaged" in str(trouble_with_native(5))
    assert not loaded
    library.write_bytes(ELF)
    native_kernel._library.cache_clear()
    assert "is damaged" in str(trouble_with_native(5))
    assert loaded == [str(library)]


def test_another_library(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has other functions than the kernel's."""
    whole = ctypes.CDLL(None)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: whole)
    library.write_bytes(ELF)
    assert "is damaged" in str(trouble_with_native(5))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path.name)])
def test_no_file(library: Path, make: Callable[[Path], None]) -> None:
    """A pipe would be waited for."""
    make(library)
    assert "was not compiled" in str(trouble_with_native(5))
