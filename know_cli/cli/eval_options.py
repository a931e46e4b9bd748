"""Options of ``know eval`` whose explanations are long, and what is made of some."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import typer

from know_cli.errors import UsageError

_MOST_SEEDS = 1000


def seeds_option() -> Any:
    """``--seeds``."""
    return typer.Option(
        metavar="N|I-J",
        show_default="the suite's",
        help="Number of seeds, or the seeds from I to J: 5 are those from 0 to 4, and 5-9 are five "
        "others, for another machine with a folder of its own.",
    )


def parse_seeds(text: str) -> range:
    """Parse ``5``, the seeds 0 to 4, or ``5-9``.

    Raises:
        UsageError: anything else, no seed, or seeds above 999.

    >>> parse_seeds("3"), parse_seeds("5-9")
    (range(0, 3), range(5, 10))
    """
    match = re.fullmatch(r"(?:(\d{1,9})-)?(\d{1,9})", text.strip())
    if match:
        first = int(match[1] or 0)
        found = range(first, int(match[2]) + (match[1] is not None))
        if found and found.stop <= _MOST_SEEDS:
            return found
    raise UsageError(
        f"--seeds {text}: write a number from 1 to {_MOST_SEEDS}, or the first and the last seed, "
        f"such as 5-9; the highest is {_MOST_SEEDS - 1}"
    )


def is_given(context: typer.Context, name: str) -> bool:
    """Whether the user wrote an option of a parameter."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_others(context: typer.Context, own: Collection[str], option: str) -> None:
    """Refuse options that would have no effect beside one that changes what the command does.

    Args:
        context: of the command.
        own: names of the parameters that have an effect.
        option: that was given, for the message.

    Raises:
        UsageError: the reason.
    """
    for parameter in context.command.params:
        name = parameter.name or ""
        if name not in own and is_given(context, name):
            raise UsageError(f"{parameter.opts[0]}: has no effect with {option}; leave it out")


def from_option() -> Any:
    """``--from``."""
    return typer.Option(
        "--from",
        metavar="CKPT",
        show_default=False,
        help="Of the release regime: a model that is trained already, such as a public one, as "
        "Θ0; a .safetensors file or a folder of them.",
    )


def shard_option() -> Any:
    """``--shard``."""
    return typer.Option(
        metavar="I/N",
        show_default="all",
        help="Run every N-th trial, from the I-th on, for N machines or array jobs that share "
        "FOLDER. When all are done, the same command without it collects what they found.",
    )


def join_option() -> Any:
    """``--join``."""
    return typer.Option(
        metavar="FILE",
        show_default=False,
        help="Of the release regime: run nothing, and add the tasks, seeds and starts of another "
        "machine's release.json to FOLDER's; repeatable.",
    )
