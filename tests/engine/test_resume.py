"""``--resume``: a run that was ended goes on, and writes what it would have written at once."""

from __future__ import annotations

import fcntl
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from know_cli.engine.journal import Journal, journal_path, remove_journals
from know_cli.engine.progress import Silent
from know_cli.engine.report import Report
from know_cli.engine.settings import NormMode, Settings
from know_cli.errors import EXIT_DONE, OutputError
from know_cli.kinds import Kind
from know_cli.methods.known import KnownPredictor
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request
from tests.support.command import Command
from tests.support.trajectories import write_trajectory

# So many blocks a batch that the trajectory below has about a dozen batches.
SETTINGS = Settings(steps=2, allow_nonfinite=True, max_memory=4 << 20)
NAN = 5


class Ends(Silent):
    """Ends the run after some batches, as Ctrl-C does."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def advance(self, parameters: int) -> None:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Several batches, with a layer whose statistics are rescaled, and values to be copied."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    state = {
        "stem.conv1.weight": normal(70, 65, 3, 3),
        "stem.conv1.bias": normal(70),
        "stem.bn1.weight": torch.ones(70),
        "stem.bn1.bias": torch.zeros(70),
        "stem.bn1.running_mean": normal(70),
        "stem.bn1.running_var": torch.rand(70, generator=generator) + 0.5,
        "fc.weight": normal(300, 211),
        "half.weight": normal(90, 33).half(),
    }
    trajectory = [state]
    for _ in range(4):
        trajectory.append(
            {n: (t + 0.1 * normal(*t.shape)).to(t.dtype) for n, t in trajectory[-1].items()}
        )
    trajectory[3]["fc.weight"][7, :NAN] = math.nan
    return write_trajectory(tmp_path_factory.mktemp("resume"), trajectory)


def request_of(paths: Sequence[Path], bundle: Path, output: Path, **wishes: Any) -> Request:
    request = Request(
        paths, output, str(bundle), SETTINGS, device="cpu", kernel="torch", force=True, resume=True
    )
    return replace(request, **wishes)


def run(request: Request) -> Report:
    with open_prediction(request) as opened:
        return opened.execute()


def end_after(request: Request, batches: int) -> None:
    with open_prediction(request) as opened, pytest.raises(KeyboardInterrupt):
        opened.execute(Ends(batches))


@pytest.fixture(scope="module")
def at_once(
    paths: list[Path], bundle_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bytes, dict[str, Any]]:
    """The bytes and the report of a run that was not ended."""
    output = tmp_path_factory.mktemp("whole") / "out"
    report = run(request_of(paths, bundle_path, output, resume=False))
    return output.read_bytes(), numbers(report)


def numbers(report: Report) -> dict[str, Any]:
    content = report.to_json()
    return {name: content[name] for name in ("kinds", "not_predicted", "replaced", "nonfinite")}


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects the rows of every block that is computed."""
    rows: list[int] = []
    predict = KnownPredictor.predict

    def count(self: KnownPredictor, kind: Kind, step: int, history: Tensor, out: Tensor) -> None:
        rows.append(len(out))
        predict(self, kind, step, history, out)

    monkeypatch.setattr(KnownPredictor, "predict", count)
    return rows


