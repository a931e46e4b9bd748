"""Writing a checkpoint: header first, tensors to their final offsets, renamed at the end.

Until :meth:`CheckpointWriter.commit` nothing is visible under the output's name, and leaving
the ``with`` block without it, for whatever reason, removes every temporary.
"""

from __future__ import annotations

import filecmp
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from know_cli.checkpoints.checkpoint import Checkpoint, is_inside_closely
from know_cli.checkpoints.dtypes import safetensors_dtype
from know_cli.checkpoints.header import TensorInfo, encode_header
from know_cli.checkpoints.layouts import OTHER_FORMATS, SUFFIX, is_index, weights_in
from know_cli.checkpoints.temporary import Temporary, join_temporary
from know_cli.errors import OutputError
from know_cli.files import missing_folder

if TYPE_CHECKING:
    import torch

# Weights in other formats and training state would contradict the predicted weights beside them.
_LEFT_OUT = {SUFFIX, *OTHER_FORMATS}
_WRITE_BYTES = 8 << 20
_STAMPS = 1 << 31  # seconds that every file system can hold
# Several machines may write to one page of a file. One that has read the page may, on NFS, write
# all of it back (nfs_can_extend_write in Linux); one that cannot read writes its own bytes only.
_ONLY_WRITES = os.O_WRONLY | os.O_CLOEXEC


def check_output(output: Path, inputs: list[Checkpoint], *, is_folder: bool, force: bool) -> None:
    """Refuse an output that must not or cannot be written, before any work is done.

    Args:
        output: the path as the user gave it.
        inputs: checkpoints that must never be overwritten.
        is_folder: whether a folder is going to be written.
        force: whether an existing output may be replaced.

    Raises:
        OutputError: the reason, and what to do.
    """
    if output == Path("-"):
        raise OutputError(f"{output}: a checkpoint is written at many places at once; name a file")
    parent = output.parent
    try:
        has_parent = parent.is_dir()
        output.exists()
    except OSError as error:  # a name too long, for one
        raise OutputError(f"{output}: cannot be written: {error.strerror or error}") from error
    if not has_parent:
        raise missing_folder(parent)
    if is_folder and output.suffix.lower() == SUFFIX and not output.is_dir():
        raise OutputError(
            f"{output}: is the name of a file, but the output is a folder with the same files as "
            "the first checkpoint is; name a folder"
        )
    for checkpoint in inputs:
        _refuse_input(output, checkpoint, is_folder)
    if output.exists() or output.is_symlink():
        if output.is_dir() != is_folder:
            wanted, found = ("folder", "file") if is_folder else ("file", "folder")
            raise OutputError(
                f"{output}: is a {found}, but the output is a {wanted} as the first checkpoint "
                "is; name another"
            )
        if not (output.is_file() or output.is_dir() or output.is_symlink()):
            raise OutputError(f"{output}: is neither a file nor a folder; name another output")
        if output.is_dir() and output.resolve().parent == output.resolve():
            raise OutputError(f"{output}: is the root of all files; name another output")
        if not force and _is_taken(output):
            raise OutputError(f"{output}: exists already; --force replaces it")
    folder = output if output.is_dir() else parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{output}: no permission to write in {folder}")


def _refuse_input(output: Path, checkpoint: Checkpoint, is_folder: bool) -> None:
    inputs = [checkpoint.path, *checkpoint.headers]
    outputs = [output]
    if is_folder:
        outputs += [output / path.name for path in checkpoint.headers]
    for one in inputs:
        for other in outputs:
            if other.exists() and one.samefile(other):
                raise OutputError(
                    f"{output}: is the input {checkpoint.path}; an input is never overwritten, "
                    "name another output"
                )


