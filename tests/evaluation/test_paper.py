"""``know eval --paper``: the paper's tables, ours beside them, and what the experiments take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from know_cli.evaluation.paper import page
from know_cli.evaluation.paper.plan import experiments
from know_cli.evaluation.paper.tables import CONTROLS, PAPER_TABLES
from know_cli.evaluation.release import cost
from know_cli.evaluation.release.plan import RELEASE_TASKS
from tests.support.command import Command, one_line

TASK = "release-cifar100-cifar10-resnet18"
ROOT = Path(page.__file__).parents[3]


def start(*values: float | None) -> dict[str, Any]:
    rates = {"1": {"values": list(values), "validation": list(values)}}
    return {
        "factors": [1.0] * len(values),
        "tuned": [v and v + 0.01 for v in values],
        "rates": rates,
    }


def measured() -> dict[str, Any]:
    """Three seeds of the release's task, with one of the controls."""
    task = RELEASE_TASKS[TASK]
    cell = {
        "naive": start(0.90, 0.91, 0.92),
        "retrodiction-x8": start(0.92, 0.94, 0.96),
        "shrink-0.5": start(0.91, 0.91, 0.91),
    }
    return {
        "format": 1,
        "regime": "release",
        "tasks": {
            TASK: {
                "definition": {"downstream": [{"size": one.size} for one in task.base.downstream]},
                "facts": {"measure": {"name": "accuracy", "unit": "points", "scale": 100.0}},
                "cells": {"24000 images": cell},
            }
        },
    }


def test_every_figure_is_of_a_start_that_its_task_has() -> None:
    for table in PAPER_TABLES:
        for name, figures in table.rows:
            assert len(figures) == len(table.columns), name
            for figure in figures:
                if figure.task:
                    task = RELEASE_TASKS[figure.task]
                    labels = {arm.label for arm in task.arms({})}
                    assert {figure.start, *CONTROLS} <= labels
                    sizes = [one.size for one in task.base.downstream]
                    assert max(sizes) * figure.share // 100 in sizes
    large = {name for name, task in RELEASE_TASKS.items() if task.base.large}
    large.remove("release-cifar10-resnet18")  # the paper's network on other data
    assert {name for table in PAPER_TABLES for name in table.tasks} == large


def test_ours_stand_beside_the_paper_s_with_controls() -> None:
    rows = {row[:2]: row[2:] for row in page.rows_of(PAPER_TABLES[0], measured()["tasks"])}
    assert rows["50 %", "naive"] == ("92.08", "91.00", "92.00")
    paper, own, tuned = rows["50 %", "KNOWN ×8"]
    assert paper == "93.11 ± 0.19"
    # Differences 2, 3, 4 points: mean 3, standard deviation 1, t(2) = 4.3027, over √3.
    assert own == tuned.replace("95.00", "94.00") == "94.00 (+3.00 ± 2.48)"
    assert rows["50 %", "KNOWN ×2"] == ("92.58 ± 0.14", page.NOT_RUN, page.NOT_RUN)
    assert rows["50 %", "shrink-0.5"][:2] == ("", "91.00 (+0.00 ± 2.48)")
    assert rows["50 %", "longer"] == ("", page.NOT_RUN, page.NOT_RUN)
    assert ("50 %", "controls") not in rows
    assert rows["100 % of the data", "controls"] == ("", page.NOT_RUN, page.NOT_RUN)
    assert ("100 % of the data", "longer") not in rows


def test_what_the_experiments_take() -> None:
    found = {one.task: one for one in experiments(None)}
    one = found[TASK]
    assert (one.pretrained, one.fine_tuned) == (50_000, (48_000, 24_000, 12_000))
    assert one.lacking == "not found here: cifar100, cifar10"
    # An epoch, sessions of 25,000 to 3,125, twice as many more; 26 starts with 10 epochs of the
    # head and 100 at each of six rates.
    sessions = 25_000 + 12_500 + 6_250 + 3_125
    starts = len({"naive", "retrodiction", "continuation"}) - 1  # families, of three steps each
    arms = 5 + 4 + 3 * starts + 2 + 3 * 3  # the last with two, three and four checkpoints
    assert one.examples == 50_000 + 3 * sessions + arms * 610 * 84_000
    seconds = cost.measured().seconds
    assert found.keys() < seconds.keys()
    assert one.hours == pytest.approx(one.examples * seconds[TASK] / 3600)


def test_the_command_shows_tables_and_writes_a_page(tmp_path: Path, know: Command) -> None:
    done = know("eval", "--paper", cwd=tmp_path, process=True)
    assert done.returncode == 0, done.stderr
    for table in PAPER_TABLES:
        assert table.title in done.stdout
    assert "93.55 ± 0.05" in done.stdout
    assert "they were not compared with the paper itself" in " ".join(done.stdout.split())
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "release.json").write_text(json.dumps(measured()))
    done = know("eval", "--paper", "-o", "release", "--table", "paper.md", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "94.00 (+3.00 ± 2.48)" in done.stdout
    written = (tmp_path / "paper.md").read_text()
    assert (
        "| 50 % | KNOWN ×8 | 93.11 ± 0.19 | 94.00 (+3.00 ± 2.48) | 95.00 (+3.00 ± 2.48) |"
        in written
    )
    (tmp_path / "release").rename(tmp_path / "inner")
    (tmp_path / "all").mkdir()
    (tmp_path / "inner").rename(tmp_path / "all" / "resnet18")  # folders of several runs
    done = know("eval", "--paper", "-o", "all", cwd=tmp_path)
    assert "94.00 (+3.00 ± 2.48)" in done.stdout
    again = know("eval", "--paper", "--table", "paper.md", cwd=tmp_path)
    assert again.returncode == 4
    assert (tmp_path / "paper.md").read_text() == written


def test_the_plan_lists_data_sizes_and_hours(tmp_path: Path, know: Command) -> None:
    done = know("eval", "--paper", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "release-voc-cityscapes" in line)
    assert line.split()[:5] == [
        "release-voc-cityscapes-deeplab", "VOC2012,", "cityscapes", "no", "1,464",
    ]  # fmt: skip
    assert "How long a GPU takes for them has not been measured" in " ".join(done.stdout.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--paper", "--norm", "copy"), "--norm: has no effect with --paper; leave it out"),
        (("--paper", "--seeds", "3"), "--seeds: has no effect with --paper; leave it out"),
        (
            ("--paper", "-o", "nowhere"),
            "nowhere: has no release.json, and no folder that has",
        ),
        (("--paper", "--dry-run", "--data-folder", "no"), "no: no such folder of data sets"),
        ((), "-o/--output is missing: name a folder for the results"),
    ],
)
def test_usage_errors(
    arguments: tuple[str, ...], words: str, tmp_path: Path, know: Command
) -> None:
    done = know("eval", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert words in one_line(done.stderr)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"regime": "release", "format": 1, "tasks": {"a": {"cells": {"b": {}}}}}',
     '{"regime": "converged", "format": 1, "tasks": {}}', "[" * 5000],
)  # fmt: skip
def test_results_of_something_else_are_refused(content: str, tmp_path: Path, know: Command) -> None:
    (tmp_path / "release.json").write_text(content)
    done = know("eval", "--paper", "-o", ".", cwd=tmp_path)
    assert done.returncode == 2
    assert "release.json: is no result of 'know eval --regime release'" in one_line(done.stderr)


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    tasks = json.loads((ROOT / "docs" / "results" / "release.json").read_text())["tasks"]
    assert page.to_markdown(tasks) == (ROOT / "docs" / "results" / "paper.md").read_text()
