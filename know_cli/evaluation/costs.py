"""What a trial costs, as it was measured for the published results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from know_cli.files import read_text

_MEASURED = Path(__file__).with_name("costs.json")


@dataclass(frozen=True)
class Costs:
    """Of the trials of one sort of evaluation.

    Attributes:
        processor: on which they were measured.
        seconds: of processor time for one trial, by task; not of every task.
    """

    processor: str
    seconds: Mapping[str, float]


def costs(sort: str) -> Costs:
    """What was measured for ``forgetting``, ``run`` or ``branches``.

    Raises:
        KeyError: another sort.
    """
    found = json.loads(read_text(_MEASURED))[sort]
    return Costs(found["processor"], found["seconds"])
