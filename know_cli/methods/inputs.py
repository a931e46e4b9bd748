"""What a method is given before it sees any values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from know_cli.checkpoints import Trajectory
from know_cli.checkpoints.metadata import Session
from know_cli.errors import CheckpointError
from know_cli.methods.registry import HyperModelBundle, Value

Bundle = TypeVar("Bundle", bound=HyperModelBundle)


@dataclass(frozen=True)
class Inputs:
    """Everything that a method is built from; passed to each method's ``predictors``.

    Attributes:
        trajectory: the open checkpoints, Θ0 first.
        steps: how many are predicted.
        rate: share of the data that is kept from one checkpoint to the next.
        devices: where a hyper-model runs; if there are several, all are of one type.
        options: a value for each of the method's options that has one.
        given_bundle: the weights of the method's hyper-model, if it has one.
        kernel: name of the kernel that runs KNOWN; ``auto`` takes the fastest that runs.
    """

    trajectory: Trajectory
    steps: int
    rate: float
    devices: tuple[torch.device, ...]
    options: Mapping[str, Value]
    given_bundle: HyperModelBundle | None = None
    kernel: str = "auto"

    @property
    def checkpoints(self) -> int:
        """S."""
        return len(self.trajectory)

    def bundle_of(self, hyper_model: type[Bundle]) -> Bundle:
        """Return the bundle of the method's hyper-model.

        Args:
            hyper_model: the class that the bundle must have.

        Raises:
            ValueError: the registry does not list the method as one that reads such a bundle.
            CheckpointError: the bundle is for another number of checkpoints.
        """
        bundle = self.given_bundle
        if not isinstance(bundle, hyper_model):
            raise ValueError("this method is not registered as one that reads such a bundle")
        if bundle.checkpoints != self.checkpoints:
            raise CheckpointError(
                f"{bundle.source}: this KNOWN reads {bundle.checkpoints} checkpoints, "
                f"{self.checkpoints} were given"
            )
        return bundle

    @property
    def sessions(self) -> list[Session] | None:
        """The session recorded in each checkpoint, Θ0's first; None if any checkpoint has none."""
        found = [Session.from_metadata(c.metadata) for c in self.trajectory.checkpoints]
        sessions = [session for session in found if session is not None]
        return sessions if len(sessions) == len(found) else None

    def number(self, option: str) -> float:
        """Return the value of a numeric option."""
        return float(self.options[option])

    def given(self, option: str) -> float | None:
        """Return the value of a numeric option; None where it is absent."""
        return float(self.options[option]) if option in self.options else None
