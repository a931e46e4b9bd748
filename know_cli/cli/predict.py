"""``know predict``, which is also ``know-predict``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.checkpoints.paths import method_path
from know_cli.cli.options import (
    every_option,
    last_option,
    max_memory_option,
    no_progress_option,
    one_json,
    parse_rate,
    quiet_option,
    report_option,
    threads_option,
    trajectory_option,
    usable_cores,
)
from know_cli.cli.output import Output
from know_cli.engine.devices import DEVICE_NAMES
from know_cli.engine.settings import MAX_STEPS, FrozenMode, NormMode
from know_cli.known.kernels import AUTO, KERNEL_NAMES
from know_cli.methods.bundles import default_method
from know_cli.methods.decay import LoraMode
from know_cli.methods.registry import (
    DEFAULT_METHODS,
    describe_methods,
    find_method,
    parse_options,
)
from know_cli.methods.spelling import Spelled, parse_spelled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from know_cli.prediction.predict import Prediction

EPILOG = "\n\n".join(
    (
        "Examples:",
        "know-predict run/ckpt0..ckpt4 -o start.safetensors",
        "know-predict ckpt0 ckpt1 ckpt2 ckpt3 ckpt4 -o predicted --steps 3 --every-step",
        "know-predict run/ckpt0..ckpt4 -o start.safetensors --dry-run",
        "know-predict run/ckpt0..ckpt4 -o baseline --method task-vector --option alpha=0.5",
        "know-predict run/ckpt0..ckpt4 -o start --method known,steps=2 --method shrink,lambda=0.9",
        "know-predict output_dir --trajectory run --last 5 -o averaged",
        "know-predict start mnli sst2 qqp --trajectory branches -o fused",
        "torchrun --nproc-per-node 8 --no-python know-predict run/ckpt0..4 -o start.safetensors",
        "Methods, with their options and defaults; n is the number of steps:",
        # What follows \b is not wrapped.
        f"\b\n{describe_methods()}",
        "Exit codes: 0 done, 1 a bug, 2 wrong usage, 3 checkpoints that cannot be used, "
        "4 output that cannot be written, 130 interrupted.",
    )
)

_WHICH = "What the checkpoints are"
_METHOD = "What is predicted, and how"
_MACHINE = "Where it runs"
_TALK = "What it says"


_DEFAULTS = ", ".join(f"{name} for {kind.plural}" for kind, name in DEFAULT_METHODS.items())


def predict(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CKPT...",
            show_default=False,
            help="2 to 16 checkpoints of one model (shrink and naive take one), full data first, "
            "most-forgotten last: .safetensors files, or folders as Hugging Face's libraries write "
            "them; of a pipeline, the folder of one component. An argument such as "
            "run/ckpt0..ckpt4 stands for a range, and with --trajectory run a folder for all "
            "checkpoint-* in it.",
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
    trajectory: Annotated[TrajectoryKind | None, trajectory_option(_WHICH)] = None,
    last: Annotated[int | None, last_option(_WHICH)] = None,
    every: Annotated[int | None, every_option(_WHICH)] = None,
    steps: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=MAX_STEPS,
            help="Steps to predict: at a rate of 0.5, 1 is x2 the data, 2 is x4, 3 is x8.",
            rich_help_panel=_METHOD,
        ),
    ] = 1,
    every_step: Annotated[
        bool,
        typer.Option(
            "--every-step",
            help="Also write each intermediate step: OUT with .x2, .x4 … before the suffix, or "
            ".step1, .step2 … of what is no forgetting.",
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
        list[str] | None,
        typer.Option(
            metavar="NAME[,OPTION=VALUE,…]",
            show_default=_DEFAULTS,
            help="What predicts: KNOWN, or one of the baselines in the list below; options may "
            "follow the name, also weights=… and steps=…. Repeatable: all are computed in one "
            "pass, and each output is OUT with its method before the suffix.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
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
            show_default="continuation",
            help="KNOWN bundle: the name of a shipped one, continuation or retrodiction, or the "
            "path, such as ./mine, of a bundle's folder or of one with KNOWN_Conv.h5, KNOWN_FC.h5 "
            "and KNOWN_Bias.h5. For methods known, lstsq, noise and settle.",
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
    lora: Annotated[
        LoraMode | None,
        typer.Option(
            show_default="exact",
            help="LoRA's pairs in --method average: exact averages their products, truncated to "
            "their rank; factors averages the factors. As --option lora=…",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    norm: Annotated[
        NormMode | None,
        typer.Option(
            show_default="rescale, or average with --method average",
            help="Normalisation layers: copy; predict their weights and biases; reset BatchNorm; "
            "rescale running statistics to the predicted weights where the layer before is known "
            "from the names, else copy; or, with --method average, average all.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    frozen: Annotated[
        FrozenMode,
        typer.Option(
            help="Tensors, and single elements of tensors, that are the same in all checkpoints.",
            rich_help_panel=_METHOD,
        ),
    ] = FrozenMode.COPY,
    allow_nonfinite: Annotated[
        bool,
        typer.Option(
            "--allow-nonfinite",
            help="Where a value or its prediction is not finite, take the first checkpoint's; do "
            "not refuse it.",
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
    kernel: Annotated[
        str,
        typer.Option(
            metavar=KERNEL_NAMES,
            help="Which of KNOWN's implementations computes; they round differently. auto takes "
            "the fastest that runs on the device.",
            rich_help_panel=_MACHINE,
        ),
    ] = AUTO,
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
            "--json",
            metavar="FILE.json",
            show_default=False,
            help="Write the report (of a dry run: the plan) as JSON; - is standard output.",
            rich_help_panel=_TALK,
        ),
    ] = None,
    older_report: Annotated[Path | None, report_option()] = None,
    quiet: Annotated[bool, quiet_option(_TALK)] = False,
    no_progress: Annotated[bool, no_progress_option(_TALK)] = False,
) -> None:
    """Predict the weights that a model would have had with more data.

    Reads checkpoints recorded while a model was fine-tuned on ever smaller subsets of its data,
    follows each parameter's history with a small hyper-model, and writes the weights one or
    more steps before the first: as if trained on 2, 4, 8 times the data. Of the checkpoints of
    one training run, or of branches from a common start, it writes the average.
    """
    from know_cli.checkpoints.arguments import find_checkpoints
    from know_cli.cli.report_file import check_report_path, takes_stdout, write_report
    from know_cli.engine.settings import Settings
    from know_cli.errors import UsageError
    from know_cli.kinds import parse_override
    from know_cli.prediction.request import Request
    from know_cli.ranks.environment import processes_here
    from know_cli.ranks.opening import open_ranks

    talk = Output(quiet, aside=takes_stdout(report, older_report))
    # First of all, so that whatever ends one rank ends all.
    with open_ranks(talk.notice) as ranks:
        talk = talk if ranks.rank == 0 else Output(quiet=True)
        paths, kind_of_all = find_checkpoints(
            checkpoints, trajectory, talk.notice, last=last, every=every
        )
        # Without a name, the bundle tells that it is a hyper-model that is wanted.
        texts = method or [default_method(kind_of_all, weights)]
        spelled = [parse_spelled(text, "--method") for text in dict.fromkeys(texts)]
        shared = [*(option or ()), *([f"lora={lora.value}"] if lora else [])]
        if len(spelled) > 1:
            _check_several(spelled, [*shared, *([weights] if weights else [])], ranks.size)
        try:
            overrides = tuple(parse_override(text) for text in kind or ())
        except ValueError as error:
            raise UsageError(str(error)) from error
        # A path does not keep the slash at its end.
        names_folder = output.endswith(("/", "/."))
        requests = [
            Request(
                checkpoints=paths,
                output=Path(output) if len(spelled) == 1 else method_path(output, one.name),
                names_folder=names_folder,
                weights=one.weights or weights,
                settings=Settings(
                    steps=steps if one.steps is None else one.steps,
                    norm=norm,
                    frozen=frozen,
                    overrides=overrides,
                    allow_nonfinite=allow_nonfinite,
                    max_memory=max_memory,
                    threads=threads or max(1, usable_cores() // processes_here()),
                ),
                rate=rate,
                every_step=every_step,
                device=device,
                kernel=kernel,
                force=force,
                method=one.method,
                options=parse_options(find_method(one.method), [*one.options, *shared]),
                resume=resume,
                checksum=checksum,
                trajectory=kind_of_all,
            )
            for one in spelled
        ]
        report = one_json(report, older_report)
        if report is not None:
            outputs = [request.output for request in requests]
            check_report_path(report, [*paths, *outputs], force=force)

        from know_cli.cli.progress import progress_for
        from know_cli.cli.tables import plan_tables, report_tables
        from know_cli.prediction.together import open_together

        with open_together(requests, ranks, talk.notice) as together:
            for prediction in together.predictions:
                if report is not None:
                    check_report_path(report, prediction.files, force=force)
            contents = []
            if dry_run:
                for prediction in together.predictions:
                    talk.show(*plan_tables(prediction))
                    contents.append(_plan_json(prediction))
            else:
                with progress_for(talk, bar=not no_progress) as progress:
                    results = together.execute(progress)
                for prediction, result in zip(together.predictions, results, strict=True):
                    talk.show(*report_tables(prediction, result))
                    contents.append({**prediction.describe(), **result.to_json()})
            if report is not None and ranks.rank == 0:
                one_of_all = {"predictions": contents} if len(contents) > 1 else contents[0]
                write_report(report, one_of_all, force=force)


def _check_several(spelled: Sequence[Spelled], shared: Sequence[str], processes: int) -> None:
    """Refuse what is unclear with several methods, or not done with them."""
    from know_cli.errors import UsageError

    if shared:
        raise UsageError(
            f"{shared[0]}: it is not clear which --method is meant; write it after the method's "
            "name, as in --method average,last=3"
        )
    if processes > 1:
        raise UsageError(
            f"--method {spelled[1].text}: several processes predict with one method; start it "
            "once for each, or without torchrun"
        )


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
        "notices": list(prediction.notices),
    }
