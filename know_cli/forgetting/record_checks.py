"""What the record of a trajectory must have, whoever wrote it."""

from __future__ import annotations

from typing import Any

from know_cli.checkpoints.metadata import rate_problem
from know_cli.forgetting.subsets import MOST_SESSIONS

_LONGEST_IDENTITY = 64


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
