"""Figures that tests of reliability measure, for the table in the README.

``KNOW_FIGURES=FILE pytest …`` adds each to a file, a JSON object a line; ``python -m
tests.figures FILE`` prints the table of what the file has.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

_VARIABLE = "KNOW_FIGURES"


def record(test: str, **figures: Any) -> None:
    """Keep the figures of a test, if they are asked for."""
    if path := os.environ.get(_VARIABLE):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"test": test, **figures}) + "\n")
