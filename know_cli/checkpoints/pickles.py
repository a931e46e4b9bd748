"""Checkpoints that PyTorch pickled, turned into safetensors files without running their code.

A pickle is a program: loading one from a stranger runs what the stranger wrote. PyTorch's
restricted loader (``weights_only=True``) knows tensors and plain containers only, and is all
that is used here; what needs more is refused. Tensors stay on disk (``mmap=True``) until they
are written, one after the other.
"""

from __future__ import annotations

import pickle
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from know_cli.checkpoints.dtypes import safetensors_dtype
from know_cli.checkpoints.header import START_BYTES, known_as, unreadable
from know_cli.checkpoints.json_text import MAX_OBJECTS, is_unicode
from know_cli.checkpoints.state import save_checkpoint
from know_cli.errors import CheckpointError, OutputError, a_type, quoted

#: Where training programs keep the state dict in what they save, the usual ones first.
NESTED = ("state_dict", "model_state_dict", "model", "module", "params", "weights")
# How the loader names what it will not run.
_CODE = re.compile(r"GLOBAL ([\w.<>]+)|class ([\w.]+)")
_MAX_NAMED = 3


@dataclass
class Conversion:
    """What was written, and what the user should know of it.

    Attributes:
        tensors: number of tensors.
        nbytes: size of their data.
        nested: key under which the state dict was found; empty if it was at the top.
        shared: groups of names that share memory in the input; each is written in full.
        left_out: names in the state dict that are no tensors.
    """

    tensors: int
    nbytes: int
    nested: str = ""
    shared: list[list[str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def notices(self) -> list[str]:
        """Lines for the user."""
        lines = []
        if self.nested:
            lines.append(f"taking the state dict under {self.nested!r}")
        for names in self.shared[:_MAX_NAMED]:
            lines.append(
                f"{', '.join(map(quoted, names))} share memory; each is written in full, so that "
                "every name is found"
            )
        if len(self.shared) > _MAX_NAMED:
            lines.append(f"and {len(self.shared) - _MAX_NAMED} more groups that share memory")
        if self.left_out:
            named = ", ".join(map(quoted, self.left_out[:_MAX_NAMED]))
            more = len(self.left_out) - _MAX_NAMED
            lines.append(
                f"left out, since they are no tensors: {named}"
                + (f" and {more} more" if more > 0 else "")
            )
        return lines


def convert_pickle(source: Path, output: Path) -> Conversion:
    """Write the state dict in a file of ``torch.save`` as a safetensors file.

    Args:
        source: the file (``.pt``, ``.pth``, ``.bin``, ``.ckpt``), in the zip form that PyTorch
            has written since version 1.6.
        output: the file to write; replaced if it exists.

    Raises:
        CheckpointError: it cannot be read without running code, or has no usable state dict.
        OutputError: the output cannot be written.
    """
    tensors, result = read_pickle(source)
    _check_space(output, result.nbytes)
    save_checkpoint(output, tensors, {"format": "pt"})
    return result


def read_pickle(source: Path) -> tuple[dict[str, Tensor], Conversion]:
    """The tensors of a pickled state dict, still on disk, and what was found beside them.

    Raises:
        CheckpointError: as :func:`convert_pickle`.
    """
    content = _load(source)
    state, nested = _find_state(source, content)
    if len(state) > MAX_OBJECTS:
        raise CheckpointError(f"{source}: has more than the {MAX_OBJECTS} tensors that are read")
    tensors: dict[str, Tensor] = {}
    left_out = []
    for name, value in state.items():
        if isinstance(value, Tensor):
            tensors[name] = _checked(source, name, value)
        else:
            left_out.append(name)
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return tensors, Conversion(len(tensors), nbytes, nested, _shared(tensors), left_out)


def _load(source: Path) -> Any:
    try:
        if not source.is_file():
            raise CheckpointError(f"{source}: no such file; give one that torch.save wrote")
        with source.open("rb") as file:
            start = file.read(START_BYTES)
    except OSError as error:
        raise unreadable(source, error) from error
    if not start.startswith(b"PK\x03\x04"):
        if start.startswith(b"\x80"):
            raise CheckpointError(
                f"{source}: is in the form that PyTorch wrote before version 1.6; if you trust it, "
                "load it and save it again with torch.save"
            )
        if not start:
            raise CheckpointError(f"{source}: is empty; download or save it again")
        if start[8:9] == b"{":
            raise CheckpointError(
                f"{source}: looks like a safetensors file, which needs no converting"
            )
        what = known_as(start, source.stat().st_size) or "is not a file of torch.save"
        raise CheckpointError(f"{source}: {what}; nothing was read of it")
    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(source, str(error))) from error
    except MemoryError:
        raise
    except Exception as error:
        # A damaged archive fails in many ways, none of which is this program's.
        text = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{source}: is damaged, or no checkpoint ({type(error).__name__}: {text}); download or "
            "save it again"
        ) from error


def _refusal(source: Path, text: str) -> str:
    match = _CODE.search(text)
    if match is None:
        return f"{source}: is damaged, or holds more than tensors; it was not loaded"
    name = match[1] or match[2]
    return (
        f"{source}: holds more than tensors: loading it would run {quoted(name)}, and a pickle can "
        "run any code that way; refused; if you trust it, save its state_dict() alone"
    )


def _find_state(source: Path, content: Any) -> tuple[Mapping[str, Any], str]:
    """The mapping that has tensors, and the key that it was under."""
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{source}: holds {a_type(content)}, not a state dict; save state_dict() alone"
        )
    nested = ""
    if not _has_tensors(content):
        for key in NESTED:
            if isinstance(content.get(key), Mapping) and _has_tensors(content[key]):
                content, nested = content[key], key
                break
        else:
            raise CheckpointError(
                f"{source}: has no tensors, nor a state dict under {', '.join(NESTED)}"
            )
    for name in content:
        if not isinstance(name, str) or not is_unicode(name):
            raise CheckpointError(f"{source}: has {quoted(name)} where a tensor's name should be")
    return content, nested


def _has_tensors(content: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in content.values())


def _checked(source: Path, name: str, tensor: Tensor) -> Tensor:
    """The tensor, if it can be written as it is."""

    def fail(problem: str) -> CheckpointError:
        return CheckpointError(f"{source}: tensor {quoted(name)}: {problem}")

    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise fail("is sparse, quantised or without data; save it as a plain tensor")
    if tensor.is_conj() or tensor.is_neg():
        raise fail("is a conjugate or negative view; save a copy of it")
    try:
        safetensors_dtype(tensor.dtype)
    except KeyError as error:
        raise fail(f"safetensors files have no dtype {tensor.dtype}") from error
    # A few bytes can claim to be any number of elements, all the same.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise fail("is larger than the data it is made of; save a copy of it")
    return tensor.detach()


def _shared(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names whose tensors are of one storage, in groups."""
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            groups.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _check_space(output: Path, nbytes: int) -> None:
    """Names that share memory can need far more room than the input has."""
    try:
        free = shutil.disk_usage(output.absolute().parent).free
    except OSError as error:
        raise OutputError(f"{output}: cannot be written: {error.strerror or error}") from error
    if nbytes > free:
        raise OutputError(f"{output}: needs {nbytes} bytes, and {free} are free there")