def check_file_output(output: Path, inputs: Sequence[Path], *, force: bool) -> None:
    """Refuse a single file that must not or cannot be written, before any work is done.

    Args:
        output: the path as the user gave it.
        inputs: files that must never be overwritten.
        force: whether an existing output may be replaced.

    Raises:
        OutputError: the reason, and what to do.
    """
    check_output(output, [], is_folder=False, force=True)
    try:
        for path in inputs:
            if output.exists() and path.exists() and output.samefile(path):
                raise OutputError(
                    f"{output}: is the input; an input is never overwritten, name another output"
                )
    except OSError as error:
        raise OutputError(f"{output}: cannot be written: {error.strerror or error}") from error
    if not force and (output.exists() or output.is_symlink()):
        raise OutputError(f"{output}: exists already; --force replaces it")


class Sink(Protocol):
    """Where the tensors of an output go; :class:`CheckpointWriter` is one."""

    @property
    def left_out(self) -> list[Path]:
        """Files beside the inputs' weights that are not part of the output."""

    @property
    def remaining(self) -> list[Path]:
        """Files with other weights that were in the output's place and stay."""

    @property
    def nbytes(self) -> int:
        """Size of the output's safetensors files."""

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Take bytes of one tensor, ``offset`` counted from the start of its data."""

    def flush(self) -> None:
        """Have everything where it cannot be lost."""

    def commit(self) -> None:
        """Show the output under its name."""

    def __enter__(self) -> Sink: ...

    def __exit__(self, *exception: object) -> None: ...


class _Places:
    """Open files of an output, and where in them the bytes of each tensor go."""

    def __init__(self, output: Path, like: Checkpoint, metadata: Mapping[str, str]) -> None:
        self.output = output
        self.left_out: list[Path] = []
        self.remaining: list[Path] = []
        self._like = like
        self._metadata = dict(metadata)
        self._place: dict[str, tuple[int, TensorInfo]] = {}
        self._descriptors: list[int] = []

    def _layouts(self) -> Iterator[tuple[Path, bytes, dict[str, TensorInfo]]]:
        """Of each file: the one in the checkpoint that it is like, its header, its tensors."""
        for path, header in self._like.headers.items():
            tensors = [(info.name, info.dtype, info.shape) for info in header.tensors.values()]
            yield path, *encode_header(tensors, self._metadata)

    def _file(self, temporary: Path, path: Path) -> Path:
        return temporary / path.name if self._like.is_folder else temporary

    def _take(self, descriptor: int, infos: Mapping[str, TensorInfo]) -> None:
        for name, info in infos.items():
            self._place[name] = (descriptor, info)

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write bytes of one tensor, ``offset`` counted from the start of its data.

        Raises:
            OutputError: the disk is full, or refuses.
        """
        descriptor, info = self._place[name]
        with _output_errors(self.output):
            _write_at(descriptor, data, info.begin + offset)

    @property
    def nbytes(self) -> int:
        """Size of the safetensors files that are written."""
        ends: dict[int, int] = {}
        for descriptor, info in self._place.values():
            ends[descriptor] = max(ends.get(descriptor, 0), info.end)
        return sum(ends.values())

    def _sync(self) -> None:
        for descriptor in self._descriptors:
            os.fsync(descriptor)
        self._close()

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())


