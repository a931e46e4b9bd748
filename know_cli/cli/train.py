"""``know train``: make a KNOWN bundle from recorded trajectories, and measure bundles on them."""

from __future__ import annotations

import shlex
import shutil
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from know_cli.cli.options import RegimeChoice, parse_named, quiet_option
from know_cli.cli.output import Output
from know_cli.errors import UsageError

if TYPE_CHECKING:
    from know_cli.hypermodel import Bundle
    from know_cli.kinds import Kind
    from know_cli.meta.training import Settings

EPILOG = "\n\n".join(
    (
        "Example:",
        "know collect runs --trajectories 200",
        "know train runs -o my-known --target continuation",
        "know train runs --evaluate ./my-known --evaluate continuation",
        "know-predict run/ckpt0..ckpt4 -o predicted.safetensors --weights ./my-known",
    )
)
#: Figures are measured after so many steps.
_STEPS = 3


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
    HUBER = "huber"


class ResidualsChoice(str, Enum):
    """Values of ``--residuals``."""

    RAW = "raw"
    SCALED = "scaled"
    SPREAD = "spread"


def train(
    trajectories: Annotated[
        list[Path],
        typer.Argument(
            metavar="TRAJECTORIES...",
            help="Folders that 'know forget' or 'know collect' wrote, or folders of such.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="BUNDLE", help="Folder to write the bundle into."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    evaluate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BUNDLE",
            help="Train nothing: measure a bundle, or all of a family (folder or name), on the "
            "trajectories that were held out from its training; repeatable.",
        ),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=BUNDLE",
            help="With --evaluate: measure this one beside it on the same windows; repeatable.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="With --evaluate: also write the figures here."),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(metavar="FILE.md", help="With --evaluate: also write Markdown tables here."),
    ] = None,
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
    steps: Annotated[
        int,
        typer.Option(
            min=1, max=8, help="Train through so many steps, each reading the answers before."
        ),
    ] = 1,
    loss: Annotated[
        LossChoice, typer.Option(help="Absolute or squared error, or Huber's between them.")
    ] = LossChoice.L1,
    residuals: Annotated[
        ResidualsChoice | None,
        typer.Option(
            help="Errors as they are, in units of each trajectory's mean change, or of each "
            "window's spread.",
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
    averaging: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Decay of the moving average of KNOWN's weights; 0 for none."
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of split, weights and order.")] = 0,
    holdout: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of trajectories it is judged by.")
    ] = 0.2,
    hold_out_architecture: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Never train on trajectories of this architecture; repeatable."
        ),
    ] = None,
    hold_out_data_set: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Never train on trajectories on this data set; repeatable."
        ),
    ] = None,
    hold_out_regime: Annotated[
        RegimeChoice | None,
        typer.Option(
            help="Never train on trajectories of this regime: chains of sessions, or sessions "
            "from a common start.",
            show_default="none",
        ),
    ] = None,
    rows_per_tensor: Annotated[
        int, typer.Option(min=1, help="The most windows taken from one tensor and position.")
    ] = 1000,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of torch; default: torch's own.")
    ] = None,
    quiet: Annotated[bool, quiet_option()] = False,
) -> None:
    """Train a KNOWN, the small model that predicts parameters, on recorded trajectories.

    Writes conv.safetensors, fc.safetensors, bias.safetensors and manifest.json, and prints how
    well it does on trajectories that it was not fitted to, beside simple rules. A run that was
    interrupted goes on with the kind that it was at.
    """
    from know_cli.cli.report_file import takes_stdout

    talk = Output(quiet, aside=takes_stdout(report, table))
    if (output is None) == (not evaluate):
        raise UsageError(
            "write -o BUNDLE to train one, or --evaluate BUNDLE to measure one, and not both"
        )
    if output is None:
        _evaluate(talk, trajectories, evaluate or [], compare or [], report, table, threads)
        return
    if compare or report or table:
        raise UsageError("--compare, --report and --table go with --evaluate")
    from know_cli.bundles import check_bundle_output

    check_bundle_output(output, force=force)
    from know_cli.hypermodel import Preparation
    from know_cli.meta.training import Loss, Residuals, Settings
    from know_cli.meta.windows import Target

    paper = target is TargetChoice.RETRODICTION
    settings = Settings(
        target=Target(target.value),
        checkpoints=checkpoints,
        preparation=Preparation(preparation.value if preparation else "raw" if paper else "spread"),
        steps=steps,
        loss=Loss(loss.value),
        residuals=Residuals(residuals.value if residuals else "raw" if paper else "scaled"),
        penalised=paper if penalty is None else penalty,
        epochs=epochs,
        batch_rows=batch_rows,
        learning_rate=learning_rate,
        averaging=averaging,
        seed=seed,
        holdout=holdout,
        held_out_architectures=tuple(sorted(set(hold_out_architecture or []))),
        held_out_data_sets=tuple(sorted(set(hold_out_data_set or []))),
        held_out_regimes=() if hold_out_regime is None else (hold_out_regime.value,),
        rows_per_tensor=rows_per_tensor,
    )
    _train(talk, trajectories, output, settings, threads)


