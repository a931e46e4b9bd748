"""``know inspect``, help, version, and how light the start is."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from know_cli import __version__
from know_cli.errors import EXIT_CHECKPOINT, EXIT_DONE, EXIT_USAGE
from tests.support.command import Command, one_line
from tests.support.forkserver import ForkServer
from tests.support.trajectories import states, write_trajectory

COMMANDS = [
    "predict", "verify", "inspect", "demo", "forget", "collect", "train", "eval", "plot", "bench",
    "convert",
]  # fmt: skip
PLOTS = ["trajectory", "landscape", "results"]


def test_inspect_measures_steps_and_cosines(tmp_path: Path, know: Command) -> None:
    trajectory = states()
    write_trajectory(tmp_path, trajectory)
    done = know("inspect", "ckpt0..ckpt4", "--json", "i.json", cwd=tmp_path, process=True)
    assert done.returncode == EXIT_DONE, done.stderr
    for words in ("5 checkpoints, sampling rate not recorded", "length of step", "cosine of steps",
                  "tensors frozen: frozen.weight", "tensors with values that are not finite: none"):  # fmt: skip
        assert words in done.stdout
    found = json.loads((tmp_path / "i.json").read_text())
    steps = [
        (b["conv1.weight"].double() - a["conv1.weight"].double()).reshape(-1)
        for a, b in itertools.pairwise(trajectory)
    ]
    lengths = found["kinds"]["conv"]["step_lengths"]
    assert lengths == pytest.approx([float(step.norm()) for step in steps])
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in itertools.pairwise(steps)]
    assert found["kinds"]["conv"]["cosines"] == pytest.approx(cosines)
    assert found["warnings"] == []


def test_inspect_warns_in_words(tmp_path: Path, know: Command) -> None:
    trajectory = states()
    trajectory[1]["fc.weight"][0, 0] = float("inf")
    trajectory[4] = {name: tensor.clone() for name, tensor in trajectory[3].items()}
    write_trajectory(tmp_path, trajectory)
    done = know("inspect", "ckpt0..ckpt4", cwd=tmp_path)
    assert done.returncode == EXIT_DONE
    assert "warning: ckpt3.safetensors and ckpt4.safetensors have the same weights" in done.stdout
    assert "fc.weight in ckpt1.safetensors (1)" in done.stdout
    done = know("inspect", "ckpt3..ckpt0", cwd=tmp_path)
    assert "as if the checkpoints were given in reverse" in done.stdout


def test_inspect_counts_conv_fc_and_bias_together(tmp_path: Path, know: Command) -> None:
    trajectory = states()
    write_trajectory(tmp_path, trajectory)
    done = know(
        "inspect", "ckpt0..ckpt4", "--json", "i.json", "--kind", "fc.weight=copy", cwd=tmp_path
    )
    assert done.returncode == EXIT_DONE, done.stderr
    found = json.loads((tmp_path / "i.json").read_text())
    parts = [found["kinds"][kind] for kind in ("conv", "fc", "bias")]
    assert found["total"]["parameters"] == sum(part["parameters"] for part in parts)
    squares = [sum(p["step_lengths"][k] ** 2 for p in parts) for k in range(4)]
    assert found["total"]["step_lengths"] == pytest.approx([square**0.5 for square in squares])
    # Overridden, the matrix is among the copied.
    assert found["kinds"]["copy"]["parameters"] >= 20 * 33


def test_inspect_says_when_there_is_nothing_to_predict(tmp_path: Path, know: Command) -> None:
    still = {"a.weight": torch.ones(3, 3), "inv_freq": torch.ones(4), "b.inv_freq": torch.ones(4)}
    write_trajectory(tmp_path, [still] * 2)
    done = know("inspect", "ckpt0..ckpt1", cwd=tmp_path)
    assert "no tensor changes over the checkpoints" in done.stdout
    moving = [{**still, "a.weight": torch.ones(3, 3) * (1 + k)} for k in range(2)]
    write_trajectory(tmp_path, moving)
    done = know("inspect", "ckpt0..ckpt1", cwd=tmp_path)
    assert "warning" not in done.stdout
    assert "frozen: none" in done.stdout
    barely = [{"a.weight": torch.tensor([[1.0, 1.0 + 2e-7 * k]])} for k in range(2)]
    write_trajectory(tmp_path, barely)
    done = know("inspect", "ckpt0..ckpt1", cwd=tmp_path)
    assert "of their norm: nothing was forgotten" in done.stdout


@pytest.mark.parametrize("trajectory", ["forgetting", "branches"])
def test_inspect_sees_steps_that_only_float64_has(
    trajectory: str, tmp_path: Path, know: Command
) -> None:
    """And calls not finite what a prediction does, which is what float32 cannot hold."""
    values = 1e12 + torch.arange(64, dtype=torch.float64).reshape(8, 8)
    large = 1e30 * values
    large[0, 0] = 1e-9  # so that not all are whole numbers, as no weights are
    moving = [
        {"a.weight": values + k / 1024, "b.weight": large * 1.1**k, "still.weight": values,
         "mixed.weight": (values / 1e12).to(torch.float64 if k else torch.float32) + k * 1e-12}
        for k in range(3)
    ]  # fmt: skip
    write_trajectory(tmp_path, moving)
    done = know(
        "inspect", "ckpt0..ckpt2", "--trajectory", trajectory, "--json", "i.json", cwd=tmp_path
    )
    assert done.returncode == EXIT_DONE, done.stderr
    assert "same weights" not in done.stdout
    found = json.loads((tmp_path / "i.json").read_text())
    assert found["frozen"] == ["still.weight"]
    assert {(bad["tensor"], bad["values"]) for bad in found["nonfinite"]} == {("b.weight", 63)}
    of = ("distances", [1, 2]) if trajectory == "branches" else ("step_lengths", [1, 1])
    lengths = [8 / 1024 * length for length in of[1]]
    assert found["total"][of[0]] == pytest.approx(lengths, rel=1e-3)
    (refused,) = [text for text in found["warnings"] if "not finite" in text]
    assert "b.weight in ckpt0.safetensors" in refused
    done = know("predict", "ckpt0..ckpt2", "-o", "out", "--method", "average", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT
    assert "tensor 'b.weight': has values that are not finite" in one_line(done.stderr)


def test_any_terminal_can_show_it(tmp_path: Path, server: ForkServer) -> None:
    write_trajectory(tmp_path)
    done = server.complete("inspect", "ckpt0..ckpt4", cwd=tmp_path, encoding="ascii")
    assert done.returncode == EXIT_DONE, done.stderr
    assert done.stdout.isascii()


def test_any_terminal_can_show_the_help(know: Command) -> None:
    done = know("predict", "--help", python=True, PYTHONIOENCODING="ascii")
    assert done.returncode == EXIT_DONE, done.stderr
    assert done.stdout.startswith("Usage: ")


def test_inspect_shows_recorded_sessions(tmp_path: Path, know: Command) -> None:
    recorded = [
        {"know.session": str(k), "know.fraction": str(0.5**k), "know.rate": "0.5", "know.trajectory": "t"}
        for k in range(5)
    ]  # fmt: skip
    write_trajectory(tmp_path, metadata=recorded)
    done = know("inspect", "ckpt4..ckpt0", cwd=tmp_path)
    assert "put right to 0, 1, 2, 3, 4" in done.stderr
    assert "sampling rate 0.5" in done.stdout
    assert "0.0625" in done.stdout


def test_inspect_refuses_like_predict(tmp_path: Path, know: Command) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "a.safetensors")
    save_file({"y": torch.ones(1)}, tmp_path / "b.safetensors")
    done = know("inspect", "a", "b", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT
    assert "not of one model" in one_line(done.stderr)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, know: Command) -> None:
    done = know(command, "--help")
    assert done.returncode == EXIT_DONE
    assert done.stderr == ""
    assert f"know {command}" in done.stdout
    assert know(command, "-h").stdout == done.stdout


def test_family_help_and_version(know: Command) -> None:
    done = know("--help")
    assert all(command in done.stdout for command in COMMANDS)
    assert know("--version").stdout == f"know-predict {__version__}\n"
    done = know("prdict")
    assert done.returncode == EXIT_USAGE
    assert "No such command 'prdict'" in one_line(done.stderr)


@pytest.mark.parametrize("group", [[], ["plot"]])
def test_commands_of_commands_without_one_show_help(group: list[str], know: Command) -> None:
    done = know(*group)
    assert done.returncode == EXIT_USAGE
    assert done.stderr.startswith("Usage: know")
    assert "Commands:\n" in done.stderr
    assert done.stdout == ""
    done = know("plot", "trajectori")
    assert "No such command 'trajectori'" in one_line(done.stderr)


@pytest.mark.parametrize("picture", PLOTS)
def test_every_picture_has_help(picture: str, know: Command) -> None:
    done = know("plot", picture, "--help")
    assert done.returncode == EXIT_DONE
    assert f"know plot {picture}" in done.stdout
    assert picture in know("plot", "--help").stdout


LIGHT = [
    ["--help"], ["--version"], *([command, "--help"] for command in COMMANDS),
    ["predict"], ["predict", "a", "-o", "b", "--steps", "0"], ["predict", "a", "-o", "b", "--rate", "x"],
    ["convert", "here"], ["convert", "here", "-o", "there"], ["verify", "a"], ["verify", "here", "there", "missing"],
    ["predict", "missing", "-o", "b"], ["predict", "here", "-o", "b"],
    ["predict", "here", "there", "-o", "b", "--device", "tpu"],
    ["predict", "here", "there", "-o", "b", "--weights", "nothing"],
    ["predict", "here", "there", "-o", "b", "--method", "best"],
    ["predict", "here", "there", "-o", "b", "--method", "tsv", "--option", "beta=1"],
    ["predict", "here", "there", "-o", "b", "--method", "tsv", "--weights", "continuation"],
    *(["plot", picture, "--help"] for picture in PLOTS), ["plot"],
    ["plot", "trajectory", "here", "there", "-o", "b.pdf"], ["plot", "trajectory", "here", "-o", "b.png"],
    ["plot", "landscape", "here", "there", "-o", "b.png"], ["plot", "results", "here", "-o", "b"],
    ["plot", "trajectory", "here", "there", "-o", "b.png", "--other", "x"],
]  # fmt: skip


#: Runs each command line in a fork of a process that has run none but the first.
LIGHT_RUNS = """
import gc, io, json, os, sys
from contextlib import redirect_stdout
import typer
from know_cli.cli.main import family_app, run

