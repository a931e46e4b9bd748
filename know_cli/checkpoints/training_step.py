"""After how many training steps a checkpoint was saved, and how far its rate had fallen, if told.

Looked up in this order: the metadata that this program's callbacks write, the state that a trainer
left beside the weights, and the number in the checkpoint's name (``checkpoint-500``,
``step_000100.safetensors``, ``epoch_12``, ``ckpt_10k``).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from know_cli.checkpoints.json_text import MAX_BYTES
from know_cli.checkpoints.layouts import LAYOUTS
from know_cli.checkpoints.metadata import TRAINING_STEP
from know_cli.files import read_text

#: What transformers' Trainer leaves in each of its checkpoint folders.
TRAINER_STATE = "trainer_state.json"

# A number may be written short: ``10k``, ``1.5M``, ``2e4``.
_NUMBER = re.compile(
    r"(?:(?<![A-Za-z0-9])\d{1,18}(?:\.\d{1,6})?e\d{1,2}|\d{1,18}(?:\.\d{1,6})?[kKmMBT])"
    r"(?![A-Za-z0-9])|\d{1,18}"
)
_ZEROS = {"k": 3, "m": 6, "b": 9, "t": 12}
_LARGEST = 10**18
# What stands before the number of a step in names, the surest first; names can have other
# numbers, too, such as a loss.
_WORDS = tuple(
    re.compile(rf"(?<![a-z])(?:{words})[-_=. ]?$", re.IGNORECASE)
    for words in ("steps?", "iters?|iterations?|updates?", "epochs?", "checkpoint|ckpt")
)
# Numbers in names of a trainer's checkpoints are of steps, and those are never so few.
_FEWEST_STEPS = 10


def training_step(path: Path, metadata: Mapping[str, str]) -> int | None:
    """The training step of a checkpoint; None if nothing tells it.

    Args:
        path: of its file or folder.
        metadata: its safetensors metadata.

    >>> training_step(Path("run/checkpoint-500"), {})
    500
    >>> training_step(Path("step=400-loss=0.25.safetensors"), {})
    400
    >>> training_step(Path("ckpt_10k"), {})
    10000
    """
    recorded = _recorded(path, metadata)
    return _from_name(_stem(path)) if recorded is None else recorded


def training_steps(checkpoints: Sequence[tuple[Path, Mapping[str, str]]]) -> list[int] | None:
    """The training steps of several checkpoints, all told in one way; None if one is not told.

    Where not every checkpoint has it recorded, their names tell it: if they are alike but for
    numbers, by those that differ.

    Args:
        checkpoints: path and safetensors metadata of each.

    >>> training_steps([(Path(f"run/{n}/model.safetensors"), {}) for n in (100, 200)])
    [100, 200]
    """
    recorded = [_recorded(path, metadata) for path, metadata in checkpoints]
    steps = [step for step in recorded if step is not None]
    if len(steps) == len(checkpoints):
        return steps
    return _from_names([path for path, _ in checkpoints])


def has_trainer_state(path: Path) -> bool:
    """Whether a trainer's state lies beside the weights, which shows that they are of a run."""
    return _from_trainer(path) is not None


def rate_left(path: Path) -> float | None:
    """The learning rate that a trainer logged last, as a share of the highest one that it logged.

    Args:
        path: of a checkpoint's file or folder.

    Returns:
        From 0 to 1; None if no trainer's state lies beside the weights, or it tells no rate.
    """
    history = (_trainer_state(path) or {}).get("log_history")
    logged = history if isinstance(history, list) else []
    rates = [one["learning_rate"] for one in logged if isinstance(one, dict) and _has_rate(one)]
    highest = max(rates, default=0)
    return float(rates[-1] / highest) if highest > 0 else None


def _has_rate(logged: Mapping[str, Any]) -> bool:
    rate = logged.get("learning_rate")
    return isinstance(rate, int | float) and 0 <= rate <= _LARGEST and math.isfinite(rate)


def names_show_steps(paths: Sequence[Path]) -> bool:
    """Whether names of checkpoints have rising or falling numbers that are called steps or such.

    >>> names_show_steps([Path("step_100"), Path("step_200")])
    True
    >>> names_show_steps([Path("ckpt0"), Path("ckpt1")])
    False
    """
    steps = _from_names(paths)
    if steps is None or steps not in (sorted(set(steps)), sorted(set(steps), reverse=True)):
        return False
    ranks = [_surest(_stem(path)) for path in paths]
    return all(
        rank < len(_WORDS) - 1 or (rank == len(_WORDS) - 1 and step >= _FEWEST_STEPS)
        for rank, step in zip(ranks, steps, strict=True)
    )


def _recorded(path: Path, metadata: Mapping[str, str]) -> int | None:
    step = _number(metadata.get(TRAINING_STEP))
    return _from_trainer(path) if step is None else step


def _number(text: object) -> int | None:
    try:
        number = int(str(text))
    except ValueError:
        return None
    return number if 0 <= number <= _LARGEST else None


def _from_trainer(path: Path) -> int | None:
    return _number((_trainer_state(path) or {}).get("global_step"))


def _trainer_state(path: Path) -> dict[str, Any] | None:
    """What a trainer left beside the weights; None if there is nothing, or nothing readable."""
    # Beside a file that is called as a folder's model is; others may be of other steps.
    if not path.is_dir() and path.name.partition(".")[0] not in LAYOUTS:
        return None
    state = (path if path.is_dir() else path.parent) / TRAINER_STATE
    try:
        content = json.loads(read_text(state, MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _stem(path: Path) -> str:
    return path.stem if path.suffix == ".safetensors" else path.name


def _surest(name: str) -> int:
    """Position among the words of the first one before a number; their count if none is."""
    starts = [name[: number.start()] for number in _NUMBER.finditer(name)]
    found = (k for k, words in enumerate(_WORDS) if any(map(words.search, starts)))
    return next(found, len(_WORDS))


def _from_name(name: str) -> int | None:
    """The last number after the surest word for a step; without such words the last number."""
    numbers = list(_NUMBER.finditer(name))
    rank = _surest(name)
    if rank < len(_WORDS):
        numbers = [each for each in numbers if _WORDS[rank].search(name[: each.start()])]
    return _value(numbers[-1][0]) if numbers else None


def _value(number: str) -> int:
    """What a number in a name says; the fraction of a step that is left over is dropped."""
    digits, _, exponent = number.partition("e")
    zeros = _ZEROS.get(digits[-1].lower(), 0) + int(exponent or 0)
    whole, _, fraction = digits.rstrip("kKmMBT").partition(".")
    value = int(whole) * 10**zeros + int(fraction or 0) * 10**zeros // 10 ** len(fraction)
    return value if value <= _LARGEST else int(whole)


def _from_names(paths: Sequence[Path]) -> list[int] | None:
    found = [_from_name(_stem(path)) for path in paths]
    steps = [step for step in found if step is not None]
    if len(steps) == len(found) == len(set(steps)):
        return steps
    # Folders tell what files that are all called alike do not.
    texts = [str(path.with_name(_stem(path))) for path in paths]
    if len({_NUMBER.sub("\0", text) for text in texts}) > 1:
        return steps if len(steps) == len(found) else None
    columns = zip(
        *([_value(number) for number in _NUMBER.findall(text)] for text in texts), strict=True
    )
    differ = [list(column) for column in columns if len(set(column)) == len(texts)]
    return differ[-1] if differ else (steps if len(steps) == len(found) else None)
