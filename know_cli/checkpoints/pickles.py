"""Checkpoints that PyTorch pickled, turned into safetensors files without running their code.

A conversion is planned first: every pickle is read (its tensors stay on disk), and all that can
be refused is. Then the data are copied, storage by storage in pieces of some megabytes, through
the same writer that predictions go through, so that an output is there whole or not at all. Only
a storage of which a tensor is a transposed or otherwise strided view is held in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from know_cli.checkpoints.checkpoint import Checkpoint
from know_cli.checkpoints.conversion import Conversion
from know_cli.checkpoints.dtypes import safetensors_dtype
from know_cli.checkpoints.folders import Beside
from know_cli.checkpoints.header import Header, Stamp, TensorInfo, encode_header, unreadable
from know_cli.checkpoints.json_text import MAX_BYTES
from know_cli.checkpoints.layouts import SUFFIX, is_index
from know_cli.checkpoints.output_checks import (
    check_file_output,
    check_folder_output,
    check_output,
)
from know_cli.checkpoints.pickle_data import copy_data, nbytes_of, problem_of, shared_memory
from know_cli.checkpoints.pickle_folders import (
    PickleModel,
    find_model,
    read_index,
    safetensors_name,
    shards_of,
)
from know_cli.checkpoints.pickle_names import PickledTensor
from know_cli.checkpoints.state_search import Found, find_state, is_average
from know_cli.checkpoints.torch_files import open_torch_file
from know_cli.checkpoints.writer import CheckpointWriter
from know_cli.errors import CheckpointError, OutputError, UsageError, quoted
from know_cli.files.folders import (
    create_file,
    free_bytes,
    new_folder,
    remove_empty,
    remove_within,
)
from know_cli.files.protected import Protected

_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class _Part:
    """One pickle, and the safetensors file that it becomes."""

    source: Path
    name: str
    stamp: Stamp
    found: Found

    @property
    def tensors(self) -> dict[str, PickledTensor]:
        return self.found.tensors


@dataclass(frozen=True)
class Plan:
    """A conversion that has been checked.

    Attributes:
        source: what the user named, for a folder's index its folder.
        model: the pickles, where the output is a folder; None for a single file.
        parts: each pickle with its tensors.
        copies_others: whether what lies beside the pickles belongs to the output.
        result: is completed by :meth:`execute`.
    """

    source: Path
    model: PickleModel | None
    parts: list[_Part]
    copies_others: bool
    result: Conversion

    @property
    def inputs(self) -> list[Path]:
        """Everything that must never be overwritten."""
        return [self.source, *(part.source for part in self.parts)]

    def check(self, inputs: Sequence[Path], *, force: bool) -> None:
        """Refuse an output that must not or cannot be written.

        Args:
            inputs: of this plan, and of the others that are executed with it.
            force: whether an existing output may be replaced.

        Raises:
            OutputError: the reason, and what to do.
        """
        output = self.result.output
        if self.model is None:
            check_file_output(output, inputs, force=force)
        else:
            folders = [self.source] if self.copies_others else []
            protected = Protected(inputs, folders)
            protected.refuse(output, [output, *(output / part.name for part in self.parts)])
            check_folder_output(output, protected, force=force)

    def execute(self, *, force: bool) -> Conversion:
        """Copy the data; the output is there whole or not at all.

        Raises:
            CheckpointError: an input is damaged, or has changed since it was planned.
            OutputError: the output cannot be written.
        """
        _check_space(self.result.output, self.result.nbytes)
        with _Writer(self, force=force) as writer:
            for part in self.parts:
                with open_torch_file(part.source) as file:
                    _check_unchanged(part, file.stamp)
                    copy_data(file, part.tensors, writer)
                    _check_unchanged(part, _stamp(part.source))
            writer.commit()
        if self.model is not None:
            own = {*self.model.files, self.model.index}
            self.result.files_left_out = [path for path in writer.left_out if path not in own]
            self.result.remaining = writer.remaining
        return self.result


def convert_pickle(source: Path, output: Path, key: str = "", *, force: bool = True) -> Conversion:
    """Write the state dict in a file of ``torch.save`` as a safetensors file.

    Args:
        source: the file (``.pt``, ``.pth``, ``.bin``, ``.ckpt``).
        output: the file to write.
        key: under which the state dict is; see
            :func:`~know_cli.checkpoints.state_search.find_state`.
        force: whether an output that exists is replaced.

    Raises:
        CheckpointError: it cannot be read without running code, or has no usable state dict.
        OutputError: the output cannot be written.
    """
    plan = _plan_file(source, output, key)
    plan.check(plan.inputs, force=force)
    return plan.execute(force=force)


def plan_conversions(
    sources: Sequence[Path], output: Path, key: str = "", *, force: bool = False
) -> list[Plan]:
    """Read all inputs of a conversion, and refuse what cannot be done, before anything is written.

    Args:
        sources: a pickle becomes a file; a folder or shard index becomes a folder; so do several
            files that are the shards of a model; several of anything else go into a folder.
        output: the file or folder.
        key: under which the state dicts are.
        force: whether outputs that exist are to be replaced.

    Raises:
        UsageError: two inputs would become one output.
        CheckpointError: an input cannot be used.
        OutputError: an output must not or cannot be written.
    """
    if len(sources) == 1:
        is_folder = is_model(sources[0])
        _check_name(output, is_folder=is_folder)
        if is_folder:  # before the inputs are read, which takes a while
            check_output(output, [], is_folder=True, force=force)
        else:
            check_file_output(output, sources, force=force)
        plans = [_plan(sources[0], output, key)]
    else:
        _check_name(output, is_folder=True)
        check_output(output, [], is_folder=True, force=True)
        shards = shards_of(sources)
        if shards is not None:
            plans = [_plan_model(sources[0].parent, shards, output, key, copies_others=False)]
        else:
            plans = [_plan(source, output / name, key) for source, name in _names(sources).items()]
            if not output.exists():
                return plans
    inputs = [path for plan in plans for path in plan.inputs]
    for plan in plans:
        plan.check(inputs, force=force)
    return plans


def execute(plans: Sequence[Plan], output: Path, *, force: bool) -> Iterator[Conversion]:
    """Execute plans one by one, in a folder that is made if they need it.

    Raises:
        CheckpointError, OutputError: as :meth:`Plan.execute`.
    """
    made = any(plan.result.output.parent == output for plan in plans) and not output.exists()
    try:
        if made:
            new_folder(output)
        for plan in plans:
            yield plan.execute(force=force)
    except OSError as error:
        raise OutputError(f"{output}: cannot be made: {error.strerror or error}") from error
    finally:
        if made:
            remove_empty(output)  # it is not, as it should be


def is_model(source: Path) -> bool:
    """Whether an input becomes a folder: one itself, or a shard index."""
    return source.is_dir() or source.suffix == ".json"


def _check_name(output: Path, *, is_folder: bool) -> None:
    if is_folder and output.suffix == SUFFIX:
        raise OutputError(
            f"{output}: is named as a file, but the output is a folder; name it without {SUFFIX}"
        )


def _names(sources: Sequence[Path]) -> dict[Path, str]:
    """What each of several inputs is called in the folder that they are written to."""
    names: dict[str, Path] = {}
    for source in sources:
        name = source.name or source.resolve().name
        if source.is_dir():
            name = source.resolve().name
        elif is_model(source):
            name = source.resolve().parent.name
        else:
            name = safetensors_name(name)
        if name in names:
            raise UsageError(
                f"{source}: would become {name}, as {names[name]} does; convert them one by one"
            )
        names[name] = source
    return {source: name for name, source in names.items()}


def _plan(source: Path, output: Path, key: str) -> Plan:
    if source.is_dir():
        return _plan_model(source, find_model(source), output, key)
    if is_model(source):
        return _plan_model(source.parent, read_index(source), output, key)
    return _plan_file(source, output, key)


def _plan_file(source: Path, output: Path, key: str) -> Plan:
    part = _part(source, output.name, key)
    return Plan(source, None, [part], False, _summary(output, [part]))


def _plan_model(
    folder: Path, model: PickleModel, output: Path, key: str, *, copies_others: bool = True
) -> Plan:
    parts = [_part(source, name, key) for source, name in model.files.items()]
    owner: dict[str, Path] = {}
    for part in parts:
        for name in part.tensors:
            if name in owner:
                raise CheckpointError(
                    f"{part.source}: tensor {quoted(name)} is in {owner[name].name} as well; "
                    "save the checkpoint again"
                )
            owner[name] = part.source
    if model.index is not None:
        _check_index(model, owner)
    return Plan(folder, model, parts, copies_others, _summary(output, parts))


def _check_index(model: PickleModel, owner: Mapping[str, Path]) -> None:
    for name in sorted(model.shards.keys() | owner.keys()):
        said, found = model.shards.get(name), owner[name].name if name in owner else None
        if said != found:
            raise CheckpointError(
                f"{model.index}: tensor {quoted(name)} is "
                f"{f'in {found}' if found else 'in none of the shards'}, but "
                f"{f'{said} by the index' if said else 'not in the index'}; index and shards are "
                "not of one checkpoint"
            )


def _part(source: Path, name: str, key: str) -> _Part:
    with open_torch_file(source) as file:
        found = find_state(source, file.content(), key)
        for tensor_name, tensor in found.tensors.items():
            problem = problem_of(file, tensor)
            if problem:
                raise CheckpointError(f"{source}: tensor {quoted(tensor_name)}: {problem}")
        part = _Part(source, name, file.stamp, found)
    if len(_layout(part)[0]) > MAX_BYTES:
        raise CheckpointError(
            f"{source}: the names and shapes of its tensors need a header of more than the "
            f"{MAX_BYTES} bytes that are read"
        )
    return part


def _summary(output: Path, parts: Sequence[_Part]) -> Conversion:
    result = Conversion(output)
    for part in parts:
        found = part.found
        result.tensors += len(found.tensors)
        result.nbytes += sum(map(nbytes_of, found.tensors.values()))
        result.nested = result.nested or found.key
        result.shared += shared_memory(found.tensors)
        result.left_out += found.left_out
        result.strays += found.strays
        result.averages += [key for key in found.averages if key not in result.averages]
        result.averaged += [
            name
            for name in found.tensors
            if found.is_average or ("." in name and is_average(name.partition(".")[0]))
        ]
    return result


def _stamp(path: Path) -> Stamp:
    try:
        return Stamp.of(path.stat())
    except OSError as error:
        raise unreadable(path, error) from error


def _check_unchanged(part: _Part, stamp: Stamp) -> None:
    if stamp != part.stamp:
        raise CheckpointError(
            f"{part.source}: has changed while it was read, so that nothing made of it can be "
            "relied on; do not write to inputs during a run, and run again"
        )


class _Writer(CheckpointWriter):
    """Writes the files of a plan; for a model of shards also their index."""

    def __init__(self, plan: Plan, *, force: bool) -> None:
        self._plan = plan
        headers = {}
        for part in plan.parts:
            start, infos = _layout(part)
            size = max((info.end for info in infos.values()), default=len(start))
            path = part.source if plan.model is None else plan.source / part.name
            headers[path] = Header(infos, _METADATA, size, part.stamp)
        like = Checkpoint(plan.source, plan.model is not None, headers, {})
        super().__init__(plan.result.output, like, _METADATA, force=force)

    def _find_beside(self) -> Beside:
        if not (self._plan.copies_others and self._like.is_folder):
            return Beside()
        return Beside.of(self._like, is_converted=True)

    def _write_beside(self, folder: int) -> list[Path]:
        model = self._plan.model
        assert model is not None, "a single file has nothing beside it"
        left_out = super()._write_beside(folder)
        # Of the pickles, where its name is a variant's, and of other weights, which were left out.
        for name in filter(is_index, os.listdir(folder)):
            remove_within(name, folder)
        if model.index_name:
            weight_map = {name: part.name for part in self._plan.parts for name in part.tensors}
            index = {
                "metadata": {**model.metadata, "total_size": self._plan.result.nbytes},
                "weight_map": weight_map,
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            descriptor = create_file(model.index_name, folder)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(descriptor)
        return left_out


def _layout(part: _Part) -> tuple[bytes, dict[str, TensorInfo]]:
    return encode_header(
        [(name, safetensors_dtype(t.dtype), t.shape) for name, t in part.tensors.items()],
        _METADATA,
    )


def _check_space(output: Path, nbytes: int) -> None:
    """Names that share memory can need far more room than the input has."""
    try:
        free = free_bytes(output.absolute().parent)
    except OSError as error:
        raise OutputError(f"{output}: cannot be written: {error.strerror or error}") from error
    if nbytes > free:
        raise OutputError(f"{output}: needs {nbytes} bytes, and {free} are free there")
