"""``know demo``."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from know_cli.cli.output import Output

if TYPE_CHECKING:
    from rich.table import Table

    from know_cli.demo import Row, SessionRow

_PREDICTED = "predicted.safetensors"


def demo(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="[DIR]",
            help="Folder for checkpoints and predictions; created if it is missing.",
        ),
    ] = Path("know-demo"),
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, max=2**31, help="Seed of all random numbers.")
    ] = 0,
    fine_tunings: Annotated[
        int,
        typer.Option(metavar="N", min=2, max=1000, help="Fine-tunings from each start."),
    ] = 20,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", show_default="the shipped default", help="As for 'know predict'."
        ),
    ] = None,
) -> None:
    """Train, forget, predict and fine-tune a small network on real images, and compare.

    Takes about a minute on two cores, needs scikit-learn, and prints what it measures, even if
    the prediction loses. KNOWN has never seen the images.
    """
    from know_cli.files import check_writable, make_folder, missing_folder

    if not folder.parent.is_dir():
        raise missing_folder(folder.parent)
    make_folder(folder)
    check_writable(folder)

    import torch

    from know_cli import demo as work
    from know_cli.checkpoints.paths import factor_name, step_path
    from know_cli.errors import KnowError
    from know_cli.ranks.environment import own_command

    # Networks this small are slower on several threads than on one.
    torch.set_num_threads(1)
    talk = Output()
    sessions = work.record(folder, seed, talk.notice)
    talk.show(
        "forgetting: a small network trained on ever fewer digits",
        "",
        _sessions_table(sessions),
        "",
    )

    output = folder / _PREDICTED
    arguments = [f"{folder}/ckpt0..ckpt{work.SESSIONS - 1}", "-o", str(output)]
    arguments += ["--steps", str(work.STEPS), "--every-step"]
    arguments += [] if weights is None else ["--weights", weights]
    arguments += ["--force"] if output.exists() else []
    talk.show(f"$ know-predict {shlex.join(arguments)}")
    sys.stdout.flush()
    done = subprocess.run([*own_command("know_cli"), "predict", *arguments], check=False)
    if done.returncode:
        failure = KnowError("the prediction failed; see the message above")
        failure.exit_code = done.returncode
        raise failure

    predictions = {
        factor_name(work.RATE, step): step_path(output, work.RATE, step, is_folder=False)
        for step in range(1, work.STEPS)
    }
    predictions[factor_name(work.RATE, work.STEPS)] = output
    rows = work.fine_tune(work.starts(folder, predictions), seed, fine_tunings, talk.notice)
    talk.show(
        "",
        f"fine-tuned {fine_tunings} times on {work.FINE_TUNING_IMAGES} other, noisy digits, "
        "accuracy on the rest:",
        "",
        _results_table(rows),
        "",
        *_reading(rows),
    )


def _sessions_table(sessions: Sequence[SessionRow]) -> Table:
    from know_cli.cli.tables import new_table

    table = new_table("session", "images", "accuracy on them", "accuracy on noisy digits")
    for row in sessions:
        table.add_row(
            str(row.index),
            str(row.images),
            f"{row.train_accuracy:.1%}",
            f"{row.test_accuracy:.1%}",
        )
    return table


def _results_table(rows: Sequence[Row]) -> Table:
    from know_cli.cli.tables import new_table

    table = new_table("start", "accuracy", "difference in points (95 %)")
    for row in rows:
        difference = "-"
        if row.difference is not None and row.interval is not None:
            difference = f"{100 * row.difference:+.2f} ± {100 * row.interval:.2f}"
        table.add_row(row.start, f"{row.accuracy:.2%}", difference)
    return table


def _reading(rows: Sequence[Row]) -> list[str]:
    """The result in words, for better or worse."""
    verdicts: dict[str, list[str]] = {}
    for row in rows:
        if row.difference is None or row.interval is None:
            continue
        if abs(row.difference) <= row.interval:
            verdict = "no significant difference"
        else:
            verdict = "better" if row.difference > 0 else "worse"
        verdicts.setdefault(verdict, []).append(row.start)
    lines = [f"{verdict}: {', '.join(starts)}" for verdict, starts in verdicts.items()]
    return [*lines, "one pre-training and one task: a demonstration, not an evaluation"]
