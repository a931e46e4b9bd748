"""``know verify``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from know_cli.cli.options import (
    force_option,
    max_memory_option,
    no_progress_option,
    quiet_option,
    threads_option,
    usable_cores,
)
from know_cli.cli.output import Output
from know_cli.engine.devices import DEVICE_NAMES, check_device_name
from know_cli.errors import counted

if TYPE_CHECKING:
    from know_cli.prediction.verify import Verification

EPILOG = "\n\n".join(
    (
        "Examples:",
        "know verify start.safetensors run/ckpt0..ckpt4",
        "know verify start.safetensors run/ckpt0..ckpt4 --full",
        "Exit codes: 0 it is what it says, 2 wrong usage, 3 it is not, or cannot be verified, 4 "
        "the report cannot be written.",
    )
)

_SPANS = 256


def verify(
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            show_default=False,
            help="A checkpoint that 'know predict' wrote.",
            readable=False,  # what cannot be read is told as of any other checkpoint
        ),
    ],
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CKPT...",
            show_default=False,
            help="The checkpoints that it was made from, in the same order; of a run, in any, and "
            "its folder will do.",
        ),
    ],
    full: Annotated[
        bool,
        typer.Option("--full", help="Compute everything again, not a sample."),
    ] = False,
    spans: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            show_default=str(_SPANS),
            help="Blocks of parameters in the sample.",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            show_default="another one each time",
            help="Which sample; it is printed, to be repeated.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            show_default="the shipped one of that digest",
            help="KNOWN bundle that it was made with.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar=DEVICE_NAMES,
            show_default="where it was made",
            help="Where to compute; another device may round otherwise.",
        ),
    ] = None,
    threads: Annotated[int | None, threads_option()] = None,
    max_memory: Annotated[int, max_memory_option()] = 1 << 30,
    json: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            show_default=False,
            help="Write what is found as JSON; - is standard output.",
        ),
    ] = None,
    force: Annotated[bool, force_option()] = False,
    quiet: Annotated[bool, quiet_option()] = False,
    no_progress: Annotated[bool, no_progress_option()] = False,
) -> None:
    """Compute a predicted checkpoint again from its inputs, and compare the bytes.

    What was done is read from the checkpoint's own metadata. A random sample of blocks, and of
    the tensors that are copied, is checked in seconds; --full checks all. If there is an
    OUT.sha256 ('know predict --checksum'), the whole checkpoint is compared with it, too.
    """
    from know_cli.checkpoints.arguments import find_checkpoints
    from know_cli.checkpoints.checksum import digest_paths
    from know_cli.checkpoints.metadata import TrajectoryKind
    from know_cli.checkpoints.paths import check_count, expand_arguments
    from know_cli.checkpoints.run_folder import read_metadata
    from know_cli.cli.report_file import check_report_path, takes_stdout, write_report
    from know_cli.errors import UsageError

    talk = Output(quiet, aside=takes_stdout(json))
    found, *more = expand_arguments([str(output)])
    made_of = TrajectoryKind.from_metadata(read_metadata(found)) or TrajectoryKind.FORGETTING
    paths, _ = find_checkpoints(checkpoints, made_of, talk.notice)
    _refuse_swapped([found, *more, *paths])
    if more:
        raise UsageError(f"{output}: names {len(more) + 1} checkpoints; OUT is one, and goes first")
    if made_of is not TrajectoryKind.RUN:  # of a run, those that were used are found
        check_count(paths, made_of, 1)
    if device is not None:
        check_device_name(device)
    for option, given in (("--seed", seed), ("--spans", spans)):
        if full and given is not None:
            raise UsageError(f"{option}: all is computed with --full; leave one of the two out")
    if json is not None:
        check_report_path(json, [*paths, found, *digest_paths(found)], "--json", force=force)

    from know_cli.cli.progress import progress_for
    from know_cli.prediction.verify import verify as verify_output

    with progress_for(talk, bar=not no_progress) as progress:
        result = verify_output(
            found,
            paths,
            spans=None if full else spans or _SPANS,
            seed=seed,
            weights=weights,
            device=device,
            threads=threads or usable_cores(),
            max_memory=max_memory,
            progress=progress,
        )
    for notice in result.notices:
        talk.notice(notice)
    if json is not None:
        write_report(json, result.to_json(), force=force)
    result.check(found)
    talk.show(*_lines(found, result))


def _refuse_swapped(paths: list[Path]) -> None:
    """Refuse the checkpoints with the output that was made from them last.

    Raises:
        UsageError: only the last one was written by 'know predict'.
        CheckpointError: one cannot be read.
    """
    from know_cli.checkpoints import open_checkpoint
    from know_cli.checkpoints.metadata import METHOD
    from know_cli.errors import UsageError

    def is_prediction(path: Path) -> bool:
        with open_checkpoint(path) as checkpoint:
            return METHOD in checkpoint.metadata

    if len(paths) > 1 and not is_prediction(paths[0]) and is_prediction(paths[-1]):
        raise UsageError(
            f"{paths[-1]} was written by 'know predict' and {paths[0]} was not: the output goes "
            f"first: {shlex.join(['know', 'verify', *(str(p) for p in (paths[-1], *paths[:-1]))])}"
        )


def _lines(output: Path, result: Verification) -> list[str]:
    from know_cli.cli.tables import bytes_text

    what = "everything" if result.seed is None else f"a sample (--seed {result.seed})"
    lines = [
        f"{output}: {what} computed again is the same: {bytes_text(result.bytes_compared)} of "
        f"{bytes_text(result.bytes_total)}, in {result.tensors} of "
        f"{counted(result.tensors_total, 'tensor')}"
    ]
    if result.rescaled:
        lines.append(
            f"not in a sample: {counted(result.rescaled, 'running statistic')}, which "
            f"depend{'s' * (result.rescaled == 1)} on whole layers"
        )
    lines.append(
        f"digest as in {result.digest}" if result.digest else "no digest (OUT.sha256) to compare"
    )
    return lines
