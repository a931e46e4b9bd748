"""What is trusted: bundles by their digest, no network, versions that are pinned."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from know_cli.errors import EXIT_DONE, CheckpointError
from know_cli.known.bundle import load_bundle
from know_cli.known.shipped import shipped
from tests.support.trajectories import write_trajectory

ROOT = Path(__file__).parent.parent
# Python runs this at its start; whatever would speak to another machine ends the program.
CUT = """
import os, socket
def refuse(*arguments, **named):
    os.write(2, b"network is used\\n")
    os._exit(77)
for name in ("connect", "connect_ex", "bind", "sendto"):
    setattr(socket.socket, name, refuse)
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refuse
"""


def test_damaged_bundles_are_never_used(tmp_path: Path) -> None:
    """Any bit of a shipped bundle's weights: refused before anything is computed with it."""
    source = shipped()["continuation"][5]
    chance, spoilt = random.Random(0), 0
    for number in range(30):
        folder = tmp_path / str(number)
        shutil.copytree(source, folder)
        file = folder / chance.choice(["conv", "fc", "bias"])
        file = file.with_suffix(".safetensors")
        content = bytearray(file.read_bytes())
        content[chance.randrange(8, len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
        try:
            assert load_bundle(folder).digest == load_bundle(source).digest
        except CheckpointError:
            spoilt += 1
    # What is left are bits of the header that say nothing: spaces, the names of metadata.
    assert spoilt >= 25


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"format": 1, "format": 1}', "\xff", "[]", "null"]
)
def test_manifests_from_strangers(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match="is not a bundle's manifest"):
        load_bundle(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b" " * 20_000_001)
    with pytest.raises(CheckpointError, match="longer than the 20000000 bytes"):
        load_bundle(tmp_path)


def without_network() -> list[str]:
    """What a command begins with that is to find no network at all, where that may be had."""
    cut = ["unshare", "-n"]
    if shutil.which(cut[0]) is None:
        return []
    tried = subprocess.run([*cut, "true"], capture_output=True, check=False)
    return [] if tried.returncode else cut


def test_nothing_speaks_to_a_network(tmp_path: Path) -> None:
    write_trajectory(tmp_path)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "sitecustomize.py").write_text(CUT)
    path = f"{tmp_path / 'cut'}:{ROOT}"
    probe = subprocess.run(
        [sys.executable, "-c", "import socket; socket.create_connection(('127.0.0.1', 9))"],
        env={"PYTHONPATH": path}, capture_output=True, check=False,
    )  # fmt: skip
    assert probe.returncode == 77, "the network is not cut"
    commands = [
        ["predict", "ckpt0..ckpt4", "-o", "out.safetensors", "--checksum"],
        ["inspect", "ckpt0..ckpt4"],
        ["verify", "out", "ckpt0..ckpt4"],
    ]
    code = (
        "import sys\n"
        "from know_cli.cli.main import family_app, run\n"
        f"sys.exit(max(run(family_app(), 'know', command) for command in {commands}))\n"
    )
    done = subprocess.run(
        [*without_network(), sys.executable, "-c", code],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    assert "network is used" not in done.stderr
    for words in ("wrote out.safetensors.sha256", "length of step", "computed again is the same"):
        assert words in done.stdout


def test_every_dependency_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(
        re.fullmatch(r"[\w.-]+==[\w.]+(; python_version [<>=]+ \"3\.\d+\")?", p) for p in pins
    )
    pinned = {re.split(r"==", pin)[0].lower().replace("_", "-") for pin in pins}
    project = (ROOT / "pyproject.toml").read_text()
    for name in re.findall(r"^ +\"([\w-]+)>=", project, re.MULTILINE):
        assert name.lower() in pinned, name
