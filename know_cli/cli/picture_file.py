"""Pictures on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from know_cli.cli.report_file import check_report_path
from know_cli.errors import UsageError
from know_cli.plots.picture import FORMATS


def check_picture(path: Path, others: Sequence[Path], *, force: bool) -> str:
    """Check that a picture can be drawn and written without overwriting anything else.

    Args:
        path: of the picture.
        others: files and folders of this run that must not be written into.
        force: whether a picture that exists may be replaced.

    Returns:
        Its format, one of :data:`~know_cli.plots.picture.FORMATS`.

    Raises:
        UsageError: there is no such format.
        OutputError: the reason, and what to do.
    """
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise UsageError(f"-o {path}: pictures are written as {' or '.join(FORMATS)}")
    check_report_path(path, others, "-o", force=force)
    return suffix
