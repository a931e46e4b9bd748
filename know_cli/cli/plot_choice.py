"""``know plot choose``: the picture of a search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from know_cli.cli.options import force_picture_option, picture_option, quiet_option
from know_cli.cli.output import Output
from know_cli.cli.picture_file import check_picture

EPILOG = "\n\n".join(
    (
        "Example:",
        "know plot choose start.safetensors.search -o candidates.png",
    )
)


def choice(
    search: Annotated[
        Path,
        typer.Argument(
            metavar="SEARCH",
            show_default=False,
            help="The folder that 'know choose' keeps, OUT.search, or its report as JSON.",
        ),
    ],
    output: Annotated[
        Path,
        picture_option(),
    ],
    force: Annotated[bool, force_picture_option()] = False,
    quiet: Annotated[bool, quiet_option()] = False,
) -> None:
    """Draw every candidate of 'know choose' with its interval, in order, and the line of Θ0.

    Differences are paired by seed. Those of choosing are too large for the best, by selection; its
    difference on fresh seeds is drawn below it, and that of a random direction of the same length.
    """
    talk = Output(quiet)
    suffix = check_picture(output, [search] if search.is_file() else [], force=force)
    from know_cli.choosing.intervals import check_intervals
    from know_cli.plots.picture import require_matplotlib

    require_matplotlib()
    check_intervals()
    from know_cli.files import write_bytes
    from know_cli.plots.choice import draw_choice, read_choice

    write_bytes(output, draw_choice(read_choice(search), suffix), replace=force)
    talk.show(f"wrote {output}")