class CheckpointWriter(_Places):
    """Streams a checkpoint that has the tensors of another, each at its final offset.

    Use as a context manager: :meth:`write` any part of any tensor in any order, then
    :meth:`commit`. For a folder, shards and index keep their names, and the
    files beside them that are not weights are copied.

    Args:
        output: file or folder to write, checked before with :func:`check_output`.
        like: the checkpoint whose tensors, dtypes and layout the output has.
        metadata: of every safetensors file written.

    Attributes:
        left_out: after the flush of a folder, files and sub-folders that were not copied along
            because they hold other weights or training state.
        remaining: after the commit into a folder that was there, files in it with other weights
            or training state, which stay.
    """

    def __init__(
        self, output: Path, like: Checkpoint, metadata: Mapping[str, str], *, force: bool = True
    ) -> None:
        super().__init__(output, like, metadata)
        self._force = force
        self._flushed = False
        self._is_stamped = False
        self._temporary: Temporary | None = None

    def __enter__(self) -> CheckpointWriter:
        with _output_errors(self.output):
            self._temporary = Temporary(self.output, is_folder=self._like.is_folder)
            try:
                if not self._force and _is_taken(self.output):
                    raise OutputError(
                        f"{self.output}: another run has just written it; --force replaces it"
                    )
                for path, start, infos in self._layouts():
                    self._start_file(path, start, infos)
            except BaseException:
                self._discard()
                raise
        return self

    @property
    def _place_of_files(self) -> Path:
        assert self._temporary is not None, "use it in a with block"
        return self._temporary.path

    def _start_file(self, path: Path, start: bytes, infos: Mapping[str, TensorInfo]) -> None:
        flags = os.O_CREAT | os.O_EXCL if self._like.is_folder else 0
        target = self._file(self._place_of_files, path)
        descriptor = os.open(target, _ONLY_WRITES | flags, 0o666)
        self._descriptors.append(descriptor)
        size = max((info.end for info in infos.values()), default=len(start))
        # Asking for all space now turns a full disk into an error before hours of work; while the
        # file is empty, since where a file system cannot do it the C library reads what is there.
        if hasattr(os, "posix_fallocate") and size:
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.truncate(descriptor, size)
        _write_at(descriptor, memoryview(start), 0)
        self._take(descriptor, infos)

    def share(self) -> SharedPlace:
        """Let other processes write parts of it, each with a :class:`CheckpointPart`.

        Raises:
            OutputError: another run has taken the temporary in this moment.
        """
        assert self._temporary is not None, "use it in a with block"
        with _output_errors(self.output):
            stamp = secrets.randbelow(_STAMPS)
            for descriptor in self._descriptors:
                os.fsync(descriptor)
                if hasattr(os, "posix_fadvise"):
                    # What this machine remembers of the file must not be written back with
                    # its own part.
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.utime(descriptor, (stamp, stamp))
            self._is_stamped = True
            return SharedPlace(self._temporary.path.absolute(), self._temporary.share(), stamp)

    def flush(self) -> None:
        """Have everything on disk, still under the temporary name; after it only renames are left.

        Raises:
            OutputError: the disk refuses.
        """
        with _output_errors(self.output):
            if self._is_stamped:
                for descriptor in self._descriptors:
                    os.utime(descriptor)
            self._sync()
            if self._like.is_folder:
                self.left_out = copy_other_files(self._like, self._place_of_files)
        self._flushed = True

    def commit(self) -> None:
        """Flush what is not flushed yet, and give it the output's name, a folder's index last.

        Raises:
            OutputError: the disk refuses; an output that existed is untouched, except that an
                existing folder may have lost its weights if the failure comes while its files
                are exchanged, so that old and new ones are never taken for one model.
        """
        if not self._flushed:
            self.flush()
        with _output_errors(self.output):
            assert self._temporary is not None, "use it in a with block"
            if not self._like.is_folder:
                self._temporary.path.replace(self.output)
                self._temporary.moved()
            elif _move_folder(self._temporary.path, self.output):
                self._temporary.moved()
            else:
                self.remaining = self._other_weights()
            _sync_folder(self.output.absolute().parent)

    def _other_weights(self) -> list[Path]:
        own = {path.name for path in self._like.headers}
        return sorted(
            path
            for path in self.output.iterdir()
            if path.suffix in _LEFT_OUT and path.name not in own and not path.is_dir()
        )

    def _discard(self) -> None:
        self._close()
        if self._temporary is not None:
            self._temporary.discard()

    def __exit__(self, *exception: object) -> None:
        self._discard()


@dataclass(frozen=True)
class SharedPlace:
    """Where an output is until it is complete, for the other processes that write it.

    Attributes:
        path: of the temporary; all see it under this path.
        is_locked: whether it is kept from other runs by a lock.
        stamp: time of the files' last change, in whole seconds, drawn at random. A machine that
            does not share the file system may have files of the same name and size there, which
            a run that was killed left.
    """

    path: Path
    is_locked: bool
    stamp: int


