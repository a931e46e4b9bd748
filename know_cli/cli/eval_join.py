"""``know eval --join``: results of the release regime from several machines as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from know_cli.cli.eval_options import refuse_others
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
    refuse_others(context, _OWN, "--join")


def join_results(
    talk: Output, folder: Path, others: Sequence[Path], table: Path | None, *, force: bool
) -> None:
    """Add results to those in a folder, show all and write them there.

    Args:
        talk: to the user.
        folder: with ``release.json``, or without; made if it is missing.
        others: further such files, or folders with one; what several have is taken from the first.
        table: for the page; None for no page.
        force: whether a page that exists is replaced.

    Raises:
        UsageError: a file is no such result, or none that fits the others.
        OutputError: a file cannot be written.
    """
    from know_cli.cli.eval_release import RESULTS, task_table
    from know_cli.cli.eval_results import publish
    from know_cli.cli.report_file import check_report_path, is_own_result
    from know_cli.evaluation.release.joining import read_joinable
    from know_cli.evaluation.release.markdown import to_markdown
    from know_cli.files import make_folder

    path = folder / RESULTS
    files = [one / RESULTS if one.is_dir() else one for one in others]
    if table is not None:
        check_report_path(table, [path, *files], "--table", force=force)
    replaces = is_own_result(path)
    if replaces:
        files = [path, *files]
    found = read_joinable(files[0])
    for file in files[1:]:
        found, left_out = _joined(found, file)
        for task, seeds in left_out.items():
            listed = ", ".join(map(str, seeds))
            talk.warning(
                f"{file}: {task}: seeds {listed} are left out, whose Θ0 is not that of the same "
                "seeds before"
            )
    make_folder(folder)
    publish(talk, found, path, to_markdown, task_table, table, replaces=replaces, force=force)


def _joined(results: dict[str, Any], file: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
    from know_cli.evaluation.release.joining import joined, read_joinable

    other = read_joinable(file)
    try:
        return joined(results, other)
    except UsageError as error:
        raise UsageError(f"--join {file}: {error}") from error
