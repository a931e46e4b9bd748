"""Checkpoints from strangers: each is refused in one line, and never half believed."""

from __future__ import annotations

import json
import random
import re
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from know_cli.checkpoints import Checkpoint, open_checkpoint
from know_cli.checkpoints.dtypes import BITS
from know_cli.checkpoints.json_text import MAX_BYTES, MAX_OBJECTS
from know_cli.cli.output import printable
from know_cli.errors import EXIT_CHECKPOINT, CheckpointError, quoted
from tests.support.command import Command, one_line
from tests.support.forkserver import ForkServer
from tests.support.hostile import (
    FILES,
    FOLDERS,
    INDEX,
    corpus,
    entry,
    mutate,
    raw_entry,
    safetensors_file,
)

SECONDS = 2.0
#: What is refused may take so many times what Python needs to parse the largest header.
TIMES = 10
MEGABYTES = 200
#: What we refuse though the library does not: parts of our messages.
STRICTER = (
    "twice", "needs exactly", "strings to strings", "has no tensors", "not a list of counts",
    "larger than can be counted", "more than the", "at most",
)  # fmt: skip


def peak_megabytes() -> float:
    """Most memory this process ever had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def largest_header() -> bytes:
    """As many tensors as are read, none with an element."""
    entries = (
        b'"layers.%d.weight":%b' % (n, raw_entry(shape="[0,4,1]", offsets="[0,0]"))
        for n in range(MAX_OBJECTS)
    )
    return b"{%b}" % b",".join(entries)


def parsing_seconds() -> float:
    """This process's time to parse the largest header, now: on a busy machine it is more."""
    text = largest_header()
    began = time.process_time()
    json.loads(text)
    return time.process_time() - began


def read(path: Path) -> Checkpoint | str:
    """The open checkpoint, or the message that it is refused with; anything else is a failure."""
    began = time.process_time()
    message = None
    try:
        return open_checkpoint(path)
    except CheckpointError as error:
        message = str(error)
    finally:
        seconds = time.process_time() - began
        assert seconds < SECONDS or seconds < TIMES * parsing_seconds()
    assert CheckpointError.exit_code == EXIT_CHECKPOINT
    assert message.startswith(str(path))
    assert len(printable(message).splitlines()) == 1
    return message


def library_reads(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """What the safetensors library makes of a file: name → dtype, shape, data; None if nothing."""
    try:
        found = safetensors.deserialize(content)
    except SafetensorError:
        return None
    return {
        name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in found
    }


def check_against_library(path: Path, content: bytes) -> bool:
    """Whether we refuse a file; the library must agree, or be known to be more lenient."""
    path.write_bytes(content)
    ours, theirs = read(path), library_reads(content)
    if isinstance(ours, str):
        assert theirs is None or any(words in ours for words in STRICTER), ours
        return True
    assert theirs is not None, "we accept what the library refuses"
    assert ours.tensors.keys() == theirs.keys()
    for name, (dtype, shape, data) in theirs.items():
        info = ours.tensors[name]
        assert (info.dtype, info.shape) == (dtype, shape)
        buffer = bytearray(info.info.nbytes)
        ours.read_into(info, 0, memoryview(buffer))
        assert bytes(buffer) == data
    ours.close()
    return False


@pytest.mark.parametrize("case", FILES)
def test_every_rule_of_the_format(case: str, tmp_path: Path) -> None:
    wrong = FILES[case]
    path = tmp_path / "wrong.safetensors"
    path.write_bytes(wrong.content)
    before = peak_megabytes()
    message = read(path)
    assert peak_megabytes() - before < MEGABYTES
    assert isinstance(message, str)
    assert re.search(wrong.message, message), message
    assert (library_reads(wrong.content) is not None) == wrong.library


@pytest.mark.parametrize("case", FOLDERS)
def test_every_rule_of_folders(case: str, tmp_path: Path) -> None:
    fill, message = FOLDERS[case]
    folder = tmp_path / "model"
    folder.mkdir()
    fill(folder)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)
    assert isinstance(read(folder), str)


def test_there_are_enough_named_cases() -> None:
    assert len(FILES) >= 40


def test_the_cache_of_hugging_face_is_no_attack(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "4d7a"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"w": torch.ones(2)}, blobs / "aa")
    (blobs / "bb").write_text('{"weight_map": {"w": "a.safetensors"}}')
    (snapshot / "a.safetensors").symlink_to("../../blobs/aa")
    (snapshot / INDEX).symlink_to("../../blobs/bb")
    with open_checkpoint(snapshot) as checkpoint:
        assert set(checkpoint.tensors) == {"w"}
    (tmp_path / "other").mkdir()
    (blobs / "aa").replace(tmp_path / "other" / "aa")
    (snapshot / "a.safetensors").unlink()
    (snapshot / "a.safetensors").symlink_to("../../other/aa")
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        open_checkpoint(snapshot)


