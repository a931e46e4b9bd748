"""What a training function measured, as it goes into a record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def plain_measurements(
    measurements: Mapping[str, Any],
) -> tuple[dict[str, float | str | bool], list[str]]:
    """Measurements in types that JSON has, and the names of those that have no such type.

    Scalars of numpy and torch become Python's; non-finite values become text.
    """
    plain: dict[str, float | str | bool] = {}
    odd = []
    for name, value in measurements.items():
        count = value.numel() if hasattr(value, "numel") else getattr(value, "size", 0)
        if hasattr(value, "item") and count == 1:
            value = value.item()
        if isinstance(value, float) and not math.isfinite(value):
            value = str(value)
        if isinstance(value, (int, float, str)):
            plain[str(name)] = value
        else:
            odd.append(str(name))
    return plain, odd
