"""Pictures of runs and branches: labels, directions and what is measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.errors import EXIT_DONE, EXIT_USAGE
from know_cli.plots import points
from know_cli.plots.trajectory import draw_trajectory
from tests.support.command import Command, one_line

PLACES = {"100": (0.0, 0.25), "200": (3.0, 0.5), "300": (4.0, 5.5)}


def write(folder: Path, name: str, place: tuple[float, ...], **more: torch.Tensor) -> Path:
    path = folder / f"{name}.safetensors"
    save_file({"fc.weight": torch.tensor([[*place], [0.25, 0.75]]), **more}, path)
    return path


def test_a_run_goes_from_its_oldest_checkpoint_to_its_latest(tmp_path: Path, know: Command) -> None:
    for step, place in PLACES.items():
        write(tmp_path, f"checkpoint-{step}", place)
    done = know("predict", ".", "--trajectory", "run", "-o", "mean", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    done = know("plot", "trajectory", "checkpoint-*", "--trajectory", "run", "-o", "a.svg",
                "--prediction", "mean", "--json", "found.json", cwd=tmp_path)  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    assert "put right to the latest first: 300, 200, 100" in done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["points"]
    # A mean is of no step, beside those of the training.
    names = ["step 300", "step 200", "step 100", "average lora=exact shape=uniform"]
    assert [point["name"] for point in found] == names
    assert [point["role"] for point in found] == ["checkpoint"] * 3 + ["prediction"]
    # Time goes from left to right.
    assert found[0]["coordinates"][0] > found[2]["coordinates"][0]
    assert "run, 100 to 300" in (tmp_path / "a.svg").read_text()
    done = know("plot", "trajectory", ".", "--trajectory", "run", "--last", "2", "-o", "b.svg",
                cwd=tmp_path)  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    assert "step 300" in done.stdout
    assert "step 100" not in done.stdout
    done = know("plot", "trajectory", ".", "-o", "c.svg", cwd=tmp_path)
    assert done.returncode == EXIT_USAGE
    assert "add --trajectory run" in one_line(done.stderr)


def test_branches_start_at_their_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write(tmp_path, "start", (0.0, 0.0), pool=torch.rand(2, 2))]
    paths += [write(tmp_path, f"b{k}", place) for k, place in enumerate(PLACES.values())]
    drawn: list[tuple[list[float], list[float]]] = []
    monkeypatch.setattr(
        "know_cli.plots.trajectory._arrow",
        lambda axes, start, end, *look: drawn.append((start.tolist(), end.tolist())),
    )
    with points.open_points(paths, kind=TrajectoryKind.BRANCHES) as opened:
        assert [point.name for point in opened.points] == ["Θ0", "branch 1", "branch 2", "branch 3"]
        # What a branch does not have is not measured.
        assert points.measured_tensors(opened.trajectory, ()) == ["fc.weight"]
        where = np.array([(0.0, 0.0), *PLACES.values()])
        content = draw_trajectory(opened.points, where, np.array([0.75, 0.25]), ".svg")
    assert content.startswith(b"<?xml")
    assert drawn == [([0.0, 0.0], list(place)) for place in PLACES.values()]


def test_a_run_without_steps_has_the_names_of_a_forgetting(tmp_path: Path) -> None:
    paths = [write(tmp_path, name, PLACES[step]) for name, step in (("b", "300"), ("a", "100"))]
    with points.open_points(paths, kind=TrajectoryKind.RUN) as opened:
        assert [point.name for point in opened.points] == ["Θ0", "Θ1"]
