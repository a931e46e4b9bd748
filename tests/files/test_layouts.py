"""Whatever lies where: only the named output changes, and what exists only with ``--force``."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from know_cli.errors import EXIT_CHECKPOINT, EXIT_DONE, EXIT_OUTPUT, EXIT_USAGE
from tests.support.command import run_here
from tests.support.layouts import check_changes, look, make_layout

CODES = (EXIT_DONE, EXIT_USAGE, EXIT_CHECKPOINT, EXIT_OUTPUT)


def run_layouts(folder: Path, seeds: range) -> Counter[str]:
    """Run a layout for each seed; how often what came of it."""
    outcomes: Counter[str] = Counter()
    for seed in seeds:
        root = folder / "root"
        root.mkdir()
        layout = make_layout(root, random.Random(seed))
        before = look(root)
        done = run_here(layout.words, root, {})
        try:
            assert done.returncode in CODES, done.stderr
            outcomes[check_changes(layout, done.returncode, before, look(root))] += 1
        except AssertionError as error:
            words = " ".join(layout.words)
            raise AssertionError(f"seed {seed}: know {words}: {done.stderr}: {error}") from error
        shutil.rmtree(root)
    return outcomes


def test_only_the_named_output_changes(tmp_path: Path) -> None:
    outcomes = run_layouts(tmp_path, range(60))
    assert outcomes.keys() == {"made", "replaced", "refused"}


@pytest.mark.slow
def test_only_the_named_output_changes_in_many_layouts(tmp_path: Path) -> None:
    """20,000 layouts."""
    outcomes = run_layouts(tmp_path, range(1000, 21_000))
    assert min(outcomes.values()) > 500, outcomes
