"""``know demo`` on real data, and the library behind it."""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from know_cli import demo
from know_cli.errors import EXIT_DONE, EXIT_OUTPUT, EXIT_USAGE
from know_cli.lab.digits import load_digits
from tests.support.command import Command, one_line


@pytest.fixture(scope="module")
def recorded(
    tmp_path_factory: pytest.TempPathFactory, know: Command
) -> tuple[Path, CompletedProcess[str]]:
    """A folder in which the demo was run, in a process of its own, and what it said."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, know("demo", "run", "--fine-tunings", 3, cwd=folder, process=True)


def own_numbers(stdout: str) -> list[str]:
    """Lines with numbers, but for those of the prediction, which is a program of its own."""
    lines = [line for line in stdout.splitlines() if "%" in line]
    own = [line for line in lines if not line.startswith(("conv", "fc", "bias"))]
    assert len(own) > 8
    return own


def test_demo(recorded: tuple[Path, CompletedProcess[str]], know: Command) -> None:
    folder, done = recorded
    assert done.returncode == EXIT_DONE, done.stderr
    lines = done.stdout.splitlines()
    command = next(line for line in lines if line.startswith("$ "))
    assert (
        command
        == "$ know-predict run/ckpt0..ckpt4 -o run/predicted.safetensors --steps 3 --every-step"
    )
    for words in ("x8 the data: 3 steps from 5 checkpoints at rate 0.5", "first checkpoint", "predicted x2",
                  "predicted x4", "predicted x8", "really continued on x2", "fresh weights"):  # fmt: skip
        assert words in done.stdout
    names = {path.name for path in (folder / "run").iterdir()}
    assert names == {
        *(f"ckpt{k}.safetensors" for k in range(5)), "continued1.safetensors", "trajectory.json",
        "predicted.safetensors", "predicted.x2.safetensors", "predicted.x4.safetensors",
    }  # fmt: skip
    again = know("demo", "run", "--fine-tunings", 3, cwd=folder)
    assert again.returncode == EXIT_DONE, again.stderr
    assert "training" not in again.stderr
    assert own_numbers(again.stdout) == own_numbers(done.stdout)
    other = know("demo", "run", "--seed", 5, cwd=folder)
    assert other.returncode == EXIT_USAGE
    assert "another trajectory" in one_line(other.stderr)


def test_demo_needs_a_parent_folder(tmp_path: Path, know: Command) -> None:
    done = know("demo", "no/run", cwd=tmp_path)
    assert done.returncode == EXIT_OUTPUT
    assert "mkdir -p no" in one_line(done.stderr)


def test_a_failing_prediction_ends_the_demo_with_its_code(
    recorded: tuple[Path, CompletedProcess[str]], know: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, _ = recorded
    done = know("demo", "run", "--weights", "nothing", cwd=folder)
    assert done.returncode == EXIT_USAGE
    # Said by the program that it starts.
    assert "neither a folder with a hyper-model" in capfd.readouterr().err


def test_the_tasks_share_no_image() -> None:
    first, _ = demo._images(downstream=False)
    second, labels = demo._images(downstream=True)
    assert len(first) + len(second) == len(load_digits("demo")[0])
    assert labels.unique().tolist() == list(range(10))
    flat = {tuple(image.reshape(-1).tolist()) for image in first}
    assert not any(tuple(image.reshape(-1).tolist()) in flat for image in second)


def test_same_start_same_accuracy(tmp_path: Path) -> None:
    from know_cli.checkpoints import save_checkpoint
    from know_cli.lab.digits import build_model

    state = dict(build_model(3).state_dict())
    for name in ("a", "b"):
        save_checkpoint(tmp_path / name, state, {})
    torch.manual_seed(99)
    rows = demo.fine_tune({"a": tmp_path / "a", "b": tmp_path / "b"}, 0, 2, lambda text: None)
    assert rows[0].accuracy == rows[1].accuracy
    assert (rows[1].difference, rows[1].interval) == (0.0, 0.0)
