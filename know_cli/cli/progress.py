"""Progress on stderr: a bar on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from know_cli.cli.output import Output
from know_cli.cli.tables import count_text
from know_cli.engine.progress import Progress as EngineProgress
from know_cli.engine.progress import Silent
from know_cli.errors import printable


@contextmanager
def progress_for(talk: Output, *, bar: bool, unit: str = "parameters") -> Iterator[EngineProgress]:
    """The right kind of progress for this terminal and these options; ``unit`` is what counts."""
    if talk.quiet:
        yield Silent()
    elif bar and sys.stderr.isatty():
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            _Count(unit),
            TimeRemainingColumn(),
            console=talk.console(stderr=True),
            transient=True,
        ) as display:
            yield _Bar(display, unit)
    else:
        yield _Lines(talk, unit)


class _Count(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        if not task.total:
            return Text("")
        rate = f", {count_text(task.speed)}/s" if task.speed else ""
        return Text(f"{count_text(task.completed)} of {count_text(task.total)} {self._unit}{rate}")


class _Bar:
    """A rich bar; one line a finished phase."""

    def __init__(self, display: Progress, unit: str) -> None:
        self._display = display
        self._unit = unit
        self._task: TaskID | None = None

    def phase(self, text: str, parameters: int = 0) -> None:
        if self._task is not None:
            self._display.remove_task(self._task)
        self._display.console.print(_phase_line(text, parameters, self._unit))
        self._task = self._display.add_task(printable(text), total=parameters or None)

    def advance(self, parameters: int) -> None:
        if self._task is not None:
            self._display.advance(self._task, parameters)


class _Lines:
    """One line a phase."""

    def __init__(self, talk: Output, unit: str) -> None:
        self._talk = talk
        self._unit = unit

    def phase(self, text: str, parameters: int = 0) -> None:
        self._talk.notice(_phase_line(text, parameters, self._unit))

    def advance(self, parameters: int) -> None:
        """Do nothing: lines are printed per phase only."""


def _phase_line(text: str, count: int, unit: str) -> str:
    text = printable(text)
    return f"{text} {count_text(count)} {unit}" if count else text