def test_a_folder_given_by_a_link_is_meant(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "real" / "a.safetensors")
    (tmp_path / "real" / INDEX).write_text('{"weight_map": {"w": "a.safetensors"}}')
    (tmp_path / "link").symlink_to("real")
    with open_checkpoint(tmp_path / "link") as checkpoint:
        assert set(checkpoint.tensors) == {"w"}


def test_a_folder_that_may_not_be_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        open_checkpoint(tmp_path)


LONG = {
    "one long name": lambda size: safetensors_file(b'{"%b":0}' % (b"n" * size)),
    "one long name of wide characters": lambda size: safetensors_file(
        b'{"%b":0}' % ("\U0001f600" + "n" * size).encode()
    ),
    "many lists": lambda size: safetensors_file(b'{"a":[%b[]]}' % (b"[]," * 740_000)),
    "many objects": lambda size: safetensors_file(
        b"{%b}" % b",".join(b'"%d":{}' % n for n in range(150_000))
    ),
    "as many tensors as are read, and a byte too many": lambda size: safetensors_file(
        largest_header(), b"x"
    ),
}


#: Each takes seconds: by default those that take the most of time and of memory.
WORST = ("many objects", "as many tensors as are read, and a byte too many")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case not in WORST)) for case in LONG]
)
def test_the_largest_headers_take_bounded_time_and_memory(case: str, tmp_path: Path) -> None:
    """In a process of its own, since memory that was freed is still in this one's peak."""
    path, header = tmp_path / "long.safetensors", tmp_path / "header.json"
    path.write_bytes(LONG[case](MAX_BYTES - 100))
    header.write_bytes(largest_header())
    code = (
        "import json, sys, time\n"
        "from pathlib import Path\n"
        "from know_cli.checkpoints import open_checkpoint\n"
        "from know_cli.errors import CheckpointError\n"
        # What this process inherits in its peak is not counted: Linux' own figure is used.
        "peak = lambda: int(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM'))) / 1e3\n"
        "before, began = peak(), time.process_time()\n"
        "try: open_checkpoint(Path(sys.argv[1]))\n"
        "except CheckpointError as error: print(len(str(error)), time.process_time() - began, peak() - before)\n"
        # As fast as this machine is now, and whatever else it does.
        "text = Path(sys.argv[2]).read_bytes()\n"
        "began = time.process_time()\n"
        "json.loads(text)\n"
        "print(time.process_time() - began)\n"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("reads Linux' own figures")
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(header)],
        capture_output=True,
        text=True,
        check=True,
    )
    length, seconds, megabytes, parsing = map(float, done.stdout.split())
    assert length < 1000
    assert seconds < TIMES * parsing, (seconds, parsing)
    assert megabytes < MEGABYTES, megabytes


def fuzz(count: int, seed: int, folder: Path) -> None:
    """Corrupt valid files until ``count`` malformed ones were refused."""
    chance, files, path = random.Random(seed), corpus(), folder / "fuzzed.safetensors"
    refused = tried = 0
    before = peak_megabytes()
    while refused < count:
        refused += check_against_library(path, mutate(chance, files))
        tried += 1
        if refused == count or tried % 10_000 == 0:
            assert peak_megabytes() - before < MEGABYTES


def test_fuzzed_files(tmp_path: Path) -> None:
    fuzz(2_000, 0, tmp_path)


@pytest.mark.slow
def test_many_fuzzed_files(tmp_path: Path) -> None:
    fuzz(200_000, 1, tmp_path)


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**65), 2**65), st.floats(), st.text(max_size=4),
        st.sampled_from(sorted(BITS)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)  # fmt: skip
NEARLY = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(sorted(BITS)), VALUES),
        "shape": st.one_of(st.lists(st.integers(0, 3), max_size=3), VALUES),
        "data_offsets": st.one_of(st.tuples(st.integers(0, 24), st.integers(0, 24)), VALUES),
    }
)
HEADERS = st.dictionaries(
    st.one_of(st.sampled_from(["a", "b", "__metadata__"]), st.text(max_size=4)),
    st.one_of(NEARLY, VALUES),
    max_size=4,
)


