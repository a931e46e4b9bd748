"""``know choose`` as its users run it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from know_cli.choosing.measures import FunctionMeasure, Result
from know_cli.errors import EXIT_DONE, EXIT_NOT_BETTER, EXIT_OUTPUT, EXIT_USAGE
from tests.support.command import Command, one_line

# Without noise, the smaller the weights, the better.
MEASURE = "mine.py:smaller"
FUNCTIONS = """
import torch
def smaller(state, seed): return -float(state["fc.weight"].abs().sum()) + seed
def larger(state, seed): return float(state["fc.weight"].abs().sum()) + seed
def fails(state, seed):
    print("no such data set")
    raise RuntimeError("stop")
"""
CANDIDATES = ["--candidate", "shrink,lambda=0.8", "--candidate", "last", "--candidate", "average"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5, generator=generator)
    for k in range(3):
        save_file(
            {"fc.weight": weight * (1 - k / 100), "fc.bias": torch.ones(6) + k},
            tmp_path / f"c{k}.safetensors",
        )
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    return tmp_path


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function of ``--evaluate`` runs in this process, which has torch already."""

    def take(
        measure: FunctionMeasure, start: Path, seed: int, values: Mapping[str, str], slot: int
    ) -> Result:
        space: dict[str, Any] = {}
        exec(Path("mine.py").read_text(), space)
        function = space[measure._function.partition(":")[2]]
        return Result(function(load_file(start), seed, **values))

    monkeypatch.setattr(FunctionMeasure, "take", take)


def test_what_is_better_is_written_with_its_evidence(run: Path, know: Command) -> None:
    arguments = [
        "choose", "c0..c2", "-o", "start.safetensors", "--evaluate", MEASURE, "--budget", 24,
        *CANDIDATES, "--json", "report.json",
    ]  # fmt: skip
    done = know(*arguments, cwd=run)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "shrink-lambda-0.8 is better than Θ0" in done.stdout
    assert "wrote start.safetensors: shrink-lambda-0.8" in done.stdout
    assert "A random direction of the same length has -" in done.stdout
    out, first = load_file(run / "start.safetensors"), load_file(run / "c0.safetensors")
    assert torch.allclose(out["fc.weight"], 0.8 * first["fc.weight"])
    with safe_open(run / "start.safetensors", "pt") as file:
        evidence = json.loads(file.metadata()["know.chosen"])
    assert evidence["winner"] == "shrink-lambda-0.8"
    assert evidence["confirmed"]["low"] > 0
    verified = know("verify", "start.safetensors", "c0..c2", "--full", cwd=run)
    assert verified.returncode == EXIT_DONE, verified.stderr
    # What is made of it later has not been chosen.
    later = ("predict", "start", "c1", "-o", "later.safetensors", "--method", "average")
    assert know(*later, cwd=run).returncode == EXIT_DONE
    with safe_open(run / "later.safetensors", "pt") as file:
        assert "know.chosen" not in file.metadata()
    report = json.loads((run / "report.json").read_text())
    assert report["confirmed"]["mean"] == pytest.approx(0.2 * float(first["fc.weight"].abs().sum()))
    assert list((run / "start.safetensors.search" / "candidates").iterdir()) == []

    again = know(*arguments, "--force", cwd=run)
    assert again.returncode == EXIT_DONE
    assert f"goes on with {report['measures']} measures that were taken before" in again.stderr


@pytest.mark.usefixtures("here")
def test_none_of_them_is_an_answer(run: Path, know: Command) -> None:
    arguments = ["choose", "c0..c2", "--evaluate", "mine.py:larger", "--budget", 24, *CANDIDATES]
    done = know(*arguments, "-o", "same.safetensors", cwd=run)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "as its name says" not in done.stderr
    assert "None of them: Θ0 is the start." in done.stdout
    out, first = load_file(run / "same.safetensors"), load_file(run / "c0.safetensors")
    assert all(torch.equal(out[name], first[name]) for name in first)
    done = know(*arguments, "-o", "none.pt", "--only-if-better", cwd=run)
    assert done.returncode == EXIT_NOT_BETTER
    assert not (run / "none.pt").exists()
    assert "warning: none.pt: will be a safetensors file, and no PyTorch pickle" in done.stderr


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("seed", [-(10**25), 10**25])
def test_a_seed_is_any_whole_number(seed: int, run: Path, know: Command) -> None:
    done = know(
        "choose", "c0..c2", "-o", "out", "--evaluate", MEASURE, "--budget", 24, *CANDIDATES,
        "--seed", seed, cwd=run,
    )  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    assert "A random direction of the same length has" in done.stdout


def test_losses_and_commands(run: Path, know: Command) -> None:
    (run / "loss.py").write_text(
        "import sys\nfrom safetensors.numpy import load_file\n"
        "print(abs(load_file(sys.argv[1])['fc.weight']).sum() * float(sys.argv[2]))\n"
    )
    done = know(
        "choose", "c0..c2", "-o", "out", "--measure", "python loss.py {start} {lr}", "--minimise",
        "--tune", "lr=1,2", "--budget", 15, "--candidate", "shrink,lambda=0.5", "--keep", "all",
        "--jobs", 2, cwd=run,
    )  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    assert "shrink-lambda-0.5 lr=1 is better than Θ0: -" in done.stdout
    assert "The best lr of Θ0 is at the end of its values" in done.stdout
    assert "--measure: has no {seed}; where it gives the same number every time" in done.stderr
    kept = {path.name for path in (run / "out.search" / "candidates").iterdir()}
    assert "shrink-lambda-0.5.safetensors" in kept


