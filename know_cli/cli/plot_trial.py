"""``know plot trial``: the loss landscape around a trial of ``know eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from know_cli.cli.options import (
    data_folder_option,
    drawn_json_option,
    force_picture_option,
    grid_option,
    margin_option,
    no_progress_option,
    parse_named,
    picture_option,
    quiet_option,
)
from know_cli.cli.output import Output
from know_cli.cli.picture_file import check_picture
from know_cli.cli.plot_points import PlotRequest, draw_landscape_of
from know_cli.evaluation.landscape_measure import LandscapeMeasure
from know_cli.evaluation.precision import Precision

EPILOG = "\n\n".join(
    (
        "Examples:",
        "know plot trial evaluation --task fashion-classes-cnn -o landscape.png",
        "know plot trial release --task release-cifar10-resnet --seed 2 --method retrodiction "
        "--bundle authors=./authors --measure score --data-folder DATA -o landscape.svg",
    )
)


def trial(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", show_default=False, help="The output folder of 'know eval'."
        ),
    ],
    task: Annotated[
        str,
        typer.Option(
            metavar="NAME", show_default=False, help="One of its tasks, of either regime."
        ),
    ],
    output: Annotated[
        Path,
        picture_option(),
    ],
    seed: Annotated[int, typer.Option(min=0, help="Of the trial.")] = 0,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL",
            show_default="continuation, retrodiction",
            help="A method whose predictions are drawn; repeatable.",
        ),
    ] = None,
    bundle: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            show_default=False,
            help="Also draw what this KNOWN bundle predicts, under this name; repeatable.",
        ),
    ] = None,
    measure: Annotated[
        LandscapeMeasure,
        typer.Option(
            help="Of the pre-training's test examples: their mean cross entropy, or the task's own "
            "score, such as the accuracy."
        ),
    ] = LandscapeMeasure.LOSS,
    data_folder: Annotated[Path | None, data_folder_option()] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="auto|cpu|cuda[:i]|mps|xpu",
            help="Where the trial was trained, and is measured.",
        ),
    ] = "cpu",
    precision: Annotated[
        Precision, typer.Option(help="In which the trial was trained, and is measured.")
    ] = Precision.FLOAT32,
    first: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="CKPT",
            show_default=False,
            help="Of the release regime: the checkpoint that the trial began with.",
        ),
    ] = None,
    grid: Annotated[int, grid_option()] = 13,
    margin: Annotated[
        float,
        margin_option(),
    ] = 0.2,
    json: Annotated[
        Path | None,
        drawn_json_option(),
    ] = None,
    force: Annotated[bool, force_picture_option()] = False,
    quiet: Annotated[bool, quiet_option()] = False,
    no_progress: Annotated[bool, no_progress_option()] = False,
) -> None:
    """Draw the loss landscape around the checkpoints of a trial, with predictions from them.

    It is the plane of the first two principal axes of all that is drawn: Θ0 to Θ4, predictions, Θ0
    trained longer, and on more data. BatchNorm's running statistics are measured again at each
    point. Checkpoints that were not kept (--no-keep) are trained again.
    """
    from know_cli.cli.report_file import check_report_path, takes_stdout

    talk = Output(quiet, aside=takes_stdout(json))
    suffix = check_picture(output, [], force=force)
    if json is not None:
        check_report_path(json, [output], "--json", force=force)
    from know_cli.plots.picture import require_matplotlib

    require_matplotlib()
    from know_cli.engine.devices import choose_devices
    from know_cli.errors import UsageError
    from know_cli.evaluation.jobs import WORK
    from know_cli.evaluation.landscape import find_trial, measured, pictured
    from know_cli.evaluation.place import Place
    from know_cli.evaluation.starts import SESSIONS
    from know_cli.evaluation.variants import VARIANTS, find_variants, is_available, of_bundle
    from know_cli.files import make_folder, remove_tree, temporary_name
    from know_cli.plots.grid import Evaluation

    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; name the one that 'know eval' wrote into")
    bundles = parse_named(bundle or [], "--bundle", "PATH")
    variants = find_variants(method or ["continuation", "retrodiction"])
    for name, path in bundles.items():
        if name in [variant.label for variant in VARIANTS]:
            raise UsageError(f"--bundle {name}=…: is already the name of a method")
        variants.append(of_bundle(name, path))
    for variant in variants:
        if not is_available(variant, SESSIONS):
            raise UsageError(f"method {variant.label!r}: cannot read {SESSIONS} checkpoints")
    chosen, *others = choose_devices(device)
    if others:
        raise UsageError(f"--device {device}: choose one, such as cuda:0")
    place = Place(chosen, precision)
    one = find_trial(task, seed, folder / WORK, data_folder, place, first)
    function, label = measured(one, measure)
    predicted = one.folder / temporary_name()
    make_folder(predicted)
    try:
        drawn = pictured(one, variants, predicted)
        request = PlotRequest(
            sessions=list(drawn.sessions),
            predictions=[(None, path) for path in drawn.predictions],
            others=dict(drawn.others),
            overrides=(),
            picture=output,
            suffix=suffix,
            json=json,
            force=force,
            trajectory=None,
            temporary=predicted,
        )
        request.check([])
        draw_landscape_of(
            request,
            talk,
            Evaluation(f"{task}, seed {seed}", function),
            label,
            grid=grid,
            margin=margin,
            bar=not no_progress,
        )
    finally:
        remove_tree(predicted, quietly=True)
