"""The process in which a user's measuring function runs: one JSON line in, one out.

Whatever the function prints goes to standard error, so that it cannot be taken for an answer.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from know_cli.checkpoints import open_checkpoint
from know_cli.checkpoints.state import read_state
from know_cli.errors import KnowError, UsageError
from know_cli.forgetting.runner import load_object


class _Copy(io.TextIOBase):
    """Writes to standard error and keeps a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.text = io.StringIO()

    def write(self, text: str) -> int:
        sys.stderr.write(text)
        return self.text.write(text)


def answer(
    function: Callable[..., Any], start: Path, seed: int, values: Mapping[str, str]
) -> dict[str, Any]:
    """Call the function once.

    Args:
        function: (state dict, seed, **values) → number.
        start: the candidate.
        seed: of the measure.
        values: of tuned placeholders, as text.

    Returns:
        ``value`` and ``output``, or ``error`` and ``output``.
    """
    copy = _Copy()
    with contextlib.redirect_stdout(copy):
        try:
            value = float(function(_read(start), seed, **values))
        except KnowError as error:
            return {"error": str(error), "output": copy.text.getvalue()}
        except Exception as error:
            copy.text.write(traceback.format_exc())
            name = type(error).__name__
            return {"error": f"raised {name}: {error}", "output": copy.text.getvalue()}
    return {"value": repr(value), "output": ""}


def _read(start: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint that is a file or a folder."""
    with open_checkpoint(start) as checkpoint:
        files = list(checkpoint.headers)
    return {name: tensor for file in files for name, tensor in read_state(file).items()}


def check_function(name: str, tuned: tuple[str, ...]) -> Callable[..., Any]:
    """Import a measuring function, and see that it can be called as it will be.

    Raises:
        KnowError: there is none, or it takes other arguments.
    """
    function = load_object(name)
    if not callable(function):
        raise UsageError(f"--evaluate {name}: is not a function")
    try:
        inspect.signature(function).bind({}, 0, **dict.fromkeys(tuned, ""))
    except TypeError as error:
        raise UsageError(
            f"--evaluate {name}: is called with a state dict and a seed"
            f"{''.join(f', {one}=' for one in tuned)}, which it does not take ({error})"
        ) from error
    except ValueError:  # a builtin without a signature
        pass
    checked: Callable[..., Any] = function
    return checked


def main() -> None:
    """Answer questions until standard input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    # Programs that the function starts must not write among the answers either.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # Nor take questions for their input, of which there is none.
    questions = os.fdopen(os.dup(sys.stdin.fileno()))
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    function = load_object(sys.argv[1])
    for line in questions:
        asked = json.loads(line)
        found = answer(function, Path(asked["start"]), asked["seed"], asked["values"])
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
