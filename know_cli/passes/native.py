"""The compiled passes (``passes.c``) as Python calls them; :mod:`know_cli.passes.numbers` does."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from know_cli.passes.library import load_library

#: The library, beside this file, where one was compiled.
LIBRARY = Path(__file__).with_name("_native.so")
#: The types that they take, by the names of safetensors, as ``passes.c`` counts them.
DTYPES = {"F32": 0, "BF16": 1, "F16": 2, "F64": 3}

_POINTER, _SIZE, _INT, _LONG = (
    ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_int64,
)  # fmt: skip
_FUNCTIONS = {
    "passes_finite": (_INT, [_POINTER, _SIZE]),
    "passes_read": (_LONG, [_INT, _LONG, _INT, _LONG, _POINTER, ctypes.POINTER(ctypes.c_int32)]),
    "passes_sum": (None, [_POINTER, _INT, _POINTER, _SIZE, _SIZE, _INT, _POINTER]),
    "passes_same": (_LONG, [_POINTER, _INT, _SIZE, _SIZE, _POINTER]),
    "passes_cast": (_INT, [_POINTER, _POINTER, _POINTER, _SIZE, _INT, _POINTER]),
    "passes_changes": (None, [_POINTER, _POINTER, _INT, _SIZE, _SIZE, _SIZE, _POINTER]),
}


@cache
def native() -> ctypes.CDLL | None:
    """The compiled passes; None where there are none, or this machine cannot run them."""
    library = load_library(LIBRARY)
    if library is None:
        return None
    try:
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        library.passes_supported.restype = ctypes.c_int
    except AttributeError:  # another library
        return None
    return library if library.passes_supported() else None
