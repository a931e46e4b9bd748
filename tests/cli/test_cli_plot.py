"""``know plot`` as its users run it."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from know_cli.errors import EXIT_CHECKPOINT, EXIT_DONE, EXIT_OUTPUT, EXIT_USAGE
from know_cli.evaluation import results
from tests.support.command import Command, one_line
from tests.support.trajectories import flat, states, write_trajectory

RESULTS = Path(results.__file__).parents[2] / "docs" / "results" / "downstream.json"
MEASURES = """
import torch
from safetensors.torch import load_file

first = load_file("ckpt0.safetensors")
PREDICTED = [n for n, t in first.items() if t.is_floating_point() and "running" not in n]
none = 7

def distance(state):
    assert list(state) and torch.equal(state["bn1.running_mean"], first["bn1.running_mean"])
    moved = [state[n].double() - first[n].double() for n in PREDICTED if "half" not in n and "brain" not in n]
    squared = sum(float(m.square().sum()) for m in moved)
    for tensor in state.values():
        tensor.zero_()  # what it is given is its own
    return squared

def level(state): return torch.tensor(0.5)
def fails(state): raise KeyError("no such layer\\nin the model")
def leaves(state): raise SystemExit("enough")
def nothing(state): pass
def infinite(state): return float("inf")
"""
PNG = b"\x89PNG\r\n\x1a\n"


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def texts(svg: Path) -> str:
    """Matplotlib draws letters as paths, and leaves the text beside them as comments."""
    content = svg.read_text(encoding="utf-8")
    assert ElementTree.fromstring(content).tag.endswith("svg")
    return content


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_names_in_scripts_that_the_font_lacks_are_drawn_without_a_word(
    suffix: str, tmp_path: Path, know: Command
) -> None:
    """Chinese and Tamil, of which matplotlib warns in two ways; a warning is not for users."""
    write_trajectory(tmp_path, states())
    arguments = ["--other", "权重=ckpt3", "--other", "எடை=ckpt4"]
    done = know(
        "plot",
        "trajectory",
        "ckpt0..ckpt2",
        *arguments,
        "-o",
        f"t.{suffix}",
        cwd=tmp_path,
        process=True,
    )
    assert done.returncode == EXIT_DONE, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("measuring ")
    assert "权重" in done.stdout


def test_trajectory(tmp_path: Path, know: Command) -> None:
    trajectory = states()
    write_trajectory(tmp_path, trajectory)
    done = know(
        "predict", "ckpt0..ckpt4", "-o", "p.safetensors", "--method", "linear", cwd=tmp_path
    )
    assert done.returncode == EXIT_DONE, done.stderr
    arguments = [
        "plot", "trajectory", "ckpt0..ckpt4", "--prediction", "p", "--other", "last one=ckpt4",
        "-o", "t.svg", "--json", "t.json",
    ]  # fmt: skip
    done = know(*arguments, cwd=tmp_path, process=True)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "wrote t.svg" in done.stdout
    drawn = texts(tmp_path / "t.svg")
    # The legend; letters beside points have a halo, which leaves no comment.
    for text in ("sessions, Θ0 to Θ4", "predicted by linear", "% of squared distances)"):
        assert text in drawn, text
    assert "<dc:date>" not in drawn

    found = json.loads((tmp_path / "t.json").read_text())
    names = ["Θ0", "Θ1", "Θ2", "Θ3", "Θ4", "linear step 1", "last one"]
    assert [point["name"] for point in found["points"]] == names
    assert [point["role"] for point in found["points"]] == [*["session"] * 5, "prediction", "other"]
    vectors = np.stack([flat(state) for state in trajectory])
    assert found["parameters"] == len(vectors[0])
    expected = np.linalg.norm(vectors[:, None] - vectors[None], axis=-1)
    np.testing.assert_allclose(np.array(found["distances"])[:5, :5], expected, rtol=1e-6)
    assert found["distances"][4][6] == 0
    assert sum(found["shares"]) == pytest.approx(1)
    coordinates = np.array([point["coordinates"] for point in found["points"]])
    between = np.linalg.norm(coordinates[:, None] - coordinates[None], axis=-1)
    np.testing.assert_allclose(between, found["distances"], atol=1e-6)

    # The same bytes again, whatever the user's own settings are.
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nlines.linewidth: 9\n")
    done = know(*arguments, "--force", "-q", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_DONE, "", "")
    assert (tmp_path / "t.svg").read_text(encoding="utf-8") == drawn
    assert not [name for name in files(tmp_path) if name.endswith(".tmp")]


def test_trajectory_as_png(tmp_path: Path, know: Command) -> None:
    write_trajectory(tmp_path)
    done = know("plot", "trajectory", "ckpt0..ckpt1", "-o", "T.PNG", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "axis 2 (0.0%)" in done.stdout
    first = (tmp_path / "T.PNG").read_bytes()
    assert first.startswith(PNG)
    done = know("plot", "trajectory", "ckpt0..ckpt1", "-o", "T.PNG", "--force", cwd=tmp_path)
    assert (tmp_path / "T.PNG").read_bytes() == first


def test_trajectory_by_files_with_an_equals_sign(tmp_path: Path, know: Command) -> None:
    write_trajectory(tmp_path)
    save_file(states(6)[5], tmp_path / "a=b.safetensors")
    done = know(
        "plot", "trajectory", "ckpt0..ckpt4", "--prediction", "a=b", "--prediction", "mine=a=b",
        "-o", "t.png", "--json", "t.json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    points = json.loads((tmp_path / "t.json").read_text())["points"]
    assert [point["name"] for point in points[5:]] == ["a=b", "mine"]


def test_landscape(tmp_path: Path, know: Command) -> None:
    trajectory = states(3)
    write_trajectory(tmp_path, trajectory)
    (tmp_path / "measures.py").write_text(MEASURES)
    done = know(
        "plot", "landscape", "ckpt0..ckpt2", "--evaluate", "measures:distance", "--grid", 5,
        "--label", "squared distance", "--kind", "half.*=copy", "--kind", "brain.*=copy",
        "-o", "l.png", "--json", "l.json", cwd=tmp_path, process=True,
    )  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    assert "evaluating 25 points" in done.stderr
    assert "squared distance: " in done.stdout
    assert (tmp_path / "l.png").read_bytes().startswith(PNG)
    found = json.loads((tmp_path / "l.json").read_text())
    assert (found["function"], found["label"]) == ("measures:distance", "squared distance")
    # Three checkpoints lie in their plane, where distances are those on paper.
    x0, y0 = found["points"][0]["coordinates"]
    grid = found["grid"]
    x, y = np.meshgrid(grid["x"], grid["y"])
    expected = (x - x0) ** 2 + (y - y0) ** 2
    assert expected.shape == (5, 5)
    np.testing.assert_allclose(grid["values"], expected, rtol=1e-4)


def test_landscape_of_a_flat_measure_as_svg(tmp_path: Path, know: Command) -> None:
    write_trajectory(tmp_path)
    (tmp_path / "measures.py").write_text(MEASURES)
    done = know(
        "plot", "landscape", "ckpt0..ckpt4", "--evaluate", "measures.py:level", "--grid", 3,
        "--margin", 0, "-o", "l.svg", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    assert "level: 0.5 to 0.5" in done.stdout
    assert "level" in texts(tmp_path / "l.svg")


def test_results(tmp_path: Path, know: Command) -> None:
    arguments = [
        "plot",
        "results",
        RESULTS,
        "-o",
        "r.svg",
        "--task",
        "text-*",
        "--method",
        "average",
    ]
    done = know(*arguments, cwd=tmp_path, process=True)
    assert done.returncode == EXIT_DONE, done.stderr
    assert done.stdout == "wrote r.svg\n"
    drawn = texts(tmp_path / "r.svg")
    for text in ("text-lora", "text-language-model", "average", "oracle", "longer", "×2"):
        assert text in drawn, text
    assert "fashion" not in drawn
    assert "retrodiction" not in drawn
    done = know(*arguments, cwd=tmp_path)
    assert done.returncode == EXIT_OUTPUT
    assert "r.svg: exists already; --force replaces it" in one_line(done.stderr)
    done = know(*arguments, "--force", "-q", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (EXIT_DONE, "")
    assert texts(tmp_path / "r.svg") == drawn


TRAJECTORY = "trajectory ckpt0..ckpt4 -o"
LANDSCAPE = "landscape ckpt0..ckpt4 -o l.png --grid 3 --evaluate"
REFUSED = {
    "format": (f"{TRAJECTORY} t.pdf", EXIT_USAGE, "-o t.pdf: pictures are written as .png or .svg"),
    "no suffix": ("results r.json -o r", EXIT_USAGE, "pictures are written as"),
    "no folder": (f"{TRAJECTORY} no/t.png", EXIT_OUTPUT, "mkdir -p no"),
    "a folder": (f"{TRAJECTORY} folder.png", EXIT_OUTPUT, "is a folder; name a file"),
    "exists": (f"{TRAJECTORY} there.png", EXIT_OUTPUT, "exists already; --force replaces it"),
    "in an input": (f"{TRAJECTORY} folder.png/t.png --other x=folder.png", EXIT_OUTPUT, "-o folder.png/t.png: is an input or an output"),
    "json is an input": (f"{TRAJECTORY} t.png --json ckpt1.safetensors", EXIT_OUTPUT, "--json ckpt1.safetensors: is an input or an output"),
    "json is the picture": (f"{TRAJECTORY} t.png --json t.png", EXIT_OUTPUT, "name another file"),
    "one checkpoint": ("trajectory ckpt0 -o t.png", EXIT_USAGE, "got 1 checkpoint"),
    "missing": ("trajectory ckpt0 ckpt9 -o t.png", EXIT_CHECKPOINT, "ckpt9: no such file"),
    "missing prediction": (f"{TRAJECTORY} t.png --prediction p", EXIT_CHECKPOINT, "p: no such file"),
    "named missing prediction": (f"{TRAJECTORY} t.png --prediction x=p", EXIT_CHECKPOINT, "p: no such file"),
    "other without name": (f"{TRAJECTORY} t.png --other ckpt1", EXIT_USAGE, "--other ckpt1: write NAME=FILE"),
    "other model": (f"{TRAJECTORY} t.png --other x=other", EXIT_CHECKPOINT, "not of one model"),
    "same name": (f"{TRAJECTORY} t.png --prediction Θ0=ckpt1", EXIT_USAGE, "name one yourself: NAME=FILE"),
    "kind": (f"{TRAJECTORY} t.png --kind x=copy", EXIT_USAGE, "matches no tensor"),
    "kind of no kind": (f"{TRAJECTORY} t.png --kind x=much", EXIT_USAGE, "write PATTERN=KIND"),
    "nothing counts": (f"{TRAJECTORY} t.png --kind *=copy", EXIT_USAGE, "no parameters of kinds"),
    "all the same": ("trajectory ckpt0 same -o t.png", EXIT_USAGE, "the same weights: there is nothing to draw"),
    "not finite": ("trajectory ckpt0 nan -o t.png", EXIT_CHECKPOINT, "tensor 'fc.bias' has values that are not finite"),
    "on a line": ("landscape ckpt0 ckpt1 -o l.png --evaluate measures:level", EXIT_USAGE, "on one line"),
    "no module": (f"{LANDSCAPE} nowhere:level", EXIT_USAGE, "no module 'nowhere' here or installed"),
    "no file": (f"{LANDSCAPE} nowhere.py:level", EXIT_USAGE, "nowhere.py: no such file"),
    "no name": (f"{LANDSCAPE} measures", EXIT_USAGE, "write it as module:name or file.py:name"),
    "no attribute": (f"{LANDSCAPE} measures:levle", EXIT_USAGE, "measures has no 'levle'"),
    "no function": (f"{LANDSCAPE} measures:none", EXIT_USAGE, "measures:none: is an int, not a function"),
    "broken module": (f"{LANDSCAPE} broken:level", EXIT_USAGE, "broken:level: import: ZeroDivisionError"),
    "raises": (f"{LANDSCAPE} measures:fails", EXIT_USAGE, "measures:fails: evaluation: KeyError"),
    "exits": (f"{LANDSCAPE} measures:leaves", EXIT_USAGE, "measures:leaves: evaluation: SystemExit: enough"),
    "returns nothing": (f"{LANDSCAPE} measures:nothing", EXIT_USAGE, "returned a NoneType, not a number"),
    "returns no finite number": (f"{LANDSCAPE} measures:infinite", EXIT_USAGE, "returned inf, not a finite number"),
    "grid": (f"{LANDSCAPE} measures:level --grid 2", EXIT_USAGE, "--grid"),
    "no results": ("results nowhere.json -o r.png", EXIT_USAGE, "nowhere.json: cannot be read: No such file"),
    "other results": ("results r.json -o r.png", EXIT_USAGE, "r.json: is not a result of 'know eval'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, know: Command, case: str) -> None:
    trajectory = states()
    write_trajectory(tmp_path, trajectory)
    (tmp_path / "folder.png").mkdir()
    save_file(trajectory[0], tmp_path / "folder.png" / "model.safetensors")
    (tmp_path / "there.png").write_text("mine")
    (tmp_path / "measures.py").write_text(MEASURES)
    (tmp_path / "broken.py").write_text("1 / 0\ndef level(state): return 1.0\n")
    (tmp_path / "r.json").write_text("{}")
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    save_file(trajectory[0], tmp_path / "same.safetensors")
    save_file(
        {**trajectory[0], "fc.bias": torch.full((20,), float("nan"))}, tmp_path / "nan.safetensors"
    )
    before = files(tmp_path)
    arguments, code, message = REFUSED[case]
    done = know("plot", *arguments.split(), cwd=tmp_path)
    assert message in one_line(done.stderr)
    assert done.returncode == code
    assert files(tmp_path) - {"__pycache__"} == before
    assert (tmp_path / "there.png").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments",
    [
        "trajectory ckpt0..ckpt4 -o t.png",
        "landscape ckpt0..ckpt4 -o l.png --evaluate measures:level",
        f"results {RESULTS} -o r.png",
    ],
)
def test_without_matplotlib_no_work_is_begun(
    tmp_path: Path, know: Command, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    write_trajectory(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = know("plot", *arguments.split(), cwd=tmp_path)
    assert done.returncode == EXIT_USAGE
    assert "pip install 'know-predict[plot]'" in one_line(done.stderr)
    assert "measuring" not in done.stderr


def test_an_interrupted_landscape_leaves_nothing(tmp_path: Path, know: Command) -> None:
    write_trajectory(tmp_path)
    (tmp_path / "measures.py").write_text("def stop(state): raise KeyboardInterrupt\n")
    before = files(tmp_path)
    done = know(
        "plot", "landscape", "ckpt0..ckpt4", "--evaluate", "measures:stop", "-o", "l.png",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 130
    assert "interrupted" in one_line(done.stderr)
    assert files(tmp_path) - {"__pycache__"} == before
