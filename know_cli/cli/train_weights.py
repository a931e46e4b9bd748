"""``know train --objective weights``: trains a KNOWN on windows, and writes its bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from know_cli.cli.measure_bundles import SCORED_STEPS
from know_cli.cli.output import Output
from know_cli.errors import counted
from know_cli.meta.settings import Settings

if TYPE_CHECKING:
    from know_cli.kinds import Kind


def train_weights(
    talk: Output,
    trajectories: list[Path],
    output: Path,
    settings: Settings,
    threads: int | None,
    *,
    force: bool,
) -> None:
    """Train a bundle, write it, and show its scores on held-out trajectories."""
    import torch

    from know_cli.cli.scores import score_tables
    from know_cli.known.bundle import save_bundle
    from know_cli.meta.kept import kept_beside
    from know_cli.meta.training import check_partial, remove_partial, train_bundle
    from know_cli.meta.windows import collect_windows, find_trajectories

    partial = kept_beside(output)
    check_partial(partial)
    if threads:
        torch.set_num_threads(threads)
    collection = collect_windows(
        find_trajectories(trajectories),
        target=settings.target,
        checkpoints=settings.checkpoints,
        steps=max(settings.steps, SCORED_STEPS),
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
    read = counted(len(collection.trajectories), "trajectory", "trajectories")
    talk.notice(f"{read}, windows: {rows}")

    def report(kind: Kind, epoch: int, training: float, held_out: float) -> None:
        talk.notice(
            f"{kind.value:4}  epoch {epoch:3} of {settings.epochs}  loss {training:.5g}  "
            f"held out {held_out:.5g}"
        )

    bundle, found = train_bundle(collection, settings, report, partial=partial)
    save_bundle(bundle, output, replace=force)
    remove_partial(partial)
    talk.show(
        *score_tables({f"{output}: {settings.target.value}, {bundle.digest}": found}, short=True)
    )
