"""A run that is killed, starved or disturbed: nothing lost, nothing half written."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from know_cli.checkpoints import CheckpointWriter, open_checkpoint
from know_cli.engine.settings import Settings
from know_cli.errors import (
    EXIT_CHECKPOINT,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_OUTPUT,
    CheckpointError,
    OutputError,
)
from know_cli.files import temporary as module
from know_cli.files.temporary import Temporary
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request
from tests.support.command import one_line
from tests.support.folders import files, model, seen_by_transformers, seen_by_us, shards
from tests.support.forkserver import NOT_BEGUN, ForkServer
from tests.support.interrupted import PREDICT, inputs, names, temporaries, temporary_files


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with three checkpoints and an old output."""
    inputs(tmp_path)
    (tmp_path / "out").write_bytes(b"precious")
    return tmp_path


def undisturbed(server: ForkServer, folder: Path) -> tuple[bytes, float]:
    """The output of a run that nothing happens to, and its seconds."""
    before = (folder / "out").read_bytes()
    began = time.monotonic()
    assert server.run(*PREDICT, cwd=folder) == EXIT_DONE
    seconds = time.monotonic() - began
    expected = (folder / "out").read_bytes()
    (folder / "out").write_bytes(before)
    return expected, seconds


def phase(folder: Path) -> str:
    """What the run was doing, by what it said last."""
    lines = (folder / "stderr.txt").read_text().splitlines()
    return lines[-1].split()[0] if lines else "opening"


def after_a_kill(server: ForkServer, folder: Path, expected: bytes) -> str:
    """Check what a killed run left, and that the next one puts it right; whose output it was."""
    left = (folder / "out").read_bytes()
    assert left in (b"precious", expected), "a mixture"
    assert temporary_files(folder) <= 1
    assert names(folder) == sorted(
        [f"ckpt{k}.safetensors" for k in range(3)] + ["out", *temporaries(folder)]
    )
    assert server.run(*PREDICT, cwd=folder) == EXIT_DONE, (folder / "stderr.txt").read_text()
    assert (folder / "out").read_bytes() == expected
    assert not temporaries(folder)
    (folder / "out").write_bytes(b"precious")
    return "old" if left == b"precious" else "new"


def kill_at_random(server: ForkServer, folder: Path, count: int, seed: int) -> Counter[str]:
    """Kill so many runs at random moments before their end; in which phases they were."""
    expected, seconds = undisturbed(server, folder)
    chance, phases, finished = random.Random(seed), Counter[str](), 0
    while phases.total() < count:
        child = server.start(*PREDICT, cwd=folder)
        time.sleep(chance.uniform(0, 1.1 * seconds))
        os.kill(child, signal.SIGKILL)  # a child that has ended waits to be asked for
        code = server.wait(child)
        if code == EXIT_DONE:
            finished += 1
            assert (folder / "out").read_bytes() == expected
            (folder / "out").write_bytes(b"precious")
            assert finished < 10 * count
            continue
        assert code == -signal.SIGKILL
        phases[phase(folder)] += 1
        after_a_kill(server, folder, expected)
    return phases


def test_killed_at_random_moments(server: ForkServer, run: Path) -> None:
    assert kill_at_random(server, run, 8, seed=0).total() == 8


@pytest.mark.slow
def test_killed_at_many_random_moments(server: ForkServer, run: Path) -> None:
    phases = kill_at_random(server, run, 200, seed=1)
    assert {"opening", "predicting"} <= phases.keys()


# Every step of writing: function → calls of it at which the run is killed.
MOMENTS = {
    "posix_fallocate": (1,), "pwrite": (1, 2, 30), "preadv": (1, 20), "fsync": (1, 2),
    "replace": (1,), "ftruncate": (1,),
}  # fmt: skip


def test_killed_at_every_step_of_writing(server: ForkServer, run: Path) -> None:
    expected, _ = undisturbed(server, run)
    for name, calls in MOMENTS.items():
        for at in calls:
            if server.run(*PREDICT, cwd=run, die={name: at}) != EXIT_DONE:
                whose = after_a_kill(server, run, expected)
                # Only after the renaming is the output the new one.
                assert whose == ("new" if (name, at) == ("fsync", 2) else "old"), (name, at)
            else:
                assert name == "ftruncate", f"{name} was not called {at} times"
                (run / "out").write_bytes(b"precious")


