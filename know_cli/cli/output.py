"""Where text goes: results to stdout; notices, warnings and progress to stderr.

With ``--report -`` or ``--json -`` the report is what stdout has, and all text for people goes
to stderr, so that a pipe gets JSON and nothing else.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

#: Columns for files and pipes: so many that no table is cut.
_NO_TERMINAL = 10_000
# Names and metadata come from strangers' files: controls (C0 but tab and line feed, delete, C1)
# and the signs that turn the direction of text around could forge what a terminal shows.
_CONTROLS = (
    *range(9),
    *range(11, 32),
    *range(127, 160),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
)
_ESCAPES = {code: ascii(chr(code))[1:-1] for code in _CONTROLS}


def printable(text: str) -> str:
    r"""A text with every character escaped that a terminal would act on.

    >>> print(printable("w\x1b[2J"))
    w\x1b[2J
    """
    return text.translate(_ESCAPES)


@dataclass(frozen=True)
class Output:
    """The one sink of a command.

    Attributes:
        quiet: nothing but errors is printed.
        aside: results go to stderr, since stdout has a report for programs.
    """

    quiet: bool = False
    aside: bool = False

    def notice(self, text: str) -> None:
        """A line for the user about what happens, on stderr."""
        if not self.quiet:
            # Work does not stop because nobody listens.
            with suppress(OSError):
                print(printable(text), file=sys.stderr)

    def warning(self, text: str) -> None:
        """A line about what may be wrong, on stderr."""
        self.notice(f"warning: {text}")

    def show(self, *renderables: RenderableType) -> None:
        """Print results (text, rich tables) on stdout, or aside."""
        if not self.quiet:
            console = self.console(stderr=self.aside)
            for renderable in renderables:
                if isinstance(renderable, str):
                    # Plain lines are never broken: paths in them are there to be copied.
                    console.print(printable(renderable), soft_wrap=True)
                else:
                    console.print(renderable)

    def console(self, *, stderr: bool = False) -> Console:
        """A rich console as wide as the terminal; where there is none, as wide as the text is."""
        from rich.console import Console

        width = None if (sys.stderr if stderr else sys.stdout).isatty() else _NO_TERMINAL
        return Console(stderr=stderr, highlight=False, width=width, markup=False, emoji=False)