@given(st.integers(0, 12), st.integers(0, 400))
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_run_goes_on_wherever_it_was_ended(
    paths: list[Path],
    bundle_path: Path,
    at_once: tuple[bytes, dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
    batches: int,
    torn: int,
) -> None:
    output = tmp_path_factory.mktemp("ended") / "out"
    request = request_of(paths, bundle_path, output)
    with open_prediction(request) as opened:
        total = sum(1 for _ in opened.plan.batches())
    assert total > 5
    end_after(request, min(batches, total - 1))
    assert not output.exists()
    # A machine that dies can leave a record in part.
    journal = journal_path(output)
    os.truncate(journal, max(0, journal.stat().st_size - torn))
    report = run(request)
    content, expected = at_once
    assert (
        "rescale: running statistics, rescaled to the change of the layer before" in report.reasons
    )
    assert output.read_bytes() == content
    assert numbers(report) == expected
    assert report.nonfinite == NAN
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_what_is_finished_is_not_computed_again(
    paths: list[Path], bundle_path: Path, tmp_path: Path, computed: list[int]
) -> None:
    request = request_of(paths, bundle_path, tmp_path / "out")
    end_after(request, 4)
    computed.clear()
    run(request)
    with open_prediction(request) as opened:
        # The batch in which the end came had been written, too.
        left = sum(batch.rows for batch in list(opened.plan.batches())[5:])
    assert sum(computed) == left * SETTINGS.steps


@pytest.mark.parametrize(
    "change", ["steps", "norm", "weights", "input", "header", "memory", "every step"]
)
def test_a_journal_of_something_else_is_not_taken(
    change: str, paths: list[Path], bundle_path: Path, tmp_path: Path, computed: list[int]
) -> None:
    copies = []
    for path in paths:
        copies.append(tmp_path / path.name)
        copies[-1].write_bytes(path.read_bytes())
    request = request_of(copies, bundle_path, tmp_path / "out")
    end_after(request, 3)
    other = {
        "steps": replace(request, settings=replace(SETTINGS, steps=3)),
        "norm": replace(request, settings=replace(SETTINGS, norm=NormMode.COPY)),
        "weights": replace(request, weights="retrodiction"),
        "memory": replace(request, settings=replace(SETTINGS, max_memory=3 << 19)),
        "every step": replace(request, every_step=True),
    }.get(change, request)
    if change == "input":
        # Same size and header, other values: only the time tells.
        data = bytearray(copies[2].read_bytes())
        data[-1] ^= 1
        copies[2].write_bytes(data)
    if change == "header":
        data = bytearray(copies[2].read_bytes())
        times = copies[2].stat()
        at = data.index(b'"pt"')
        data[at : at + 4] = b'"np"'
        copies[2].write_bytes(data)
        os.utime(copies[2], ns=(times.st_atime_ns, times.st_mtime_ns))
    computed.clear()
    report = run(other)
    assert any("all was computed anew" in notice for notice in report.notices)
    with open_prediction(other) as opened:
        rows = sum(batch.rows for batch in opened.plan.batches())
    assert sum(computed) == rows * other.settings.steps
    assert not journal_path(tmp_path / "out").exists()


def test_a_journal_without_a_batch_does_not_stay(paths: list[Path], bundle_path: Path, tmp_path: Path) -> None:  # fmt: skip
    class AtOnce(Silent):
        def phase(self, text: str, parameters: int = 0) -> None:
            assert journal_path(tmp_path / "out").exists()
            raise KeyboardInterrupt

    request = request_of(paths, bundle_path, tmp_path / "out")
    with open_prediction(request) as opened, pytest.raises(KeyboardInterrupt):
        opened.execute(AtOnce())
    assert not journal_path(tmp_path / "out").exists()


def test_a_journal_of_another_number_of_ranks_is_told(paths: list[Path], bundle_path: Path, tmp_path: Path) -> None:  # fmt: skip
    journal_path(tmp_path / "out", 1, 2).touch()
    report = run(request_of(paths, bundle_path, tmp_path / "out"))
    assert any("is of another number of ranks" in notice for notice in report.notices)
    assert not journal_path(tmp_path / "out", 1, 2).exists()


def test_the_number_of_threads_does_not_matter(paths: list[Path], bundle_path: Path, tmp_path: Path) -> None:  # fmt: skip
    request = request_of(paths, bundle_path, tmp_path / "out")
    found = set()
    for threads in (1, 2):
        settings = replace(SETTINGS, threads=threads, max_memory=1 << 30)
        with open_prediction(replace(request, settings=settings)) as opened:
            found.add(opened._journal_key())
    assert len(found) == 1


def test_every_step_goes_on_too(paths: list[Path], bundle_path: Path, tmp_path: Path) -> None:
    for name in ("ended", "whole"):
        (tmp_path / name).mkdir()
    request = request_of(paths, bundle_path, tmp_path / "ended" / "out", every_step=True)
    end_after(request, 5)
    run(request)
    run(request_of(paths, bundle_path, tmp_path / "whole" / "out", every_step=True))
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "ended" / path.name).read_bytes() == path.read_bytes()


def test_a_tensor_that_is_needed_whole_is_taken_from_the_journal(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, max_memory=64 << 20)
    request = Request(
        paths, tmp_path / "out", settings=settings, method="tsv", force=True, resume=True
    )
    with open_prediction(request) as opened:
        before = sum(1 for _ in opened.plan.batches())
        assert sum(1 for _ in opened.plan.whole_tensors()) > 1
    end_after(request, before)
    run(request)
    found = (tmp_path / "out").read_bytes()
    run(replace(request, resume=False))
    assert (tmp_path / "out").read_bytes() == found


def test_a_killed_process_leaves_its_journal_and_no_output(
    paths: list[Path], bundle_path: Path, tmp_path: Path, know: Command,
    at_once: tuple[bytes, dict[str, Any]],
) -> None:  # fmt: skip
    code = f"""
import os
from pathlib import Path
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request
from tests.engine.test_resume import SETTINGS, Ends
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request
class Dies(Ends):
    def advance(self, parameters):
        if self.left == 0:
            os.kill(os.getpid(), 9)
        self.left -= 1
request = Request([Path(p) for p in {[str(p) for p in paths]}], Path("out"), {str(bundle_path)!r},
                  SETTINGS, device="cpu", kernel="torch", force=True, resume=True)
with open_prediction(request) as opened:
    opened.execute(Dies(4))
"""
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        check=False,
    )
    assert done.returncode == -9
    assert not (tmp_path / "out").exists()
    assert journal_path(tmp_path / "out").stat().st_size > 10_000
    result = know(
        "predict", *paths, "-o", "out", "--steps", 2, "--allow-nonfinite", "--max-memory", "4M",
        "--weights", bundle_path, "--device", "cpu", "--kernel", "torch", "--threads", 1, "--resume",
        "--quiet",
        cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == EXIT_DONE, result.stderr
    assert (tmp_path / "out").read_bytes() == at_once[0]
    assert not journal_path(tmp_path / "out").exists()


def test_a_journal_from_before_is_removed_with_the_output_complete(
    paths: list[Path], bundle_path: Path, tmp_path: Path
) -> None:
    request = request_of(paths, bundle_path, tmp_path / "out")
    end_after(request, 3)
    end_after(replace(request, output=tmp_path / "other"), 3)
    assert journal_path(tmp_path / "out").exists()
    run(replace(request, resume=False))
    assert not journal_path(tmp_path / "out").exists()
    assert journal_path(tmp_path / "other").exists()


def test_a_journal_that_is_in_use_or_no_file_stays(tmp_path: Path) -> None:
    output = tmp_path / "out"
    journal_path(output, 1, 2).write_bytes(b"")
    journal_path(output, 0, 2).mkdir()
    with Journal(output, "x") as journal:
        remove_journals(output)
        assert journal.path.exists()
        assert not journal_path(output, 1, 2).exists()
    remove_journals(output)
    assert [path.name for path in tmp_path.iterdir()] == [journal_path(output, 0, 2).name]


def test_two_runs_do_not_resume_the_same_output(
    paths: list[Path], bundle_path: Path, tmp_path: Path
) -> None:
    with journal_path(tmp_path / "out").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="out: another run resumes it"):
            run(request_of(paths, bundle_path, tmp_path / "out"))


def test_a_journal_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    journal_path(tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="is not a journal of this program and user"):
        Journal(tmp_path / "out", "x").__enter__()
    (tmp_path / "target").write_bytes(b"not ours")
    journal_path(tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(OutputError, match="is not a journal of this program and user"):
        Journal(tmp_path / "link", "x").__enter__()
    assert (tmp_path / "target").read_bytes() == b"not ours"


def test_a_damaged_record_ends_the_journal(tmp_path: Path) -> None:
    with Journal(tmp_path / "out", "x") as journal:
        assert journal.finished(5) is None
        for data in (b"first", b"other", b"third"):
            journal.add(memoryview(data))
            journal.finish({"data": data.decode()})
    content = bytearray(journal.path.read_bytes())
    content[content.index(b"other")] ^= 1
    journal.path.write_bytes(content)
    with Journal(tmp_path / "out", "x") as journal:
        first = journal.finished(5)
        assert first is not None
        assert first.facts == {"data": "first"}
        buffer = bytearray(5)
        journal.read(first.position, memoryview(buffer))
        assert bytes(buffer) == b"first"
        assert journal.finished(5) is None
        assert journal.finished(5) is None
        journal.add(memoryview(b"again"))
        journal.finish({})
    with Journal(tmp_path / "out", "x") as journal:
        found = [journal.finished(5) for _ in range(3)]
        assert [f.facts if f else None for f in found] == [{"data": "first"}, {}, None]
    with Journal(tmp_path / "out", "y") as journal:
        assert "of other inputs or options" in journal.notices[0]
        assert journal.finished(5) is None
