"""``know convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from know_cli.cli.options import quiet_option
from know_cli.cli.output import Output
from know_cli.errors import counted

EPILOG = "\n\n".join(
    (
        "Examples:",
        "know convert pytorch_model.bin -o model.safetensors",
        "know convert bert-folder -o bert-safetensors",
        "know convert run/ckpt0..ckpt4.pt -o run-safetensors --key model",
        "Exit codes: 0 done, 2 wrong usage, 3 input that cannot be used, 4 output that cannot be "
        "written, 130 interrupted.",
    )
)


def convert(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="IN...",
            show_default=False,
            help="A file of torch.save (.pt, .pth, .bin, .ckpt), a folder with pytorch_model.bin "
            "or its shards, their index, or several of these; or a folder with KNOWN_*.h5.",
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            show_default=False,
            help="A .safetensors file; a folder if IN is a folder, an index, or several.",
        ),
    ],
    key: Annotated[
        str,
        typer.Option(
            "--key",
            metavar="KEY",
            show_default=False,
            help="Where the state dict is in the file, such as 'ema' or 'model.state_dict'; '.' "
            "is the outermost. Needed only if there are several.",
        ),
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    quiet: Annotated[bool, quiet_option()] = False,
) -> None:
    """Turn checkpoints that PyTorch pickled into safetensors, without running their code.

    Nothing that a pickle names is imported or called. A file becomes a file. A folder becomes a
    folder with the same shards and the files beside them. Tensors that share memory are each
    written in full, so that every name is found. A folder with the KNOWN_*.h5 of the paper's
    authors becomes a bundle for 'know predict --weights'.
    """
    from know_cli.checkpoints.paths import expand_arguments
    from know_cli.errors import OutputError, UsageError
    from know_cli.known.shipped import is_keras_folder

    talk, target, paths = Output(quiet), Path(output), expand_arguments(sources)
    if len(paths) == 1 and paths[0].is_dir() and is_keras_folder(paths[0]):
        if key:
            raise UsageError(f"--key {key}: a folder with KNOWN_*.h5 has no keys to choose from")
        _convert_bundle(paths[0], target, talk, force=force)
        return

    from know_cli.checkpoints.output_checks import name_notices
    from know_cli.checkpoints.pickles import execute, is_model, plan_conversions
    from know_cli.cli.tables import bytes_text

    if len(paths) == 1 and not is_model(paths[0]) and output.endswith("/"):
        raise OutputError(f"{output}: is named as a folder, but a file becomes a file; name that")
    plans = plan_conversions(paths, target, key, force=force)
    if len(plans) == 1 and plans[0].model is None:
        for notice in name_notices(target):
            talk.notice(notice)
    for result in execute(plans, target, force=force):
        for notice in result.notices:
            talk.notice(notice)
        tensors = counted(result.tensors, "tensor")
        talk.show(f"wrote {result.output}: {tensors}, {bytes_text(result.nbytes)}")


def _convert_bundle(source: Path, output: Path, talk: Output, *, force: bool) -> None:
    """Convert KNOWN as Keras saved it, after which h5py is not needed."""
    from know_cli.known.shipped import check_bundle_output

    check_bundle_output(output, [source], force=force)

    from know_cli.known.bundle import load_bundle, save_bundle

    bundle = load_bundle(source)
    save_bundle(
        bundle, output, {"data": "converted from Keras files; see their own source"}, replace=force
    )
    talk.show(f"wrote {output}: KNOWN for {bundle.checkpoints} checkpoints, digest {bundle.digest}")
