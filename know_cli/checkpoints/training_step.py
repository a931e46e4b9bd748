"""After how many training steps a checkpoint was saved, as far as it tells.

Looked up in this order: the metadata that this program's callbacks write, the state that a trainer
left beside the weights, and the last number in the checkpoint's name (``checkpoint-500``,
``step_000100.safetensors``, ``epoch_12``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from know_cli.checkpoints.json_text import MAX_BYTES
from know_cli.checkpoints.metadata import TRAINING_STEP

#: What transformers' Trainer leaves in each of its checkpoint folders.
TRAINER_STATE = "trainer_state.json"

_NUMBER = re.compile(r"\d{1,18}")
_LARGEST = 10**18


def training_step(path: Path, metadata: Mapping[str, str]) -> int | None:
    """The training step of a checkpoint; None if nothing tells it.

    Args:
        path: of its file or folder.
        metadata: its safetensors metadata.

    >>> training_step(Path("run/checkpoint-500"), {})
    500
    """
    for found in (_number(metadata.get(TRAINING_STEP)), _from_trainer(path), _from_name(path)):
        if found is not None:
            return found
    return None


def has_trainer_state(path: Path) -> bool:
    """Whether a trainer's state lies beside the weights, which shows that they are of a run."""
    return _from_trainer(path) is not None


def _number(text: object) -> int | None:
    try:
        number = int(str(text))
    except ValueError:
        return None
    return number if 0 <= number <= _LARGEST else None


def _from_trainer(path: Path) -> int | None:
    state = (path if path.is_dir() else path.parent) / TRAINER_STATE
    try:
        if not state.is_file() or state.stat().st_size > MAX_BYTES:
            return None
        content = json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return _number(content.get("global_step")) if isinstance(content, dict) else None


def _from_name(path: Path) -> int | None:
    numbers = _NUMBER.findall(path.stem if path.suffix == ".safetensors" else path.name)
    return int(numbers[-1]) if numbers else None
