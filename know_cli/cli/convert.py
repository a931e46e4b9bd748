"""``know convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from know_cli.cli.options import quiet_option
from know_cli.cli.output import Output

EPILOG = "\n\n".join(
    (
        "Example:",
        "know convert pytorch_model.bin -o model.safetensors",
        "Exit codes: 0 done, 2 wrong usage, 3 input that cannot be used, 4 output that cannot be "
        "written, 130 interrupted.",
    )
)


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            show_default=False,
            help="A file of torch.save: .pt, .pth, .bin or .ckpt, with a state dict in it.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="OUT.safetensors", show_default=False, help="File to write."
        ),
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    quiet: Annotated[bool, quiet_option()] = False,
) -> None:
    """Turn a checkpoint that PyTorch pickled into a safetensors file, without running its code.

    Only PyTorch's restricted loader is used; a pickle that needs more is refused. The state dict
    may lie under 'state_dict', 'model' and the like. Tensors that share memory are each written
    in full, so that every name is found.
    """
    from know_cli.checkpoints.output_checks import check_file_output

    talk = Output(quiet)
    check_file_output(output, [source], force=force)

    from know_cli.checkpoints.pickles import convert_pickle
    from know_cli.cli.tables import bytes_text

    result = convert_pickle(source, output)
    for notice in result.notices:
        talk.notice(notice)
    talk.show(f"wrote {output}: {result.tensors} tensors, {bytes_text(result.nbytes)}")
