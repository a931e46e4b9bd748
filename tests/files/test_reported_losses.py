"""What people lost, each a test of its kind: links, names taken meanwhile, cleaners, inputs in outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from know_cli.checkpoints import CheckpointWriter, open_checkpoint, save_checkpoint
from know_cli.checkpoints.checksum import check_digest
from know_cli.errors import (
    EXIT_BUG,
    EXIT_CHECKPOINT,
    EXIT_DONE,
    EXIT_OUTPUT,
    OutputError,
)
from know_cli.files import destination, write_text
from know_cli.files.temporary import Temporary
from tests.support.command import Command, one_line
from tests.support.forkserver import ForkServer
from tests.support.interrupted import PREDICT, inputs

NAIVE = ("--method", "naive", "--quiet")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two checkpoints as files, a.safetensors and b.safetensors."""
    for k, name in enumerate("ab"):
        save_file({"w": torch.full((2, 2), 1.0 + k)}, tmp_path / f"{name}.safetensors")
    return tmp_path


def model(folder: Path, value: float) -> Path:
    folder.mkdir(parents=True)
    save_file({"w": torch.full((2, 2), value)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


# ----------------------------------------------------------------------- links and descriptors


def test_a_report_to_a_name_of_standard_output(run: Path, server: ForkServer) -> None:
    (run / "stdout-link").symlink_to("/dev/stdout")
    for place in ("/dev/fd/1", "stdout-link"):
        done = server.complete("inspect", "a", "b", "--quiet", "--json", place, cwd=run)
        assert done.returncode == EXIT_DONE, done.stderr
        assert json.loads(done.stdout)
        code = server.run("inspect", "a", "b", "--quiet", "--json", place, cwd=run)
        assert code == EXIT_DONE
        assert json.loads((run / "stdout.txt").read_text())
        # Without --quiet, what is for people goes aside, as with "-".
        done = server.complete("inspect", "a", "b", "--json", place, cwd=run)
        assert json.loads(done.stdout)
        assert "tensors frozen: none" in done.stderr
    assert Path("/dev/stdout").is_symlink()
    assert (run / "stdout-link").is_symlink()
    done = server.complete("predict", "a", "b", "-o", "/dev/stdout", "--force", *NAIVE, cwd=run)
    assert done.returncode == EXIT_OUTPUT
    assert "is an open descriptor, not a file" in done.stderr


def test_a_link_is_followed_and_stays(run: Path, know: Command) -> None:
    (run / "real").mkdir()
    for name in ("out", "report", "new"):
        (run / name).symlink_to(f"real/{name}")
    (run / "real" / "out").write_text("old")
    (run / "real" / "report").write_text("old")
    words = ("predict", "a", "b", *NAIVE, "-o")
    for name in ("out", "report", "new"):
        assert know(*words, name, cwd=run).returncode == EXIT_OUTPUT
    assert know(*words, "out", "--json", "report", "--force", cwd=run).returncode == EXIT_DONE
    assert know(*words, "new", "--force", cwd=run).returncode == EXIT_DONE
    for name in ("out", "report", "new"):
        assert (run / name).is_symlink()
        assert not (run / "real" / name).is_symlink()
    assert load_file(run / "real" / "out").keys() == load_file(run / "new").keys() == {"w"}
    assert json.loads((run / "report").read_text())


@pytest.mark.parametrize("what", ["pipe", "device", "socket"])
def test_what_is_no_file_is_never_replaced(what: str, run: Path, know: Command) -> None:
    place = run / "special"
    if what == "pipe":
        os.mkfifo(place)
    elif what == "device":
        place.symlink_to("/dev/null")
    else:
        import socket

        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.path.relpath(place))
    before = place.lstat()
    done = know("predict", "a", "b", "-o", place, "--force", *NAIVE, cwd=run)
    assert done.returncode == EXIT_OUTPUT
    assert "is neither a file nor a folder" in one_line(done.stderr)
    if what == "device":
        assert know("inspect", "a", "b", "--json", place, cwd=run).returncode == EXIT_DONE
    assert place.lstat().st_ino == before.st_ino


def test_circles_of_links_are_refused(run: Path, know: Command) -> None:
    (run / "one").symlink_to("two")
    (run / "two").symlink_to("one")
    for words in (("-o", "one"), ("-o", "out", "--json", "one")):
        done = know("predict", "a", "b", *words, "--force", *NAIVE, cwd=run)
        assert done.returncode == EXIT_OUTPUT
        assert "Too many levels of symbolic links" in one_line(done.stderr)


# --------------------------------------------------------------------- names taken meanwhile


def copying(source: Path, output: Path, force: bool) -> Iterator[CheckpointWriter]:
    """A writer that has written all, before it gives the output its name."""
    with open_checkpoint(source) as like, CheckpointWriter(output, like, {}, force=force) as writer:
        for entry in like.tensors.values():
            data = bytearray(entry.info.nbytes)
            like.read_into(entry, 0, memoryview(data))
            writer.write(entry.name, 0, memoryview(data))
        writer.flush()
        yield writer


@pytest.mark.parametrize("taken_by", ["file", "link", "folder", "pipe"])
@pytest.mark.parametrize("is_folder", [False, True])
def test_a_name_that_is_taken_during_the_run_keeps_what_took_it(
    is_folder: bool, taken_by: str, tmp_path: Path
) -> None:
    source = model(tmp_path / "in", 3.0)
    source = source if is_folder else source / "model.safetensors"
    output = tmp_path / "out"
    for writer in copying(source, output, force=False):
        if taken_by == "file":
            output.write_text("precious")
        elif taken_by == "link":
            output.symlink_to("nowhere")
        elif taken_by == "folder":
            output.mkdir()
            (output / "precious").write_text("precious")
        else:
            os.mkfifo(output)
        before = output.lstat()
        with pytest.raises(OutputError, match="has come to be there during the run.*out.kept1"):
            writer.commit()
    assert output.lstat().st_ino == before.st_ino
    with open_checkpoint(tmp_path / "out.kept1") as kept:
        assert kept.tensors.keys() == {"w"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "out.kept1"]


def test_a_digest_that_appears_during_the_run_is_not_replaced(run: Path, know: Command) -> None:
    for writer in copying(run / "a.safetensors", run / "out", force=False):
        (run / "out.sha256").write_text("precious")
        writer.commit()
    assert (run / "out.sha256").read_text() == "precious"
    done = know("predict", "a", "b", "-o", "out", "--force", "--checksum", *NAIVE, cwd=run)
    assert done.returncode == EXIT_OUTPUT
    assert "is where the output's digest goes, but is none" in one_line(done.stderr)


def test_reports_are_not_replaced_without_force(run: Path, know: Command) -> None:
    (run / "notes").write_text("precious")
    before = (run / "notes").read_bytes()
    assert know("predict", "a", "b", "-o", "out", *NAIVE, cwd=run).returncode == EXIT_DONE
    for words in (
        ("predict", "a", "b", "-o", "out2", "--json", "notes", *NAIVE),
        ("inspect", "a", "b", "--json", "notes"),
        ("verify", "out", "a", "b", "--json", "notes"),
        ("bench", "--sizes", "0", "--table", "notes"),
        ("train", "runs", "--evaluate", "continuation", "--json", "notes"),
    ):
        done = know(*words, cwd=run)
        assert done.returncode == EXIT_OUTPUT, words
        assert "notes: exists already; --force replaces it" in one_line(done.stderr)
        assert (run / "notes").read_bytes() == before
    assert know("inspect", "a", "b", "--json", "notes", "--force", cwd=run).returncode == EXIT_DONE
    assert json.loads((run / "notes").read_text())


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("is_folder", [False, True])
def test_a_temporary_that_a_cleaner_removed_is_no_output(
    is_folder: bool, force: bool, tmp_path: Path
) -> None:
    """And a second run's half-written one does not get the name in its stead."""
    source = model(tmp_path / "in", 3.0)
    source = source if is_folder else source / "model.safetensors"
    for writer in copying(source, tmp_path / "out", force=force):
        temporary = writer._open_temporary.path
        temporary.rename(tmp_path / "cleaned")
        second = Temporary(tmp_path / "out", is_folder=is_folder)
        assert second.path == temporary
        with pytest.raises(OutputError, match="was removed or replaced under its temporary name"):
            writer.commit()
        assert not (tmp_path / "out").exists()
    assert second.path.exists(), "the second run's is not removed by the first"
    second.discard()


@pytest.mark.parametrize("lacks", ["nothing", "links", "renameat2", "both", "locks", "all"])
@pytest.mark.parametrize("is_folder", [False, True])
def test_names_are_given_whatever_a_file_system_lacks(
    is_folder: bool, lacks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from know_cli.files import naming, temporary

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if lacks in ("links", "both", "all"):
        monkeypatch.setattr(os, "link", refuse)
    if lacks in ("renameat2", "both", "all"):
        monkeypatch.setattr(naming, "_renameat2", lambda *_: 95)
    if lacks in ("locks", "all"):
        monkeypatch.setattr(temporary, "lock", lambda *_: False)
    source = model(tmp_path / "in", 3.0)
    source = source if is_folder else source / "model.safetensors"
    for force in (False, True):
        for writer in copying(source, tmp_path / "out", force=force):
            writer.commit()
        with open_checkpoint(tmp_path / "out") as made:
            assert made.tensors.keys() == {"w"}
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    for writer in copying(source, tmp_path / "new", force=False):
        (tmp_path / "new").write_text("precious")
        with pytest.raises(OutputError, match="has come to be there"):
            writer.commit()
    assert (tmp_path / "new").read_text() == "precious"


@pytest.fixture(params=["tmpfs", "overlay"])
def other_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder on another kind of file system."""
    place = tmp_path / "disk"
    place.mkdir()
    mounts = [["mount", "-t", "tmpfs", "none", str(place)]]
    if request.param == "overlay":
        mounts.append(
            [
                "mount", "-t", "overlay", "none", "-o",
                f"lowerdir={place}/low,upperdir={place}/up,workdir={place}/work", f"{place}/all",
            ]
        )  # fmt: skip
    made = 0
    for command in mounts:
        if subprocess.run(command, capture_output=True, check=False).returncode:
            break
        made += 1
        if made == 1 and request.param == "overlay":
            for name in ("low", "up", "work", "all"):
                (place / name).mkdir()
    used = place / "all" if made == 2 else place
    # Where nothing may be mounted, the folder itself is one more file system that it works on.
    yield used
    for target in [used, place][:made] if made == 2 else [place] * made:
        subprocess.run(["umount", target], check=True)


def test_on_other_file_systems(other_disk: Path) -> None:
    source = model(other_disk / "in", 3.0)
    for what, output in ((source, "folder"), (source / "model.safetensors", "file")):
        for force in (False, True):
            for writer in copying(what, other_disk / output, force=force):
                writer.commit()
        for writer in copying(what, other_disk / f"{output}2", force=False):
            (other_disk / f"{output}2").write_text("precious")
            with pytest.raises(OutputError, match="has come to be there"):
                writer.commit()
        assert (other_disk / f"{output}2").read_text() == "precious"
    assert not list(other_disk.glob(".know-*"))


# ------------------------------------------------------------------------- inputs in outputs


def test_an_output_that_has_an_input_in_it_is_refused(tmp_path: Path, know: Command) -> None:
    for name, value in (("run/c0", 1.0), ("run/c1", 2.0), ("old", 5.0)):
        model(tmp_path / name, value)
    model(tmp_path / "run" / "x", 7.0)
    (tmp_path / "link").symlink_to("run/c0")
    (tmp_path / "run" / "model.safetensors").write_bytes(b"old")
    os.link(
        tmp_path / "run/c1/model.safetensors", tmp_path / "old/model-00001-of-00001.safetensors"
    )
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*")}
    for first, output in (
        ("run/c0", "run"), ("link", "run"), ("link", "run/c0"), ("run/c0", "run/c0/sub"), ("run/c0", "old"), ("run/c0", "."),
    ):  # fmt: skip
        done = know("predict", first, "run/c1", "-o", output, "--force", *NAIVE, cwd=tmp_path)
        assert done.returncode == EXIT_OUTPUT, (first, output)
        assert "input" in one_line(done.stderr)
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*")} == before


def test_a_folder_in_the_output_that_is_a_link_is_not_written_through(
    tmp_path: Path, know: Command
) -> None:
    for k in range(2):
        model(tmp_path / f"c{k}", 1.0 + k)
        (tmp_path / f"c{k}" / "sub").mkdir()
        (tmp_path / f"c{k}" / "sub" / "vocab.txt").write_text("new")
    model(tmp_path / "out", 5.0)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "vocab.txt").write_text("precious")
    (tmp_path / "out" / "sub").symlink_to("../elsewhere")
    done = know("predict", "c0", "c1", "-o", "out", "--force", *NAIVE, cwd=tmp_path)
    assert done.returncode == EXIT_OUTPUT
    assert "out/sub: is a link, but a folder must go there" in one_line(done.stderr)
    assert (tmp_path / "elsewhere" / "vocab.txt").read_text() == "precious"


def test_links_are_judged_by_what_they_lead_to(tmp_path: Path, know: Command) -> None:
    for k in range(2):
        folder = model(tmp_path / f"c{k}", 1.0 + k)
        (folder / ".git").mkdir()
        (folder / ".git" / "config").write_text("token")
        (folder / "optimizer.pt").write_text("state")
        (folder / "words.txt").write_text("words")
        (tmp_path / "private").write_text("private")
        for name, target in (
            ("git.json", ".git/config"), ("readme.md", "optimizer.pt"), ("out.txt", "../private"), ("fine.txt", "words.txt"),
        ):  # fmt: skip
            (folder / name).symlink_to(target)
    done = know("predict", "c0", "c1", "-o", "out", "--method", "naive", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "fine.txt", "model.safetensors", "words.txt",
    ]  # fmt: skip
    for name in ("git.json", "readme.md", "out.txt"):
        assert f"{name}: left out" in done.stderr


def test_names_that_differ_in_case_only_are_told_apart_by_the_file_system(
    run: Path, know: Command
) -> None:
    """Where they are not, the report would replace the output."""
    done = know("predict", "a", "b", "-o", "out", "--json", "OUT", *NAIVE, cwd=run)
    assert done.returncode == EXIT_OUTPUT
    assert "--json OUT: is an input or an output of this run" in one_line(done.stderr)


# -------------------------------------------------------------------------------- the digest


def test_a_run_that_is_killed_leaves_no_digest_of_another_output(
    server: ForkServer, tmp_path: Path
) -> None:
    """Between the renaming and the removal of the old digest there is nothing left to do."""
    inputs(tmp_path, 3000)
    (tmp_path / "out").unlink(missing_ok=True)
    first = [word for word in PREDICT if word != "--force"]
    assert server.run(*first, "--checksum", cwd=tmp_path) == EXIT_DONE
    for name, at in (("unlink", 1), ("unlink", 2), ("replace", 1), ("fsync", 3)):
        server.run(*PREDICT, "--steps", "1", cwd=tmp_path, die={name: at})
        with open_checkpoint(tmp_path / "out"):
            check_digest(tmp_path / "out")
        assert server.run(*PREDICT, "--checksum", cwd=tmp_path) == EXIT_DONE
        assert check_digest(tmp_path / "out") is not None
    assert [path.name for path in tmp_path.glob(".know-*")] == []


# ------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("what", ["manifest", "index of the output", "beside", "checkpoint"])
def test_pipes_hang_nobody(what: str, tmp_path: Path, know: Command) -> None:
    for k in range(2):
        model(tmp_path / f"c{k}", 1.0 + k)
    words = ["predict", "c0", "c1", "-o", "out", *NAIVE]
    expected = EXIT_CHECKPOINT
    if what == "manifest":
        (tmp_path / "bundle").mkdir()
        os.mkfifo(tmp_path / "bundle" / "manifest.json")
        words = ["predict", "c0", "c1", "-o", "out", "--weights", "./bundle"]
    elif what == "index of the output":
        model(tmp_path / "out", 3.0)
        os.mkfifo(tmp_path / "out" / "model.safetensors.index.json")
        words.append("--force")
        expected = EXIT_DONE
    elif what == "beside":
        os.mkfifo(tmp_path / "c0" / "pipe")
        expected = EXIT_DONE
    else:
        (tmp_path / "c1" / "model.safetensors").unlink()
        os.mkfifo(tmp_path / "c1" / "model.safetensors")
    assert know(*words, cwd=tmp_path).returncode == expected


@pytest.mark.parametrize(
    ("words", "file"),
    [
        (("plot", "results", "pipe", "-o", "x.svg"), "pipe"),
        (("convert", "pipe", "-o", "x.safetensors"), "pipe"),
        (("convert", "folder", "-o", "x"), "folder/pytorch_model.bin.index.json"),
        (("verify", "pipe", "a", "b"), "pipe"),
        (("verify", "a", "a", "b"), "a.safetensors.sha256"),
        (("inspect", "a", "pipe"), "pipe"),
        (("eval", "-o", "folder", "--task", "digits"), "folder/results.json"),
        (("forget", "torch:ones", "-o", "folder", "--size", "10"), "folder/trajectory.json"),
    ],
)
def test_pipes_are_no_inputs_of_any_sort(
    words: tuple[str, ...], file: str, run: Path, know: Command
) -> None:
    (run / "folder").mkdir()
    os.mkfifo(run / file)
    done = know(*words, cwd=run)
    assert done.returncode not in (EXIT_DONE, EXIT_BUG), done.stderr
    one_line(done.stderr)


# ------------------------------------------------------------------------ limits of the system


def test_limits_of_the_system_are_no_bugs(
    run: Path, know: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from know_cli.engine import run as engine

    for error, words in (
        (RuntimeError("can't start new thread"), "no more threads"),
        (MemoryError(), "no more memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "no more memory"),
    ):

        def refuse(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(engine, "predict", refuse)
        done = know("predict", "a", "b", "-o", "out", *NAIVE, cwd=run)
        assert done.returncode == EXIT_OUTPUT
        assert words in one_line(done.stderr)
        assert not (run / "out").exists()
        assert not list(run.glob(".know-*"))


@pytest.mark.slow
def test_an_address_space_that_is_too_small(run: Path) -> None:
    code = (
        "import resource, sys, torch\n"
        "from know_cli.cli.main import family_app, run\n"
        "import know_cli.prediction.opening, know_cli.methods.linear\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20),) * 2)\n"
        "sys.exit(run(family_app(), 'know', sys.argv[1:]))\n"
    )
    words = ["predict", "a", "b", "-o", "out", "--method", "linear", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=run, capture_output=True, text=True, check=False
    )
    assert done.returncode in (EXIT_CHECKPOINT, EXIT_OUTPUT), done.stderr
    assert "bug" not in done.stderr
    assert not (run / "out").exists()


def test_modules_of_the_working_folder_are_not_imported(run: Path, know: Command) -> None:
    (run / "typer.py").write_text("raise SystemExit('taken')")
    done = know("--version", cwd=run, python=True)
    assert done.returncode == EXIT_DONE, done.stderr


@pytest.mark.slow
def test_modules_of_the_working_folder_are_not_run(run: Path, know: Command) -> None:
    for name in ("torch.py", "numpy.py", "typer.py"):
        (run / name).write_text("raise SystemExit('taken')")
    done = know("inspect", "a", "b", cwd=run, process=True)
    assert done.returncode == EXIT_DONE, done.stderr


# -------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("name", ["__metadata__", "half\ud800"])
def test_tensors_that_nobody_could_read_are_not_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="a tensor cannot be called"):
        save_checkpoint(tmp_path / "out", {name: torch.ones(1)}, {})
    assert not list(tmp_path.iterdir())


def test_reports_are_json_whatever_is_measured(run: Path, know: Command) -> None:
    for name, value in (("a", 0.0), ("b", torch.inf)):
        save_file({"w": torch.full((2, 2), value)}, run / f"{name}.safetensors")
    know("predict", "a", "b", "-o", "out", "--allow-nonfinite", "--json", "r.json", *NAIVE, cwd=run)
    know("inspect", "a", "b", "--json", "i.json", cwd=run)
    found = 0
    for report in run.glob("*.json"):
        json.loads(report.read_text(), parse_constant=pytest.fail)
        found += 1
    assert found == 2


def test_small_files_are_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "report"
    write_text(place, "one", replace=False)
    with pytest.raises(OutputError, match="exists already"):
        write_text(place, "two", replace=False)
    fsync = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        write_text(place, "two", replace=True)
    monkeypatch.setattr(os, "fsync", fsync)
    assert place.read_text() == "one"
    write_text(place, "three", replace=True)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["three"]
    with suppress(OSError):
        assert destination(place) == place