def test_a_killed_run_into_a_new_folder(server: ForkServer, tmp_path: Path) -> None:
    for k in range(2):
        folder = shards(tmp_path / f"s{k}")
        for number in range(2):
            save_file(
                {f"layer{number}.weight": torch.full((3, 4), 1.0 + k)},
                folder / f"model-{number + 1:05d}-of-00002.safetensors",
            )
    command = ("predict", "s0", "s1", "-o", "out", "--method", "linear")
    for empty in (False, True):
        for name, at in (("pwrite", 2), ("fsync", 1), ("fsync", 4)):
            if empty:
                (tmp_path / "out").mkdir()
            assert server.run(*command, cwd=tmp_path, die={name: at}) == -signal.SIGKILL
            assert not list((tmp_path / "out").glob("*.safetensors"))
            assert server.run(*command, cwd=tmp_path) == EXIT_DONE
            assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
                path.name for path in (tmp_path / "s0").iterdir()
            )
            assert names(tmp_path) == ["out", "s0", "s1"]
            for path in (tmp_path / "out").iterdir():
                path.unlink()
            (tmp_path / "out").rmdir()


@pytest.mark.parametrize(
    "calls",
    [("replace", "unlink"), pytest.param(("fsync", "mkdir"), marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_killed_while_a_folder_is_replaced(
    calls: Sequence[str], server: ForkServer, tmp_path: Path
) -> None:
    """A reader then finds the old model, the new one or none; the next run puts it right."""
    for k in range(2):
        model(tmp_path / f"s{k}", "two shards", 2.0 + k)
    model(tmp_path / "old", "three shards", 1.0)
    out, command = tmp_path / "out", ("predict", "s0", "s1", "-o", "out", "--method", "naive")
    shutil.copytree(tmp_path / "old", out)
    assert server.run(*command, "--force", cwd=tmp_path) == EXIT_DONE
    expected, seen = files(out), set[tuple[float, ...]]()
    assert seen_by_us(out) == {2.0}
    for name in calls:
        for at in itertools.count(1):
            shutil.rmtree(out)
            shutil.copytree(tmp_path / "old", out)
            code = server.run(*command, "--force", cwd=tmp_path, die={name: at})
            if code == EXIT_DONE:
                break
            assert code == -signal.SIGKILL
            assert names(tmp_path) == ["old", "out", "s0", "s1"]
            config = json.loads((out / "config.json").read_text())["model"]
            found = seen_by_us(out)
            assert found == seen_by_transformers(out)
            assert found in (set(), {config}), (name, at)
            seen.add(tuple(found))
            assert server.run(*command, "--force", cwd=tmp_path) == EXIT_DONE
            assert files(out) == expected, (name, at)
    assert seen >= {(1.0,), ()}


# ------------------------------------------------------------------------------------ faults

FAULTS: dict[str, tuple[str, int, int, int, str]] = {
    # function, call, errno, exit code, what is said
    "disk full at the start": ("posix_fallocate", 1, errno.ENOSPC, EXIT_OUTPUT, "No space left"),
    "disk full while writing": ("pwrite", 30, errno.ENOSPC, EXIT_OUTPUT, "No space left"),
    "quota": ("pwrite", 3, errno.EDQUOT, EXIT_OUTPUT, "quota"),
    "disk fails while writing": ("pwrite", 2, errno.EIO, EXIT_OUTPUT, "Input/output error"),
    "disk fails while flushing": ("fsync", 1, errno.EIO, EXIT_OUTPUT, "Input/output error"),
    "renaming refused": ("replace", 1, errno.EACCES, EXIT_OUTPUT, "Permission denied"),
    "disk fails while reading": ("preadv", 1, errno.EIO, EXIT_CHECKPOINT, "cannot be read: Input"),
    "disk fails later": ("preadv", 200, errno.EIO, EXIT_CHECKPOINT, "cannot be read: Input"),
    "network file is stale": ("preadv", 150, errno.ESTALE, EXIT_CHECKPOINT, "cannot be read: Stale"),
    "no more descriptors": ("open", 10, errno.EMFILE, EXIT_OUTPUT, "Too many open files"),
}  # fmt: skip


def test_faults_of_the_system(server: ForkServer, run: Path) -> None:
    before = names(run)
    for case, (name, at, number, code, message) in FAULTS.items():
        found = server.run(*PREDICT, cwd=run, fail={name: (at, number)})
        stderr = (run / "stderr.txt").read_text()
        assert found == code, (case, stderr)
        assert message in one_line(stderr), case
        assert names(run) == before, case
        assert (run / "out").read_bytes() == b"precious"


def test_a_limit_of_file_sizes(server: ForkServer, run: Path) -> None:
    before = names(run)
    for size in (100, 50_000, 1_000_000):
        assert server.run(*PREDICT, cwd=run, file_bytes=size) == EXIT_OUTPUT
        assert "File too large" in one_line((run / "stderr.txt").read_text())
        assert names(run) == before
        assert (run / "out").read_bytes() == b"precious"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "none", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("may not mount a small file system here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_full(server: ForkServer, run: Path, small_disk: Path) -> None:
    (small_disk / "out").write_bytes(b"precious")
    command = ["small/out" if word == "out" else word for word in PREDICT]
    assert server.run(*command, cwd=run) == EXIT_OUTPUT
    assert "No space left on device" in one_line((run / "stderr.txt").read_text())
    assert [path.name for path in small_disk.iterdir()] == ["out"]
    assert (small_disk / "out").read_bytes() == b"precious"


def test_a_read_only_folder(server: ForkServer, run: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    command = ["small/out" if word == "out" else word for word in PREDICT]
    assert server.run(*command, cwd=run) == EXIT_OUTPUT
    assert "no permission to write in small" in one_line((run / "stderr.txt").read_text())


@pytest.mark.parametrize("wish", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_at_random_moments(server: ForkServer, run: Path, wish: signal.Signals) -> None:
    expected, seconds = undisturbed(server, run)
    before, chance, interrupted, sent = names(run), random.Random(int(wish)), 0, 0
    # On a busy machine a run takes many times as long as another, so that signals come before it
    # has begun or after it is done; some must come in between.
    while sent < 6 or not interrupted:
        sent += 1
        child = server.start(*PREDICT, cwd=run)
        began = time.monotonic()
        time.sleep(chance.uniform(0.1, 0.9) * seconds)
        os.kill(child, wish)
        code = server.wait(child)
        said, output = (run / "stderr.txt").read_text(), (run / "out").read_bytes()
        assert output in (b"precious", expected)
        if code == EXIT_INTERRUPTED:
            interrupted += 1
            assert "interrupted" in one_line(said)
        elif code in (-wish, NOT_BEGUN):
            # Before its command line has begun, or after all of it is done.
            assert said == "" or output == expected
        else:
            assert code == EXIT_DONE, said
            assert output == expected
            seconds = min(seconds, time.monotonic() - began)
        assert names(run) == before
        (run / "out").write_bytes(b"precious")
        assert sent < 200


# --------------------------------------------------------------------- inputs that change


class Meddler:
    """Does something to the inputs while the engine is at work."""

    def __init__(self, at: str, what: Callable[[], object]) -> None:
        self._at, self._what = at, what

    def phase(self, text: str, parameters: int = 0) -> None:
        if text.startswith(self._at):
            self._what()

    def advance(self, parameters: int) -> None:
        """Nothing."""


def rewrite(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-4] + b"\0\0\0\0")


def replace(path: Path) -> None:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "written to": (rewrite, "has changed while it was read"),
    "appended to": (append, "has changed while it was read"),
    "replaced by another": (replace, "has changed while it was read"),
    "touched": (lambda path: os.utime(path, ns=(1, 1)), "has changed while it was read"),
    "removed": (lambda path: path.unlink(), "no such file"),
    "cut short": (lambda path: os.truncate(path, 2000), "has become shorter"),
}


@pytest.mark.parametrize("which", [0, 2])
@pytest.mark.parametrize("case", CHANGES)
def test_an_input_that_changes_while_it_is_read(case: str, which: int, tmp_path: Path) -> None:
    what, message = CHANGES[case]
    inputs(tmp_path, 5_000)
    paths = [tmp_path / f"ckpt{k}.safetensors" for k in range(3)]
    request = Request(paths, tmp_path / "out", settings=Settings(), method="linear")
    meddler = Meddler("predicting", lambda: what(paths[which]))
    with open_prediction(request) as prediction, pytest.raises(CheckpointError) as caught:
        prediction.execute(meddler)
    assert message in str(caught.value)
    assert str(paths[which]) in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not temporaries(tmp_path)


# -------------------------------------------------------------------------------- two runs


def test_another_run_has_the_output(server: ForkServer, run: Path) -> None:
    like = open_checkpoint(run / "ckpt0.safetensors")
    with CheckpointWriter(run / "out", like, {}) as writer:
        assert server.run(*PREDICT, cwd=run) == EXIT_OUTPUT
        message = one_line((run / "stderr.txt").read_text())
        assert "out: another run is writing it; wait until it is done" in message
        with pytest.raises(OutputError, match="another run is writing it"), writer:
            pass
        assert temporary_files(run) == 1
        writer.commit()
    assert server.run(*PREDICT, cwd=run) == EXIT_DONE
    assert not temporaries(run)


@pytest.mark.parametrize("force", [pytest.param(True, marks=pytest.mark.slow), False])
def test_two_runs_at_once(force: bool, server: ForkServer, tmp_path: Path) -> None:
    """One wins whole, the other fails cleanly, whoever is first and by how much."""
    inputs(tmp_path, 1_000_000)
    words = [word for word in PREDICT if force or word != "--force"]
    said = tmp_path / "said"
    said.mkdir()
    running = [
        server.start(*words, cwd=tmp_path, out=said / f"out{k}", err=said / f"err{k}")
        for k in range(2)
    ]
    codes_of = [server.wait(process) for process in running]
    ended = [((said / f"err{k}").read_text(), code) for k, code in enumerate(codes_of)]
    shutil.rmtree(said)
    codes = sorted(code for _, code in ended)
    # With --force the second may have begun when the first was done, and replaces it.
    assert codes == [EXIT_DONE, EXIT_OUTPUT] or (force and codes == [EXIT_DONE, EXIT_DONE])
    for text, code in ended:
        if code == EXIT_OUTPUT:
            line = one_line(text)
            assert "another run" in line or "exists already" in line
    assert names(tmp_path) == [*(f"ckpt{k}.safetensors" for k in range(3)), "out"]
    first = (tmp_path / "out").read_bytes()
    with open_prediction(
        Request(
            [tmp_path / f"ckpt{k}.safetensors" for k in range(3)], tmp_path / "again",
            settings=Settings(steps=2), method="linear",
        )
    ) as prediction:  # fmt: skip
        prediction.execute()
    assert (tmp_path / "again").read_bytes() == first


def test_many_writers_at_once(tmp_path: Path) -> None:
    """Threads that want one output: whoever gets it has it alone, and what it writes is whole."""
    save_file({"w": torch.zeros(1000)}, tmp_path / "like.safetensors")
    done: list[int] = []
    refused: list[int] = []
    inside = threading.Lock()

    def write(number: int) -> None:
        like = open_checkpoint(tmp_path / "like.safetensors")
        data = memoryview(bytes([number]) * 4000)
        for _ in range(20):
            try:
                with CheckpointWriter(tmp_path / "out", like, {}) as writer:
                    assert inside.acquire(blocking=False), "two have the lock"
                    try:
                        for begin in range(0, 4000, 400):
                            writer.write("w", begin, data[begin : begin + 400])
                        writer.flush()
                    finally:
                        inside.release()
                    writer.commit()
                done.append(number)
            except OutputError as error:
                assert "another run is writing it" in str(error)  # noqa: PT017
                refused.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) + len(refused) == 80
    assert done
    content = (tmp_path / "out").read_bytes()[-4000:]
    assert len(set(content)) == 1
    assert not temporaries(tmp_path)


def test_what_a_killed_run_left_is_emptied(tmp_path: Path) -> None:
    for is_folder in (False, True):
        output = tmp_path / f"out{is_folder}"
        first = Temporary(output, is_folder=is_folder)
        if is_folder:
            (first.path / "sub").mkdir()
            (first.path / "sub" / "file").write_text("old")
            (first.path / "link").symlink_to(tmp_path)
        else:
            first.path.write_text("old and long")
        os.close(first.descriptor)  # as when its process ends
        second = Temporary(output, is_folder=is_folder)
        assert second.path == first.path
        assert not (list(second.path.iterdir()) if is_folder else second.path.read_bytes())
        second.discard()
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["link", "folder", "pipe", "somebody's"])
def test_what_is_not_ours_is_left_alone(what: str, tmp_path: Path) -> None:
    """In a folder that all may write to, a stranger may have put it there."""
    place = Temporary(tmp_path / "out", is_folder=False)
    place.discard()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    if what == "link":
        place.path.symlink_to(victim)
    elif what == "folder":
        place.path.mkdir()
    elif what == "pipe":
        os.mkfifo(place.path)
    elif os.geteuid() == 0:
        place.path.touch()
        os.chown(place.path, 65534, 65534)
    else:
        pytest.skip("needs root to make somebody else's file")
    with pytest.raises(OutputError, match="is not a temporary of this program and user"):
        Temporary(tmp_path / "out", is_folder=False)
    assert victim.read_text() == "precious"
    assert place.path.exists()


def test_a_second_name_of_another_file_is_removed_and_the_file_is_not(tmp_path: Path) -> None:
    """A run that was killed after its file had got its name leaves such a one."""
    place = Temporary(tmp_path / "out", is_folder=False)
    place.discard()
    (tmp_path / "victim").write_text("precious")
    place.path.hardlink_to(tmp_path / "victim")
    again = Temporary(tmp_path / "out", is_folder=False)
    os.write(again.descriptor, b"new")
    again.give_name(replace=False)
    again.discard()
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "out").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 2


def test_an_interruption_just_after_the_second_name_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def interrupted(*arguments: Any, **options: Any) -> None:
        link(*arguments, **options)
        raise KeyboardInterrupt

    (tmp_path / "out").write_text("precious")
    place = Temporary(tmp_path / "out", is_folder=False)
    monkeypatch.setattr(os, "link", interrupted)
    with pytest.raises(KeyboardInterrupt):
        place.give_name(replace=True)
    place.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").read_text() == "precious"


def test_a_run_that_comes_while_a_file_is_replaced_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not take the second name for one that a killed run left."""
    replace, refused = os.replace, []

    def late(*arguments: Any) -> None:
        with pytest.raises(OutputError, match="another run is writing it") as error:
            Temporary(tmp_path / "out", is_folder=False)
        refused.append(error)
        replace(*arguments)

    (tmp_path / "out").write_text("old")
    place = Temporary(tmp_path / "out", is_folder=False)
    os.write(place.descriptor, b"new")
    monkeypatch.setattr(os, "replace", late)
    place.give_name(replace=True)
    place.discard()
    assert len(refused) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").read_text() == "new"


def test_where_there_are_no_locks_the_last_to_finish_wins_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that replace one file at the same moment: neither takes the other's second name."""
    monkeypatch.setattr(module, "lock", lambda *_: False)
    one, two = (Temporary(tmp_path / "out", is_folder=False) for _ in range(2))
    os.write(one.descriptor, b"one")
    os.write(two.descriptor, b"two")
    (tmp_path / "out").write_text("old")
    replace, seen = os.replace, []

    def late(*arguments: Any) -> None:
        monkeypatch.setattr(os, "replace", replace)
        two.give_name(replace=True)
        seen.append((tmp_path / "out").read_text())
        replace(*arguments)

    monkeypatch.setattr(os, "replace", late)
    one.give_name(replace=True)
    one.discard()
    two.discard()
    assert seen == ["two"]
    assert (tmp_path / "out").read_text() == "one"
    assert not temporaries(tmp_path)


@pytest.mark.parametrize("is_folder", [False, True])
def test_where_there_are_no_locks_each_run_has_its_own(
    is_folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    one, two = (Temporary(tmp_path / "out", is_folder=is_folder) for _ in range(2))
    assert one.path != two.path
    assert one.path.is_dir() == is_folder
    one.discard()
    assert two.path.exists()
    two.discard()
    # The one that the lock was tried on is empty, and the next run's.
    assert len(list(tmp_path.iterdir())) <= 1


def test_a_temporary_that_its_writer_just_renamed_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking it, the other run finishes: what was locked is its output."""
    first = Temporary(tmp_path / "out", is_folder=False)
    first.path.write_text("whole")
    flock, done = fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not done:
            done.append(True)
            first.path.replace(tmp_path / "out")
            first.moved()
            first.discard()
        flock(descriptor, operation)

    monkeypatch.setattr(module.fcntl, "flock", late)
    second = Temporary(tmp_path / "out", is_folder=False)
    assert (tmp_path / "out").read_text() == "whole"
    assert second.path.read_bytes() == b""
    second.discard()


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "in.safetensors")
    like = open_checkpoint(tmp_path / "in.safetensors")
    (tmp_path / "out").write_text("precious")
    with (
        pytest.raises(OutputError, match="another run has just written it; --force"),
        CheckpointWriter(tmp_path / "out", like, {}, force=False),
    ):
        pass
    assert (tmp_path / "out").read_text() == "precious"
    assert not temporaries(tmp_path)