class CheckpointPart(_Places):
    """Writes a part of the checkpoint that a :class:`CheckpointWriter` elsewhere has begun.

    It is the other writer that completes it, after this one's :meth:`flush`. Use as a context
    manager.

    Args:
        output: as the other writer's.
        like: as the other writer's.
        metadata: as the other writer's.
        place: what the other writer shares; nobody may write before all have opened it.
        check: is called while the place is not seen yet, and raises if that is in vain.
    """

    def __init__(
        self,
        output: Path,
        like: Checkpoint,
        metadata: Mapping[str, str],
        place: SharedPlace,
        check: Callable[[], None],
    ) -> None:
        super().__init__(output, like, metadata)
        self._shared = place
        self._check = check
        self._lock = -1

    def __enter__(self) -> CheckpointPart:
        with _output_errors(self.output):
            self._lock = join_temporary(
                self._shared.path,
                self.output,
                is_folder=self._like.is_folder,
                is_locked=self._shared.is_locked,
                check=self._check,
            )
            try:
                for path, start, infos in self._layouts():
                    target = self._file(self._shared.path, path)
                    descriptor = os.open(target, _ONLY_WRITES | os.O_NOFOLLOW)
                    self._descriptors.append(descriptor)
                    size = max((info.end for info in infos.values()), default=len(start))
                    found = os.fstat(descriptor)
                    if (found.st_size, int(found.st_mtime)) != (size, self._shared.stamp):
                        raise OutputError(
                            f"{target}: is not the file that rank 0 has begun; the ranks' machines "
                            "must share the output's file system"
                        )
                    self._take(descriptor, infos)
            except BaseException:
                self._leave()
                raise
        return self

    def flush(self) -> None:
        """Have what was written here on disk.

        Raises:
            OutputError: the disk refuses.
        """
        with _output_errors(self.output):
            self._sync()

    def commit(self) -> None:
        """Nothing: the other writer shows the output."""

    def _leave(self) -> None:
        self._close()
        os.close(self._lock)

    def __exit__(self, *exception: object) -> None:
        self._leave()


def _holds_weights(folder: Path) -> bool:
    return any(path.suffix in _LEFT_OUT for path in folder.rglob("*"))


def copy_other_files(source: Checkpoint, target: Path) -> list[Path]:
    """Copy what lies beside a folder's weights (config, tokenizer, shard index) into ``target``.

    Links are followed within the folder. Hidden files and weights in other formats are left out,
    and so are whole sub-folders that hold weights, such as those that a trainer saves with its
    state, and links that lead out of the folder: what is published with a model must not be any
    file of this disk that a stranger's link names.

    Returns:
        The files left out because they hold other weights or training state, or lead elsewhere.
    """
    states = [path for path in source.path.iterdir() if path.is_dir() and _holds_weights(path)]
    left_out = sorted(path for path in states if not path.name.startswith("."))
    for path in sorted(source.path.rglob("*")):
        relative = path.relative_to(source.path)
        if source.path / relative.parts[0] in states:
            continue
        if any(part.startswith(".") for part in relative.parts) or not path.is_file():
            continue
        of_other_weights = is_index(path.name) and path != source.index_path
        if path.suffix in _LEFT_OUT or of_other_weights:
            if path not in source.headers:
                left_out.append(path)
            continue
        if not is_inside_closely(path, source.path):
            left_out.append(path)
            continue
        copy = target / relative
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        with copy.open("rb+") as file:
            os.fsync(file.fileno())
    return left_out


