"""JSON from strangers: what a safetensors header and a shard index are parsed with.

Python's parser is more lenient than the format, and than a stranger deserves: it takes a key
twice, ``NaN``, ``-0`` as a count and halves of characters, and builds whatever it is told to.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NoReturn

#: Longest text that is parsed; the library reads five times as much, which can take a gigabyte
#: of memory.
MAX_BYTES = 20_000_000
#: Most objects in it, and so tensors in a file.
MAX_OBJECTS = 150_000
# Each value but the first stands behind one of these, so that they bound what is built: with
# the longest text, less than 200 MB. A tensor of four dimensions has ten of them.
_MARKS = (b",", b"[", b"{")
_MAX_MARKS = 1_500_000
# All counts are below 2**64; longer numbers take time to convert.
_MAX_DIGITS = 20


class BadJsonError(Exception):
    """A text that is refused; the message says why, in words that follow "is" or "has"."""


def parse_json(raw: bytes) -> Any:
    """Parse a JSON text strictly.

    Args:
        raw: UTF-8, at most :data:`MAX_BYTES` long.

    Raises:
        BadJsonError: it is not valid, has a key twice in one object, or too much in it.
    """
    if len(raw) > MAX_BYTES:
        raise BadJsonError(f"is too long: {len(raw)} bytes, of {MAX_BYTES} that are read")
    # A brace in a name counts as well, which is harmless.
    if raw.count(b"{") > MAX_OBJECTS + 2:
        raise BadJsonError(f"has more than the {MAX_OBJECTS} tensors that are read")
    if sum(raw.count(mark) for mark in _MARKS) > _MAX_MARKS:
        raise BadJsonError(f"has more than the {_MAX_MARKS} values that are read")
    try:
        return json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_int=_integer,
            parse_constant=_constant,
        )
    except (ValueError, RecursionError) as error:
        raise BadJsonError("is not valid JSON") from error


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold a text: JSON can escape halves of characters, which it cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise BadJsonError(f"has the key {twice[:100]!a} twice")
    return found


def _integer(text: str) -> int:
    """A number; −1, which is no count of anything, for what is one to Python only."""
    return -1 if text == "-0" or len(text) > _MAX_DIGITS else int(text)


def _constant(text: str) -> NoReturn:
    raise ValueError(f"no JSON: {text}")