def test_each_command_is_asked_for_its_seed(run: Path, know: Command) -> None:
    done = know(
        "choose", "c0..c2", "-o", "out", "--measure", "echo {start} >> starts; echo {seed}",
        "--confirm", "echo {start} >> starts; echo 1", "--budget", 24, *CANDIDATES, cwd=run,
    )  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    assert "--measure: has no {seed}" not in done.stderr
    assert "--confirm: has no {seed}" in done.stderr


def test_a_measure_that_fails_for_the_base_ends_the_search(run: Path, know: Command) -> None:
    done = know(
        "choose", "c0..c2", "-o", "out", "--evaluate", "mine.py:fails", "--budget", 24,
        *CANDIDATES, cwd=run,
    )  # fmt: skip
    assert done.returncode == EXIT_USAGE
    assert "no such data set" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("know: error: the measure fails for Θ0 itself: it raised RuntimeError")
    assert not (run / "out").exists()


@pytest.mark.parametrize("quiet", [(), ("--quiet",)])
def test_the_output_of_a_measure_that_fails_for_the_base_is_told_once(
    run: Path, know: Command, quiet: tuple[str, ...]
) -> None:
    measure = "echo {start} > /dev/null; echo $((2 * 21)) is my problem >&2; exit 3"
    done = know(
        "choose", "c0..c2", "-o", "out", "--measure", measure, "--budget", 24, *CANDIDATES, *quiet,
        cwd=run,
    )  # fmt: skip
    assert done.returncode == EXIT_USAGE
    *_, told, last = done.stderr.splitlines()
    assert told == "42 is my problem"
    assert "for Θ0 itself: it ended with exit code 3" in last
    assert done.stderr.count("42 is my problem") == 1
    assert not (quiet and len(done.stderr.splitlines()) > 2)


def test_a_single_seed_is_one(run: Path, know: Command, here: None) -> None:
    done = know(
        "choose", "c0..c2", "-o", "out", "--evaluate", MEASURE, "--budget", 10,
        "--candidate", "average", "--candidate", "last", cwd=run,
    )  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    assert " on 1 seed.\n" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ((), EXIT_USAGE, "give one of --measure COMMAND and --evaluate"),
        (("--measure", "echo 1"), EXIT_USAGE, "--measure: has no {start}"),
        (("--evaluate", MEASURE, "--confirm", "echo 1"), EXIT_USAGE, "--confirm: has no {start}"),
        (("--evaluate", "mine.py:nothing"), EXIT_USAGE, "mine.py"),
        (("--evaluate", MEASURE, "--tune", "lr=1"), EXIT_USAGE, "does not take"),
        (("--evaluate", MEASURE, "--measure-json", "a"), EXIT_USAGE, "--measure-json a: is read"),
        (("--measure", "echo {start}", "--tune", "lr"), EXIT_USAGE, "write NAME=V1,V2,V3"),
        (("--measure", "echo {start}", "--device-variable", "GPU=0"), EXIT_USAGE, "give the name"),
        (("--evaluate", MEASURE, "--candidate", "magic"), EXIT_USAGE, "--candidate magic"),
        (("--evaluate", MEASURE, "--candidate", "shrink,x"), EXIT_USAGE, "'x' has no value"),
        (("--evaluate", MEASURE, "--budget", "5"), EXIT_USAGE, "need at least"),
        (("--evaluate", MEASURE, "--folder", ".", "-o", "../out"), EXIT_OUTPUT, "has the input"),
        (("--evaluate", MEASURE, "--folder", "."), EXIT_USAGE, "-o out: lies in the search's own"),
        (("--evaluate", MEASURE, "--folder", "out"), EXIT_USAGE, "lies in the search's own folder"),
        (("--evaluate", MEASURE, "--folder", "out/a"), EXIT_USAGE, "--folder out/a: lies in the"),
        (("--evaluate", MEASURE, "-o", "."), EXIT_OUTPUT, ".: is a folder, but the output is a file"),
        (("--evaluate", MEASURE, "-o", "/"), EXIT_OUTPUT, "/: is the root of all files"),
    ],
)  # fmt: skip
def test_wrong_usage(
    arguments: tuple[str, ...], code: int, text: str, run: Path, know: Command
) -> None:
    done = know("choose", "c0..c2", "-o", "out", *arguments, cwd=run)
    assert done.returncode == code, done.stderr
    assert text in done.stderr.splitlines()[-1]
    assert not (run / "out").exists()


@pytest.mark.usefixtures("here")
def test_another_search_in_the_same_folder_is_refused(run: Path, know: Command) -> None:
    arguments = ["choose", "c0..c2", "-o", "out", "--evaluate", MEASURE, *CANDIDATES]
    assert know(*arguments, "--budget", 24, cwd=run).returncode == EXIT_DONE
    done = know(*arguments, "--budget", 30, "--force", cwd=run)
    assert done.returncode == EXIT_USAGE
    last = one_line(done.stderr.splitlines()[-1] + "\n")
    assert "is of a search with other --budget; give the same again" in last
    assert "another --folder" in last
