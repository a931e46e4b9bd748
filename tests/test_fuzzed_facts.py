"""Whatever is wrong with what is read beside weights, it is never a bug: no exit code 1."""

from __future__ import annotations

import random
import traceback
from collections import Counter
from pathlib import Path

import pytest

from know_cli.errors import EXIT_CHECKPOINT, EXIT_DONE, EXIT_OUTPUT, EXIT_USAGE, KnowError
from know_cli.evaluation import results
from know_cli.evaluation.runs import results as runs_results
from know_cli.plots.curves import curves_of
from tests.support.command import run_here
from tests.support.mutations import Workshop

CODES = {EXIT_DONE, EXIT_USAGE, EXIT_CHECKPOINT, EXIT_OUTPUT}


def read_results(path: Path) -> tuple[int, str]:
    """What ``know plot results`` makes of results, without the drawing."""
    code, told = EXIT_DONE, ""
    for work in (
        lambda: curves_of(results.read_results(path), ["*"], None),
        lambda: runs_results.read_results(path),
    ):
        try:
            work()
        except KnowError as error:
            code, told = error.exit_code, str(error)
        except Exception:
            return 1, traceback.format_exc()
    return code, told


def fuzz(workshop: Workshop, count: int, seed: int) -> Counter[tuple[str, int]]:
    """Spoil so many things; how often each sort ended with each code."""
    chance, ended, found = random.Random(seed), Counter[tuple[str, int]](), []
    for number in range(count):
        workshop.clean()
        kind, words = workshop.spoil(chance)
        if kind == "results":
            code, stderr = read_results(workshop.folder / words[1])
        else:
            done = run_here(words, workshop.folder, {})
            code, stderr = done.returncode, done.stderr
        ended[kind, code] += 1
        if code not in CODES:
            found.append(f"{number} {kind}: {' '.join(words)[:300]!r}: {code}: {stderr[-1500:]}")
    assert not found, "\n".join(found[:20])
    return ended


@pytest.fixture
def workshop(tmp_path: Path, bundle_path: Path) -> Workshop:
    return Workshop(tmp_path, bundle_path)


@pytest.mark.parametrize("seed", range(4))  # in several processes
def test_spoilt_facts_are_no_bugs(workshop: Workshop, seed: int) -> None:
    """2,000 by default; the slow suite runs 50,000."""
    ended = fuzz(workshop, 500, seed)
    assert {kind for kind, _ in ended} == workshop.kinds.keys()


@pytest.mark.slow
def test_many_spoilt_facts_are_no_bugs(workshop: Workshop) -> None:
    fuzz(workshop, 50_000, 10)