@given(HEADERS, st.integers(0, 32), st.binary(max_size=4))
@settings(max_examples=80)
def test_headers_out_of_anything(
    tmp_path_factory: pytest.TempPathFactory, header: object, size: int, tail: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    check_against_library(path, safetensors_file(header, bytes(size) + tail))


@given(st.binary(max_size=200), st.booleans())
@settings(max_examples=300)
def test_bytes_out_of_anything(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, with_length: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    check_against_library(path, safetensors_file(content) if with_length else content)


def test_what_is_accepted_opens_in_torch_as_well(tmp_path: Path) -> None:
    for number, content in enumerate(corpus()[1:]):
        path = tmp_path / f"{number}.safetensors"
        assert not check_against_library(path, content)
        with safe_open(path, "pt") as file, open_checkpoint(path) as checkpoint:
            for name in file.keys():  # noqa: SIM118  not a dictionary
                entry = checkpoint.tensors[name]
                buffer = torch.empty(entry.info.nbytes, dtype=torch.uint8)
                checkpoint.read_into(entry, 0, memoryview(buffer.numpy()))
                assert tuple(file.get_tensor(name).shape) == entry.shape
                assert torch.equal(file.get_tensor(name).reshape(-1).view(torch.uint8), buffer)


COMMAND = ("predict", "wrong", "good", "-o", "out", "--method", "naive")


def refused_by_command(
    know: Command, folder: Path, content: bytes, *, process: bool = False
) -> None:
    """The real command line ends with code 3, one line, nothing on stdout, no output."""
    (folder / "wrong.safetensors").write_bytes(content)
    before = sorted(folder.iterdir())
    done = know(*COMMAND, cwd=folder, process=process)
    check_refusal(done.returncode, done.stdout, done.stderr)
    assert sorted(folder.iterdir()) == before


def refused_by_process(server: ForkServer, folder: Path, content: bytes) -> None:
    """The same in a process of its own, which is quick to start."""
    (folder / "wrong.safetensors").write_bytes(content)
    before = sorted(folder.iterdir())
    done = server.complete(*COMMAND, cwd=folder)
    check_refusal(done.returncode, done.stdout, done.stderr)
    assert sorted(folder.iterdir()) == before


def check_refusal(code: int, stdout: str, stderr: str) -> None:
    assert code == EXIT_CHECKPOINT, stderr
    assert "wrong.safetensors" in one_line(stderr)
    assert len(stderr) < 5000
    assert stdout == ""


def spoilt(count: int, seed: int, folder: Path) -> list[bytes]:
    """Malformed files, each of which the reader refuses."""
    chance, files, found = random.Random(seed), corpus(), []
    while len(found) < count:
        content = mutate(chance, files)
        if check_against_library(folder / "probe.safetensors", content):
            found.append(content)
    (folder / "probe.safetensors").unlink()
    return found


@pytest.fixture
def beside_a_good_one(tmp_path: Path) -> Path:
    save_file({"w": torch.ones(3)}, tmp_path / "good.safetensors")
    return tmp_path


def test_fuzzed_files_through_the_command_line(beside_a_good_one: Path, know: Command) -> None:
    for number, content in enumerate(spoilt(60, 2, beside_a_good_one)):
        refused_by_command(know, beside_a_good_one, content, process=number == 0)


@pytest.mark.slow
def test_many_fuzzed_files_through_the_command_line(
    beside_a_good_one: Path, server: ForkServer
) -> None:
    for content in spoilt(2_000, 3, beside_a_good_one):
        refused_by_process(server, beside_a_good_one, content)


def test_named_cases_through_the_command_line(beside_a_good_one: Path, know: Command) -> None:
    for wrong in FILES.values():
        if len(wrong.content) < 1_000_000:
            refused_by_command(know, beside_a_good_one, wrong.content)


def test_names_cannot_forge_what_a_terminal_shows(tmp_path: Path, know: Command) -> None:
    name = "w\x1b[2J\x9b1A\u202e.weight\r"
    for k, path in enumerate(("a", "b")):
        save_file(
            {name: torch.ones(2, 2), "x": torch.ones(2, 2) * (1 + k)},
            tmp_path / f"{path}.safetensors",
        )
    done = know("inspect", "a", "b", cwd=tmp_path)
    assert "tensors frozen: w\\x1b[2J\\x9b1A\\u202e.weight\\r" in done.stdout
    save_file({name: torch.full((2, 2), torch.nan)}, tmp_path / "a.safetensors")
    save_file({name: torch.ones(2, 2)}, tmp_path / "b.safetensors")
    done = know("predict", "a", "b", "-o", "out", "--method", "last", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT
    for sign in "\x1b\x9b\u202e\r":
        assert sign not in done.stdout + done.stderr


def test_long_names_are_cut_in_messages(tmp_path: Path, know: Command) -> None:
    content = safetensors_file({"n" * 1_000_000: entry(shape=[2])}, bytes(4))
    (tmp_path / "a.safetensors").write_bytes(content)
    save_file({"w": torch.ones(1)}, tmp_path / "b.safetensors")
    done = know("inspect", "a", "b", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT
    assert len(one_line(done.stderr)) < 500
    assert quoted("n" * 1000).startswith("'nnn")
    assert len(quoted("n" * 1000)) < 130


def test_the_corpus_is_valid_and_the_mutations_are_various() -> None:
    assert all(library_reads(content) is not None for content in corpus())
    chance = random.Random(0)
    spoilt = [mutate(chance, corpus()) for _ in range(500)]
    assert len(set(spoilt)) > 400
    lengths = {struct.unpack("<Q", content[:8])[0] for content in spoilt if len(content) >= 8}
    assert len(lengths) > 50
