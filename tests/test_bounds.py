"""Time grows with the size of what is read, and not faster."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from know_cli.checkpoints import open_checkpoint
from know_cli.checkpoints.checksum import is_digest
from know_cli.checkpoints.layouts import find_model
from know_cli.checkpoints.paths import expand_arguments
from know_cli.errors import KnowError, printable, quoted
from know_cli.kinds import classify_all
from know_cli.known.bundle import load_bundle
from know_cli.normalisation import find_norm_layers
from tests.support.hostile import INDEX, entry, safetensors_file

SIZES = (1, 2, 4, 8)
#: Eight times the size may take so many times as long, and in any case so many seconds: small
#: times are mostly noise.
TIMES, SECONDS = 40.0, 0.25


def shape_of(names: list[str]) -> dict[str, tuple[tuple[int, ...], str]]:
    return dict.fromkeys(names, ((2, 2), "F32"))


def header(folder: Path, size: int) -> object:
    """One name of 200 kB, twice that, …"""
    path = folder / "long.safetensors"
    path.write_bytes(safetensors_file({"n." * 100_000 * size: entry()}, bytes(4)))
    return open_checkpoint(path)


def metadata(folder: Path, size: int) -> object:
    path = folder / "metadata.safetensors"
    found = {"a": entry(), "__metadata__": {f"k{n}": "v" for n in range(500 * size)}}
    path.write_bytes(safetensors_file(found, bytes(4)))
    return open_checkpoint(path)


def index(folder: Path, size: int) -> object:
    """Of 1,000 tensors that are not there; the slow suite has a million."""
    (folder / INDEX).write_text(
        json.dumps({"weight_map": {f"layers.{n}.w": "a.safetensors" for n in range(1000 * size)}})
    )
    save_file({"w": torch.ones(1)}, folder / "a.safetensors")
    return open_checkpoint(folder)


def manifest(folder: Path, size: int) -> object:
    (folder / "manifest.json").write_text(json.dumps({f"k{n}": n for n in range(500 * size)}))
    return load_bundle(folder)


def digest(folder: Path, size: int) -> object:
    path = folder / "x.sha256"
    path.write_text("".join(f"\\{'0' * 64}  a\\\\n{n}\n" for n in range(300 * size)))
    return is_digest(path)


def long_line_of_a_digest(folder: Path, size: int) -> object:
    path = folder / "y.sha256"
    path.write_text("\\" + "0" * 64 + "  " + "\\\\" * 10_000 * size)
    return is_digest(path)


def experts(folder: Path, size: int) -> object:
    names = ["experts." * 1000 * size + str(n) for n in range(20)]
    return classify_all(shape_of(names)), find_norm_layers(dict.fromkeys(names, (2,)))


def parts(folder: Path, size: int) -> object:
    names = [
        "norm1_" * 1000 * size + ".weight",
        "a" * 8000 * size,
        "_orig_mod." * 1000 * size + "w",
    ]
    return classify_all(shape_of(names)), find_norm_layers(dict.fromkeys(names, (2,)))


def numbers(folder: Path, size: int) -> object:
    return classify_all(shape_of([f"blocks.{'1' * 1000 * size}.{'0' * n}w" for n in range(20)]))


def many_tensors(folder: Path, size: int) -> object:
    return classify_all(shape_of([f"layers.{n}.mlp.fc.weight" for n in range(40 * size)]))


def ranges(folder: Path, size: int) -> object:
    return expand_arguments([f"{folder}/" + "1../" * 100 * size])


def ranges_of_one_name(folder: Path, size: int) -> object:
    return expand_arguments(["1.." * 10 * size])


def patterns(folder: Path, size: int) -> object:
    return expand_arguments([f"{folder}/" + "*a" * 10 * size])


def shown(folder: Path, size: int) -> object:
    return printable("\u202e" * 5000 * size), quoted("\x00" * 5000 * size)


def names_in_a_folder(folder: Path, size: int) -> object:
    for n in range(20 * size):
        (folder / f"model-{n:05d}-of-99999.safetensors").touch()
    return find_model(folder)


WORK: list[Callable[[Path, int], object]] = [
    header, metadata, index, manifest, digest, long_line_of_a_digest, experts, parts, numbers, many_tensors, ranges,
    ranges_of_one_name, patterns, shown, names_in_a_folder,
]  # fmt: skip


def seconds(work: Callable[[Path, int], object], folder: Path, size: int) -> float:
    """This process's own time, the least of two."""
    found = []
    for _ in range(2):
        began = time.process_time()
        with suppress(KnowError):
            work(folder, size)
        found.append(time.process_time() - began)
    return min(found)


@pytest.mark.parametrize("work", WORK, ids=lambda work: str(work.__name__))
def test_time_grows_with_the_size(work: Callable[[Path, int], object], tmp_path: Path) -> None:
    first, *others = (seconds(work, tmp_path, size) for size in SIZES)
    for size, found in zip(SIZES[1:], others, strict=True):
        assert found < max(TIMES / SIZES[-1] * size * first, SECONDS * size), (first, others)


@pytest.mark.slow
def test_an_index_of_a_million_tensors(tmp_path: Path) -> None:
    text = ",".join(f'"{n}":"a.safetensors"' for n in range(1_000_000))
    (tmp_path / INDEX).write_text(f'{{"weight_map":{{{text}}}}}')
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    began = time.process_time()
    with pytest.raises(KnowError):
        open_checkpoint(tmp_path)
    assert time.process_time() - began < 20
