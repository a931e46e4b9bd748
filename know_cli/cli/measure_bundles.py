"""``know train --evaluate``: measures bundles on the trajectories that they were not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from know_cli.cli.options import parse_named
from know_cli.cli.output import Output

if TYPE_CHECKING:
    from know_cli.known.bundle import Bundle

#: Scores are measured after one to this many steps.
SCORED_STEPS = 3


def measure_bundles(
    talk: Output,
    trajectories: list[Path],
    names: list[str],
    compare: list[str],
    json: Path | None,
    table: Path | None,
    threads: int | None,
    *,
    force: bool,
) -> None:
    """Measure bundles on the trajectories that their manifests name as held out."""
    import torch

    from know_cli.cli.report_file import check_reports, write_out, write_report
    from know_cli.cli.scores import score_tables, scores_markdown
    from know_cli.meta.held_out import evaluate, to_json
    from know_cli.meta.manifest import settings_of, split_of
    from know_cli.meta.windows import collect_windows, find_trajectories

    check_reports(json, table, trajectories, force=force)
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
            steps=SCORED_STEPS,
            rows_per_tensor=settings.rows_per_tensor,
            seed=settings.seed,
        )
        beside = {
            name: one for name, one in others.items() if one.checkpoints == bundle.checkpoints
        }
        title = f"{bundle.target}, {bundle.checkpoints} checkpoints, {bundle.digest}"
        tables[title] = evaluate(bundle, collection, split_of(bundle, collection), beside)
    talk.show(*score_tables(tables))
    if json is not None:
        write_report(json, {title: to_json(one) for title, one in tables.items()}, force=force)
    if table is not None:
        write_out(table, scores_markdown(tables), force=force)


def _bundles(name: str) -> list[Bundle]:
    """One bundle, or all of a family, by a folder or a shipped family's name."""
    from know_cli.known.bundle import load_bundle
    from know_cli.known.shipped import MANIFEST, family, is_path

    path = Path(name)
    is_one = is_path(name) and (path / MANIFEST).exists()
    folders = [path] if is_one else list(family(name, "--evaluate").values())
    return [load_bundle(folder) for folder in folders]


def _named_bundles(pairs: list[str]) -> dict[str, Bundle]:
    from know_cli.known.bundle import load_bundle

    named = parse_named(pairs, "--compare", "BUNDLE")
    return {name: load_bundle(Path(path)) for name, path in named.items()}
