"""Shapes of small networks with BatchNorm, and the sources found in them."""

from __future__ import annotations

from know_cli.normalisation import find_norm_layers

Shapes = dict[str, tuple[int, ...]]


def batchnorm(prefix: str, features: int) -> Shapes:
    one = (features,)
    return {
        f"{prefix}.weight": one, f"{prefix}.bias": one, f"{prefix}.running_mean": one,
        f"{prefix}.running_var": one, f"{prefix}.num_batches_tracked": (),
    }  # fmt: skip


def sources(shapes: Shapes) -> dict[str, str | None]:
    return {layer.prefix: layer.source_weight for layer in find_norm_layers(shapes)}


def preactivation(prefix: str, inputs: int, outputs: int) -> Shapes:
    return {
        **batchnorm(f"{prefix}.bn1", inputs), f"{prefix}.conv1.weight": (outputs, inputs, 3, 3),
        **batchnorm(f"{prefix}.bn2", outputs), f"{prefix}.conv2.weight": (outputs, outputs, 3, 3),
    }  # fmt: skip


def residual(prefix: str, inputs: int, outputs: int) -> Shapes:
    return {
        f"{prefix}.conv1.weight": (outputs, inputs, 3, 3), **batchnorm(f"{prefix}.bn1", outputs),
        f"{prefix}.conv2.weight": (outputs, outputs, 3, 3), **batchnorm(f"{prefix}.bn2", outputs),
    }  # fmt: skip
