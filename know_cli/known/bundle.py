"""A bundle: three trained hyper-models, one per kind, and a manifest that says how they were made.

On disk a bundle is a folder with ``conv.safetensors``, ``fc.safetensors``,
``bias.safetensors`` and ``manifest.json``; :mod:`know_cli.known.shipped` finds it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from know_cli.checkpoints import open_checkpoint, save_checkpoint
from know_cli.checkpoints.json_text import MAX_BYTES, BadJsonError, parse_json
from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.checkpoints.paths import MAX_CHECKPOINTS, MIN_CHECKPOINTS
from know_cli.errors import CheckpointError
from know_cli.files import json_text, make_folder, read_bytes, write_text
from know_cli.kinds import PREDICTED_KINDS, Kind
from know_cli.known.keras import read_keras_folder
from know_cli.known.module import Known, has_factor
from know_cli.known.preparation import Preparation
from know_cli.known.shipped import MANIFEST

FORMAT = 1
#: The entry of a manifest that names the kind of trajectory; without it, it is a forgetting.
TRAJECTORY = "trajectory"
#: The entry of a manifest by which other hyper-models than KNOWN say which they are.
OTHER_MODEL = "model"
#: The entry of a manifest that says, where it is true, that there is a factor on θ0.
FACTOR = "factor"


@dataclass(frozen=True)
class Bundle:
    """Three hyper-models, ready to use.

    Attributes:
        states: for each of conv, fc and bias the state dict of a :class:`Known`, float32.
        checkpoints: S, the length of the windows that it reads.
        preparation: what is done to a window first.
        target: what it was trained to predict, ``retrodiction`` or ``continuation``.
        manifest: the content of its manifest (data, seeds, losses, versions).
        source: where it was read from.
    """

    states: dict[Kind, dict[str, Tensor]]
    checkpoints: int
    preparation: Preparation
    target: str
    manifest: dict[str, Any] = field(default_factory=dict)
    source: Path | None = None

    @property
    def trajectory(self) -> TrajectoryKind:
        """The kind of trajectory that it was taught on: the manifest's, else a forgetting."""
        return TrajectoryKind(self.manifest.get(TRAJECTORY, TrajectoryKind.FORGETTING.value))

    @property
    def factor(self) -> bool:
        """Whether its hyper-models have a second output, a factor on θ0."""
        return has_factor(self.states[Kind.CONV])

    def module(self, kind: Kind) -> Known:
        """Return the reference module of one kind, in evaluation mode."""
        known = Known(self.checkpoints, self.preparation, factor=self.factor)
        known.load_state_dict(self.states[kind])
        return known.eval()

    def to_json(self, details: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Its manifest as it is written.

        Args:
            details: further entries, instead of those of the same names.
        """
        own: dict[str, Any] = {
            "format": FORMAT,
            "checkpoints": self.checkpoints,
            "preparation": self.preparation.value,
            "target": self.target,
            TRAJECTORY: self.trajectory.value,
            **({FACTOR: True} if self.factor else {}),
            "digest": self.digest,
            "parameters": sum(tensor.numel() for tensor in self.states[Kind.CONV].values()),
        }
        rest = {**self.manifest, **(details or {})}
        return {**own, **{key: value for key, value in rest.items() if key not in own}}

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that depend on every weight and on the preparation.

        So they depend on whether there is a second output, too, since its weights are among them.
        Equal for a folder of Keras files and the bundle converted from it.
        """
        hasher = hashlib.sha256(f"{self.preparation.value} {self.checkpoints}".encode())
        for kind in PREDICTED_KINDS:
            for name, tensor in sorted(self.states[kind].items()):
                hasher.update(f"\n{kind.value} {name} ".encode())
                hasher.update(tensor.contiguous().numpy().tobytes())
        return hasher.hexdigest()[:16]


def load_bundle(path: Path) -> Bundle:
    """Read a bundle, or a folder of the three Keras files, and check every layer.

    Raises:
        CheckpointError: something is missing, not finite, of a wrong shape, or not what the
            manifest says.
        UsageError: a Keras folder, and h5py is not installed.

    >>> from know_cli.known.shipped import find_bundle
    >>> load_bundle(find_bundle("continuation", 5)).checkpoints
    5
    """
    if not (path / MANIFEST).exists():
        states = read_keras_folder(path)
        size = states[Kind.CONV]["window.input.weight"].shape[1]
        return Bundle(states, size, Preparation.RAW, "retrodiction", {}, path)
    manifest = _read_manifest(path / MANIFEST)
    states = {}
    for kind in PREDICTED_KINDS:
        file = path / f"{kind.value}.safetensors"
        states[kind] = _read_state(file, manifest["checkpoints"], manifest.get(FACTOR, False))
    bundle = Bundle(
        states,
        manifest["checkpoints"],
        Preparation(manifest["preparation"]),
        manifest["target"],
        manifest,
        path,
    )
    if bundle.digest != manifest["digest"]:
        raise CheckpointError(
            f"{path}: weights and {MANIFEST} do not belong together (digest {bundle.digest}, "
            f"manifest {manifest['digest']}); install or train the bundle again"
        )
    return bundle


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = parse_json(read_bytes(path, MAX_BYTES))
        if OTHER_MODEL in manifest:
            raise CheckpointError(
                f"{path}: is of the hyper-model {str(manifest[OTHER_MODEL])[:40]!r}, not of KNOWN; "
                "predict with that as --method, and measure it with --objective network"
            )
        fine = (
            manifest["format"] == FORMAT
            and isinstance(manifest["checkpoints"], int)
            and MIN_CHECKPOINTS <= manifest["checkpoints"] <= MAX_CHECKPOINTS
            and manifest["preparation"] in [item.value for item in Preparation]
            and isinstance(manifest["target"], str)
            and isinstance(manifest["digest"], str)
            and manifest.get(TRAJECTORY, TrajectoryKind.FORGETTING.value)
            in [item.value for item in TrajectoryKind]
            and isinstance(manifest.get(FACTOR, False), bool)
        )
    except (OSError, BadJsonError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: is not a bundle's manifest ({error!r})") from error
    if not fine:
        raise CheckpointError(
            f"{path}: is not a manifest of format {FORMAT}; it needs format, checkpoints "
            f"({MIN_CHECKPOINTS} to {MAX_CHECKPOINTS}), preparation (raw or spread), target, "
            "digest and, if any, a trajectory (forgetting, run or branches) and a factor (true or "
            "false)"
        )
    return dict(manifest)


def _read_state(path: Path, checkpoints: int, factor: bool) -> dict[str, Tensor]:
    known = Known(checkpoints, factor=factor)
    wanted = {
        name: tuple(tensor.shape) for name, tensor in known.state_dict(keep_vars=True).items()
    }
    with open_checkpoint(path) as checkpoint:
        found = {name: entry.shape for name, entry in checkpoint.tensors.items()}
        if found.get("head.bias") == ((1,) if factor else (2,)):
            raise CheckpointError(
                f"{path}: has {'no' if factor else 'a'} factor on θ0, and {MANIFEST} says "
                f'{"" if factor else "nothing of "}"{FACTOR}": true; install or train the bundle '
                "again"
            )
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise CheckpointError(
                    f"{path}: tensor {name!r} is {found.get(name, 'missing')}, a hyper-model for "
                    f"{checkpoints} checkpoints has {wanted.get(name, 'none of that name')}"
                )
        state = {}
        for name, entry in checkpoint.tensors.items():
            if entry.dtype != "F32":
                raise CheckpointError(f"{path}: tensor {name!r} is {entry.dtype}, not F32")
            tensor = torch.empty(entry.shape)
            checkpoint.read_into(entry, 0, tensor.view(-1).numpy().data.cast("B"))
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"{path}: tensor {name!r} is not finite")
            state[name] = tensor
    return state


def save_bundle(
    bundle: Bundle,
    path: Path,
    details: Mapping[str, Any] | None = None,
    *,
    replace: bool = True,
) -> None:
    """Write a bundle into a folder, which is created if missing; the manifest is written last.

    Args:
        bundle: what to write; the entries of its manifest are kept.
        path: the folder.
        details: further manifest entries (data, seeds, losses, versions).
        replace: whether files of a bundle that is there are replaced.

    Raises:
        OutputError: it cannot be written.
    """
    make_folder(path)
    for kind in PREDICTED_KINDS:
        save_checkpoint(
            path / f"{kind.value}.safetensors",
            bundle.states[kind],
            {"format": "pt"},
            replace=replace,
        )
    manifest = bundle.to_json(details)
    write_text(path / MANIFEST, json_text(manifest, indent=2), replace=replace)
