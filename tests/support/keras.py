"""Files of KNOWN as Keras would have saved them."""

from __future__ import annotations

from pathlib import Path

import h5py
import torch

from know_cli.kinds import PREDICTED_KINDS
from know_cli.known.bundle import Bundle
from know_cli.known.keras import KERAS_FILES

# Written down here a second time, on purpose: layer of Keras → layer of KNOWN.
KERAS_LAYERS = {
    "dense": "window.input", "dense_1": "window.squeeze", "dense_2": "window.linear",
    "dense_3": "window.amplitude", "dense_4": "window.rate", "dense_5": "window.output",
    "dense_6": "difference.input", "dense_7": "difference.squeeze",
    "dense_8": "difference.linear", "dense_9": "difference.amplitude",
    "dense_10": "difference.rate", "dense_11": "difference.output", "dense_12": "head",
}  # fmt: skip


def write_keras(bundle: Bundle, folder: Path, root: str = "") -> Path:
    """The bundle as Keras 2 would have saved it."""
    folder.mkdir(exist_ok=True)
    for kind, name in KERAS_FILES.items():
        with h5py.File(folder / name, "w") as file:
            for keras, ours in KERAS_LAYERS.items():
                state = bundle.states[kind]
                group = f"{root}{keras}/{keras}"
                file[f"{group}/kernel:0"] = state[f"{ours}.weight"].numpy().T
                file[f"{group}/bias:0"] = state[f"{ours}.bias"].numpy()
    return folder


def same(one: Bundle, two: Bundle) -> bool:
    return all(
        torch.equal(one.states[kind][name], two.states[kind][name])
        for kind in PREDICTED_KINDS
        for name in one.states[kind]
    )
