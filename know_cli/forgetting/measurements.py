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
        try:
            count = value.numel() if hasattr(value, "numel") else getattr(value, "size", 0)
            if hasattr(value, "item") and count == 1:
                value = value.item()
            if not isinstance(value, str):
                value = _number(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # such as a meta tensor's
            odd.append(str(name))
        else:
            plain[str(name)] = value
    return plain, odd


def _number(value: Any) -> float | str | bool:
    """A number as JSON can have it; text if it is not finite.

    Raises:
        TypeError: it is none.
        OverflowError: an integer is larger than any float, and perhaps than JSON's readers take.
    """
    if not isinstance(value, (int, float)):
        raise TypeError(value)
    return value if math.isfinite(value) else str(value)
