"""The element types of the safetensors format."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Name → bits per element, from the smallest alignment to the largest: ``save_file`` of the
# safetensors library writes tensors in the reverse of this order, then by name.
BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

#: Rank in the order of ``save_file``, which writes the highest rank first.
RANK: dict[str, int] = {name: position for position, name in enumerate(BITS)}

#: The types that can be predicted, with their names in torch.
FLOATS: dict[str, str] = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def is_float(dtype: str) -> bool:
    """Whether tensors of this safetensors dtype can be predicted.

    >>> is_float("BF16"), is_float("I64")
    (True, False)
    """
    return dtype in FLOATS


def torch_dtype(dtype: str) -> torch.dtype:
    """Return the torch dtype of one of :data:`FLOATS`.

    Raises:
        KeyError: the dtype is not one that can be predicted.

    >>> torch_dtype("BF16")
    torch.bfloat16
    """
    import torch

    found: torch.dtype = getattr(torch, FLOATS[dtype])
    return found


def safetensors_dtype(dtype: torch.dtype | str) -> str:
    """The safetensors name of a torch dtype, or of one's name, such as ``float32``.

    Raises:
        KeyError: where the format has no such type (complex128, torch's own quantised types).
    """
    return _TORCH_NAMES[str(dtype).removeprefix("torch.")]


_TORCH_NAMES = {
    **{torch_name: name for name, torch_name in FLOATS.items()},
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "complex64": "C64",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}

#: Of all that torch has a type for, its name there; it packs two of four bits into one element.
TORCH_NAMES = {
    **{name: torch_name for torch_name, name in _TORCH_NAMES.items()},
    "F4": "float4_e2m1fn_x2",
}
