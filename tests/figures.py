"""Figures that tests of reliability measure, and a table of them.

``KNOW_FIGURES=FILE pytest …`` adds each to a file, a JSON object a line, long tests as they go;
``python -m tests.figures FILE…`` prints a table of what the files have.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_VARIABLE = "KNOW_FIGURES"


@dataclass(frozen=True)
class Row:
    """A line of the table: what it says, and the test and figure that it takes its number from.

    Attributes:
        text: what was done.
        test: as in :func:`record`; the slow suite's has ``_slow`` after it.
        figure: the name of the number.
        adds_up: whether several tests record a part each; else the last record counts.
    """

    text: str
    test: str
    figure: str
    adds_up: bool = False


ROWS = (
    Row("malformed files, one a rule of the format", "hostile_named", "files"),
    Row("malformed folders and shard indexes, one a rule", "hostile_named", "folders"),
    Row("files spoilt at random, refused as safetensors refuses them", "fuzz", "refused"),
    Row("of such files, through the whole command line", "fuzz_commands", "refused"),
    Row("spoilt pickles that `know convert` refused", "pickles", "refused"),
    Row("spoilt bundles that were refused", "bundles", "refused"),
    Row("runs killed (`kill -9`) at a random moment, and put right by the next", "kills", "survived"),
    Row("runs killed at a step of writing, and put right", "kills_steps", "survived"),
    Row("runs killed at a step of replacing a folder, and put right", "kills_folder", "survived"),
    Row("runs ended by SIGINT, SIGTERM or SIGHUP, without a trace", "signals", "interrupted", True),
    Row("failures of disk and system injected", "faults_system", "injected"),
    Row("inputs changed while they were read, and noticed", "inputs_changed", "injected", True),
    Row("tensors in one checkpoint", "tensors", "tensors"),
    Row("elements in one tensor", "elements", "elements"),
)  # fmt: skip


def record(test: str, **figures: Any) -> None:
    """Keep the figures of a test, if they are asked for."""
    if path := os.environ.get(_VARIABLE):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"test": test, **figures}) + "\n")


def table(lines: Iterable[str]) -> str:
    """A table, from the lines of files that :func:`record` wrote."""
    records = [json.loads(line) for line in lines]
    text = ["| tried | by default | with `-m slow` |", "| --- | ---: | ---: |"]
    for row in ROWS:
        cells = [_number(records, row, row.test + suffix) for suffix in ("", "_slow")]
        text.append(f"| {row.text} | {cells[0]} | {cells[1]} |")
    return "\n".join(text)


def _number(records: list[dict[str, Any]], row: Row, test: str) -> str:
    numbers = [found[row.figure] for found in records if found["test"] == test]
    if not numbers:
        return ""
    return f"{sum(numbers) if row.adds_up else numbers[-1]:,}"


if __name__ == "__main__":
    print(table(line for name in sys.argv[1:] for line in Path(name).read_text().splitlines()))
