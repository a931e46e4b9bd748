"""``know forget`` as a user runs it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from know_cli.cli.forget import load_labels, parse_options, parse_rates
from know_cli.errors import EXIT_DONE, EXIT_USAGE, UsageError
from tests.support.command import Command, one_line

MODULE = """
import torch

def session(session):
    start = torch.zeros(3) if session.start is None else session.start["w"]
    if session.options.get("fail") == str(session.index):
        raise RuntimeError("out of luck")
    return {"w": start + len(session.indices)}, {"accuracy": 0.25}

names = ["a", "b"] * 20
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MODULE)
    return tmp_path


def test_records_and_goes_on(folder: Path, know: Command) -> None:
    arguments = ("mine.py:session", "run", "--labels", "mine:names", "--sessions", "3")
    broken = know("forget", *arguments, "--option", "fail=2", cwd=folder, process=True)
    assert broken.returncode == 2
    assert broken.stderr.splitlines()[-1] == (
        "know: error: mine.py:session: run, session 2: RuntimeError: out of luck; KNOW_DEBUG=1 "
        "shows the traceback"
    )
    assert sorted(path.name for path in (folder / "run").iterdir()) == [
        "ckpt0.safetensors",
        "ckpt1.safetensors",
        "trajectory.json",
    ]
    other = know("forget", *arguments, cwd=folder)
    assert other.returncode == 2
    assert "of another trajectory" in other.stderr
    debug = know("forget", *arguments, "--option", "fail=2", cwd=folder, KNOW_DEBUG="1")
    assert 'raise RuntimeError("out of luck")' in debug.stderr


