"""The errors that a user can cause, each with the exit code that the command ends with.

A message is one line that says what is wrong, in which file and tensor, and what to do.
Anything that is not a :class:`KnowError` is a bug in this program and ends with exit code 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_CHECKPOINT = 3
EXIT_OUTPUT = 4
#: ``know choose --only-if-better`` found nothing better.
EXIT_NOT_BETTER = 5
EXIT_INTERRUPTED = 130
#: What a shell reports for a program that SIGPIPE ended.
EXIT_BROKEN_PIPE = 141


class KnowError(Exception):
    """Base of all errors that are reported to the user as one line.

    Attributes:
        exit_code: that the command ends with.
        is_told: whether another process has told the user already.
    """

    exit_code = EXIT_BUG
    is_told = False


class UsageError(KnowError):
    """The command line, or a call of the library, asks for something that cannot be done."""

    exit_code = EXIT_USAGE


class CheckpointError(KnowError):
    """An input checkpoint or bundle is missing, corrupt, mismatched or not finite."""

    exit_code = EXIT_CHECKPOINT


class OutputError(KnowError):
    """The output exists already, or cannot be written."""

    exit_code = EXIT_OUTPUT


_MAX_QUOTED = 120
# Names and metadata come from strangers' files. What a terminal acts on, what breaks lines, what
# turns the direction of text around, what is not seen, and halves of characters could forge what
# is shown: the categories Cc, Cf, Zl, Zp and Cs of Unicode.
_STRANGE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e"
    "\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\U000110bd"
    "\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0001"
    "\U000e0020-\U000e007f]"
)


def printable(text: str) -> str:
    r"""A line of text with every character escaped that could forge what is shown.

    >>> print(printable("w\x1b[2J\n\u202e"))
    w\x1b[2J\n\u202e
    """
    return _STRANGE.sub(lambda found: ascii(found[0])[1:-1], text)


def quoted(value: object) -> str:
    """What a file or a user gave, for a message: as Python writes it, cut in its middle if long.

    Characters that a terminal would act on are escaped.

    >>> quoted("conv1.weight")
    "'conv1.weight'"
    """
    text = repr(value)
    if len(text) <= _MAX_QUOTED:
        return text
    half = _MAX_QUOTED // 2
    return f"{text[:half]}…{text[-half:]}"


def quoted_first(names: Sequence[str], most: int = 3) -> str:
    """The first of several names for a message, and how many more there are.

    >>> quoted_first(["a", "b"]), quoted_first(["a", "b", "c"], 1)
    ("'a', 'b'", "'a' and 2 more")
    """
    more = len(names) - most
    return ", ".join(map(quoted, names[:most])) + (f" and {more} more" if more > 0 else "")


def a_type(value: object) -> str:
    """The type of a value with its article, for a message.

    >>> a_type(3), a_type([])
    ('an int', 'a list')
    """
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in set('aeio') else 'a'} {name}"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """So many of something.

    Args:
        number: how many.
        noun: what one of them is.
        plural: what several are; None adds an s.

    >>> counted(1, "seed"), counted(2, "seed"), counted(0, "branch", "branches")
    ('1 seed', '2 seeds', '0 branches')
    """
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def was_interrupted(error: BaseException | None) -> bool:
    """Whether an error is an interruption, or has become of one, as while a class is being made."""
    return isinstance(error, KeyboardInterrupt) or (
        error is not None and was_interrupted(error.__cause__)
    )
