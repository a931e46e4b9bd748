"""Folders that other users may write: the worst that can happen is an error."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from know_cli.checkpoints import CheckpointWriter, open_checkpoint
from know_cli.engine.journal import Journal, journal_path
from know_cli.errors import KnowError
from know_cli.files.temporary import Temporary
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two other users")

US, THEM = 4711, 4712


@pytest.fixture(
    params=[
        pytest.param(0o1777, id="sticky"),
        pytest.param(0o777, id="open", marks=pytest.mark.slow),
        pytest.param(0o2775, id="group", marks=pytest.mark.slow),
    ]
)
def shared(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder that two users may write, with a checkpoint and something precious of ours."""
    place = Path(tempfile.mkdtemp(prefix="know-shared-"))
    place.chmod(0o755)
    folder, home = place / "shared", place / "home"
    for made, mode in ((folder, request.param), (home, 0o755)):
        made.mkdir()
        made.chmod(mode)
    for k in range(2):
        save_file({"w": torch.full((50, 50), 1.0 + k)}, folder / f"c{k}.safetensors")
    (home / "precious").write_text("precious")
    for path in (home, home / "precious", *folder.iterdir()):
        os.chown(path, US, 0)
    yield folder
    shutil.rmtree(place)


def as_us(work: Callable[[Callable[[], None]], object], between: Callable[[], object]) -> str:
    """Do some work as a user in a process of its own; what it was refused with.

    Args:
        work: calls its argument at the moment at which others do something.
        between: what they do, as root.
    """
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # those that there were are not in a copy of the process
            os.setgroups([])
            os.setgid(0)
            os.setuid(US)
            os.umask(0o002)

            def moment() -> None:
                theirs.sendall(b"now")
                theirs.recv(2)

            message = ""
            try:
                work(moment)
            except KnowError as error:
                message = str(error)
            theirs.sendall(b"end" + message.encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    theirs.close()
    said = b""
    while said != b"end":
        said = ours.recv(3)
        if said == b"now":
            between()
            ours.sendall(b"ok")
        elif not said:
            break
    message = ours.recv(10_000).decode()
    ours.close()
    assert os.waitpid(child, 0)[1] == 0
    return message


def given(path: Path) -> Path:
    """Let something be the other user's."""
    os.chown(path, THEM, THEM, follow_symlinks=False)
    return path


def predict(folder: Path, *, force: bool = True, resume: bool = False) -> None:
    request = Request(
        [folder / f"c{k}.safetensors" for k in range(2)], folder / "out", method="linear", force=force,
        resume=resume,
    )  # fmt: skip
    with open_prediction(request) as prediction:
        prediction.execute()


def copying(folder: Path, moment: Callable[[], None], *, force: bool) -> None:
    """Write a checkpoint of which others get hold before it has its name."""
    with (
        open_checkpoint(folder / "c0.safetensors") as like,
        CheckpointWriter(folder / "out", like, {}, force=force) as writer,
    ):
        moment()
        entry = like.tensors["w"]
        data = bytearray(entry.info.nbytes)
        like.read_into(entry, 0, memoryview(data))
        writer.write("w", 0, memoryview(data))
        writer.flush()
        moment()
        writer.commit()


def precious(folder: Path) -> str:
    found = folder.parent / "home" / "precious"
    assert found.stat().st_uid == US
    assert not found.is_symlink()
    return found.read_text()


TRAPS: dict[str, Callable[[Path, Path], object]] = {
    "a link": lambda place, target: given(_link(place, target)),
    "a hard link": lambda place, target: os.link(target, place),
    "a file": lambda place, target: given(_file(place)),
    "a pipe": lambda place, target: (os.mkfifo(place), given(place)),
    "a folder": lambda place, target: (place.mkdir(), given(place)),
}


def _link(place: Path, target: Path) -> Path:
    place.symlink_to(target)
    return place


def _file(place: Path) -> Path:
    place.write_bytes(b"forged")
    place.chmod(0o666)
    return place


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("where", ["out", "temporary", "second", "journal"])
def test_traps_that_are_set_before(where: str, trap: str, shared: Path) -> None:
    probe = Temporary(shared / "out", is_folder=False)
    probe.discard()
    place = {
        "out": shared / "out", "temporary": probe.path, "journal": journal_path(shared / "out"),
        "second": probe.path.with_name(probe.path.name.replace(".tmp", ".new.tmp")),
    }[where]  # fmt: skip
    TRAPS[trap](place, shared.parent / "home" / "precious")
    message = as_us(lambda moment: predict(shared, resume=where == "journal"), lambda: None)
    assert precious(shared) == "precious"
    written = shared / "out"
    if not message:
        assert written.stat().st_uid == US
        assert stat.S_ISREG(written.lstat().st_mode)
        with open_checkpoint(written) as made:
            assert made.tensors.keys() == {"w"}
    elif where != "out":
        assert not written.exists()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("trap", TRAPS)
def test_a_temporary_that_is_swapped(trap: str, force: bool, shared: Path) -> None:
    """Whoever may remove another's files in a folder may put something else in their place."""
    done = []

    def swap() -> None:
        done.append(True)
        (temporary,) = shared.glob(".know-*.tmp")
        temporary.unlink()
        TRAPS[trap](temporary, shared.parent / "home" / "precious")

    message = as_us(lambda moment: copying(shared, moment, force=force), lambda: done or swap())
    assert "was removed or replaced under its temporary name" in message
    assert precious(shared) == "precious"
    assert not (shared / "out").exists()


@pytest.mark.parametrize("trap", TRAPS)
def test_a_name_that_they_take_meanwhile(trap: str, shared: Path) -> None:
    def take() -> None:
        if not os.path.lexists(shared / "out"):
            TRAPS[trap](shared / "out", shared.parent / "home" / "precious")

    message = as_us(lambda moment: copying(shared, moment, force=False), take)
    assert "has come to be there during the run" in message
    assert precious(shared) == "precious"
    with open_checkpoint(shared / "out.kept1") as kept:
        assert kept.tensors.keys() == {"w"}


def test_a_journal_of_theirs_with_right_checksums_is_not_taken(shared: Path) -> None:
    """It would be taken for what an earlier run has computed."""

    def work(moment: Callable[[], None]) -> None:
        with Journal(shared / "out", "identity") as journal:
            journal.add(memoryview(b"forged"))
            journal.finish({"frozen": 0, "replaced": {}, "copied": [], "truncation": None})
        moment()
        with Journal(shared / "out", "identity") as journal:
            assert journal.finished(6) is None

    message = as_us(work, lambda: given(journal_path(shared / "out")))
    assert "is not a journal of this program and user" in message


def test_what_cannot_be_read_is_found_before_the_work(shared: Path) -> None:
    for k in range(2):
        folder = shared / f"m{k}"
        folder.mkdir()
        save_file({"w": torch.full((2, 2), 1.0 + k)}, folder / "model.safetensors")
        (folder / "model.safetensors").chmod(0o644)
        (folder / "tokenizer.json").write_text("{}")
        (folder / "tokenizer.json").chmod(0o600)

    def work(moment: Callable[[], None]) -> None:
        request = Request([shared / f"m{k}" for k in range(2)], shared / "out", method="linear")
        with open_prediction(request):
            pytest.fail("is opened")

    message = as_us(work, lambda: None)
    assert message.endswith("m0/tokenizer.json: cannot be read: Permission denied")
    assert not (shared / "out").exists()
