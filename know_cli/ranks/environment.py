"""What the environment says about the ranks that ``torchrun`` started."""

from __future__ import annotations

import os
import sys

from know_cli.errors import UsageError

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_one_of_several() -> bool:
    """Whether ``torchrun``, or whatever sets the same variables, started several ranks.

    Raises:
        UsageError: a variable is not a number, or they contradict each other.
    """
    if any(name not in os.environ for name in _VARIABLES):
        return False
    size, rank, _ = map(environment_number, ("WORLD_SIZE", "RANK", "MASTER_PORT"))
    if not 0 <= rank < size:
        raise UsageError(f"RANK={rank}, WORLD_SIZE={size}: no such rank; start with torchrun")
    return size > 1


def processes_here() -> int:
    """Return the number of ranks on this machine; 1 if this process is alone.

    Raises:
        UsageError: the environment contradicts itself.
    """
    if not is_one_of_several() or "LOCAL_WORLD_SIZE" not in os.environ:
        return 1
    return max(1, environment_number("LOCAL_WORLD_SIZE"))


def own_command(module: str) -> list[str]:
    """The words that start a module of this program as a process of its own.

    Modules in the working folder, such as a stranger's ``torch.py``, are not looked at.
    """
    if sys.version_info >= (3, 11):
        return [sys.executable, "-P", "-m", module]
    code = (
        "import runpy, sys; del sys.path[0]; "
        "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
    )
    return [sys.executable, "-c", code, module]


def environment_number(name: str) -> int:
    """Read an environment variable that holds a number.

    Raises:
        UsageError: it does not.
    """
    text = os.environ[name]
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"{name}={text!r} in the environment is no number; start with torchrun")
    return int(text)
