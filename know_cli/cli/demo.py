"""``know demo``."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from know_cli.cli.options import usable_cores
from know_cli.cli.output import Output

if TYPE_CHECKING:
    from rich.table import Table

    from know_cli.demo import RunRow, SessionRow

_OWN = """\
To do the same with checkpoints of your own, the last ones of a run or those of a forgetting:

  know inspect output_dir --trajectory run
  know choose output_dir --trajectory run -o start.safetensors \\
      --measure 'python fine_tune.py --init {start} --seed {seed} --lr {lr}' \\
      --tune lr=3e-4,1e-3,3e-3
  know plot choose start.safetensors.search -o candidates.png"""


def demo(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="[DIR]",
            help="Folder for checkpoints, starts and pictures; created if it is missing.",
        ),
    ] = Path("know-demo"),
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, max=2**31, help="Seed of the recordings.")
    ] = 0,
    budget: Annotated[
        int, typer.Option(metavar="N", min=1, help="Measures that each of the two choices takes.")
    ] = 90,
) -> None:
    """Record a run and a forgetting on real images, and choose a start from each, honestly.

    Takes less than two minutes on two cores, needs scikit-learn, and says what it finds, even if
    no candidate is better than the checkpoint that there was. KNOWN has never seen the images.
    """
    from know_cli.files import check_writable, make_folder, missing_folder

    if not folder.parent.is_dir():
        raise missing_folder(folder.parent)
    make_folder(folder)
    check_writable(folder)

    import torch

    from know_cli import demo as work

    # Networks this small are slower on several threads than on one.
    torch.set_num_threads(1)
    talk = Output()
    run, forgetting = folder / "run", folder / "forgetting"
    rows = work.record_run(run, forgetting, seed, talk.notice)
    talk.show("1. an ordinary run on digits, and its last checkpoints", "", _run_table(rows), "")
    sessions = work.record_forgetting(forgetting, seed, talk.notice)
    talk.show("2. a forgetting: trained on ever fewer digits", "", _sessions_table(sessions), "")
    talk.show(
        f"3. The task: fine-tuning on {work.FINE_TUNING_IMAGES} other, noisy digits, accuracy on "
        "the rest. One read of the checkpoints makes all candidates, and each gets its own rate:",
        "",
    )
    for checkpoints, kind, name, candidates in (
        (run, "run", "from-run", work.OF_RUN),
        (
            f"{forgetting}/ckpt0..ckpt{work.SESSIONS - 1}",
            "forgetting",
            "from-forgetting",
            work.OF_FORGETTING,
        ),
    ):
        output = folder / f"{name}.safetensors"
        more = ["--force"] if output.exists() else []
        _start(
            talk, "choose", str(checkpoints), "--trajectory", kind, "-o", str(output),
            *(word for text in candidates for word in ("--candidate", text)),
            "--evaluate", work.MEASURE, "--tune", work.TUNED, "--budget", str(budget),
            "--jobs", str(min(usable_cores(), 4)), *more,
        )  # fmt: skip
        if find_spec("matplotlib") is None:
            talk.notice("no picture of the candidates: pip install 'know-predict[plot]' draws it")
        else:
            search, picture = f"{output}.search", folder / f"{name}.png"
            _start(talk, "plot", "choose", search, "-o", str(picture), "--force")
        talk.show("")
    talk.show(
        "One network and one task: a demonstration, not an evaluation.",
        "",
        *_OWN.splitlines(),
    )


def _start(talk: Output, *arguments: str) -> None:
    """Run a command as a user would, and show it."""
    from know_cli.errors import KnowError
    from know_cli.ranks.environment import own_command

    talk.show(f"$ know {shlex.join(arguments)}")
    sys.stdout.flush()
    done = subprocess.run([*own_command("know_cli"), *arguments], check=False)
    if done.returncode:
        failure = KnowError(f"know {arguments[0]} failed; see the message above")
        failure.exit_code = done.returncode
        raise failure


def _run_table(rows: Sequence[RunRow]) -> Table:
    from know_cli.cli.tables import new_table

    table = new_table("checkpoint", "accuracy on noisy digits")
    for row in rows:
        table.add_row(row.path.name, f"{row.test_accuracy:.1%}")
    return table


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
