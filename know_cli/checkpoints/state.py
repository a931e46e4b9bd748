"""Reads and writes whole state dicts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from know_cli.checkpoints.checkpoint import open_checkpoint
from know_cli.checkpoints.dtypes import safetensors_dtype
from know_cli.checkpoints.header import METADATA_KEY, encode_header
from know_cli.checkpoints.json_text import MAX_BYTES, is_unicode
from know_cli.errors import OutputError, UsageError, quoted
from know_cli.files import output_errors, sync_folder
from know_cli.files.temporary import Temporary

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_WRITE_BYTES = 8 << 20


def save_checkpoint(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    *,
    replace: bool = True,
) -> None:
    """Write a state dict as one safetensors file, whole or not at all, the same bytes each time.

    Tensors that share memory (tied weights) are each written in full, so ``load_state_dict`` finds
    every name.

    Args:
        path: the file.
        tensors: by name, on any device and with any memory layout.
        metadata: entries of the header, strings to strings.
        replace: whether a file that exists is replaced.

    Raises:
        OutputError: the file cannot be written, the format has no such dtype, or a tensor has no
            values that lie in memory one beside the other.

    >>> import torch
    >>> path = Path("ckpt0.safetensors")
    >>> save_checkpoint(path, {"fc.weight": torch.eye(2)}, {"format": "pt"})
    >>> read_state(path)
    {'fc.weight': tensor([[1., 0.],
            [0., 1.]])}
    """
    import torch

    for name, tensor in tensors.items():
        if not _is_plain(tensor):
            raise OutputError(
                f"{path}: tensor {quoted(name)}: is sparse, nested, quantised or without data; "
                "save it as a plain tensor"
            )
    kept = {name: tensor.detach() for name, tensor in tensors.items()}
    try:
        layout = [(n, safetensors_dtype(t.dtype), tuple(t.shape)) for n, t in kept.items()]
    except KeyError as error:
        raise OutputError(f"{path}: safetensors has no dtype {error}") from error
    for name in kept:
        if name == METADATA_KEY or not is_unicode(name):
            raise OutputError(
                f"{path}: a tensor cannot be called {quoted(name)} in a safetensors file; rename "
                "the parameter"
            )
    start, infos = encode_header(layout, metadata)
    if len(start) > MAX_BYTES:
        raise OutputError(
            f"{path}: the names and shapes of its tensors need a header of more than the "
            f"{MAX_BYTES} bytes that are read"
        )
    with output_errors(path):
        temporary = Temporary(path, is_folder=False)
        try:
            with os.fdopen(temporary.start_file(path.name), "wb") as file:
                file.write(start)
                buffer = torch.empty(_WRITE_BYTES, dtype=torch.uint8)
                for name in infos:
                    flat = kept[name].reshape(-1)
                    # Piece by piece through one buffer, so that a tensor mapped from a file or on
                    # another device is never copied whole, whatever its strides.
                    rows = _WRITE_BYTES // flat.element_size()
                    for row in range(0, len(flat), rows):
                        piece = flat[row : row + rows]
                        bytes_of = buffer[: len(piece) * flat.element_size()]
                        bytes_of.view(flat.dtype).copy_(piece)
                        file.write(bytes_of.numpy().data)
                file.flush()
                os.fsync(file.fileno())
            temporary.give_name(replace=replace)
            sync_folder(temporary.place.absolute().parent)
        finally:
            temporary.discard()


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a shape and values that can be written, one after the other."""
    import torch

    # A lazy module's parameters have not even a shape.
    if torch.nn.parameter.is_lazy(tensor) or tensor.is_nested:
        return False
    return tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_quantized)


def read_state(path: Path, *, folders: bool = False) -> dict[str, Tensor]:
    """Read a whole checkpoint into tensors on the CPU.

    Args:
        path: of its file.
        folders: whether a folder of several files will do, too.

    Raises:
        CheckpointError: it is missing or corrupt, or changes while it is read.
        UsageError: it is a folder.
    """
    from know_cli.checkpoints.reading import read_tensor

    with open_checkpoint(path) as checkpoint:
        if checkpoint.is_folder and not folders:
            raise UsageError(f"{path}: is a folder; name its .safetensors file")
        state = {name: read_tensor(checkpoint, one) for name, one in checkpoint.tensors.items()}
        checkpoint.check_unchanged()
    return state