def test_prints_a_line_a_session_and_a_result(folder: Path, know: Command) -> None:
    arguments = ("mine:session", "run", "--size", "40", "--sessions", "2", "--before", "1")
    done = know("forget", *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert "session 1" in lines[1]
    assert "10 samples" in lines[1]
    assert "accuracy 0.25" in lines[1]
    assert "continuation 1" in lines[2]
    assert done.stdout.startswith("run: 3 sessions trained")
    again = know("forget", *arguments, "--quiet", cwd=folder)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")


def test_one_of_anything_is_told_as_one(folder: Path, know: Command) -> None:
    arguments = ("mine:session", "run", "--size", "40", "--sessions", "2")
    done = know("forget", *arguments, cwd=folder)
    assert done.stdout.startswith("run: 2 sessions trained in ")
    (folder / "run" / "ckpt1.safetensors").unlink()
    again = know("forget", *arguments, cwd=folder)
    assert "run: 1 session is already there, continuing" in again.stderr
    assert again.stdout.startswith("run: 1 session trained in ")
    few = know("forget", "mine:session", "other", "--size", "1", cwd=folder)
    assert "1 sample is too few for 5 sessions at sampling rate 0.5" in one_line(few.stderr)


@pytest.mark.parametrize("when", ["imported", "called"])
def test_a_function_may_change_the_working_folder(when: str, folder: Path, know: Command) -> None:
    """Everything goes where its path led before, whatever the function does."""
    (folder / "elsewhere").mkdir()
    moves = f"os.chdir({str(folder / 'elsewhere')!r})"
    (folder / "moving.py").write_text(
        "import os, torch\n"
        f"{moves if when == 'imported' else ''}\n"
        "def session(session):\n"
        f"    {moves if when == 'called' else 'pass'}\n"
        "    return {'w': torch.full((2,), float(session.index))}\n"
    )
    np.save(folder / "labels.npy", np.arange(8) % 2)
    save_file({"w": torch.zeros(2)}, folder / "first.safetensors")
    given = ("--labels", "labels.npy", "--sessions", "3", "--from", "first.safetensors")
    done = know("forget", "moving.py:session", "run", *given, cwd=folder, process=True)
    assert done.returncode == EXIT_DONE, done.stderr
    assert done.stdout.startswith("run: 2 sessions trained")
    assert {path.name for path in (folder / "run").iterdir()} == {
        "ckpt0.safetensors", "ckpt1.safetensors", "ckpt2.safetensors", "trajectory.json"
    }  # fmt: skip
    assert not list((folder / "elsewhere").iterdir())


def test_numbers_that_no_machine_has(folder: Path, know: Command) -> None:
    """More threads than the system gives end the process; so many samples, a bug."""
    wrong = [("--threads", "100000", "--threads"), ("--size", str(10**20), f"{10**20} samples")]
    for option, number, named in wrong:
        refused = know("forget", "mine:session", "run", "--size", "40", option, number, cwd=folder)
        assert refused.returncode == EXIT_USAGE
        assert named in one_line(refused.stderr)
    assert not (folder / "run").exists()


def test_several_trajectories(folder: Path, know: Command) -> None:
    common = ("mine:session", "runs", "--size", "40", "--sessions", "2", "--rate", "0.3..0.9")
    refused = know("forget", *common, cwd=folder)
    assert refused.returncode == 2
    assert "--trajectories" in refused.stderr
    done = know("forget", *common, "--trajectories", "3", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["0000", "0001", "0002"]
    assert done.stdout.startswith("runs: 3 trajectories, 6 sessions trained")


def test_arguments(tmp_path: Path) -> None:
    assert parse_rates("0.5") == (0.5, 0.5)
    assert parse_rates("0.3..0.9") == (0.3, 0.9)
    assert parse_rates("1/3") == (1 / 3, 1 / 3)
    for wrong in ("", "0", "1", "0.9..0.3", "0.1..0.2..0.3", "half", "nan"):
        with pytest.raises(UsageError, match="--rate"):
            parse_rates(wrong)
    assert parse_options(["a=1", "b=x=y", "c="]) == {"a": "1", "b": "x=y", "c": ""}
    for pairs in (["a"], ["=1"], ["a=1", "a=2"]):
        with pytest.raises(UsageError, match="KEY=VALUE"):
            parse_options(pairs)
    np.save(tmp_path / "labels.npy", np.arange(4))
    assert load_labels(str(tmp_path / "labels.npy")).tolist() == [0, 1, 2, 3]
    np.save(tmp_path / "square.npy", np.ones((2, 2)))
    (tmp_path / "text.npy").write_text("no array")
    np.savez(tmp_path / "several.npz", one=np.arange(4))
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    for name in ("square.npy", "text.npy", "missing.npy", "several.npy"):
        with pytest.raises(UsageError, match=name):
            load_labels(str(tmp_path / name))


def test_starts_every_session_from_a_given_checkpoint(folder: Path, know: Command) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    save_file({"w": torch.full((3,), 1000.0)}, folder / "start.safetensors")
    done = know("forget",
        "mine.py:session", "run", "--labels", "mine:names", "--sessions", "3", "--start", "start.safetensors", cwd=folder)  # fmt: skip
    assert done.returncode == 0, done.stderr
    values = [load_file(folder / "run" / f"ckpt{k}.safetensors")["w"][0].item() for k in range(3)]
    assert values == [1040, 1020, 1010]
    done = know(
        "forget", "mine.py:session", "x", "--size", "9", "--start", "no.safetensors", cwd=folder
    )
    assert done.returncode == 3
    assert "no.safetensors: no such file" in done.stderr


def test_a_model_that_is_trained_already_is_session_0(folder: Path, know: Command) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    (folder / "public").mkdir()
    save_file({"w": torch.full((3,), 1000.0)}, folder / "public" / "model.safetensors")
    record = (
        "forget", "mine.py:session", "run", "--labels", "mine:names", "--sessions", "3",
        "--from", "public",
    )  # fmt: skip
    done = know(*record, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "2 sessions trained" in done.stdout
    values = [load_file(folder / "run" / f"ckpt{k}.safetensors")["w"][0].item() for k in range(3)]
    assert values == [1000, 1020, 1030]  # as it was, then 20 and 10 of 40 samples
    found = know("predict", *(f"run/ckpt{k}" for k in range(3)), "--method", "average", "-o",
                 "out.safetensors", cwd=folder)  # fmt: skip
    assert found.returncode == 0, found.stderr
    done = know(*record, cwd=folder)
    assert "0 sessions trained" in done.stdout
    save_file({"w": torch.full((3,), 1001.0)}, folder / "public" / "model.safetensors")
    other = know(*record, cwd=folder)
    assert other.returncode == 2
    assert "is of another trajectory" in other.stderr
    assert "options, function or start differ; record into another folder" in other.stderr
    both = know(*record, "--start", "public/model.safetensors", cwd=folder)
    assert both.returncode == 2
    assert "--start and --from exclude each other" in " ".join(both.stderr.split())
