"""``know predict``, which is also ``know-predict``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from know_cli.cli.options import (
    max_memory_option,
    no_progress_option,
    parse_rate,
    quiet_option,
    threads_option,
    usable_cores,
)
from know_cli.cli.output import Output
from know_cli.engine.device_names import DEVICE_NAMES, check_device_name
from know_cli.methods.registry import (
    DEFAULT_METHOD,
    check_weights,
    describe_methods,
    find_method,
    parse_options,
)

if TYPE_CHECKING:
    from know_cli.engine.report import Report
    from know_cli.methods.prediction import Prediction

EPILOG = "\n\n".join(
    (
        "Examples:",
        "know-predict run/ckpt0..ckpt4 -o start.safetensors",
        "know-predict ckpt0 ckpt1 ckpt2 ckpt3 ckpt4 -o predicted --steps 3 --every-step",
        "know-predict run/ckpt0..ckpt4 -o start.safetensors --dry-run",
        "know-predict run/ckpt0..ckpt4 -o rival --method task-vector --option alpha=0.5",
        "torchrun --nproc-per-node 8 -m know_cli predict run/ckpt0..ckpt4 -o start.safetensors",
        "Methods, with their options and defaults; n is the number of steps:",
        # What follows \b is not wrapped.
        f"\b\n{describe_methods()}",
        "Exit codes: 0 done, 1 a bug, 2 wrong usage, 3 checkpoints that cannot be used, "
        "4 output that cannot be written, 130 interrupted.",
    )
)

_METHOD = "What is predicted, and how"
_MACHINE = "Where it runs"
_TALK = "What it says"


# The same values as the engine's enums, which are not imported here: they live beside torch.
class NormChoice(str, Enum):
    """Values of ``--norm``."""

    COPY = "copy"
    PREDICT = "predict"
    RESET = "reset"
    RESCALE = "rescale"


class FrozenChoice(str, Enum):
    """Values of ``--frozen``."""

    COPY = "copy"
    PREDICT = "predict"


def predict(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CKPT...",
            show_default=False,
            help="2 to 16 checkpoints of one model, full data first, most-forgotten last: "
            ".safetensors files, or folders as Hugging Face's libraries write them; of a pipeline, "
            "the folder of one component. An argument such as run/ckpt0..ckpt4 stands for a range.",
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            show_default=False,
            help="File or folder to write, as the first checkpoint is one or the other.",
        ),
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    steps: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=8,
            help="Steps to predict: at a rate of 0.5, 1 is x2 the data, 2 is x4, 3 is x8.",
            rich_help_panel=_METHOD,
        ),
    ] = 1,
    every_step: Annotated[
        bool,
        typer.Option(
            "--every-step",
            help="Also write each intermediate step: OUT with .x2, .x4 … before the suffix.",
            rich_help_panel=_METHOD,
        ),
    ] = False,
    rate: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            parser=parse_rate,
            show_default="the checkpoints' own, else 0.5",
            help="Sampling rate of the forgetting, such as 0.5 or 1/3; names the factor.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What predicts: KNOWN, or one of its rivals in the list below.",
            rich_help_panel=_METHOD,
        ),
    ] = DEFAULT_METHOD,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            show_default=False,
            help="Set an option of the method; the list below has them. Repeatable.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            show_default="the shipped default",
            help="KNOWN bundle: the name of a shipped one, or the path, such as ./mine, of a "
            "bundle's folder or of one with KNOWN_Conv.h5, KNOWN_FC.h5 and KNOWN_Bias.h5. For "
            "methods known, lstsq and noise.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=KIND",
            show_default=False,
            help="Set the kind of the tensors that a glob matches: conv, fc, bias or copy. "
            "Repeatable, the last match counts.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    norm: Annotated[
        NormChoice,
        typer.Option(
            help="Normalisation layers: copy; predict their weights and biases; reset BatchNorm; "
            "or rescale running statistics to the predicted weights where the layer before is "
            "known from the names, else copy.",
            rich_help_panel=_METHOD,
        ),
    ] = NormChoice.RESCALE,
    frozen: Annotated[
        FrozenChoice,
        typer.Option(help="Tensors that are the same in all checkpoints.", rich_help_panel=_METHOD),
    ] = FrozenChoice.COPY,
    allow_nonfinite: Annotated[
        bool,
        typer.Option(
            "--allow-nonfinite",
            help="Copy values that are not finite from the first checkpoint, do not refuse them.",
            rich_help_panel=_METHOD,
        ),
    ] = False,
    device: Annotated[
        str,
        typer.Option(
            metavar=DEVICE_NAMES,
            help="Where KNOWN runs; auto takes a CUDA device if there is one. Methods without "
            "KNOWN use the CPU.",
            rich_help_panel=_MACHINE,
        ),
    ] = "auto",
    threads: Annotated[
        int | None, threads_option(_MACHINE, ", of each process that torchrun starts")
    ] = None,
    max_memory: Annotated[int, max_memory_option(_MACHINE, " of each process")] = 1 << 30,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Keep what is finished in a hidden journal beside OUT until OUT is complete, and "
            "go on from it after a run that was killed. Needs the space of the output once more.",
            rich_help_panel=_MACHINE,
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the plan and write nothing.", rich_help_panel=_TALK),
    ] = False,
    checksum: Annotated[
        bool,
        typer.Option(
            "--checksum",
            help="Also write OUT.sha256, which 'sha256sum -c' and 'know verify' check.",
            rich_help_panel=_TALK,
        ),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            show_default=False,
            help="Write the report (of a dry run: the plan) as JSON; - is standard output.",
            rich_help_panel=_TALK,
        ),
    ] = None,
    quiet: Annotated[bool, quiet_option(_TALK)] = False,
    no_progress: Annotated[bool, no_progress_option(_TALK)] = False,
) -> None:
    """Predict the weights that a model would have had with more data.

    Reads checkpoints recorded while a model was fine-tuned on ever smaller subsets of its data,
    follows each parameter's history with a small hyper-model, and writes the weights one or
    more steps before the first: as if trained on 2, 4, 8 times the data.
    """
    from know_cli.bundles import check_weights_name
    from know_cli.checkpoints.paths import check_count, expand_arguments
    from know_cli.cli.report_file import check_report_path, takes_stdout, write_report
    from know_cli.engine.ranks import open_ranks, processes_here
    from know_cli.errors import UsageError
    from know_cli.kinds import parse_override

    talk = Output(quiet, aside=takes_stdout(report))
    # First of all, so that whatever ends one rank ends all.
    with open_ranks(talk.notice) as ranks:
        talk = talk if ranks.rank == 0 else Output(quiet=True)
        paths = expand_arguments(checkpoints, talk.notice)
        try:
            overrides = tuple(parse_override(text) for text in kind or ())
        except ValueError as error:
            raise UsageError(str(error)) from error
        check_count(paths)
        check_device_name(device)
        chosen = find_method(method)
        options = parse_options(chosen, option or ())
        check_weights(chosen, weights)
        if weights is not None:
            check_weights_name(weights)
        if report is not None:
            check_report_path(report, [*paths, Path(output)])

        from know_cli.engine.plan import FrozenMode, NormMode, Settings
        from know_cli.methods.prediction import Request, open_prediction

        request = Request(
            checkpoints=paths,
            output=Path(output),
            # A path does not keep the slash at its end.
            names_folder=output.endswith(("/", "/.")),
            weights=weights,
            settings=Settings(
                steps=steps,
                norm=NormMode(norm.value),
                frozen=FrozenMode(frozen.value),
                overrides=overrides,
                allow_nonfinite=allow_nonfinite,
                max_memory=max_memory,
                threads=threads or max(1, usable_cores() // processes_here()),
            ),
            rate=rate,
            every_step=every_step,
            device=device,
            force=force,
            method=method,
            options=options,
            resume=resume,
            checksum=checksum,
        )
        with open_prediction(request, ranks) as prediction:
            if report is not None:
                check_report_path(report, prediction.files)
            content = _predict(prediction, talk, dry_run=dry_run, bar=not no_progress)
            if report is not None and ranks.rank == 0:
                write_report(report, content)


def _predict(prediction: Prediction, talk: Output, *, dry_run: bool, bar: bool) -> dict[str, Any]:
    """Show the plan, or execute it and show what came of it; what a JSON report has."""
    from know_cli.cli.tables import plan_tables, report_tables

    for notice in prediction.notices:
        talk.notice(notice)
    if dry_run:
        talk.show(*plan_tables(prediction))
        return _plan_json(prediction)
    result = _execute(prediction, talk, bar=bar)
    for notice in result.notices[len(prediction.notices) :]:
        talk.notice(notice)
    talk.show(*report_tables(prediction, result))
    return {**prediction.describe(), **result.to_json()}


def _execute(prediction: Prediction, talk: Output, *, bar: bool) -> Report:
    from know_cli.cli.progress import progress_for

    with progress_for(talk, bar=bar) as progress:
        return prediction.execute(progress)


def _plan_json(prediction: Prediction) -> dict[str, Any]:
    plan = prediction.plan
    return {
        **prediction.describe(),
        "dry_run": True,
        "bytes_to_read": plan.bytes_to_read,
        "bytes_to_write": plan.bytes_to_write,
        "outputs": [{"path": str(o.path), "step": o.step} for o in prediction.outputs],
        "tensors": [
            {
                "name": tensor.name,
                "kind": tensor.kind.value,
                "action": tensor.action.value,
                "reason": tensor.reason,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "layer_before": tensor.layer.source_weight if tensor.layer else None,
            }
            for tensor in plan.tensors
        ],
        "notices": prediction.notices,
    }