def save_checkpoint(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a state dict as one safetensors file, whole or not at all, the same bytes each time.

    Tensors that share memory (tied weights) are each written in full, so that
    ``load_state_dict`` finds every name.

    Args:
        path: the file; replaced if it exists.
        tensors: by name, on any device, any layout in memory.
        metadata: string to string.

    Raises:
        OutputError: the file cannot be written, or a tensor's dtype has no place in the format.
    """
    import torch

    kept = {name: tensor.detach() for name, tensor in tensors.items()}
    try:
        layout = [(n, safetensors_dtype(t.dtype), tuple(t.shape)) for n, t in kept.items()]
    except KeyError as error:
        raise OutputError(f"{path}: safetensors has no dtype {error}") from error
    start, infos = encode_header(layout, metadata)
    with _output_errors(path):
        temporary = Temporary(path, is_folder=False)
        try:
            with temporary.path.open("r+b") as file:
                file.write(start)
                buffer = torch.empty(_WRITE_BYTES, dtype=torch.uint8)
                for name in infos:
                    flat = kept[name].reshape(-1)
                    # Piece by piece into one buffer: a tensor that is mapped from a file, or on
                    # another device, needs no second copy of itself, and any stride will do.
                    rows = _WRITE_BYTES // flat.element_size()
                    for row in range(0, len(flat), rows):
                        piece = flat[row : row + rows]
                        bytes_of = buffer[: len(piece) * flat.element_size()]
                        bytes_of.view(flat.dtype).copy_(piece)
                        file.write(bytes_of.numpy().data)
                file.flush()
                os.fsync(file.fileno())
            temporary.path.replace(path)
            temporary.moved()
        finally:
            temporary.discard()
        _sync_folder(path.parent)


def _is_taken(output: Path) -> bool:
    """Whether something other than an empty folder, or our temporary in it, has the name."""
    if output.is_dir():
        return any(not path.name.startswith(".know-") for path in output.iterdir())
    return output.exists() or output.is_symlink()


def _move_folder(temporary: Path, output: Path) -> bool:
    """Give a folder its name, or its files their places; whether it was the folder itself.

    Whoever opens the output meanwhile, or after a run that was killed in here, finds the model
    before, the new one, or that there is none; never weights of both, or the weights of one with
    the configuration of the other. Nothing is removed that the next run could not tell from what
    belongs there: the old index, which names the old shards, goes after them.
    """
    _sync_folder(temporary)
    if not output.exists():
        temporary.rename(output)
        return True
    files = {
        path.relative_to(temporary): path for path in sorted(temporary.rglob("*")) if path.is_file()
    }
    for relative in files:
        _refuse_folder_in_place(output, relative)
    index = next((files.pop(at) for at in list(files) if is_index(str(at))), None)
    weights = {at: files.pop(at) for at in list(files) if at.suffix == SUFFIX}
    old = weights_in(output)
    if not _is_one_step(weights, files, output):
        _remove(output, old)
    for relative, path in {**files, **weights}.items():
        target = output / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    # What is left of the model before, its index above all, would be taken for this one's.
    _remove(output, [name for name in old if Path(name) not in weights])
    if index is not None:
        index.replace(output / index.name)
        _sync_folder(output)
    return False


def _refuse_folder_in_place(output: Path, relative: Path) -> None:
    """Refuse to begin an exchange that would fail in its middle."""
    target = output / relative
    if target.is_dir() and not target.is_symlink():
        raise OutputError(f"{target}: is a folder where a file must go; name another output")
    for parent in relative.parents:
        if (output / parent).exists() and not (output / parent).is_dir():
            raise OutputError(f"{output / parent}: is no folder, but one must go there")


def _is_one_step(weights: Mapping[Path, Path], others: Mapping[Path, Path], output: Path) -> bool:
    """Whether a single file is all that changes, so that renaming it is the whole exchange."""
    filecmp.clear_cache()  # which goes by times and sizes
    return len(weights) == 1 and all(
        (output / at).is_file() and filecmp.cmp(path, output / at, shallow=False)
        for at, path in others.items()
    )


def _remove(folder: Path, names: Iterable[str]) -> None:
    """Remove files, and have all that was done in the folder on disk before anything else."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    _sync_folder(folder)


def _write_at(descriptor: int, data: memoryview, position: int) -> None:
    if not data.nbytes:
        return  # an empty view cannot be cast
    view = data.cast("B")
    while len(view):
        count = os.pwrite(descriptor, view, position)
        position, view = position + count, view[count:]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _output_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{output}: cannot be written: {error.strerror or error}; nothing of it was kept"
        ) from error
