"""Where text goes: results to stdout; notices, warnings and progress to stderr.

With ``--report -`` or ``--json -`` the report is what stdout has, and all text for people goes
to stderr, so that a pipe gets JSON and nothing else.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from know_cli.errors import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

#: Columns for files and pipes: so many that no table is cut.
_NO_TERMINAL = 10_000


@dataclass(frozen=True)
class Output:
    """The one sink of a command.

    Attributes:
        quiet: nothing but errors, with what explains them, is printed.
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

    def explain(self, text: str) -> None:
        """Lines on stderr that belong to the error that follows, so that ``quiet`` keeps them."""
        with suppress(OSError):
            print(printable(text), file=sys.stderr)

    def warning(self, text: str) -> None:
        """A line about what may be wrong, on stderr."""
        self.notice(f"warning: {text}")

    def show(self, *renderables: RenderableType) -> None:
        """Print results on stdout, or aside: lines of text, and tables of :mod:`cli.tables`."""
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
