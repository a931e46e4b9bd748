"""``know train``: train a bundle on recorded trajectories, and measure bundles on them."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from know_cli.checkpoints.metadata import Regime
from know_cli.cli.measure_bundles import measure_bundles
from know_cli.cli.options import one_json, quiet_option, report_option, torch_threads_option
from know_cli.cli.output import Output
from know_cli.cli.train_network import NetworkRequest, check_model, through_networks
from know_cli.cli.train_options import check_options
from know_cli.cli.train_weights import train_weights
from know_cli.errors import UsageError
from know_cli.known.preparation import Preparation
from know_cli.meta.network_settings import (
    DOWNSTREAM_BATCH,
    NETWORK_RATES,
    HyperModel,
    NetworkSettings,
)
from know_cli.meta.settings import Loss, Residuals, Settings, Target

EPILOG = "\n\n".join(
    (
        "Examples:",
        "know collect trajectories --trajectories 200",
        "know train trajectories -o my-known --target continuation",
        "know train trajectories --evaluate ./my-known --evaluate continuation",
        "know-predict run/ckpt0..ckpt4 -o predicted.safetensors --weights ./my-known",
        "know collect runs --regime run --trajectories 100 --checkpoints 9 --brief --side 16",
        "know train runs -o my-settle --objective network",
        "know collect branches --regime branches --trajectories 100 --side 16",
        "know train branches -o my-branches --objective network",
    )
)
# A heading of the help text.
_NETWORK = "With --objective network"


class Objective(str, Enum):
    """Values of ``--objective``."""

    WEIGHTS = "weights"
    NETWORK = "network"


def train(
    context: typer.Context,
    trajectories: Annotated[
        list[Path],
        typer.Argument(
            metavar="TRAJECTORIES...",
            help="Folders that 'know forget' or 'know collect' wrote, or folders of such folders; "
            "with --objective network those of 'know collect'.",
        ),
    ],
    objective: Annotated[
        Objective,
        typer.Option(
            help="weights: KNOWN, by its distance to a target; network: --model, by what the "
            "networks of collected runs, branches or forgettings say with the predicted weights."
        ),
    ] = Objective.WEIGHTS,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="BUNDLE", help="Folder for the bundle."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    evaluate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BUNDLE",
            help="Instead of training, measure a bundle or a whole family (folder or shipped name) "
            "on the trajectories that were held out from its training; repeatable.",
        ),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=BUNDLE",
            help="With --evaluate: also measure this bundle on the same windows; repeatable.",
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="With --evaluate or --objective network: also write the scores as JSON.",
        ),
    ] = None,
    report: Annotated[Path | None, report_option()] = None,
    table: Annotated[
        Path | None,
        typer.Option(metavar="FILE.md", help="Likewise, the tables as Markdown."),
    ] = None,
    target: Annotated[
        Target,
        typer.Option(
            help="retrodiction: the previous session (the paper); continuation: the first "
            "checkpoint trained further on 1/rate times the data."
        ),
    ] = Target.RETRODICTION,
    checkpoints: Annotated[
        int, typer.Option(min=2, max=16, help="S, the number of checkpoints that it reads.")
    ] = 5,
    preparation: Annotated[
        Preparation | None,
        typer.Option(
            help="Windows as they are (raw), or centred and divided by their spread.",
            show_default="raw for retrodiction, else spread",
        ),
    ] = None,
    factor: Annotated[
        bool,
        typer.Option("--factor", help="A second output of KNOWN: a factor on θ0."),
    ] = False,
    steps: Annotated[
        int,
        typer.Option(
            min=1,
            max=8,
            help="Train through this many steps, each reading the previous predictions.",
        ),
    ] = 1,
    loss: Annotated[
        Loss, typer.Option(help="Absolute error, squared error, or Huber's loss between them.")
    ] = Loss.L1,
    residuals: Annotated[
        Residuals | None,
        typer.Option(
            help="Errors as they are (raw), in units of each trajectory's mean change (scaled), or "
            "of each window's spread.",
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
    batch_rows: Annotated[int, typer.Option(min=1, help="Windows per step.")] = 4096,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Adam's initial learning rate.",
            show_default="0.001, through networks 0.01, of KNOWN 0.003",
        ),
    ] = None,
    averaging: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Decay of the moving average of KNOWN's weights; 0 for none."
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of split, weights and order.")] = 0,
    holdout: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of trajectories held out for evaluation.")
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
        Regime | None,
        typer.Option(
            help="Never train on trajectories of this regime: chains of sessions, or sessions "
            "from a common start.",
            show_default="none",
        ),
    ] = None,
    rows_per_tensor: Annotated[
        int, typer.Option(min=1, help="The most windows taken from one tensor and position.")
    ] = 1000,
    threads: Annotated[int | None, torch_threads_option("torch's own, through networks 1")] = None,
    data_folder: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where the data sets' files are, FOLDER/NAME each.",
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    model: Annotated[
        HyperModel | None,
        typer.Option(
            help="Which hyper-model is taught: that of --method settle, or KNOWN.",
            show_default="settle",
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    meta_steps: Annotated[
        int,
        typer.Option(
            min=1,
            help="Steps of the training; each takes --runs-per-step.",
            rich_help_panel=_NETWORK,
        ),
    ] = 200,
    runs_per_step: Annotated[
        int,
        typer.Option(
            min=1,
            help="Runs, sets of branches or forgettings that a step learns from.",
            rich_help_panel=_NETWORK,
        ),
    ] = 8,
    hidden: Annotated[
        int,
        typer.Option(
            min=1,
            max=1024,
            help="Width of the part of settle that reads how it went.",
            rich_help_panel=_NETWORK,
        ),
    ] = 16,
    width: Annotated[
        int,
        typer.Option(
            min=0,
            max=1024,
            help="Width of the part of settle that corrects single elements; 0 for none.",
            rich_help_panel=_NETWORK,
        ),
    ] = 0,
    roles: Annotated[
        bool,
        typer.Option(
            "--roles",
            help="Let that part also read the role of each tensor: of a normalisation layer, a "
            "table, a factor, a depthwise or pointwise convolution, an attention, or other.",
            rich_help_panel=_NETWORK,
        ),
    ] = False,
    distance: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Weight of the squared distance to the annealed weights, as a share of that of "
            "the average, also of branches; of forgettings to the weights after training on "
            "1/rate times the data, as a share of Θ0's.",
            rich_help_panel=_NETWORK,
        ),
    ] = 0.0,
    downstream: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Weight of the loss on another task, of a data set that other trajectories are "
            "of, after --downstream-steps with a fresh head.",
            rich_help_panel=_NETWORK,
        ),
    ] = 0.0,
    downstream_steps: Annotated[
        int, typer.Option(min=1, max=100, help="Of fine-tuning.", rich_help_panel=_NETWORK)
    ] = 10,
    downstream_examples: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            min=DOWNSTREAM_BATCH,
            show_default="200",
            help="How many examples of the other task these steps may use; repeatable, and then "
            "one of the numbers is drawn for each network and step.",
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Divide logits by the temperature that suits them best before their loss is "
            "taken, so that being less sure of the same answers gains nothing.",
            rich_help_panel=_NETWORK,
        ),
    ] = False,
    every: Annotated[
        int,
        typer.Option(
            min=1,
            help="Measure what is gained, and keep what was learned, after so many steps.",
            rich_help_panel=_NETWORK,
        ),
    ] = 50,
    quiet: Annotated[bool, quiet_option()] = False,
) -> None:
    """Train KNOWN, the small model that predicts parameters, on recorded trajectories.

    Writes conv.safetensors, fc.safetensors, bias.safetensors and manifest.json, and prints how
    well it does on held-out trajectories, compared with simple rules. An interrupted run continues
    with the kind that it was training.

    With --objective network it trains the hyper-model of --method settle, or KNOWN, on ordinary
    runs that 'know collect --regime run' wrote, or on forgettings of 'know collect' (with --regime
    release-chain, --samples leaves samples unseen), or settle on branches (--regime branches; with
    Θ0 they make the number that --checkpoints says): by the cross entropy of their networks with
    the predicted weights, on samples that they were not trained on. Of the options above
    --data-folder in the list, these apply: -o, --force, --evaluate, --json, --table, --checkpoints,
    --learning-rate, --seed, --holdout, --hold-out-architecture and --threads, and with --model
    known --preparation, --factor and --steps; the others are refused.
    """
    from know_cli.cli.report_file import takes_stdout

    json = one_json(json, report)
    talk = Output(quiet, aside=takes_stdout(json, table))
    if (output is None) == (not evaluate):
        raise UsageError(
            "give either -o BUNDLE to train a bundle, or --evaluate BUNDLE to measure one"
        )
    if factor and output is None:
        raise UsageError("--factor: is for -o BUNDLE; leave it out")
    for name, given in (("model", model is not None), ("roles", roles)):
        if given and (output is None or objective is Objective.WEIGHTS):
            raise UsageError(f"--{name}: is for -o BUNDLE with --objective network; leave it out")
    through = objective is Objective.NETWORK
    check_options(context, through_networks=through, measured=output is None)
    if through:
        if compare or len(evaluate or []) > 1:
            raise UsageError("--objective network: measures one bundle, and compares with averages")
        examples = sorted(set(downstream_examples or NetworkSettings.downstream_examples))
        of_known = {"preparation": preparation, "factor": factor, "steps": steps > 1}
        of_settle = {
            "hidden": hidden != NetworkSettings.hidden,
            "width": width,
            "roles": roles,
        }
        check_model(model, of_known, of_settle, measured=output is None)
        through_networks(
            talk,
            NetworkRequest(
                runs=trajectories,
                output=output,
                settings=NetworkSettings(
                    checkpoints=checkpoints,
                    model=model or HyperModel.SETTLE,
                    preparation=preparation or Preparation.SPREAD,
                    factor=factor,
                    predicted_steps=steps,
                    hidden=hidden,
                    width=width,
                    roles=roles,
                    steps=meta_steps,
                    runs=runs_per_step,
                    learning_rate=NETWORK_RATES[model or HyperModel.SETTLE]
                    if learning_rate is None
                    else learning_rate,
                    distance=distance,
                    downstream=downstream,
                    downstream_steps=downstream_steps,
                    downstream_examples=tuple(examples),
                    calibrated=calibrate,
                    seed=seed,
                ),
                holdout=holdout,
                architectures=tuple(sorted(set(hold_out_architecture or []))),
                data_folder=data_folder,
                json=json,
                table=table,
                every=every,
                threads=threads,
            ),
            [Path(one) for one in evaluate or []],
            force=force,
        )
        return
    if output is None:
        measure_bundles(
            talk, trajectories, evaluate or [], compare or [], json, table, threads, force=force
        )
        return
    if compare or json or table:
        raise UsageError("--compare, --json and --table need --evaluate")
    from know_cli.known.shipped import check_bundle_output

    check_bundle_output(output, trajectories, force=force)
    paper = target is Target.RETRODICTION
    settings = Settings(
        target=target,
        checkpoints=checkpoints,
        preparation=preparation or (Preparation.RAW if paper else Preparation.SPREAD),
        factor=factor,
        steps=steps,
        loss=loss,
        residuals=residuals or (Residuals.RAW if paper else Residuals.SCALED),
        penalised=paper if penalty is None else penalty,
        epochs=epochs,
        batch_rows=batch_rows,
        learning_rate=1e-3 if learning_rate is None else learning_rate,
        averaging=averaging,
        seed=seed,
        holdout=holdout,
        held_out_architectures=tuple(sorted(set(hold_out_architecture or []))),
        held_out_data_sets=tuple(sorted(set(hold_out_data_set or []))),
        held_out_regimes=() if hold_out_regime is None else (hold_out_regime.value,),
        rows_per_tensor=rows_per_tensor,
    )
    train_weights(talk, trajectories, output, settings, threads, force=force)
