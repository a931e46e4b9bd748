"""``know train --objective network``: teach the hyper-model for runs through the networks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from know_cli.cli.output import Output

if TYPE_CHECKING:
    from rich.console import RenderableType

    from know_cli.meta.network_bundle import Progress
    from know_cli.meta.network_gains import Gains, Interval
    from know_cli.meta.network_settings import NetworkSettings


@dataclass(frozen=True)
class NetworkRequest:
    """What is asked for.

    Attributes:
        runs: folders of runs.
        output: for the bundle.
        settings: how to teach.
        holdout: share of the runs that is held out.
        architectures: none of which is taught on.
        data_folder: where the data sets' files are.
        json: also gets the gains and the curve; None for nowhere.
        every: steps between measurements.
        threads: of torch.
    """

    runs: Sequence[Path]
    output: Path
    settings: NetworkSettings
    holdout: float
    architectures: tuple[str, ...] = field(default=())
    data_folder: Path | None = None
    json: Path | None = None
    every: int = 50
    threads: int | None = None


def train_network(talk: Output, request: NetworkRequest) -> None:
    """Teach a bundle, report as it goes, and show what it gains on runs held out.

    Raises:
        KnowError: there are too few runs, a file cannot be read or written, or the training
            diverges.
    """
    import torch

    from know_cli.cli.report_file import write_report
    from know_cli.meta.network_bundle import split_runs, teach_bundle
    from know_cli.meta.network_data import find_runs, load_runs
    from know_cli.settle.bundle import save_bundle

    torch.set_num_threads(request.threads or 1)
    settings = request.settings
    runs, left_out = load_runs(find_runs(request.runs), settings.checkpoints, request.data_folder)
    reasons: dict[str, list[Path]] = {}
    for path, reason in left_out.items():
        reasons.setdefault(reason, []).append(path)
    for reason, (first, *others) in reasons.items():
        also = f" and {len(others)} more" if others else ""
        talk.warning(f"left out {first}{also}: {reason}")
    split = split_runs(runs, request.holdout, settings.seed, request.architectures)
    counts = ", ".join(f"{len(found)} {name}" for name, found in split.held_out.items())
    talk.notice(f"{len(split.training)} runs to learn from; held out: {counts}")
    facts: dict[str, Any] = {
        "holdout": request.holdout,
        "held_out_architectures": list(request.architectures),
    }
    partial = request.output.with_name(request.output.name + ".partial")
    began = time.process_time()
    bundle, found = teach_bundle(
        split,
        settings,
        facts,
        lambda progress: talk.notice(_line(progress, settings.steps)),
        every=request.every,
        partial=partial,
    )
    save_bundle(bundle, request.output)
    partial.unlink(missing_ok=True)
    if request.json is not None:
        seconds = round(time.process_time() - began)
        write_report(request.json, {**bundle.manifest, "processor_seconds": seconds})
    talk.show(*_tables(found), f"wrote {request.output}: {bundle.digest}")


def _line(progress: Progress, steps: int) -> str:
    from know_cli.meta.network_gains import TAUGHT, best_average

    parts = [f"step {progress.step} of {steps}", f"{progress.seconds:.0f} s"]
    for group, table in progress.gains.items():
        best = best_average(table)
        parts.append(
            f"{group}: {_text(table.accuracy[TAUGHT])} points over last, "
            f"{_text(table.ahead[best])} over {best}"
        )
    return "; ".join(parts)


def _text(interval: Interval, digits: int = 2) -> str:
    return f"{interval.mean:+.{digits}f} ± {interval.half:.{digits}f}"


def _tables(found: Mapping[str, Gains]) -> list[RenderableType]:
    """One table per group of held-out runs."""
    from know_cli.cli.tables import new_table

    lines: list[RenderableType] = [
        "Over the last checkpoint, on samples that the runs have not seen; mean over runs held out "
        "± 95 % interval"
    ]
    for group, gains in found.items():
        table = new_table("start", "points", "nats", "settle ahead by points", "by nats")
        for name, accuracy in gains.accuracy.items():
            ahead = ["", ""]
            if name in gains.ahead:
                ahead = [_text(gains.ahead[name]), _text(gains.ahead_loss[name], 4)]
            table.add_row(name, _text(accuracy), _text(gains.loss[name], 4), *ahead)
        lines += ["", f"{gains.runs} {group} held out", table]
    return lines
