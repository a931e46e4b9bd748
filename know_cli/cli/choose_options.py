"""Options of ``know choose``: what is made of those that say how a start is measured."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from know_cli.errors import UsageError

if TYPE_CHECKING:
    from know_cli.choosing.measures import CommandMeasure, FunctionMeasure


def parse_grid(texts: list[str] | tuple[str, ...]) -> list[tuple[tuple[str, str], ...]]:
    """All combinations of tuned values.

    >>> parse_grid(["lr=1,2", "decay=0"])
    [(('lr', '1'), ('decay', '0')), (('lr', '2'), ('decay', '0'))]

    Raises:
        UsageError: a text is not NAME=V1,V2, or a name comes twice.
    """
    axes: dict[str, list[str]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        found = [value for value in values.split(",") if value]
        if not name.isidentifier() or name in ("start", "seed") or not found:
            raise UsageError(f"--tune {text}: write NAME=V1,V2,V3, as in lr=1e-4,1e-3")
        if name in axes:
            raise UsageError(f"--tune {text}: {name} is tuned twice; put all values into one")
        if len(set(found)) < len(found):
            raise UsageError(f"--tune {text}: has a value twice")
        axes[name] = found
    axis_lists = [[(name, value) for value in found] for name, found in axes.items()]
    return [tuple(combination) for combination in itertools.product(*axis_lists)]


def measure_of(
    command: str | None,
    function: str | None,
    tuned: tuple[str, ...],
    key: str | None,
    timeout: float | None,
    variable: str,
    option: str = "--measure",
) -> CommandMeasure | FunctionMeasure:
    """The measure of a command, or where there is none of a function.

    Args:
        command: a shell command; None takes ``function``.
        function: ``module:function`` or ``file.py:function``.
        tuned: names of the tuned values.
        key: of the command's last JSON line; None takes its last line.
        timeout: seconds after which a measure counts as failed; None waits for ever.
        variable: environment variable that tells each of the jobs its number; empty sets none.
        option: that the command was given with, for messages.

    Raises:
        UsageError: the command or the function does not take what it is given.
    """
    from know_cli.choosing.measures import CommandMeasure, FunctionMeasure

    if command is not None:
        measure = CommandMeasure(command, key, timeout, variable, option)
        measure.check(tuned)
        return measure
    assert function is not None
    from know_cli.choosing.worker import check_function

    check_function(function, tuned)
    return FunctionMeasure(function, timeout, variable)
