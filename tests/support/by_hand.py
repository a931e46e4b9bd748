"""Formulas of the paper and the design, computed independently in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from know_cli.known.module import Preparation

Array = np.ndarray[Any, np.dtype[np.float64]]


def by_hand(state: dict[str, torch.Tensor], window: Array, preparation: Preparation) -> Array:
    """The formula of KNOWN in float64 numpy, a row of ``[rows, S]`` at a time.

    Where the head has a second row there is a factor on θ0: (1 + tanh(h₂))·θ0 + scale·tanh(h₁).
    """
    weights = {name: tensor.double().numpy() for name, tensor in state.items()}

    def layer(name: str, x: Array) -> Array:
        return np.asarray(weights[f"{name}.weight"] @ x + weights[f"{name}.bias"])

    def stream(name: str, v: Array) -> Array:
        x = layer(f"{name}.input", v)
        z = np.maximum(layer(f"{name}.squeeze", x), 0)
        rate = layer(f"{name}.rate", z)
        y = layer(f"{name}.linear", z) + layer(f"{name}.amplitude", z) * np.exp(rate * x)
        h = layer(f"{name}.output", y)
        return np.where(h > 0, h, 0.3 * h)

    result = []
    for row in window:
        newest, scale = row[-1], 1.0
        values, differences = row, np.diff(row)
        if preparation is Preparation.SPREAD:
            scale = max(abs(value - newest) for value in row)
            values = (row - newest) / (scale or np.inf)
            differences = np.diff(values)
            values[-1] = np.arcsinh(newest / (scale or np.inf))
        features = np.concatenate([stream("window", values), stream("difference", differences)])
        change, *factor = np.tanh(layer("head", features))
        result.append((1 + sum(factor)) * newest + scale * change)
    return np.array(result)


def rescaled_by_hand(before: dict[str, Tensor], after: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The formula of the design, channel by channel in float64."""
    means, variances = [], []
    for c in range(8):
        w, v = before["conv1.weight"][c].double(), after["conv1.weight"][c].double()
        q = (v * w).sum() / (w * w).sum()
        shift = before["bn1.running_mean"][c].double() - before["conv1.bias"][c].double()
        means.append(shift * q + after["conv1.bias"][c].double())
        growth = (v * v).sum() / (w * w).sum()
        variances.append(before["bn1.running_var"][c].double() * growth)
    return torch.stack(means).float(), torch.stack(variances).float()
