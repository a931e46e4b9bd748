"""What a bundle's manifest records of its training: written by ``know train``, and read back."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from know_cli import __version__
from know_cli.errors import UsageError
from know_cli.kinds import PREDICTED_KINDS, Kind
from know_cli.known.bundle import Bundle
from know_cli.known.preparation import Preparation
from know_cli.meta.scores import least_squares
from know_cli.meta.settings import Loss, Residuals, Settings, Target
from know_cli.meta.split import TRAJECTORIES, Split
from know_cli.meta.windows import Collection
from know_cli.methods.lstsq import RULE


def training_facts(
    collection: Collection,
    settings: Settings,
    parts: Split,
    losses: Mapping[Kind, Sequence[tuple[float, float]]],
) -> dict[str, Any]:
    """The entries of a manifest that describe a training.

    Args:
        collection: all trajectories and windows.
        settings: how KNOWN was trained.
        parts: the division of the trajectories.
        losses: for each kind the training and the held-out loss of every epoch.

    Returns:
        ``settings``; ``data``, what was trained on and what was held out; ``rule``, the linear
        rule that fits the training windows best; ``losses``; ``threads`` of torch; ``versions``.
    """
    used = collection.trajectories
    rates = [trajectory.rate for trajectory in used]
    trained = [used[number] for number in parts.training]
    return {
        "settings": settings.to_json(),
        "data": {
            "functions": sorted({trajectory.function for trajectory in used}),
            "architectures": sorted({one.architecture for one in trained} - {""}),
            "data_sets": sorted({one.data_set for one in trained} - {""}),
            "regimes": dict(sorted(Counter(one.regime for one in trained).items())),
            "rates": [min(rates), max(rates)],
            "training": [one.identity for one in trained],
            "held_out": {
                name: [used[number].identity for number in numbers]
                for name, numbers in parts.held_out.items()
            },
            "rows": {
                kind.value: len(collection.windows[kind].of(parts.training))
                for kind in PREDICTED_KINDS
            },
        },
        # The linear rule that KNOWN must beat, kept to be applied without these windows.
        RULE: {
            kind.value: [
                float(weight)
                for weight in least_squares(
                    collection.windows[kind].of(parts.training).with_target(1)
                )
            ]
            for kind in PREDICTED_KINDS
        },
        "losses": {
            kind.value: {
                "training": [float(f"{loss:.5g}") for loss, _ in found],
                "held_out": [float(f"{loss:.5g}") for _, loss in found],
            }
            for kind, found in losses.items()
        },
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of this program and of the libraries that decide the bytes of a training."""
    return {
        "know-predict": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def settings_of(bundle: Bundle) -> Settings:
    """The settings that a bundle was trained with, from its manifest.

    Raises:
        UsageError: the manifest does not record them.
    """
    try:
        kept = dict(bundle.manifest["settings"])
        enums = {"target": Target, "preparation": Preparation, "loss": Loss, "residuals": Residuals}
        for key, enum in enums.items():
            kept[key] = enum(kept[key])
        for key in ("held_out_architectures", "held_out_data_sets", "held_out_regimes"):
            kept[key] = tuple(kept.get(key, ()))
        return Settings(**kept)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{bundle.source}: its manifest does not say how it was trained ({error!r}), so "
            "it is unknown what was held out; give a bundle that 'know train' wrote"
        ) from error


def split_of(bundle: Bundle, collection: Collection) -> Split:
    """The split that a bundle was trained with, matched to trajectories by their identities.

    Args:
        bundle: one that ``know train`` wrote.
        collection: the trajectories; those that were not part of the training are in no group.

    Raises:
        UsageError: the manifest does not record the split, or none of the held-out trajectories
            is in the collection.
    """
    numbers = {one.identity: number for number, one in enumerate(collection.trajectories)}
    try:
        data = bundle.manifest["data"]
        held_out = data["held_out"]
        if isinstance(held_out, list):  # manifests of the first version
            held_out = {TRAJECTORIES: held_out}
        training = [numbers[one] for one in data["training"] if one in numbers]
        groups = {
            name: sorted(numbers[one] for one in identities if one in numbers)
            for name, identities in held_out.items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{bundle.source}: its manifest does not say what was held out ({error!r}); give "
            "a bundle that 'know train' wrote"
        ) from error
    found = {name: group for name, group in groups.items() if group}
    if not found:
        raise UsageError(
            f"{bundle.source}: none of the trajectories held out from its training was given; "
            "give those that 'know train' was given"
        )
    return Split(sorted(training), found)
