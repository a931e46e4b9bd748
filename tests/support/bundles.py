"""Bundles of random KNOWN."""

from __future__ import annotations

import torch

from know_cli.kinds import PREDICTED_KINDS
from know_cli.known.bundle import Bundle
from know_cli.known.module import Known, Preparation


def random_bundle(
    checkpoints: int = 5,
    seed: int = 0,
    preparation: Preparation = Preparation.RAW,
    *,
    factor: bool = False,
) -> Bundle:
    """Three KNOWN with random weights, large enough that every layer matters."""
    generator = torch.Generator().manual_seed(seed)
    every = {}
    for kind in PREDICTED_KINDS:
        state = Known(checkpoints, factor=factor).state_dict()
        every[kind] = {
            name: torch.randn(tensor.shape, generator=generator) * 0.15
            for name, tensor in state.items()
        }
    return Bundle(every, checkpoints, preparation, "retrodiction")
