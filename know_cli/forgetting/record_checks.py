"""Reads the record of a trajectory, and checks that it has what it must, whoever wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from know_cli.checkpoints.json_text import MAX_BYTES
from know_cli.checkpoints.metadata import rate_problem
from know_cli.errors import UsageError
from know_cli.files import read_text
from know_cli.forgetting.subsets import MOST_SESSIONS

RECORD = "trajectory.json"
FORMAT = 1

_LONGEST_IDENTITY = 64


def read_record(folder: Path, name: str = RECORD) -> dict[str, Any]:
    """Read the ``trajectory.json`` of a recorded trajectory, or a record of another name.

    Returns:
        ``trajectory`` (identity), ``function``, ``options``, ``seed``, ``rate``, ``sessions``
        and ``continuations`` (how many there are when it is complete), and ``recorded``: for each
        session's index, as text, its fraction, samples, seed and measurements.

    Raises:
        UsageError: the file is missing or is not such a record.
    """
    path = folder / name
    try:
        record = json.loads(read_text(path, MAX_BYTES))
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r}")
        check_record(record)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UsageError(f"{path}: is not the record of a trajectory ({error!r})") from error
    return dict(record)


def check_record(record: Any) -> None:
    """Check what is computed with.

    Args:
        record: of JSON's plain types.

    Raises:
        ValueError: something is missing or cannot be; says what.
    """
    if not isinstance(record, dict):
        raise ValueError("is no object")
    identity = record.get("trajectory")
    if not isinstance(identity, str) or not 0 < len(identity) <= _LONGEST_IDENTITY:
        raise ValueError("has no identity of a trajectory")
    if int(identity, 16) < 0:
        raise ValueError("has no identity of a trajectory, but a negative number")
    for key in ("sessions", "continuations"):
        count = record.get(key)
        if type(count) is not int or not 0 <= count <= MOST_SESSIONS:
            raise ValueError(f"{key} is no count")
    rate = record.get("rate")
    if not isinstance(rate, int | float):
        raise ValueError("rate is no number")
    if rate != 1 and rate_problem(float(rate)) is not None:  # branches may have all of the data
        raise ValueError("rate is no rate")
    recorded = record.get("recorded")
    if not isinstance(recorded, dict):
        raise ValueError("recorded is no object")
    for session in recorded.values():
        found = session.get("measurements", {}) if isinstance(session, dict) else None
        if not isinstance(found, dict):
            raise ValueError("a session is no object, or its measurements are none")
        if not all(isinstance(value, str | bool | int | float) for value in found.values()):
            raise ValueError("a measurement is neither number, text nor boolean")
    setup = record.get("setup", {})
    design = setup.get("design", {}) if isinstance(setup, dict) else None
    if not isinstance(design, dict):
        raise ValueError("setup is no object, or its design is none")
