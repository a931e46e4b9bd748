"""``know convert-weights``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from know_cli.cli.options import quiet_option
from know_cli.cli.output import Output


def convert_weights(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            show_default=False,
            help="Folder with KNOWN_Conv.h5, KNOWN_FC.h5 and KNOWN_Bias.h5 as Keras saved them.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="BUNDLE", show_default=False, help="Folder to write."
        ),
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    quiet: Annotated[bool, quiet_option()] = False,
) -> None:
    """Convert a KNOWN saved by Keras into a bundle, after which h5py is not needed."""
    from know_cli.errors import CheckpointError, OutputError
    from know_cli.known.bundle import load_bundle, save_bundle
    from know_cli.known.shipped import check_bundle_output, is_keras_folder

    if not source.is_dir():
        raise CheckpointError(f"{source}: no such folder")
    if not is_keras_folder(source):
        raise CheckpointError(f"{source}: the folder has no KNOWN_*.h5")
    if output.exists() and output.samefile(source):
        raise OutputError(f"{output}: is the input; name another folder")
    check_bundle_output(output, force=force)
    bundle = load_bundle(source)
    save_bundle(bundle, output, {"data": "converted from Keras files; see their own source"})
    Output(quiet).show(
        f"wrote {output}: KNOWN for {bundle.checkpoints} checkpoints, digest {bundle.digest}"
    )
