"""JSON as it is written: valid for every reader."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from know_cli.errors import printable


def json_text(content: Any, indent: int | None = None) -> str:
    r"""A JSON text of plain types, with a line feed at its end.

    Numbers that JSON does not have (NaN and the infinities) become null. All but ASCII is
    escaped: a path may have bytes that are no UTF-8, and a name characters that turn a terminal's
    text around.

    >>> json_text({"loss": float("nan"), "name": "é"})
    '{"loss": null, "name": "\\u00e9"}\n'
    """
    return json.dumps(_finite(content), indent=indent, allow_nan=False) + "\n"


def printable_texts(content: Any) -> Any:
    """Plain types with all texts in them as they may be shown; see :func:`errors.printable`."""
    if isinstance(content, str):
        return printable(content)
    if isinstance(content, Mapping):
        return {printable_texts(key): printable_texts(one) for key, one in content.items()}
    if isinstance(content, Sequence):
        return [printable_texts(one) for one in content]
    return content


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_key(key): _finite(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_finite(one) for one in value]
    return value


def _key(key: Any) -> Any:
    return str(key) if isinstance(key, float) and not math.isfinite(key) else key