def _train(
    talk: Output, trajectories: list[Path], output: Path, settings: Settings, threads: int | None
) -> None:
    import torch

    from know_cli.cli.figures import figures_tables
    from know_cli.hypermodel import save_bundle
    from know_cli.meta.training import train_bundle
    from know_cli.meta.windows import collect_windows, find_trajectories

    if threads:
        torch.set_num_threads(threads)
    collection = collect_windows(
        find_trajectories(trajectories),
        target=settings.target,
        checkpoints=settings.checkpoints,
        steps=max(settings.steps, _STEPS),
        rows_per_tensor=settings.rows_per_tensor,
        seed=settings.seed,
    )
    reasons: dict[str, list[Path]] = {}
    for path, reason in collection.skipped.items():
        reasons.setdefault(reason, []).append(path)
    for reason, (first, *others) in reasons.items():
        also = f" and {len(others)} more" if others else ""
        talk.warning(f"left out {first}{also}: {reason}")
    rows = ", ".join(f"{len(found):,} {kind.value}" for kind, found in collection.windows.items())
    talk.notice(f"{len(collection.trajectories)} trajectories, windows: {rows}")

    def tell(kind: Kind, epoch: int, training: float, held_out: float) -> None:
        talk.notice(
            f"{kind.value:4}  epoch {epoch:3} of {settings.epochs}  loss {training:.5g}  "
            f"held out {held_out:.5g}"
        )

    partial = output.with_name(output.name + ".partial")
    bundle, found = train_bundle(collection, settings, tell, partial=partial)
    save_bundle(bundle, output, {"command": _command(trajectories, output, settings)})
    shutil.rmtree(partial, ignore_errors=True)
    talk.show(
        *figures_tables({f"{output}: {settings.target.value}, {bundle.digest}": found}, short=True)
    )


def _command(trajectories: list[Path], output: Path, settings: Settings) -> str:
    """The command that makes the same bundle, with every default written out."""
    import torch

    command = ["know", "train", *map(str, trajectories), "-o", str(output)]
    for option, value in (
        ("--target", settings.target.value),
        ("--checkpoints", settings.checkpoints),
        ("--preparation", settings.preparation.value),
        ("--steps", settings.steps),
        ("--loss", settings.loss.value),
        ("--residuals", settings.residuals.value),
        ("--epochs", settings.epochs),
        ("--batch-rows", settings.batch_rows),
        ("--learning-rate", f"{settings.learning_rate:g}"),
        ("--averaging", f"{settings.averaging:g}"),
        ("--seed", settings.seed),
        ("--holdout", f"{settings.holdout:g}"),
        *(("--hold-out-architecture", name) for name in settings.held_out_architectures),
        *(("--hold-out-data-set", name) for name in settings.held_out_data_sets),
        *(("--hold-out-regime", name) for name in settings.held_out_regimes),
        ("--rows-per-tensor", settings.rows_per_tensor),
        ("--threads", torch.get_num_threads()),
    ):
        command += [option, str(value)]
    return shlex.join([*command, "--penalty" if settings.penalised else "--no-penalty"])


def _evaluate(
    talk: Output,
    trajectories: list[Path],
    names: list[str],
    compare: list[str],
    report: Path | None,
    table: Path | None,
    threads: int | None,
) -> None:
    """Measure bundles on what was held out from their training, as their manifests say."""
    import torch

    from know_cli.cli.figures import figures_markdown, figures_tables
    from know_cli.cli.report_file import check_report_path, write_out, write_report
    from know_cli.meta.held_out import evaluate, to_json
    from know_cli.meta.training import settings_of, split_of
    from know_cli.meta.windows import collect_windows, find_trajectories

    for option, path in (("--report", report), ("--table", table)):
        if path is not None:
            check_report_path(path, [], option)
    if threads:
        torch.set_num_threads(threads)
    bundles = [bundle for name in names for bundle in _bundles(name)]
    others = _named_bundles(compare)
    found = find_trajectories(trajectories)
    tables = {}
    for bundle in bundles:
        settings = settings_of(bundle)
        talk.notice(f"measuring {bundle.source}")
        collection = collect_windows(
            found,
            target=settings.target,
            checkpoints=settings.checkpoints,
            steps=_STEPS,
            rows_per_tensor=settings.rows_per_tensor,
            seed=settings.seed,
        )
        beside = {
            name: one for name, one in others.items() if one.checkpoints == bundle.checkpoints
        }
        title = f"{bundle.target}, {bundle.checkpoints} checkpoints, {bundle.digest}"
        tables[title] = evaluate(bundle, collection, split_of(bundle, collection), beside)
    talk.show(*figures_tables(tables))
    if report is not None:
        write_report(report, {title: to_json(one) for title, one in tables.items()})
    if table is not None:
        write_out(table, figures_markdown(tables))


def _bundles(name: str) -> list[Bundle]:
    """One bundle, or all of a family, by a folder or a shipped family's name."""
    from know_cli.bundles import MANIFEST, family, is_path
    from know_cli.hypermodel import load_bundle

    path = Path(name)
    is_one = is_path(name) and (path / MANIFEST).exists()
    folders = [path] if is_one else list(family(name, "--evaluate").values())
    return [load_bundle(folder) for folder in folders]


def _named_bundles(pairs: list[str]) -> dict[str, Bundle]:
    from know_cli.hypermodel import load_bundle

    named = parse_named(pairs, "--compare", "BUNDLE")
    return {name: load_bundle(Path(path)) for name, path in named.items()}
