"""Reads KNOWN files that Keras 2 wrote (``save_weights``, HDF5), as in the authors' release.

``dense/dense/kernel:0`` is [in, out], the transpose of torch's weight. Stream 1 reads the window,
stream 2 its differences. There is no factor on θ0 in such files. Needs the extra ``keras`` (h5py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from know_cli.errors import CheckpointError, UsageError
from know_cli.files import check_regular
from know_cli.kinds import Kind
from know_cli.known.module import FEATURES, HIDDEN, SQUEEZED

KERAS_FILES = {Kind.CONV: "KNOWN_Conv.h5", Kind.FC: "KNOWN_FC.h5", Kind.BIAS: "KNOWN_Bias.h5"}

# Keras layer → our layer, its input size (None if it depends on S) and its output size.
_LAYERS: dict[str, tuple[str, int | None, int]] = {
    "dense": ("window.input", None, HIDDEN),
    "dense_1": ("window.squeeze", HIDDEN, SQUEEZED),
    "dense_2": ("window.linear", SQUEEZED, HIDDEN),
    "dense_3": ("window.amplitude", SQUEEZED, HIDDEN),
    "dense_4": ("window.rate", SQUEEZED, HIDDEN),
    "dense_5": ("window.output", HIDDEN, FEATURES),
    "dense_6": ("difference.input", None, HIDDEN),
    "dense_7": ("difference.squeeze", HIDDEN, SQUEEZED),
    "dense_8": ("difference.linear", SQUEEZED, HIDDEN),
    "dense_9": ("difference.amplitude", SQUEEZED, HIDDEN),
    "dense_10": ("difference.rate", SQUEEZED, HIDDEN),
    "dense_11": ("difference.output", HIDDEN, FEATURES),
    "dense_12": ("head", 2 * FEATURES, 1),
}


def read_keras_folder(path: Path) -> dict[Kind, dict[str, Tensor]]:
    """Read ``KNOWN_Conv.h5``, ``KNOWN_FC.h5`` and ``KNOWN_Bias.h5``.

    Returns:
        For each kind the state dict of a :class:`~know_cli.known.module.Known`, float32.

    Raises:
        UsageError: h5py is not installed.
        CheckpointError: a file or layer is missing, of a wrong shape, or not finite.
    """
    states = {kind: read_keras_file(path / name) for kind, name in KERAS_FILES.items()}
    sizes = {kind: state["window.input.weight"].shape[1] for kind, state in states.items()}
    if len(set(sizes.values())) > 1:
        listing = ", ".join(f"{KERAS_FILES[kind]} {size}" for kind, size in sizes.items())
        raise CheckpointError(
            f"{path}: the files are for different numbers of checkpoints: {listing}"
        )
    return states


def read_keras_file(path: Path) -> dict[str, Tensor]:
    """Read one file as a state dict; see :func:`read_keras_folder`."""
    try:
        import h5py
    except ImportError as error:
        raise UsageError(
            f"{path}: reading Keras files needs h5py: pip install 'know-predict[keras]'"
        ) from error
    try:
        check_regular(path)
        with h5py.File(path, "r") as file:
            root = file.get("model_weights", file)
            return _read_layers(path, root)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; a hyper-model of Keras has three") from error
    except OSError as error:
        raise CheckpointError(f"{path}: is not a readable HDF5 file ({error})") from error


def _read_layers(path: Path, root: Any) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    checkpoints: int | None = None
    for layer, (name, inputs, outputs) in _LAYERS.items():
        kernel = _dataset(path, root, f"{layer}/{layer}/kernel:0")
        bias = _dataset(path, root, f"{layer}/{layer}/bias:0")
        if layer == "dense" and kernel.ndim == 2:
            checkpoints = kernel.shape[0]
            if checkpoints < 2:
                raise CheckpointError(f"{path}: layer 'dense' reads {checkpoints} checkpoints")
        if inputs is None:
            inputs = (checkpoints or 0) - (layer == "dense_6")
        if kernel.shape != (inputs, outputs) or bias.shape != (outputs,):
            raise CheckpointError(
                f"{path}: layer {layer!r} ({name}) has shapes {kernel.shape} and {bias.shape}, "
                f"KNOWN needs {(inputs, outputs)} and {(outputs,)}"
            )
        if not (np.isfinite(kernel).all() and np.isfinite(bias).all()):
            raise CheckpointError(f"{path}: layer {layer!r} ({name}) is not finite")
        state[f"{name}.weight"] = torch.from_numpy(kernel.T.copy())
        state[f"{name}.bias"] = torch.from_numpy(bias.copy())
    return state


def _dataset(path: Path, root: Any, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    try:
        return np.asarray(root[name], dtype=np.float32)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: layer dataset {name!r} is missing") from error
