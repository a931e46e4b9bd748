"""``know eval --join``: results of the release regime from several machines as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from know_cli.errors import UsageError
from know_cli.evaluation.release.regime import Regime

if TYPE_CHECKING:
    from know_cli.cli.output import Output

#: Parameters that joining has.
_OWN = ("output", "regime", "join", "table", "force", "quiet")


def check_join(context: typer.Context) -> None:
    """Refuse options that would have no effect.

    Raises:
        UsageError: the reason.
    """
    if context.params["regime"] is not Regime.RELEASE:
        raise UsageError("--join is for --regime release")
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name not in _OWN and source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"{parameter.opts[0]}: has no effect with --join; leave it out")


def join_results(
    talk: Output, folder: Path, others: Sequence[Path], table: Path | None, *, force: bool
) -> None:
    """Add results to those in a folder, show all and write them there.

    Args:
        talk: to the user.
        folder: with ``release.json``, or without; made if it is missing.
        others: further such files; what several have is taken from the first.
        table: for the page; None for no page.
        force: whether a page that exists is replaced.

    Raises:
        UsageError: a file is no such result, or a task has several definitions.
        OutputError: a file cannot be written.
    """
    from know_cli.cli.eval_release import RESULTS, task_table
    from know_cli.cli.eval_results import publish
    from know_cli.evaluation.release.joining import joined
    from know_cli.evaluation.release.markdown import to_markdown
    from know_cli.evaluation.release.results import read_release
    from know_cli.files import make_folder

    path = folder / RESULTS
    replaces = path.exists()
    first, *rest = [read_release(one) for one in ([path, *others] if replaces else others)]
    for other in rest:
        first = joined(first, other)
    make_folder(folder)
    publish(talk, first, path, to_markdown, task_table, table, replaces=replaces, force=force)
