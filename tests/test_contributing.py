"""What CONTRIBUTING.md says of additions, done: each in a copy of the package, as it is listed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import know_cli

ROOT = Path(know_cli.__file__).parent.parent
# Where the files are that the lists name.
LISTED = ("know_cli", "docs", "README.md")
ITEM = re.compile(
    r"^\d+\. `(?P<path>[^`]+)`, (?P<how>new|after|before|in place of)"
    r"(?: (?P<ticks>`+)(?P<anchor>.+?)(?P=ticks))?:\n\n"
    r"   ```\w+\n(?P<text>(?:(?:   .*)?\n)+?)   ```$",
    re.MULTILINE,
)


INDENT = re.compile("^   ", re.MULTILINE)  # of what belongs to an item of a list
State = dict[str, np.ndarray]
# The rules of the bundle that the hyper-model of the page is given.
FC, BIAS = (0.25, -0.5), (0.5, 0.125)
# Imports what is heavy once, and runs each command in a process of its own, which finds the
# package in its copy.
RUNNER = """
import json, os, runpy, sys, traceback
import numpy, rich.table, safetensors.torch, torch, typer
torch.set_num_threads(1)
codes = []
for run in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        sys.path.insert(0, run["root"])
        os.chdir(run["folder"])
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
        program, *arguments = run["command"]
        code = 1
        try:
            if program == "know":
                sys.argv = ["know", *arguments]
                runpy.run_module("know_cli", run_name="__main__", alter_sys=True)
            else:
                assert (program, arguments[0]) == ("python", "-c")
                exec(arguments[1])
                code = 0
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # to take torch down in good order would take a second
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


@dataclass(frozen=True)
class Change:
    """An item of a list: what is done to a file."""

    path: str
    how: str
    anchor: str
    text: str

    def make(self, root: Path) -> None:
        file = root / self.path
        if self.how == "new":
            assert not file.exists(), file
            file.parent.mkdir(exist_ok=True)
            file.write_text(self.text, encoding="utf-8")
            return
        assert self.anchor
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        found = [k for k, line in enumerate(lines) if line.strip().startswith(self.anchor)]
        assert len(found) == 1, f"{self.path}: {len(found)} lines begin with {self.anchor}"
        start = found[0] + (self.how == "after")
        lines[start : found[0] + (self.how != "before")] = [self.text]
        file.write_text("".join(lines), encoding="utf-8")


@dataclass(frozen=True)
class Addition:
    """A section: the list of changes, and the command at its end."""

    changes: tuple[Change, ...]
    command: list[str]

    @property
    def files(self) -> set[str]:
        return {change.path for change in self.changes}


def additions() -> dict[str, Addition]:
    """What the page says, by the titles of its sections."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Add something")[1]
    found = {}
    for section in page.split("\n### ")[1:]:
        title, _, text = section.partition("\n")
        changes = tuple(
            Change(
                item["path"],
                item["how"],
                (item["anchor"] or "").strip(),
                INDENT.sub("", item["text"]),
            )
            for item in ITEM.finditer(text)
        )
        # No item is overlooked because it is written in another way.
        assert len(changes) == len(re.findall(r"^\d+\. ", text, re.MULTILINE)), title
        (command,) = re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        found[title] = Addition(changes, shlex.split(command))
    return found


ADDITIONS = additions()


def digests(folder: Path) -> dict[str, str]:
    """Every file of a copy but Python's caches, by its path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if "__pycache__" not in path.parts
    }


def write_inputs(folder: Path) -> list[State]:
    """Three checkpoints of a layer in ``run``, and a bundle for the hyper-model of the page."""
    (folder / "drift-bundle").mkdir()
    content = {"target": "retrodiction", "rule": {"conv": [0, 0], "fc": FC, "bias": BIAS}}
    (folder / "drift-bundle" / "drift.json").write_text(json.dumps(content))
    generator = np.random.default_rng(0)
    states = []
    (folder / "run").mkdir()
    for k in range(3):
        state = {
            name: generator.standard_normal(shape, np.float32)
            for name, shape in {"fc.weight": (4, 3), "fc.bias": (4,)}.items()
        }
        save_file(state, folder / "run" / f"ckpt{k}.safetensors")
        states.append(state)
    return states


def is_average(folder: Path, states: list[State]) -> None:
    shares = np.array([1, 0.25, 0.0625]) / 1.3125
    written = load_file(folder / "ema.safetensors")
    assert written.keys() == states[0].keys()
    for name, values in written.items():
        expected = sum(share * state[name] for share, state in zip(shares, states, strict=True))
        np.testing.assert_allclose(values, expected, rtol=1e-5)


