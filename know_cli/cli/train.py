"""``know train``: make a KNOWN bundle from recorded trajectories."""

from __future__ import annotations

import shlex
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from know_cli.cli.output import Output

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

    from know_cli.kinds import Kind
    from know_cli.meta.figures import Figures

EPILOG = "\n\n".join(
    (
        "Example:",
        "know forget train.py:session runs --trajectories 50 --sessions 7 --before 1 "
        "--rate 0.5..0.9",
        "know train runs -o my-known --target continuation",
        "know-predict run/ckpt0..ckpt4 -o predicted.safetensors --weights my-known",
    )
)


# The same values as the enums of meta and hypermodel, which live beside torch.
class TargetChoice(str, Enum):
    """Values of ``--target``."""

    RETRODICTION = "retrodiction"
    CONTINUATION = "continuation"


class PreparationChoice(str, Enum):
    """Values of ``--preparation``."""

    RAW = "raw"
    SPREAD = "spread"


class LossChoice(str, Enum):
    """Values of ``--loss``."""

    L1 = "l1"
    L2 = "l2"


class ResidualsChoice(str, Enum):
    """Values of ``--residuals``."""

    RAW = "raw"
    SCALED = "scaled"


def train(
    trajectories: Annotated[
        list[Path],
        typer.Argument(
            metavar="TRAJECTORIES...",
            help="Folders that 'know forget' wrote, or folders of such.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="BUNDLE", help="Folder to write the bundle into."),
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    target: Annotated[
        TargetChoice,
        typer.Option(
            help="retrodiction: the session before (the paper); continuation: the first "
            "checkpoint trained further on 1/rate times the data."
        ),
    ] = TargetChoice.RETRODICTION,
    checkpoints: Annotated[
        int, typer.Option(min=2, max=16, help="S, how many checkpoints it reads.")
    ] = 5,
    preparation: Annotated[
        PreparationChoice | None,
        typer.Option(
            help="Windows as they are, or centred and divided by their spread.",
            show_default="raw for retrodiction, spread for continuation",
        ),
    ] = None,
    loss: Annotated[LossChoice, typer.Option(help="Absolute or squared error.")] = LossChoice.L1,
    residuals: Annotated[
        ResidualsChoice | None,
        typer.Option(
            help="Errors as they are, or in units of each trajectory's mean change.",
            show_default="raw for retrodiction, scaled for continuation",
        ),
    ] = None,
    penalty: Annotated[
        bool | None,
        typer.Option(
            help="Add the paper's L1 penalties on KNOWN's weights.",
            show_default="yes for retrodiction",
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the windows.")] = 20,
    batch_rows: Annotated[int, typer.Option(min=1, help="Windows a step.")] = 4096,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Adam's at the start.")] = 1e-3,
    seed: Annotated[int, typer.Option(min=0, help="Of split, weights and order.")] = 0,
    holdout: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of trajectories it is judged by.")
    ] = 0.2,
    rows_per_tensor: Annotated[
        int, typer.Option(min=1, help="The most windows taken from one tensor and position.")
    ] = 1000,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of torch; default: torch's own.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Train a KNOWN, the small model that predicts parameters, on recorded trajectories.

    Writes conv.safetensors, fc.safetensors, bias.safetensors and manifest.json, and prints how
    well it does on trajectories that it was not fitted to, beside simple rules.
    """
    talk = Output(quiet)
    check_bundle_output(output, force=force)
    import torch

    from know_cli.hypermodel import Preparation, save_bundle
    from know_cli.meta.training import Loss, Residuals, Settings, train_bundle
    from know_cli.meta.windows import Target, collect_windows, find_trajectories

    if threads:
        torch.set_num_threads(threads)
    paper = target is TargetChoice.RETRODICTION
    settings = Settings(
        target=Target(target.value),
        checkpoints=checkpoints,
        preparation=Preparation(preparation.value if preparation else "raw" if paper else "spread"),
        loss=Loss(loss.value),
        residuals=Residuals(residuals.value if residuals else "raw" if paper else "scaled"),
        penalised=paper if penalty is None else penalty,
        epochs=epochs,
        batch_rows=batch_rows,
        learning_rate=learning_rate,
        seed=seed,
        holdout=holdout,
        rows_per_tensor=rows_per_tensor,
    )
    collection = collect_windows(
        find_trajectories(trajectories),
        target=settings.target,
        checkpoints=checkpoints,
        rows_per_tensor=rows_per_tensor,
        seed=seed,
    )
    for reason in collection.skipped:
        talk.warning(f"left out {reason}")
    rows = ", ".join(f"{len(table):,} {kind.value}" for kind, table in collection.windows.items())
    talk.notice(f"{len(collection.trajectories)} trajectories, windows: {rows}")

    def report(kind: Kind, epoch: int, training: float, held_out: float) -> None:
        talk.notice(
            f"{kind.value:4}  epoch {epoch:3} of {epochs}  loss {training:.5g}  "
            f"held out {held_out:.5g}"
        )

    bundle, figures = train_bundle(collection, settings, report)
    command = ["know", "train", *map(str, trajectories), "-o", str(output)]
    command += ["--target", target.value, "--checkpoints", str(checkpoints)]
    command += ["--preparation", settings.preparation.value, "--loss", settings.loss.value]
    command += ["--residuals", settings.residuals.value]
    command += ["--penalty" if settings.penalised else "--no-penalty", "--epochs", str(epochs)]
    command += ["--batch-rows", str(batch_rows), "--learning-rate", f"{learning_rate:g}"]
    command += ["--seed", str(seed), "--holdout", f"{holdout:g}"]
    command += ["--rows-per-tensor", str(rows_per_tensor)]
    command += ["--threads", str(torch.get_num_threads())]
    save_bundle(bundle, output, {"command": shlex.join(command)})
    talk.show(figures_table(figures), f"{output}: {target.value}, {bundle.digest}")


def check_bundle_output(output: Path, *, force: bool) -> None:
    """Refuse a bundle folder that has contents, or is a file.

    Raises:
        OutputError: the reason, and what to do.
    """
    from know_cli.errors import OutputError

    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: is a file; a bundle is a folder, name another")
    if output.is_dir() and any(output.iterdir()) and not force:
        raise OutputError(f"{output}: exists already; --force replaces it")


def figures_table(figures: Mapping[Kind, Figures]) -> Table:
    """L1 ratios on held-out trajectories, one row a kind."""
    from rich.table import Table

    table = Table(
        title="mean error on held-out trajectories; 1 is no change, less is better",
        title_justify="left",
    )
    table.add_column("kind")
    for name in ("windows", "KNOWN", "better in", "x lambda", "extrapolation", "average", "linear"):
        table.add_column(name, justify="right")
    for kind, found in figures.items():
        table.add_row(
            kind.value,
            f"{found.rows:,}",
            f"{found.known:.3f}",
            f"{found.better:.0%}",
            f"{found.multiplier:.3f} ({found.multiplier_value:.3f})",
            f"{found.extrapolation:.3f} ({found.extrapolation_value:+.2f})",
            f"{found.average:.3f}",
            f"{found.least_squares:.3f}",
        )
    return table
