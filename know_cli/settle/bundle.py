"""A bundle of the hyper-model ``settle``: its weights, and a manifest that says how it was taught.

On disk it is a folder with ``settle.safetensors`` and ``manifest.json``;
:mod:`know_cli.settle.shipped` finds it.
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

from know_cli.checkpoints import save_checkpoint
from know_cli.checkpoints.json_text import MAX_BYTES, BadJsonError, parse_json
from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.checkpoints.paths import MAX_CHECKPOINTS
from know_cli.checkpoints.state import read_state
from know_cli.errors import CheckpointError
from know_cli.files import json_text, make_folder, read_bytes, write_text
from know_cli.settle.module import Settle
from know_cli.settle.shipped import FEWEST, MANIFEST, MODEL

FORMAT = 1
#: What it is taught: by no target, but by what networks say with its weights.
TARGET = "network"
_WEIGHTS = "settle.safetensors"
_WIDEST = 1024
_TRAJECTORIES = tuple(kind.value for kind in TrajectoryKind)


@dataclass(frozen=True)
class SettleBundle:
    """The hyper-model, ready to use.

    Attributes:
        state: the state dict of a :class:`~know_cli.settle.module.Settle`, float32.
        checkpoints: S, the length of the windows that it reads.
        hidden, width: see :class:`~know_cli.settle.module.Settle`.
        trajectory: the kind of trajectory that it was taught on, and reads.
        manifest: the content of its manifest (settings, runs, gains, versions).
        source: where it was read from.
        roles: whether it reads the role of each tensor; said in the manifest only where it does,
            so that others are what they were.
    """

    state: dict[str, Tensor]
    checkpoints: int
    hidden: int
    width: int
    trajectory: TrajectoryKind = TrajectoryKind.RUN
    manifest: dict[str, Any] = field(default_factory=dict)
    source: Path | None = None
    roles: bool = False

    @property
    def target(self) -> str:
        """What it was taught by."""
        return TARGET

    @staticmethod
    def of(
        model: Settle, manifest: Mapping[str, Any], trajectory: TrajectoryKind = TrajectoryKind.RUN
    ) -> SettleBundle:
        """That of a module, with entries for the manifest."""
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        sizes = model.checkpoints, model.hidden, model.width
        return SettleBundle(state, *sizes, trajectory, dict(manifest), roles=model.roles)

    @property
    def of_branches(self) -> bool:
        """Whether it reads branches, which it computes otherwise."""
        return self.trajectory is TrajectoryKind.BRANCHES

    def to_json(self) -> dict[str, Any]:
        """Its manifest as it is written."""
        own: dict[str, Any] = {
            "format": FORMAT,
            "model": MODEL,
            "checkpoints": self.checkpoints,
            "hidden": self.hidden,
            "width": self.width,
            **({"roles": True} if self.roles else {}),
            "target": self.target,
            "trajectory": self.trajectory.value,
            "digest": self.digest,
            "parameters": sum(tensor.numel() for tensor in self.state.values()),
        }
        return {**own, **{key: value for key, value in self.manifest.items() if key not in own}}

    def module(self) -> Settle:
        """The module with its weights, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            model = Settle(
                self.checkpoints, self.hidden, self.width, self.roles, branches=self.of_branches
            )
        model.load_state_dict(self.state)
        return model.eval().requires_grad_(False)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that depend on every weight, and on whether it reads branches."""
        of_branches = f" {self.trajectory.value}" if self.of_branches else ""
        hasher = hashlib.sha256(f"{MODEL} {self.checkpoints}{of_branches}".encode())
        for name, tensor in sorted(self.state.items()):
            hasher.update(f"\n{name} {tuple(tensor.shape)} ".encode())
            hasher.update(tensor.contiguous().numpy().tobytes())
        return hasher.hexdigest()[:16]


def load_bundle(path: Path) -> SettleBundle:
    """Read a bundle, and check every layer.

    Raises:
        CheckpointError: something is missing, not finite, of a wrong shape, or not what the
            manifest says.
    """
    manifest = _read_manifest(path / MANIFEST)
    checkpoints, hidden, width = (manifest[key] for key in ("checkpoints", "hidden", "width"))
    roles = manifest.get("roles", False)
    file = path / _WEIGHTS
    state = read_state(file)
    with torch.random.fork_rng(devices=[]):
        wanted = Settle(checkpoints, hidden, width, roles).state_dict()
    for name in sorted(wanted.keys() | state.keys()):
        shapes = [tuple(of[name].shape) if name in of else None for of in (state, wanted)]
        if shapes[0] != shapes[1] or state[name].dtype != torch.float32:
            raise CheckpointError(
                f"{file}: tensor {name!r} is {shapes[0] or 'missing'}, the manifest wants float32 "
                f"of {shapes[1] or 'no such tensor'}; install or train the bundle again"
            )
        if not torch.isfinite(state[name]).all():
            raise CheckpointError(f"{file}: tensor {name!r} is not finite")
    trajectory = TrajectoryKind(manifest["trajectory"])
    bundle = SettleBundle(state, checkpoints, hidden, width, trajectory, manifest, path, roles)
    if bundle.digest != manifest["digest"]:
        raise CheckpointError(
            f"{path}: weights and {MANIFEST} do not belong together (digest {bundle.digest}, "
            f"manifest {manifest['digest']}); install or train the bundle again"
        )
    return bundle


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = parse_json(read_bytes(path, MAX_BYTES))
        if "preparation" in manifest and "model" not in manifest:
            raise CheckpointError(f"{path}: is of a KNOWN; take --method known")
        fine = (
            manifest["format"] == FORMAT
            and manifest["model"] == MODEL
            and all(type(manifest[key]) is int for key in ("checkpoints", "hidden", "width"))
            and FEWEST <= manifest["checkpoints"] <= MAX_CHECKPOINTS
            and 0 < manifest["hidden"] <= _WIDEST
            and 0 <= manifest["width"] <= _WIDEST
            and isinstance(manifest.get("roles", False), bool)
            and isinstance(manifest["digest"], str)
            and manifest["trajectory"] in _TRAJECTORIES
        )
    except (OSError, BadJsonError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: is not the manifest of a hyper-model settle ({error!r})"
        ) from error
    if not fine:
        raise CheckpointError(
            f"{path}: is not a manifest of format {FORMAT} of a hyper-model settle; it needs "
            f"format, model ({MODEL}), checkpoints ({FEWEST} to {MAX_CHECKPOINTS}), hidden, width, "
            "trajectory and digest, and roles, if it is there, true or false"
        )
    return dict(manifest)


def save_bundle(bundle: SettleBundle, path: Path, *, replace: bool = True) -> None:
    """Write a bundle into a folder, which is created if missing; the manifest is written last.

    Args:
        bundle: what to write; the entries of its manifest are kept.
        path: the folder.
        replace: whether files of a bundle that is there are replaced.

    Raises:
        OutputError: it cannot be written.
    """
    make_folder(path)
    save_checkpoint(path / _WEIGHTS, bundle.state, {"format": "pt"}, replace=replace)
    write_text(path / MANIFEST, json_text(bundle.to_json(), indent=2), replace=replace)
