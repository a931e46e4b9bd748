"""Teaches a bundle through networks, and says what it gains on trajectories held out."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.errors import UsageError
from know_cli.meta.manifest import versions
from know_cli.meta.network_data import NetworkRun
from know_cli.meta.network_gains import Gains, HeldOut, gains
from know_cli.meta.network_models import NetworkBundle, NetworkModel, model_of
from know_cli.meta.network_settings import NetworkSettings
from know_cli.meta.network_training import teach

#: Groups of runs that are never taught on.
RUNS, ARCHITECTURES = "runs", "architectures"


@dataclass(frozen=True)
class RunSplit:
    """A division of runs.

    Attributes:
        training: to learn from.
        held_out: to measure on, by group; none of them empty.
    """

    training: list[NetworkRun]
    held_out: dict[str, list[NetworkRun]]


def split_runs(
    runs: Sequence[NetworkRun], holdout: float, seed: int, architectures: Sequence[str] = ()
) -> RunSplit:
    """Divide runs into those for training and those held out.

    The draw depends on their names, so the same ones are held out when more are collected.

    Args:
        runs: to divide, at least one.
        holdout: share that is held out of those that are of other architectures.
        seed: of the draw.
        architectures: none of which is taught on.

    Raises:
        UsageError: no run has such an architecture, or one side would be empty.
    """
    present = {run.setup.design.architecture for run in runs}
    for name in sorted(set(architectures) - present):
        raise UsageError(
            f"cannot hold out architecture {name!r}: there are {', '.join(sorted(present))}"
        )
    never = [run for run in runs if run.setup.design.architecture in architectures]
    rest = [run for run in runs if run.setup.design.architecture not in architectures]
    drawn = [_place(seed, run.name) < holdout for run in rest]
    training = [run for run, is_out in zip(rest, drawn, strict=True) if not is_out]
    groups = {
        RUNS: [run for run, is_out in zip(rest, drawn, strict=True) if is_out],
        ARCHITECTURES: never,
    }
    held_out = {name: found for name, found in groups.items() if found}
    if not training or not held_out:
        raise UsageError(
            f"{len(runs)} {runs[0].trajectory.units} cannot be split with a share of {holdout:g} "
            f"held out: at least one is needed on each side; {_more(runs)}"
        )
    return RunSplit(training, held_out)


def not_taught_on(bundle: NetworkBundle, runs: Sequence[NetworkRun]) -> dict[str, list[NetworkRun]]:
    """The runs that a bundle was not taught on, by group, those collected later among them.

    Raises:
        UsageError: it was taught on all of them.
    """
    taught = set(bundle.manifest.get("taught_on", []))
    never = bundle.manifest.get("held_out_architectures", [])
    groups: dict[str, list[NetworkRun]] = {RUNS: [], ARCHITECTURES: []}
    for run in runs:
        if run.name not in taught:
            is_new = run.setup.design.architecture in never
            groups[ARCHITECTURES if is_new else RUNS].append(run)
    found = {name: group for name, group in groups.items() if group}
    if not found:
        raise UsageError(f"{bundle.source}: was taught on all {len(runs)} of these; {_more(runs)}")
    return found


def measure_bundle(bundle: NetworkBundle, runs: Sequence[NetworkRun]) -> dict[str, Any]:
    """What a bundle gains on the runs that it was not taught on: its manifest with these gains.

    Raises:
        UsageError: it was taught on all of them.
    """
    model, found = model_of(bundle), {}
    groups = not_taught_on(bundle, runs)
    for name, group in groups.items():
        found[name] = gains(
            HeldOut(group, bundle.checkpoints).measured(model), model.name
        ).to_json()
    held_out = {name: sorted(run.name for run in group) for name, group in groups.items()}
    return {**bundle.to_json(), "held_out": held_out, "gains": found, "curve": []}


def _more(runs: Sequence[NetworkRun]) -> str:
    options = {
        TrajectoryKind.RUN: "run",
        TrajectoryKind.FORGETTING: "release-chain --samples …",
        TrajectoryKind.BRANCHES: "branches",
    }[runs[0].trajectory]
    return f"record more with 'know collect --regime {options}'"


def _place(seed: int, name: str) -> float:
    """A number from 0 to 1 that depends on the seed and the name."""
    drawn = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(drawn[:8], "big") / 2**64


@dataclass(frozen=True)
class Progress:
    """Where a training is.

    Attributes:
        step: of the hyper-model's own training.
        seconds: since it began, or was continued.
        loss: mean logarithm of the training runs' cross entropy.
        gains: by group of held-out runs.
    """

    step: int
    seconds: float
    loss: float
    gains: dict[str, Gains]

    def to_json(self) -> dict[str, Any]:
        """The step with its loss and, by group, the gain over the newest checkpoint."""
        found: dict[str, Any] = {"step": self.step, "loss": round(self.loss, 5)}
        for group, table in self.gains.items():
            stored = table.to_json()
            found[group] = {
                "accuracy": stored["accuracy"][table.taught],
                "loss": stored["loss"][table.taught],
                "ahead": stored["ahead"],
                "ahead_loss": stored["ahead_loss"],
            }
        return found


def teach_bundle(
    split: RunSplit,
    settings: NetworkSettings,
    facts: dict[str, Any],
    report: Callable[[Progress], None] = lambda progress: None,
    *,
    every: int = 50,
    partial: Path | None = None,
) -> NetworkBundle:
    """Teach a bundle, measuring as it goes.

    Args:
        split: of the runs.
        settings: how.
        facts: further entries of the manifest.
        report: called every so many steps.
        every: steps between reports.
        partial: see :func:`~know_cli.meta.network_training.teach`.

    Returns:
        The bundle, whose manifest records runs, settings, versions, and gains on the runs held
        out. Nothing is chosen by them.

    Raises:
        UsageError: the training diverges.
    """
    groups = {name: HeldOut(runs, settings.checkpoints) for name, runs in split.held_out.items()}
    began = time.monotonic()

    def told(step: int, loss: float, model: NetworkModel) -> dict[str, Any]:
        found = {name: gains(group.measured(model), model.name) for name, group in groups.items()}
        progress = Progress(step, time.monotonic() - began, loss, found)
        report(progress)
        return progress.to_json()

    model, curve = teach(
        split.training,
        settings,
        told,
        every=every,
        partial=partial,
        reported_of=[run.name for runs in split.held_out.values() for run in runs],
    )
    final = {name: gains(group.measured(model), model.name) for name, group in groups.items()}
    manifest = {
        "settings": settings.to_json(),
        "taught_on": sorted(run.name for run in split.training),
        "held_out": {
            name: sorted(run.name for run in runs) for name, runs in split.held_out.items()
        },
        **facts,
        "gains": {name: found.to_json() for name, found in final.items()},
        "curve": curve,
        "versions": versions(),
    }
    return model.bundle(manifest, split.training[0].trajectory)
