"""Scales of LoRA adapters, which PEFT and MLX keep beside the weights and not among them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from know_cli.checkpoints.checkpoint import Checkpoint
from know_cli.errors import CheckpointError
from know_cli.files import read_text

_CONFIG = "adapter_config.json"
_STEMS = ("adapter_model", "adapters")
# What the product of two factors is multiplied by follows from these, with what PEFT takes where
# one is missing. The rank is that of the factors, which are compared as tensors.
_SCALES: Mapping[str, Any] = {"lora_alpha": 8, "use_rslora": False, "alpha_pattern": {}}
# MLX has a factor in there, whose default was not always the same.
_MLX = ("lora_parameters", "scale")
_MOST_BYTES = 1 << 24


def check_scales(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse adapters whose products are scaled differently: their factors do not compare.

    Where a configuration is missing, or cannot be read, nothing is known and nothing refused.

    Args:
        checkpoints: the first is Θ0, whose configuration an output has.

    Raises:
        CheckpointError: a scale differs from that of the first one that tells it.
    """
    found = [one for one in map(_config, checkpoints) if one is not None]
    for path, config in found[1:]:
        first_path, first = found[0]
        for key, default in _SCALES.items():
            one, other = (
                default if each.get(key) is None else each[key] for each in (first, config)
            )
            if one != other:
                raise _other_scale(path, key, other, first_path, one)
    told = [(path, factor) for path, config in found if (factor := _factor(config)) is not None]
    for path, factor in told[1:]:
        if factor != told[0][1]:
            raise _other_scale(path, ".".join(_MLX), factor, *told[0])


def _other_scale(path: Path, key: str, scale: Any, first: Path, of_first: Any) -> CheckpointError:
    return CheckpointError(
        f"{path}: {key} is {json.dumps(scale)} but {json.dumps(of_first)} in {first}: the same "
        "factors mean another change of the weights; bring all adapters to one scale first, such "
        "as by multiplying lora_B"
    )


def _factor(config: Mapping[str, Any]) -> Any:
    """What MLX multiplies the product by; None where that is not told."""
    parameters = config.get(_MLX[0])
    return parameters.get(_MLX[1]) if isinstance(parameters, dict) else None


def _config(checkpoint: Checkpoint) -> tuple[Path, Mapping[str, Any]] | None:
    """The configuration beside an adapter's weights; None for what is none, or tells none."""
    file = next(iter(checkpoint.headers))
    if not file.name.startswith(_STEMS):
        return None
    path = file.parent / _CONFIG
    try:
        content = json.loads(read_text(path, _MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return (path, content) if isinstance(content, dict) else None