def is_counted(folder: Path, states: list[State]) -> None:
    assert (folder / "stdout").read_text() == "run/ckpt0.safetensors: 16 parameters\n"


def is_network(folder: Path, states: list[State]) -> None:
    printed = (folder / "stdout").read_text()
    assert "(conv3): Conv2d(16, 32, kernel_size=(1, 1), stride=(1, 1), bias=False)" in printed
    assert "(head): Linear(in_features=64, out_features=10, bias=True)" in printed


def is_task(folder: Path, states: list[State]) -> None:
    title, shape = (folder / "stdout").read_text().splitlines()
    # The pool has twice the samples of the pre-training; networks tell two classes apart.
    assert title == "upright and level stripes to rising and falling ones, a CNN; 128; 16 images"
    assert shape == "torch.Size([128, 2])"


def is_drift(folder: Path, states: list[State]) -> None:
    written = load_file(folder / "drift.safetensors")
    assert written.keys() == states[0].keys()
    for name, (early, late) in (("fc.weight", FC), ("fc.bias", BIAS)):
        oldest, middle, newest = (state[name].astype(np.float64) for state in reversed(states))
        means = (middle - oldest).mean(), (newest - middle).mean()
        spreads = (middle - oldest).std(), (newest - middle).std()
        # Step by step: the movements of the window, in units of what is recorded for each.
        scores = (
            (middle - oldest - means[0]) / spreads[0],
            (newest - middle - means[1]) / spreads[1],
        )
        first = newest + means[1] + spreads[1] * (early * scores[0] + late * scores[1])
        scores = scores[1], (first - newest - means[1]) / spreads[1]
        second = first + means[1] + spreads[1] * (early * scores[0] + late * scores[1])
        np.testing.assert_allclose(written[name], second, rtol=1e-4, atol=1e-5)


CHECKS: dict[str, Callable[[Path, list[State]], None]] = {
    "A method": is_average,
    "A command": is_counted,
    "A network": is_network,
    "A task": is_task,
    "A hyper-model": is_drift,
}


def copy(root: Path, *names: str) -> None:
    """Files and folders as they are, with Python's caches, so that little is compiled anew."""
    root.mkdir(parents=True)
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name)
        else:
            shutil.copy(ROOT / name, root / name)
    (root / "weights").symlink_to(ROOT / "weights")


def test_every_addition_works_and_touches_what_is_listed(tmp_path: Path) -> None:
    assert ADDITIONS.keys() == CHECKS.keys()
    runs, made = [], {}
    for title, addition in ADDITIONS.items():
        folder, root = tmp_path / title, tmp_path / title / "copy"
        copy(root, *LISTED)
        before = digests(root)
        for change in addition.changes:
            change.make(root)
        made[title] = before, write_inputs(folder)
        runs.append({"folder": str(folder), "root": str(root), "command": addition.command})
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps(runs),
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    for title, code in zip(ADDITIONS, json.loads(done.stdout), strict=True):
        folder, (before, states) = tmp_path / title, made[title]
        assert code == 0, f"{title}: {(folder / 'stderr').read_text()}"
        CHECKS[title](folder, states)
        after = digests(folder / "copy")
        changed = {name for name in before | after if before.get(name) != after.get(name)}
        assert changed == ADDITIONS[title].files, title


@pytest.mark.slow
def test_additions_pass_the_tests_of_their_neighbours(tmp_path: Path) -> None:
    root = tmp_path / "copy"
    others = ("tests", "pyproject.toml", "LICENSE", "CONTRIBUTING.md", "SECURITY.md", ".github")
    copy(root, *LISTED, *others, "CITATION.cff")
    for addition in ADDITIONS.values():
        for change in addition.changes:
            change.make(root)
    for name, chosen in {
        "test_architecture": "", "test_documentation": "methods or every_command or packages",
        "test_zoo": "mobilenetv1", "test_evaluation": "stripes",
    }.items():  # fmt: skip
        (file,) = (root / "tests").rglob(f"{name}.py")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-n", "0", "-k", chosen, file],
            capture_output=True, text=True, cwd=root, timeout=600, check=False,
            env={**os.environ, "PYTHONPATH": str(root)},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        assert " passed" in done.stdout
    for command in (
        ["ruff", "check", "know_cli"],
        ["ruff", "format", "--check", "know_cli"],
        ["mypy"],
    ):
        if shutil.which(command[0]):  # in the extra 'dev'
            done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout
