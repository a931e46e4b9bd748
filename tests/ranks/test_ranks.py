"""Ranks that are processes: the same bytes, and one that fails ends all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from know_cli.checkpoints import CheckpointPart, CheckpointWriter, open_checkpoint
from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.engine.predictor import Predictor, Predictors
from know_cli.engine.settings import FrozenMode, NormMode
from know_cli.errors import (
    EXIT_CHECKPOINT,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_OUTPUT,
    EXIT_USAGE,
    OutputError,
    UsageError,
)
from know_cli.files import temporary
from know_cli.files.temporary import Temporary, join_temporary
from know_cli.prediction.opening import check_agreement
from know_cli.prediction.recipe import Recipe
from know_cli.ranks import torchrun
from know_cli.ranks.alone import PeerError, Ranks
from know_cli.ranks.environment import processes_here
from know_cli.ranks.opening import open_ranks
from tests.support.command import Command
from tests.support.forkserver import ForkServer
from tests.support.interrupted import PREDICT, inputs, temporaries, temporary_files

ROOT = Path(__file__).parents[2]
# Nothing is slow here; this is what "within seconds" may be on a machine that has much to do.
SECONDS = 30.0


RECIPE = Recipe(
    version="1", method="naive", options={}, bundle=None, target=None, steps=1, rate=0.5,
    trajectory=TrajectoryKind.FORGETTING, norm=NormMode.COPY, frozen=FrozenMode.COPY, overrides=(), allow_nonfinite=False, checkpoints=2,
    inputs=("a", "b"), device="cuda", kernel=None,
)  # fmt: skip


class Crew:
    """Processes that are the ranks of one run, without torchrun, so that they start quickly."""

    def __init__(self, server: ForkServer) -> None:
        self._server = server

    def start(
        self,
        *arguments: object,
        cwd: Path,
        size: int = 2,
        wishes: Mapping[int, dict[str, Any]] | None = None,
        own: Mapping[int, tuple[str, ...]] | None = None,
    ) -> list[int]:
        """Start the ranks; what each says goes into a file of the folder ``talk`` beside."""
        talk = cwd.parent / "talk"
        talk.mkdir(exist_ok=True)
        for path in talk.iterdir():
            path.unlink()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return [
            self._server.start(
                *((own or {}).get(rank) or arguments),
                cwd=cwd,
                out=talk / f"out{rank}",
                err=talk / f"err{rank}",
                env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                **(wishes or {}).get(rank, {}),
            )
            for rank in range(size)
        ]

    def wait(self, pids: list[int]) -> list[int]:
        """Exit codes; a process that does not end within seconds is killed, and gives none."""
        late = threading.Event()

        def kill() -> None:
            late.set()
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

        watchdog = threading.Timer(SECONDS, kill)
        watchdog.start()
        codes = [self._server.wait(pid) for pid in pids]
        watchdog.cancel()
        return [] if late.is_set() else codes

    def run(self, *arguments: object, cwd: Path, size: int = 2, **more: Any) -> list[int]:
        """Exit codes of all ranks, which end within seconds of each other."""
        return self.wait(self.start(*arguments, cwd=cwd, size=size, **more))


def said(folder: Path, size: int = 2) -> list[list[str]]:
    """The errors that each rank told of."""
    texts = [(folder.parent / "talk" / f"err{rank}").read_text() for rank in range(size)]
    assert not any("Traceback" in text for text in texts), texts
    return [[line for line in text.splitlines() if "error: " in line] for text in texts]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def crew(server: ForkServer) -> Crew:
    return Crew(server)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with three checkpoints and an old output."""
    folder = tmp_path / "run"
    folder.mkdir()
    inputs(folder)
    (folder / "out").write_bytes(b"precious")
    return folder


def expected(know: Command, folder: Path) -> bytes:
    """The output of a process alone."""
    alone = [word if word != "out" else "../alone" for word in PREDICT]
    assert know(*alone, "--quiet", cwd=folder).returncode == EXIT_DONE
    return (folder.parent / "alone").read_bytes()


# --------------------------------------------------------------------------------- all is well


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_write_what_one_process_does(size: int, crew: Crew, run: Path, know: Command) -> None:
    wanted = expected(know, run)
    command = (*PREDICT, "--json", "../report.json", "--checksum")
    assert crew.run(*command, cwd=run, size=size) == [EXIT_DONE] * size
    assert (run / "out").read_bytes() == wanted
    assert names(run) == ["ckpt0", "ckpt1", "ckpt2", "out", "out.sha256"] or names(run) == [
        *(f"ckpt{k}.safetensors" for k in range(3)), "out", "out.sha256",
    ]  # fmt: skip
    report = json.loads((run.parent / "report.json").read_text())
    assert report["ranks"] == size
    assert report["bytes_written"] == len(wanted)
    assert sum(kind["predicted"] for kind in report["kinds"].values()) == 302_000
    talk = run.parent / "talk"
    assert "wrote out" in (talk / "out0").read_text()
    assert f"predicting as rank 0 of {size}: " in (talk / "err0").read_text()
    for rank in range(1, size):
        assert (talk / f"out{rank}").read_text() == ""
        assert (talk / f"err{rank}").read_text() == ""


def torch_run(*arguments: object, cwd: Path, size: int = 2) -> subprocess.CompletedProcess[str]:
    """What a user types."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size),
         "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
         *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_torchrun(run: Path, know: Command) -> None:
    wanted = expected(know, run)
    done = torch_run("-m", "know_cli", *PREDICT, cwd=run)
    assert done.returncode == EXIT_DONE, done.stderr
    assert (run / "out").read_bytes() == wanted
    assert done.stdout.count("wrote out") == 1
    assert not temporaries(run)


def test_a_dry_run_is_told_by_one_rank(crew: Crew, run: Path) -> None:
    before = names(run)
    assert crew.run(*PREDICT, "--dry-run", cwd=run) == [EXIT_DONE] * 2
    talk = run.parent / "talk"
    assert (talk / "out0").read_text()
    assert (talk / "out1").read_text() == ""
    assert names(run) == before


# ------------------------------------------------------------------------------- one rank fails

FAULTS: dict[str, tuple[int, str, int, int, int, str]] = {
    # rank, function, call, errno, exit code, what is said
    "disk full at the start": (0, "posix_fallocate", 1, errno.ENOSPC, EXIT_OUTPUT, "No space left"),
    "disk full in a part": (1, "pwrite", 2, errno.ENOSPC, EXIT_OUTPUT, "No space left"),
    "disk full on rank 0": (0, "pwrite", 3, errno.ENOSPC, EXIT_OUTPUT, "No space left"),
    "part not flushed": (1, "fsync", 1, errno.EIO, EXIT_OUTPUT, "Input/output error"),
    "header not flushed": (0, "fsync", 1, errno.EIO, EXIT_OUTPUT, "Input/output error"),
    "all not flushed": (0, "fsync", 2, errno.EIO, EXIT_OUTPUT, "Input/output error"),
    "renaming refused": (0, "replace", 1, errno.EACCES, EXIT_OUTPUT, "Permission denied"),
    "unreadable at once": (1, "preadv", 1, errno.EIO, EXIT_CHECKPOINT, "cannot be read: Input"),
    "unreadable later": (1, "preadv", 140, errno.EIO, EXIT_CHECKPOINT, "cannot be read: Input"),
    "unreadable on rank 0": (0, "preadv", 140, errno.ESTALE, EXIT_CHECKPOINT, "be read: Stale"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_a_rank_that_fails_ends_all(case: str, crew: Crew, run: Path) -> None:
    rank, name, at, number, code, message = FAULTS[case]
    before = names(run)
    wishes = {rank: {"fail": {name: (at, number)}}}
    assert crew.run(*PREDICT, cwd=run, size=3, wishes=wishes) == [code] * 3, said(run, 3)
    errors = said(run, 3)
    assert len(errors[rank]) == 1
    assert message in errors[rank][0]
    assert not any(lines for other, lines in enumerate(errors) if other != rank)
    assert names(run) == before
    assert (run / "out").read_bytes() == b"precious"


def test_a_missing_input_of_one_rank(crew: Crew, run: Path) -> None:
    """As on a machine where a folder is not mounted."""
    before = names(run)
    other = tuple("elsewhere/ckpt2" if word == "ckpt2" else word for word in PREDICT)
    assert crew.run(*PREDICT, cwd=run, own={1: other}) == [EXIT_CHECKPOINT] * 2
    nothing, (line,) = said(run)
    assert nothing == []
    assert "elsewhere/ckpt2: no such file or folder" in line
    assert names(run) == before


def test_ranks_with_other_inputs_or_wishes_do_not_start(crew: Crew, run: Path) -> None:
    states = load_file(run / "ckpt2.safetensors")
    save_file({n: t + 1 for n, t in states.items()}, run / "other.safetensors")
    before = names(run)
    for other in (
        tuple("other" if word == "ckpt2" else word for word in PREDICT),
        (*PREDICT, "--kind", "w=bias"),
        (*PREDICT, "--norm", "copy"),
        tuple("other-out" if word == "out" else word for word in PREDICT),
        (*PREDICT, "--every-step"),
        (*PREDICT, "--resume"),
    ):
        assert crew.run(*PREDICT, cwd=run, own={1: other}) == [EXIT_USAGE] * 2
        ((line,), nothing) = said(run)
        assert "rank 1 has other checkpoints, outputs, options, devices, processors or" in line
        assert nothing == []
        assert names(run) == before


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_only_plans_ends_the_others(rank: int, crew: Crew, run: Path) -> None:
    before = names(run)
    codes = crew.run(*PREDICT, cwd=run, own={rank: (*PREDICT, "--dry-run")})
    # Rank 0 had done and told what it was asked for.
    assert codes == ([EXIT_DONE, EXIT_USAGE] if rank == 0 else [EXIT_USAGE] * 2)
    lines = [line for lines in said(run) for line in lines]
    assert len(lines) == 1
    assert f"rank {rank} has ended, having less to do than rank {1 - rank}" in lines[0]
    assert names(run) == before
    assert (run / "out").read_bytes() == b"precious"


def test_processors_that_differ_do_not_work_together(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = SimpleNamespace(device=torch.device("cuda:0"), block_rows=1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"model {device.index}")

    class Two(Ranks):
        size = 2

        def gather(self, value: Any) -> list[Any]:
            return [value, value.replace("model 0", "model 1")]

    with pytest.raises(UsageError, match="rank 1 has other .* processors"):
        check_agreement(Two(), RECIPE, Predictors(cast(Predictor, rows)), [])


def test_an_error_of_all_ranks_is_told_once(crew: Crew, run: Path) -> None:
    command = [word for word in PREDICT if word != "--force"]
    assert crew.run(*command, cwd=run, size=3) == [EXIT_OUTPUT] * 3
    ((line,),) = [lines for lines in said(run, 3) if lines]
    assert "out: exists already" in line


def await_beginning(folder: Path) -> None:
    """Until rank 0 says that it predicts."""
    heard = folder.parent / "talk" / "err0"
    while not (heard.exists() and "predicting" in heard.read_text()):
        time.sleep(0.001)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_interruption_of_one_rank_is_one_of_all(rank: int, crew: Crew, run: Path) -> None:
    inputs(run, 2_000_000)
    before = names(run)
    for _ in range(10):
        pids = crew.start(*PREDICT, cwd=run)
        await_beginning(run)
        for _ in range(2):  # as torchrun adds its own to the terminal's
            os.kill(pids[rank], signal.SIGTERM)
        codes = crew.wait(pids)
        assert codes, "not ended within seconds"
        assert names(run) == before
        if codes != [EXIT_DONE] * 2:
            break
    assert codes == [EXIT_INTERRUPTED] * 2
    (lines,) = [lines for lines in said(run) if lines]
    assert len(lines) == 1
    assert "interrupted; the output is left as it was" in lines[0]
    assert (run / "out").read_bytes() == b"precious"


# ------------------------------------------------------------------------------ one rank is killed

# Function → calls at which a rank is killed.
MOMENTS = {
    0: {"posix_fallocate": 1, "pwrite": 3, "preadv": 20, "fsync": 2, "replace": 1},
    1: {"pwrite": 2, "preadv": 20, "fsync": 1},
}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_all(rank: int, crew: Crew, run: Path, know: Command) -> None:
    wanted = expected(know, run)
    for name, at in MOMENTS[rank].items():
        wishes = {rank: {"die": {name: at}}}
        codes = crew.run(*PREDICT, "--quiet", cwd=run, size=3, wishes=wishes)
        assert codes == [-signal.SIGKILL if k == rank else EXIT_OUTPUT for k in range(3)], name
        errors = said(run, 3)
        # Rank 0 tells of it; if it is no more, all the others do.
        speakers = [0] if rank else [1, 2]
        assert [k for k in range(3) if errors[k]] == speakers, name
        for k in speakers:
            assert f"rank {rank} ended without a word" in errors[k][0]
        assert (run / "out").read_bytes() == b"precious"
        # Reading begins before there is a temporary.
        assert temporary_files(run) == (rank == 0 and name != "preadv"), name
        # What is left is the next run's, with or without ranks.
        if name == "fsync":
            assert crew.run(*PREDICT, cwd=run) == [EXIT_DONE] * 2
        else:
            assert know(*PREDICT, cwd=run).returncode == EXIT_DONE
        assert (run / "out").read_bytes() == wanted
        assert not temporaries(run)
        (run / "out").write_bytes(b"precious")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_that_comes_back_after_the_others_have_gone_ends(
    rank: int, crew: Crew, run: Path
) -> None:
    wishes = {rank: {"stop": {"pwrite": 2}}, 1 - rank: {"die": {"pwrite": 2}}}
    pids = crew.start(*PREDICT, "--quiet", cwd=run, wishes=wishes)
    for pid, states in ((pids[1 - rank], "Z"), (pids[rank], "TZ")):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in states:
            time.sleep(0.02)
    time.sleep(0.3)
    os.kill(pids[rank], signal.SIGCONT)
    codes = crew.wait(pids)
    assert codes == [-signal.SIGKILL if k == 1 - rank else EXIT_OUTPUT for k in range(2)]
    assert f"rank {1 - rank} ended without a word" in said(run)[rank][0]
    assert (run / "out").read_bytes() == b"precious"


@pytest.mark.slow
def test_ranks_killed_at_random_moments(crew: Crew, run: Path, know: Command) -> None:
    inputs(run, 3_000_000)
    wanted, chance, killed = expected(know, run), random.Random(0), 0
    for _ in range(200):
        rank = chance.randrange(3)
        pids = crew.start(*PREDICT, cwd=run, size=3)
        await_beginning(run)
        time.sleep(chance.uniform(0, 0.25))
        os.kill(pids[rank], signal.SIGKILL)
        codes = crew.wait(pids)
        if (run / "out").read_bytes() == b"precious":
            assert codes == [-signal.SIGKILL if k == rank else EXIT_OUTPUT for k in range(3)]
            killed += 1
            assert temporary_files(run) == (rank == 0)
        else:
            # Too late to take anything back: each part was on disk already.
            assert codes[0] == (-signal.SIGKILL if codes[0] and rank == 0 else EXIT_DONE)
            assert set(codes) <= {EXIT_DONE, -signal.SIGKILL, EXIT_OUTPUT}
            assert (run / "out").read_bytes() == wanted
            assert not temporaries(run)
        if killed == 50:
            break
        (run / "out").write_bytes(b"precious")
    assert killed > 20
    assert crew.run(*PREDICT, cwd=run, size=3) == [EXIT_DONE] * 3
    assert (run / "out").read_bytes() == wanted


@pytest.mark.slow
def test_a_rank_that_is_killed_under_torchrun(run: Path) -> None:
    (run.parent / "dying.py").write_text(
        "import os\n"
        "from know_cli.cli.main import know\n"
        "from tests.support.forkserver import inject, kill\n"
        "if os.environ['RANK'] == '1':\n"
        "    inject('pwrite', 2, kill)\n"
        "know()\n"
    )
    before = names(run)
    done = torch_run(run.parent / "dying.py", *PREDICT, "--quiet", cwd=run)
    assert done.returncode != EXIT_DONE
    errors = [line for line in done.stderr.splitlines() if line.startswith("know: error: ")]
    assert len(errors) == 1, done.stderr
    assert "rank 1 ended without a word" in errors[0]
    # torchrun's own summary; it sends SIGTERM to what is about to end by itself.
    codes = set(re.findall(r"exitcode *: (-?\d+)", done.stderr))
    assert "-9" in codes
    assert codes <= {"-9", "4", "-15"}
    assert names(run) == before
    assert (run / "out").read_bytes() == b"precious"


def test_as_long_as_one_rank_lives_the_temporary_is_taken(tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = Temporary(output, is_folder=False)
    assert first.share()
    part = join_temporary(first.path, output, is_folder=False, is_locked=True, check=lambda: None)
    first.path.write_bytes(b"half")
    os.close(first.descriptor)  # as when rank 0 is killed
    with pytest.raises(OutputError, match="out: another run is writing it"):
        Temporary(output, is_folder=False)
    assert first.path.read_bytes() == b"half"
    os.close(part)
    second = Temporary(output, is_folder=False)
    assert second.path.read_bytes() == b""
    with pytest.raises(OutputError, match="out: another run is writing it"):
        join_temporary(first.path, output, is_folder=False, is_locked=True, check=lambda: None)
    second.discard()


def test_a_temporary_that_another_run_takes_while_it_is_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between giving up the one lock and getting the other."""
    flock = fcntl.flock
    first = Temporary(tmp_path / "out", is_folder=False)
    others: list[Temporary] = []

    def late(descriptor: int, operation: int) -> None:
        if operation & fcntl.LOCK_SH and not others:
            flock(descriptor, fcntl.LOCK_UN)
            others.append(Temporary(tmp_path / "out", is_folder=False))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(OutputError, match="out: another run is writing it"):
        first.share()
    first.discard()
    assert others[0].path.exists()
    others[0].discard()


def test_a_part_of_another_output_is_not_written(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "one")
    save_file({"w": torch.ones(3)}, tmp_path / "two")
    output = tmp_path / "out"
    with (
        open_checkpoint(tmp_path / "one") as one,
        open_checkpoint(tmp_path / "two") as two,
        CheckpointWriter(output, one, {}) as writer,
    ):
        place = writer.share()
        assert place.is_locked
        with (
            pytest.raises(OutputError, match="is not the file that rank 0 has begun"),
            CheckpointPart(output, two, {}, place, lambda: None),
        ):
            pass
        # As a machine has it that does not share the disk, where the same run was killed.
        stale = tmp_path / "stale"
        stale.write_bytes(bytes(place.path.stat().st_size))
        elsewhere = replace(place, path=stale, is_locked=False)
        with (
            pytest.raises(OutputError, match="must share the output's file system"),
            CheckpointPart(output, one, {}, elsewhere, lambda: None),
        ):
            pass
        with CheckpointPart(output, one, {}, place, lambda: None) as part:
            part.write("w", 4, memoryview(torch.full((1,), 7.0).numpy().tobytes()))
            part.flush()
        writer.write("w", 0, memoryview(torch.full((1,), 5.0).numpy().tobytes()))
        writer.commit()
    assert load_file(output)["w"].tolist() == [5, 7]
    assert abs(output.stat().st_mtime - time.time()) < 1000


def test_a_temporary_that_is_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporary, "_SEEN_WITHIN_SECONDS", 0.3)
    with pytest.raises(OutputError, match="must share the output's file system"):
        join_temporary(
            tmp_path / "none", tmp_path / "out", is_folder=False, is_locked=True, check=lambda: None
        )

    def fail() -> None:
        raise PeerError("rank 0 has failed", EXIT_OUTPUT, is_told=True)

    monkeypatch.setattr(temporary, "_SEEN_WITHIN_SECONDS", SECONDS)
    with pytest.raises(PeerError):
        join_temporary(
            tmp_path / "none", tmp_path / "out", is_folder=False, is_locked=True, check=fail
        )


# --------------------------------------------------------------------------------------- resuming


def test_ranks_go_on_after_a_kill(crew: Crew, run: Path, know: Command) -> None:
    wanted = expected(know, run)
    resume = (*PREDICT, "--resume")
    crew.run(*resume, cwd=run, wishes={1: {"die": {"pwrite": 12}}})
    journals = sorted(path for path in run.iterdir() if path.suffix == ".journal")
    assert [path.name[-15:] for path in journals] == ["0-of-2.journal", "1-of-2.journal"] or [
        path.name.rpartition("-of-")[2] for path in journals
    ] == ["2.journal", "2.journal"]
    assert all(path.stat().st_size > 50_000 for path in journals)
    # What is in the journals is not read from all the inputs again.
    count = 10_000
    assert crew.run(*resume, cwd=run, wishes={1: {"die": {"preadv": count}}}) == [EXIT_DONE] * 2
    assert (run / "out").read_bytes() == wanted
    assert not list(run.glob("*.journal"))


