"""A run that takes a moment, to be killed or disturbed in."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support.trajectories import write_trajectory

PREDICT = ("predict", "ckpt0", "ckpt1", "ckpt2", "-o", "out", "--force", "--method", "linear",
           "--threads", "1", "--max-memory", "3M", "--steps", "2")  # fmt: skip
TALK = ("stderr.txt", "stdout.txt")


def inputs(folder: Path, parameters: int = 300_000) -> Path:
    """A trajectory of three checkpoints that takes a moment, and an output from before."""
    generator = torch.Generator().manual_seed(0)
    big = torch.randn(parameters // 1000, 1000, generator=generator)
    small = {f"layer{n}.bias": torch.randn(50, generator=generator) for n in range(40)}
    write_trajectory(
        folder,
        [
            {name: tensor * (1 - 0.1 * k) for name, tensor in {"w": big, **small}.items()}
            | {"steps": torch.tensor(3)}
            for k in range(3)
        ],
    )
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in TALK)


def temporaries(folder: Path) -> list[str]:
    return [name for name in names(folder) if name.startswith(".know-") and name.endswith(".tmp")]


def temporary_files(folder: Path) -> int:
    """How many files or folders have such names: one has two while it replaces another."""
    return len({(folder / name).stat().st_ino for name in temporaries(folder)})
