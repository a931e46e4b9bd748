"""``know plot``: pictures of trajectories, of landscapes around them, and of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.cli.options import (
    drawn_json_option,
    every_option,
    force_picture_option,
    grid_option,
    last_option,
    margin_option,
    no_progress_option,
    picture_option,
    quiet_option,
    trajectory_option,
)
from know_cli.cli.output import Output
from know_cli.cli.picture_file import check_picture
from know_cli.cli.plot_choice import EPILOG as CHOICE_EPILOG
from know_cli.cli.plot_choice import choice
from know_cli.cli.plot_points import (
    Own,
    draw_landscape_of,
    measured_points,
    plot_request,
    points_table,
)
from know_cli.cli.plot_trial import EPILOG as TRIAL_EPILOG
from know_cli.cli.plot_trial import trial

TRAJECTORY_EPILOG = "\n\n".join(
    (
        "Example:",
        "know plot trajectory run/ckpt0..ckpt4 --prediction predicted.safetensors "
        "--other 'more data=run/continued1.safetensors' -o trajectory.svg",
    )
)
LANDSCAPE_EPILOG = "\n\n".join(
    (
        "Example:",
        "know plot landscape run/ckpt0..ckpt4 --prediction predicted.safetensors "
        "--evaluate measure.py:accuracy -o landscape.png",
    )
)
RESULTS_EPILOG = "\n\n".join(
    (
        "Example:",
        "know plot results evaluation/results.json --task 'fashion-*' --method continuation "
        "--method 'shrink-*' -o results.svg",
    )
)

_Checkpoints = Annotated[
    list[str],
    typer.Argument(
        metavar="CKPT...",
        show_default=False,
        help="The checkpoints, as for 'know predict', full data first.",
    ),
]
_Trajectory = Annotated[TrajectoryKind | None, trajectory_option()]
_Last = Annotated[int | None, last_option()]
_Every = Annotated[int | None, every_option()]
_Picture = Annotated[
    Path,
    picture_option(),
]
_Prediction = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME=]FILE",
        show_default=False,
        help="Also draw this prediction from them; repeatable.",
    ),
]
_Other = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=FILE",
        show_default=False,
        help="Also draw this checkpoint of the same model; repeatable.",
    ),
]
_Kind = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN=KIND",
        show_default=False,
        help="Set the kind of the tensors that match a glob; tensors of kind copy do not count. "
        "Repeatable.",
    ),
]
_Force = Annotated[bool, force_picture_option()]
_Json = Annotated[
    Path | None,
    drawn_json_option(),
]
_Quiet = Annotated[bool, quiet_option()]
_NoProgress = Annotated[bool, no_progress_option()]


def trajectory(
    checkpoints: _Checkpoints,
    output: _Picture,
    trajectory: _Trajectory = None,
    last: _Last = None,
    every: _Every = None,
    prediction: _Prediction = None,
    other: _Other = None,
    kind: _Kind = None,
    json: _Json = None,
    force: _Force = False,
    quiet: _Quiet = False,
    no_progress: _NoProgress = False,
) -> None:
    """Draw checkpoints and predictions in the plane that shows their distances best.

    It is the plane of the first two principal axes of all drawn checkpoints, over the tensors that
    'know predict' predicts (kinds conv, fc and bias). The data is read once, block by block.
    """
    from know_cli.cli.report_file import takes_stdout, write_report

    talk = Output(quiet, aside=takes_stdout(json))
    own = Own(checkpoints, trajectory, last, every)
    request = plot_request(own, output, prediction, other, kind, json, force, talk)
    from know_cli.files import write_bytes
    from know_cli.plots.points import describe
    from know_cli.plots.trajectory import draw_trajectory

    with measured_points(request, talk, bar=not no_progress) as (points, names, plane):
        content = draw_trajectory(points.points, *plane.first_two, request.suffix)
        if json is not None:
            write_report(json, describe(points, names, plane), force=force)
        write_bytes(output, content, replace=force)
        talk.show(points_table(points, plane), f"wrote {output}")


def landscape(
    checkpoints: _Checkpoints,
    output: _Picture,
    evaluate: Annotated[
        str,
        typer.Option(
            metavar="FUNCTION",
            show_default=False,
            help="Your function, module:function or file.py:function. It takes a state dict and "
            "returns a number, such as an accuracy or a loss.",
        ),
    ],
    trajectory: _Trajectory = None,
    last: _Last = None,
    every: _Every = None,
    prediction: _Prediction = None,
    other: _Other = None,
    grid: Annotated[
        int,
        grid_option(),
    ] = 13,
    margin: Annotated[
        float,
        margin_option(),
    ] = 0.2,
    label: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", show_default="the function's name", help="What the function measures."
        ),
    ] = None,
    kind: _Kind = None,
    json: _Json = None,
    force: _Force = False,
    quiet: _Quiet = False,
    no_progress: _NoProgress = False,
) -> None:
    """Draw contours of your own measure of weights in the plane of 'know plot trajectory'.

    Your function is called at N x N points of the plane. The weights of a point are a linear
    combination of the checkpoints; tensors that are not predicted, such as BatchNorm's running
    statistics, are the first checkpoint's.
    """
    from know_cli.cli.report_file import takes_stdout

    talk = Output(quiet, aside=takes_stdout(json))
    own = Own(checkpoints, trajectory, last, every)
    request = plot_request(own, output, prediction, other, kind, json, force, talk)
    from know_cli.plots.grid import load_evaluation

    draw_landscape_of(
        request,
        talk,
        load_evaluation(evaluate),
        label or evaluate.rpartition(":")[2],
        grid=grid,
        margin=margin,
        bar=not no_progress,
    )


def results(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="RESULTS.json", show_default=False, help="The results of 'know eval'."
        ),
    ],
    output: _Picture,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            show_default="all",
            help="A task or a pattern such as 'fashion-*'; repeatable.",
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            show_default="continuation, retrodiction, shrink-0.9, average, and your bundles",
            help="A method or a pattern of its name in tables, such as '*norm copy'; repeatable.",
        ),
    ] = None,
    force: _Force = False,
    quiet: _Quiet = False,
) -> None:
    """Draw what predictions are worth, from x1 (no prediction) to x8, with 95 % intervals.

    One panel per task shows the paired difference from fine-tuning the first checkpoint itself,
    and as lines with bands what longer training and actually having more data bring. The last
    panel shows the mean recovered gain over the data-limited tasks.
    """
    talk = Output(quiet)
    suffix = check_picture(output, [file], force=force)
    from know_cli.plots.picture import require_matplotlib

    require_matplotlib()
    from know_cli.evaluation.results import read_results
    from know_cli.files import write_bytes
    from know_cli.plots.curves import curves_of
    from know_cli.plots.results import draw_results

    curves = curves_of(read_results(file), task or ["*"], method)
    write_bytes(output, draw_results(curves, suffix), replace=force)
    talk.show(f"wrote {output}")


COMMANDS = (
    ("trajectory", trajectory, "Checkpoints and predictions in a plane.", TRAJECTORY_EPILOG),
    ("landscape", landscape, "The same plane with contours of your measure.", LANDSCAPE_EPILOG),
    ("trial", trial, "The landscape around a trial of 'know eval'.", TRIAL_EPILOG),
    ("results", results, "The results of 'know eval' as curves.", RESULTS_EPILOG),
    ("choose", choice, "The candidates of 'know choose' with their intervals.", CHOICE_EPILOG),
)