def test_other_ranks_journals_are_removed_in_the_end(crew: Crew, run: Path, know: Command) -> None:
    crew.run(*PREDICT, "--resume", cwd=run, wishes={1: {"die": {"pwrite": 12}}})
    assert len(list(run.glob("*.journal"))) == 2
    assert know(*PREDICT, cwd=run).returncode == EXIT_DONE
    assert not list(run.glob("*.journal"))


# ---------------------------------------------------------------------------- the environment


def environment(monkeypatch: pytest.MonkeyPatch, **variables: object) -> None:
    for name in (
        "RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for variables in ({}, {"WORLD_SIZE": 8}, {"RANK": 0, "WORLD_SIZE": 1, **place}):
        environment(monkeypatch, **variables)
        ranks = open_ranks(print)
        assert type(ranks) is Ranks
        assert (ranks.rank, ranks.size, processes_here()) == (0, 1, 1)
        assert ranks.broadcast(3) == 3
        assert ranks.gather(3) == [3]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "x"}, "RANK='x' in the environment is no number"),
        ({"RANK": 2}, "RANK=2, WORLD_SIZE=2: no such rank"),
        ({"RANK": 0, "MASTER_PORT": 65536}, "MASTER_PORT=65536 in the environment is no port"),
    ],
)
def test_an_environment_that_contradicts_itself(
    variables: dict[str, object], message: str, run: Path, know: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    place = {"WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    environment(monkeypatch, **{**place, **variables})
    done = know(*PREDICT, cwd=run)
    assert done.returncode == EXIT_USAGE
    assert message in done.stderr


@pytest.mark.parametrize(
    ("rank", "missing"), [(0, "not all have come"), (1, "nothing answers at 127.0.0.1:{port}")]
)
def test_ranks_that_do_not_come(
    rank: int, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """As when a run of one process inherits the environment of one rank of a training."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment(monkeypatch, RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    monkeypatch.setattr(torchrun, "_START_SECONDS", 1.0)
    monkeypatch.setattr(torchrun, "_PATIENCE_SECONDS", 0.2)
    told: list[str] = []
    with pytest.raises(UsageError) as raised:
        open_ranks(told.append).__enter__()
    missing = missing.format(port=port)
    assert f"does not reach the other ranks ({missing})" in str(raised.value)
    assert str(raised.value).endswith("unset WORLD_SIZE")
    # One rank tells what all wait for.
    assert told == (
        [
            f"rank 0 of 2: waiting for the other ranks ({missing}); if this is to be the only "
            "process, unset WORLD_SIZE"
        ]
        if rank == 0
        else []
    )


def test_a_message_does_not_wait_for_a_rank_that_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gloo may tell the listener of it, and leave the sender waiting."""
    environment(monkeypatch, RANK=1, WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=1)
    over, senders = threading.Event(), set()

    def send(tensor: torch.Tensor, peer: int) -> None:
        senders.add(threading.current_thread())
        over.wait(SECONDS)

    monkeypatch.setattr(torchrun.dist, "send", send)
    ranks = torchrun.TorchRanks(print)
    began = time.monotonic()
    threading.Timer(0.2, lambda: ranks._gone.add(0)).start()
    with pytest.raises(RuntimeError, match="rank 0 does not answer"):
        ranks._send(0, "value", 1)
    assert len(senders) == 1
    with pytest.raises(RuntimeError, match="rank 0 does not answer"):
        ranks._send(0, "end", None)
    assert time.monotonic() - began < SECONDS / 2
    over.set()
    while len(senders) < 2:
        time.sleep(0.01)
    for sender in senders:
        sender.join()


def test_an_interruption_counts_once_whatever_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, RANK=0, WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=1)
    ranks = torchrun.TorchRanks(print)
    ranks._failure = torchrun._Failure(1, EXIT_OUTPUT, is_told=False)
    with pytest.raises(KeyboardInterrupt):
        ranks._interrupt(signal.SIGINT, None)
    ranks._interrupt(signal.SIGTERM, None)


def test_ranks_of_a_machine_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(
        monkeypatch, RANK=1, WORLD_SIZE=4, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2,
        MASTER_ADDR="localhost", MASTER_PORT=1,
    )  # fmt: skip
    assert processes_here() == 2
