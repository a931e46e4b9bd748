"""Small trajectories in memory and on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from know_cli.kinds import Kind


def network(seed: int = 0) -> dict[str, Tensor]:
    """A state dict with a tensor of every kind and most float dtypes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 0.1) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    return {
        "conv1.weight": normal(8, 3, 3, 3),
        "conv1.bias": normal(8),
        "bn1.weight": 1 + normal(8),
        "bn1.bias": normal(8),
        "bn1.running_mean": normal(8),
        "bn1.running_var": normal(8).abs() + 0.5,
        "bn1.num_batches_tracked": torch.tensor(7),
        "fc.weight": normal(20, 33),
        "fc.bias": normal(20),
        "half.weight": normal(16, 10).half(),
        "brain.weight": normal(16, 10).bfloat16(),
        "double.weight": normal(6, 5).double(),
        "frozen.weight": normal(5, 5),
        "scale": normal(),
        "empty.weight": torch.empty(0, 4),
        "mask": torch.tensor([True, False, True]),
    }


def drift(state: dict[str, Tensor], seed: int, size: float) -> dict[str, Tensor]:
    """The state dict a session later: every float tensor moves, but the frozen one."""
    generator = torch.Generator().manual_seed(1000 + seed)
    moved = {}
    for name, tensor in state.items():
        if tensor.is_floating_point() and not name.startswith("frozen"):
            noise = torch.randn(tensor.shape, generator=generator) * size
            if name.endswith("running_var"):
                noise = noise.abs()
            moved[name] = (tensor.double() + noise.double()).to(tensor.dtype)
        else:
            moved[name] = tensor.clone()
    return moved


def states(count: int = 5, seed: int = 0) -> list[dict[str, Tensor]]:
    """State dicts Θ0 … Θ(S − 1) that move ever less."""
    result = [network(seed)]
    for k in range(1, count):
        result.append(drift(result[-1], seed + k, 0.02 * 0.5**k))
    return result


def write_trajectory(
    folder: Path,
    trajectory: list[dict[str, Tensor]] | None = None,
    metadata: list[dict[str, str]] | None = None,
) -> list[Path]:
    """Save state dicts as ckpt0.safetensors, … with the safetensors library."""
    paths = []
    for k, state in enumerate(trajectory if trajectory is not None else states()):
        path = folder / f"ckpt{k}.safetensors"
        save_file(state, path, {"format": "pt", **(metadata[k] if metadata else {})})
        paths.append(path)
    return paths


KINDS = {
    "conv1.weight": Kind.CONV, "fc.weight": Kind.FC, "half.weight": Kind.FC,
    "brain.weight": Kind.FC, "double.weight": Kind.FC, "conv1.bias": Kind.BIAS,
    "fc.bias": Kind.BIAS, "scale": Kind.BIAS,
}  # fmt: skip
Values = NDArray[np.float64]
# What 'know predict' predicts of the network above; its frozen tensor adds nothing.
PREDICTED = (
    "conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias", "fc.weight", "fc.bias", "half.weight",
    "brain.weight", "double.weight", "frozen.weight", "scale",
)  # fmt: skip


def flat(state: Mapping[str, Tensor]) -> Values:
    vector: Values = torch.cat([state[n].double().reshape(-1) for n in PREDICTED]).numpy()
    return vector