command = typer.main.get_command(family_app())
with redirect_stdout(io.StringIO()):
    run(command, "know", ["predict", "--help"])
gc.freeze()
for arguments in json.loads(sys.argv[1]):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        try:
            code = run(command, "know", arguments)
            heavy = {"torch", "numpy", "safetensors", "matplotlib", "sklearn"} & set(sys.modules)
            os.write(writer, json.dumps([code, sorted(heavy)]).encode())
        finally:
            os._exit(0)
    os.close(writer)
    print(os.read(reader, 1000).decode())
    os.close(reader)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def light_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[object]]:
    """How each command line ended: the exit code, and what of all that is heavy it imported."""
    folder = tmp_path_factory.mktemp("light")
    for name in ("here", "there"):
        (folder / name).write_text("never read")
    done = subprocess.run(
        [sys.executable, "-c", LIGHT_RUNS, json.dumps(LIGHT)],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    ends = (json.loads(line) for line in done.stdout.splitlines())
    return {" ".join(words): end for words, end in zip(LIGHT, ends, strict=True)}


@pytest.mark.parametrize("arguments", [" ".join(words) for words in LIGHT])
def test_help_and_usage_errors_import_neither_torch_nor_numpy(
    arguments: str, light_runs: dict[str, list[object]]
) -> None:
    code, heavy = light_runs[arguments]
    assert heavy == []
    assert (code == EXIT_DONE) == ("--" + arguments.rpartition("--")[2] in ("--help", "--version"))


@pytest.mark.parametrize("arguments", ["--help", "predict missing -o out"])
def test_a_process_imports_neither_torch_nor_numpy(arguments: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "know_cli", *arguments.split()],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "know_cli.cli.main" in imported
    assert not imported & {"torch", "numpy", "safetensors", "matplotlib", "sklearn"}
