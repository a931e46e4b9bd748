"""Writing checkpoints: bytes, atomicity, what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from know_cli.checkpoints import (
    CheckpointWriter,
    open_checkpoint,
    save_checkpoint,
)
from know_cli.checkpoints import writer as module
from know_cli.checkpoints.output_checks import check_output
from know_cli.errors import OutputError
from know_cli.files import temporary
from tests.support.folders import (
    INDEX,
    files,
    model,
    seen_by_transformers,
    seen_by_us,
    shards,
)
from tests.support.trajectories import network


def copy(source: Path, target: Path, metadata: dict[str, str] | None = None) -> None:
    """Write ``target`` with the data of ``source``, in odd pieces, out of order."""
    with open_checkpoint(source) as like, CheckpointWriter(target, like, metadata or {}) as writer:
        for entry in reversed(like.tensors.values()):
            data = bytearray(entry.info.nbytes)
            like.read_into(entry, 0, memoryview(data))
            for begin in reversed(range(0, len(data), 7)):
                writer.write(entry.name, begin, memoryview(data)[begin : begin + 7])
        writer.commit()


def test_streamed_file_equals_save_file(tmp_path: Path) -> None:
    save_file(network(), tmp_path / "a.safetensors", {"format": "pt"})
    copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors", {"format": "pt"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_save_checkpoint_equals_save_file(tmp_path: Path) -> None:
    save_file(network(), tmp_path / "a.safetensors", {"format": "pt"})
    save_checkpoint(tmp_path / "b.safetensors", network(), {"format": "pt"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.filterwarnings("ignore")  # torch's, that some of these are a prototype
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(3, device="meta"),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        lambda: torch.nn.LazyLinear(3).weight,
    ],
)
def test_save_checkpoint_refuses_what_has_no_plain_values(
    make: Callable[[], torch.Tensor], tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match="'w': is sparse, nested, quantised or without data"):
        save_checkpoint(tmp_path / "a.safetensors", {"b": torch.ones(2), "w": make()}, {})
    assert list(tmp_path.iterdir()) == []


def test_save_checkpoint_takes_any_memory_layout(tmp_path: Path) -> None:
    tied = torch.arange(6.0).reshape(2, 3)
    lone = {
        "one": torch.ones(1, 1).expand(1, 1).as_strided((1,), (0,)),
        "none": torch.empty(0, 3).T,
    }
    save_checkpoint(tmp_path / "lone.safetensors", lone, {})
    assert load_file(tmp_path / "lone.safetensors")["one"].tolist() == [1.0]
    assert load_file(tmp_path / "lone.safetensors")["none"].shape == (3, 0)
    save_checkpoint(
        tmp_path / "a.safetensors", {"x": tied, "y": tied, "t": tied.T, "p": tied[:, 1]}, {}
    )
    loaded = load_file(tmp_path / "a.safetensors")
    assert torch.equal(loaded["x"], tied)
    assert torch.equal(loaded["y"], tied)
    assert torch.equal(loaded["t"], tied.T)
    assert torch.equal(loaded["p"], tied[:, 1])


def test_save_checkpoint_refuses_what_the_format_lacks(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="complex128"):
        save_checkpoint(tmp_path / "a", {"x": torch.ones(1, dtype=torch.complex128)}, {})
    assert not list(tmp_path.iterdir())


def test_folder_mirrors_shards_index_and_other_files(tmp_path: Path) -> None:
    source = shards(tmp_path / "in")
    (source / "config.json").write_text("{}")
    (source / "tokenizer").mkdir()
    (source / "tokenizer" / "vocab.txt").write_text("a b")
    (source / ".cache").mkdir()
    (source / ".cache" / "x").write_text("x")
    for name in (
        "optimizer.pt",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "other.safetensors",
        "trainer_state.json",
    ):
        (source / name).write_text("stale")
    with (
        open_checkpoint(source) as like,
        CheckpointWriter(tmp_path / "out", like, {"k": "v"}) as writer,
    ):
        for entry in like.tensors.values():
            writer.write(entry.name, 0, memoryview(torch.full((3,), 9.0).numpy()))
        assert not (tmp_path / "out").exists()
        writer.commit()
    out = tmp_path / "out"
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == [
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer/vocab.txt",
    ]  # fmt: skip
    assert sorted(path.name for path in writer.left_out) == [
        "optimizer.pt", "other.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json",
        "trainer_state.json",
    ]  # fmt: skip
    with open_checkpoint(out) as written:
        assert written.metadata == {"k": "v"}
    assert load_file(out / "model-00002-of-00002.safetensors")["layer1.weight"].tolist() == [9] * 3
    with safe_open(out / "model-00002-of-00002.safetensors", "pt") as file:
        assert file.metadata() == {"k": "v"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_existing_folder_keeps_its_other_files(tmp_path: Path) -> None:
    source = shards(tmp_path / "in")
    out = shards(tmp_path / "out", 3)
    (out / "notes.txt").write_text("mine")
    copy(source, out)
    assert (out / "notes.txt").read_text() == "mine"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {"layer0.weight", "layer1.weight"}
    with open_checkpoint(out) as written:
        assert set(written.tensors) == {"layer0.weight", "layer1.weight"}
    assert not list(tmp_path.glob(".*"))


def test_single_file_replaces_a_sharded_folder(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    save_file({"w": torch.ones(2)}, source / "model.safetensors")
    copy(source, shards(tmp_path / "out"))
    with open_checkpoint(tmp_path / "out") as written:
        assert set(written.tensors) == {"w"}


@pytest.mark.parametrize("folder", [False, True])
def test_leaving_without_commit_leaves_nothing(tmp_path: Path, folder: bool) -> None:
    source = shards(tmp_path / "in") if folder else tmp_path / "in.safetensors"
    if not folder:
        save_file({"w": torch.ones(2)}, source)
    before = sorted(tmp_path.rglob("*"))
    with (
        open_checkpoint(source) as like,
        pytest.raises(KeyboardInterrupt),
        CheckpointWriter(tmp_path / "out", like, {}) as writer,
    ):
        writer.write(next(iter(like.tensors)), 0, memoryview(bytes(4)))
        raise KeyboardInterrupt
    assert sorted(tmp_path.rglob("*")) == before


def test_full_disk_is_an_error_that_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({"w": torch.ones(2)}, source)
    out.write_text("precious")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for function in ("posix_fallocate", "pwrite", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(module.os, function, full)
            with pytest.raises(OutputError, match="No space left"):
                copy(source, out)
        assert out.read_text() == "precious"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in.safetensors", "out.safetensors"]


def check(output: Path, *inputs: Path, force: bool = False, is_folder: bool = False) -> None:
    checkpoints = [open_checkpoint(path) for path in inputs]
    check_output(output, checkpoints, is_folder=is_folder, force=force)


def test_outputs_that_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    save_file({"w": torch.ones(2)}, source)
    check(tmp_path / "new.safetensors", source)
    with pytest.raises(OutputError, match="mkdir -p"):
        check(tmp_path / "no" / "new.safetensors", source)
    (tmp_path / "old").write_text("x")
    with pytest.raises(OutputError, match="exists already; --force"):
        check(tmp_path / "old", source)
    check(tmp_path / "old", source, force=True)
    with pytest.raises(OutputError, match="is a file, but the output is a folder"):
        check(tmp_path / "old", source, force=True, is_folder=True)
    with pytest.raises(OutputError, match="is a folder, but the output is a file"):
        check(tmp_path, source, force=True)


@pytest.mark.parametrize("make", ["same", "symbolic", "hard"])
def test_an_input_is_never_overwritten(tmp_path: Path, make: str) -> None:
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({"w": torch.ones(2)}, source)
    if make == "same":
        out = source
    elif make == "symbolic":
        out.symlink_to(source)
    else:
        out.hardlink_to(source)
    with pytest.raises(OutputError, match="an input is never overwritten"):
        check(out, source, force=True)


def test_a_folder_s_shards_are_never_overwritten(tmp_path: Path) -> None:
    source = shards(tmp_path / "in")
    with pytest.raises(OutputError, match="an input is never overwritten"):
        check(source, source, force=True, is_folder=True)
    out = tmp_path / "out"
    out.mkdir()
    (out / "model-00001-of-00002.safetensors").hardlink_to(
        source / "model-00001-of-00002.safetensors"
    )
    with pytest.raises(OutputError, match="an input is never overwritten"):
        check(out, source, force=True, is_folder=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    save_file({"w": torch.ones(2)}, source)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(OutputError, match="no permission"):
        check(locked / "out.safetensors", source)


def test_permission_error_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "in.safetensors"
    save_file({"w": torch.ones(2)}, source)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    like = open_checkpoint(source)
    monkeypatch.setattr(module.os, "open", refuse)
    with (
        pytest.raises(OutputError, match="Permission denied"),
        CheckpointWriter(tmp_path / "out.safetensors", like, {}),
    ):
        pass


def single(folder: Path) -> Path:
    folder.mkdir()
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    return folder


def test_nothing_of_the_model_before_is_left_to_be_read(tmp_path: Path) -> None:
    """Some readers prefer a single file to an index: both must be of one model."""
    source, out = shards(tmp_path / "in"), single(tmp_path / "out")
    copy(source, out)
    assert sorted(path.name for path in out.iterdir()) == sorted(p.name for p in source.iterdir())
    out = shards(tmp_path / "three", 3)
    (out / "adapter.safetensors").write_text("mine")
    copy(source, out)
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in source.iterdir()} | {"adapter.safetensors"}
    copy(single(tmp_path / "one"), out)
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "adapter.safetensors"}


def test_an_index_is_there_only_with_all_its_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = shards(tmp_path / "in"), shards(tmp_path / "out")
    seen: list[tuple[str, bool]] = []
    replace = os.replace

    def watched(name: str, target: str, **folders: int) -> None:
        seen.append((name, (out / "model.safetensors.index.json").exists()))
        replace(name, target, **folders)

    monkeypatch.setattr(os, "replace", watched)
    copy(source, out)
    assert seen[-1][0] == "model.safetensors.index.json"
    assert len(seen) == 3
    assert not any(has_index for _, has_index in seen)


def moments_of(source: Path, out: Path, place: Path) -> list[Path]:
    """Replace a folder; copies of it as it was before each step, and so after a kill there."""
    moments: list[Path] = []
    watching: list[bool] = []

    def watch(function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **named: Any) -> Any:
            if not watching:
                moments.append(place / str(len(moments)) / out.name)
                watching.append(True)
                shutil.copytree(out, moments[-1])
                watching.clear()
            return function(*arguments, **named)

        return watched

    with open_checkpoint(source) as like, CheckpointWriter(out, like, {}) as writer:
        for entry in like.tensors.values():
            data = bytearray(entry.info.nbytes)
            like.read_into(entry, 0, memoryview(data))
            writer.write(entry.name, 0, memoryview(data))
        writer.flush()
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in (
                (os, "replace"),
                (os, "unlink"),
                (os, "mkdir"),
                (os, "fsync"),
            ):
                patch.setattr(owner, name, watch(getattr(owner, name)))
            writer.commit()
    return moments


@pytest.mark.parametrize(
    ("before", "after", "other_config"),
    [
        ("one file", "one file", False),
        ("one file", "one file", True),
        ("one file", "two shards", True),
        ("one file", "one file with an index", False),
        ("two shards", "one file", False),
        ("two shards", "two shards", False),
        ("two shards", "three shards", True),
        ("two shards", "one file with an index", False),
        ("three shards", "two shards", True),
        ("three shards", "odd names", True),
        ("odd names", "two shards", True),
        ("odd names", "one file", False),
        ("one file with an index", "one file", False),
        ("one file with an index", "two shards", False),
        ("nothing", "two shards", True),
    ],
)
def test_a_folder_that_is_replaced_never_holds_a_mixture(
    before: str, after: str, other_config: bool, tmp_path: Path
) -> None:
    """Whatever the step that it is killed at: the model before, the new one, or clearly none."""
    source = model(tmp_path / "in", after, 2.0)
    out = model(tmp_path / "out", before, 1.0, None if other_config else 2.0)
    (out / "mine.txt").write_text("kept")
    moments = moments_of(source, out, tmp_path / "moments")
    expected = files(out)
    assert seen_by_us(out) == seen_by_transformers(out) == {2.0}
    assert expected.keys() == {*files(source), "mine.txt"}
    at_once = "one file" in (before, after) and after.startswith("one file") and not other_config
    found: list[tuple[set[float], set[float]]] = []
    for moment in moments:
        config = json.loads((moment / "config.json").read_text())["model"]
        found.append((seen_by_us(moment), seen_by_transformers(moment)))
        for values_found in found[-1]:
            assert values_found in (set(), {1.0}, {2.0}), "a mixture"
            assert not (values_found and other_config) or values_found == {config}
        # The next run puts it right, the same one or one of another layout.
        copy(source, moment)
        assert files(moment) == expected
    order = [{1.0}, set(), {2.0}]
    for reader in zip(*found, strict=True):
        positions = [order.index(values_found) for values_found in reader]
        assert before == "nothing" or positions == sorted(positions), "the model before came back"
    if before == after == "one file" and at_once:
        assert all(set() not in pair for pair in found), "needs no moment without a model"


def test_what_a_killed_exchange_left_is_no_hindrance_to_another_model(tmp_path: Path) -> None:
    source, out = (
        model(tmp_path / "in", "two shards", 2.0),
        model(tmp_path / "out", "odd names", 1.0),
    )
    other = model(tmp_path / "other", "three shards", 3.0)
    for moment in moments_of(source, out, tmp_path / "moments"):
        copy(other, moment)
        assert files(moment).keys() == files(other).keys()
        assert seen_by_us(moment) == seen_by_transformers(moment) == {3.0}


@pytest.mark.parametrize("what", ["config.json", "tokenizer", "model-00002-of-00002.safetensors"])
def test_an_exchange_that_cannot_end_is_not_begun(what: str, tmp_path: Path) -> None:
    source, out = (
        model(tmp_path / "in", "two shards", 2.0),
        model(tmp_path / "out", "one file", 1.0),
    )
    if what == "tokenizer":
        shutil.rmtree(out / what)
        (out / what).write_text("a file where a folder must go")
    else:
        (out / what).unlink(missing_ok=True)
        (out / what).mkdir()
    before = files(out)
    with pytest.raises(OutputError, match=f"{what}: is "):
        copy(source, out)
    assert files(out) == before
    assert seen_by_us(out) == {1.0}


def test_an_index_of_the_model_before_names_nothing_but_weights_beside_it(tmp_path: Path) -> None:
    source, out = model(tmp_path / "in", "two shards", 2.0), model(tmp_path / "out", "nothing", 1.0)
    (tmp_path / "precious.safetensors").write_text("x")
    names = ["..", "../precious.safetensors", "notes.txt", "sub.safetensors"]
    (out / INDEX).write_text(json.dumps({"weight_map": dict(enumerate(names))}))
    (out / "notes.txt").write_text("x")
    (out / "sub.safetensors").mkdir()
    copy(source, out)
    assert (tmp_path / "precious.safetensors").exists()
    assert (out / "notes.txt").exists()
    assert (out / "sub.safetensors").is_dir()
    assert seen_by_us(out) == {2.0}


def test_an_existing_folder_may_be_another_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = shards(tmp_path / "in"), tmp_path / "out"
    out.mkdir()

    def refuse(name: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        for folder in (src_dir_fd, dst_dir_fd):
            place = Path(f"/proc/self/fd/{folder}").readlink()
            assert place.is_relative_to(out), "would cross into another file system"
        replace(name, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    replace = os.replace
    monkeypatch.setattr(os, "replace", refuse)
    copy(source, out)
    assert sorted(path.name for path in out.iterdir()) == sorted(p.name for p in source.iterdir())


def test_weights_of_other_formats_that_stay_in_a_folder_are_told(tmp_path: Path) -> None:
    like = tmp_path / "like"
    like.mkdir()
    save_file({"w": torch.ones(2)}, like / "model.safetensors")
    output = tmp_path / "out"
    output.mkdir()
    for name in ("pytorch_model.bin", "notes.txt", "model.safetensors", "old.safetensors"):
        (output / name).touch()
    with open_checkpoint(like) as checkpoint, CheckpointWriter(output, checkpoint, {}) as writer:
        writer.commit()
    assert [path.name for path in writer.remaining] == ["old.safetensors", "pytorch_model.bin"]


def test_where_no_file_can_be_made_no_other_run_is_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """As in /proc, which answers that there is no such file."""
    real = os.open

    def refuse(path: object, flags: int, *rest: object, **more: object) -> int:
        if flags & os.O_CREAT:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        return real(path, flags, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OutputError, match="cannot be written: No such file or directory"):
        save_checkpoint(tmp_path / "out", {"w": torch.ones(1)}, {})


@pytest.mark.parametrize("is_folder", [False, True])
def test_an_interruption_while_a_temporary_is_made_leaves_nothing(is_folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(temporary, "lock", interrupted)
    with pytest.raises(KeyboardInterrupt):
        temporary.Temporary(tmp_path / "out", is_folder=is_folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_temporary_without_locks_is_the_only_one(is_folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(temporary, "lock", lambda *_: False)
    made = temporary.Temporary(tmp_path / "out", is_folder=is_folder)
    assert list(tmp_path.iterdir()) == [made.path]
    made.discard()
    assert list(tmp_path.iterdir()) == []


def test_sub_folders_with_weights_are_left_out(tmp_path: Path) -> None:
    source = shards(tmp_path / "in")
    for name in (
        "checkpoint-500/model.safetensors",
        "checkpoint-500/scheduler.pkl",
        "1_Pool/c.json",
    ):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("x")
    with open_checkpoint(source) as like, CheckpointWriter(tmp_path / "out", like, {}) as writer:
        writer.commit()
    assert [path.name for path in writer.left_out] == ["checkpoint-500"]
    assert (tmp_path / "out" / "1_Pool" / "c.json").exists()
    assert not (tmp_path / "out" / "checkpoint-500").exists()


def test_everything_is_on_disk_before_it_has_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in.safetensors"
    save_file({"w": torch.ones(2)}, source)
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_sync(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def watched_replace(path: Path, target: Path) -> None:
        calls.append("rename")
        replace(path, target)

    monkeypatch.setattr(module.os, "fsync", watched_sync)
    monkeypatch.setattr(module.os, "replace", watched_replace)
    copy(source, tmp_path / "out.safetensors")
    assert calls == ["file", "rename", "folder"]
