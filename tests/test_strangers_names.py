"""Names that strangers chose, in every place that a name can come from, in all that is written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from know_cli.checkpoints import metadata as keys
from know_cli.errors import EXIT_BUG, printable
from know_cli.known.bundle import load_bundle, save_bundle
from tests.support.command import Command

#: What no stream and no text file may have: controls but the line feed, marks of direction, other
#: ends of lines, what is not seen.
STRANGE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]"
)
#: Ends a line, and begins one that a reader would take for this program's.
FORGED = "\nknow: error: forged"
NAME = f"w\x1b[2J\u202e\u2028\u200f\x85\x9b1A\r\t{FORGED}.weight"
FILE = f"a\x1b]0;x\x07\u202e\u2028{FORGED}"


def check_text(text: str, where: str) -> None:
    """Refuse what could forge what is shown."""
    found = STRANGE.search(text)
    assert found is None, f"{where}: {text[max(found.start() - 40, 0) : found.end() + 20]!r}"
    assert not any(line.startswith("know: error: forged") for line in text.splitlines()), where


@pytest.fixture
def planted(tmp_path: Path, bundle_path: Path) -> Path:
    """Files, folders, tensors, metadata, bundles, functions and results of strange names."""
    for k in range(5):
        state = {
            NAME: torch.full((2, 2), 1.0 - k / 10),
            "x.bias": torch.ones(2) * k,
            "frozen" + NAME: torch.ones(2, 2),
        }
        metadata = {
            "format": "pt", keys.SESSION: str(k), keys.FRACTION: str(0.5**k), keys.RATE: "0.5",
            keys.TRAJECTORY: NAME, NAME: NAME, keys.METHOD: NAME, keys.STEPS: "1",
        }  # fmt: skip
        save_file(state, tmp_path / f"{FILE}{k}.safetensors", metadata)
    folder = tmp_path / f"{FILE}folder"
    folder.mkdir()
    save_file({NAME: torch.ones(2, 2)}, folder / "model.safetensors")
    (folder / f"{FILE}.txt").write_text("beside")
    (folder / f"{FILE}.pt").write_text("left out")
    torch.save(
        {NAME: torch.ones(2), NAME + "odd": torch.ones(2).to_sparse()}, tmp_path / f"{FILE}.pt"
    )
    save_bundle(load_bundle(bundle_path), tmp_path / f"{FILE}bundle", {"data": NAME, NAME: NAME})
    (tmp_path / "measure.py").write_text("def size(state):\n    return float(len(state))\n")
    return tmp_path


COMMANDS: list[list[str]] = [
    ["predict", "0", "1", "2", "-o", "out", "--method", "linear", "--json", "report", "--checksum"],
    ["predict", "0", "1", "2", "-o", "out", "--dry-run"],
    ["predict", "0", "1", "2", "-o", "missing/out"],
    ["predict", "0", "1", "-o", "0", "--force"],
    ["predict", "folder", "folder2", "-o", "copy", "--method", "naive"],
    ["predict", "folder", "0", "-o", "out"],
    ["predict", "0", "1", "-o", "out", "--kind", "NAME=conv", "--method", "NAME"],
    ["predict", "0", "1", "-o", "out", "--weights", "./bundle"],
    ["predict", "0", "1", "2", "3", "4", "-o", "out", "--weights", "./bundle"],
    ["predict", "0..9", "-o", "out"],
    ["inspect", "0", "1", "2", "--json", "report", "--force"],
    ["inspect", "0", "nothing"],
    ["verify", "0", "1", "2"],
    ["verify", "0", "1", "2", "--weights", "./bundle"],
    ["convert", "pt", "-o", "converted"],
    ["convert", "folder", "-o", "converted"],
    ["plot", "trajectory", "0", "1", "2", "--prediction", "NAME=3", "-o", "picture.svg", "--json", "report", "--force"],
    ["plot", "results", "0", "-o", "picture.svg"],
    ["forget", "measure.py:NAME", "recorded", "--size", "10"],
    ["train", "folder", "--evaluate", "./bundle"],
    ["eval", "-o", "evaluation", "--task", "NAME"],
    ["choose", "0", "1", "--measure", "echo NAME; exit 1", "-o", "out", "--budget", "04"],
]  # fmt: skip


def words_of(command: list[str], folder: Path) -> list[str]:
    """A command with the strange names in it."""
    found = []
    for word in command:
        start, place, end = (
            word.rpartition("=") if "=" in word and "echo" not in word else ("", "", word)
        )
        if end in ("0", "1", "2", "3", "4", "0..9"):
            end = f"{FILE}{end}"
        elif end in (
            "folder",
            "folder2",
            "pt",
            "nothing",
            "out",
            "missing/out",
            "copy",
            "report",
            "converted",
        ):
            end = f"{FILE}.pt" if end == "pt" else f"{FILE}{end}"
        elif end in ("./bundle", "picture.svg"):
            end = f"./{FILE}{end.removeprefix('./')}"
        found.append(
            (start + place + end).replace("NAME", printable(NAME) if "echo" in word else NAME)
        )
    return found


def test_no_stream_and_no_file_is_forged(planted: Path, know: Command) -> None:
    (planted / f"{FILE}folder2").symlink_to(f"{FILE}folder")
    ended = set()
    for command in COMMANDS:
        done = know(*words_of(command, planted), cwd=planted)
        assert done.returncode != EXIT_BUG, (command, done.stderr)
        ended.add(done.returncode)
        check_text(done.stdout, f"{command}: stdout")
        check_text(done.stderr, f"{command}: stderr")
    assert len(ended) >= 4
    texts = [
        path
        for path in planted.rglob("*")
        if path.is_file() and not path.name.endswith((".safetensors", ".pt", ".py", ".pyc", ".txt"))
    ]
    for path in texts:
        content = path.read_bytes()
        if content[8:9] == b"{" or path.name.endswith(".sha256"):
            continue  # weights, whose names are data; and digests, whose format keeps the bytes
        check_text(content.decode(), f"{path.name!r}")
    assert any(path.name.endswith("report") for path in texts)
    assert any(path.name.endswith(".svg") for path in texts)


def test_digests_of_strange_names_are_those_of_sha256sum(planted: Path, know: Command) -> None:
    done = know(*words_of(COMMANDS[0], planted), cwd=planted)
    assert done.returncode == 0, done.stderr
    digest = next(path for path in planted.iterdir() if path.name.endswith(".sha256"))
    checked = subprocess.run(
        ["sha256sum", "-c", digest.name], cwd=planted, capture_output=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    assert len(digest.read_bytes().splitlines()) == 1


def test_all_that_could_forge_is_escaped() -> None:
    for code in range(sys.maxunicode + 1):
        sign = chr(code)
        if unicodedata.category(sign) in ("Cc", "Cf", "Zl", "Zp", "Cs"):
            shown = printable(f"a{sign}b")
            assert shown.isascii(), hex(code)
            assert len(shown.splitlines()) == 1


def test_names_that_are_no_utf8(tmp_path: Path, know: Command) -> None:
    for k in range(2):
        save_file(
            {"w": torch.full((2, 2), 1.0 + k)},
            os.fsdecode(bytes(tmp_path) + b"/a\xff%d.safetensors" % k),
        )
    done = know("inspect", "a\udcff0", "a\udcff1", "--json", "r\udcff", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = know(
        "predict", "a\udcff0", "a\udcff1", "-o", "o\udcff", "--method", "naive", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "wrote o\\udcff" in done.stdout
