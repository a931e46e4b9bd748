"""The results of a run as JSON, and the comparisons that are computed from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from know_cli import __version__
from know_cli.checkpoints.json_text import MAX_BYTES
from know_cli.checkpoints.paths import factor_name
from know_cli.engine.settings import NormMode
from know_cli.errors import UsageError
from know_cli.evaluation.anchors import (
    LONGER,
    NAIVE,
    ORACLE,
    SCRATCH,
    UNPREDICTED,
)
from know_cli.evaluation.starts import SESSIONS, Outcome, Start
from know_cli.evaluation.statistics import (
    Comparison,
    compare,
)
from know_cli.evaluation.suite import Request
from know_cli.evaluation.tasks.task import RATE
from know_cli.files import read_text

FORMAT = 1
#: Name of the mean over all cells of a task, which is treated like a cell.
ALL = "all"
_DEFAULT_NORM = NormMode.RESCALE.value
# Required by every comparison; results of another version may lack other anchors.
_COMPARED_WITH = (SCRATCH, NAIVE, LONGER, ORACLE)
#: What the results of the other evaluations have, which is also the option that asks for them.
_OTHERS = (("regime", "release"), ("trajectory", "run"), ("trajectory", "branches"))


def to_json(
    request: Request, outcomes: Sequence[Outcome], not_run: Mapping[str, str]
) -> dict[str, Any]:
    """All measured values, one per seed, without anything derived from them.

    Returns:
        ``machine``; ``settings``; ``not_run``, reasons by task; and by task its description, its
        ``seeds``, and in their order: processor ``seconds``, ``trained`` (by session and anchor
        the measures ``train``, ``first`` and ``test``), ``starts`` (each with ``values`` by
        cell) and, where a start was chosen, ``searches`` by cell.
    """
    tasks = {}
    for task in request.tasks:
        found = sorted((o for o in outcomes if o.task == task.name), key=lambda o: o.seed)
        if found:
            first = found[0]
            tasks[task.name] = {
                "title": task.title,
                "definition": task.definition(),
                **first.facts,
                "seeds": [outcome.seed for outcome in found],
                "seconds": [outcome.seconds for outcome in found],
                "trained": {
                    name: {
                        "samples": facts["samples"],
                        **{
                            part: [outcome.trained[name][part] for outcome in found]
                            for part in ("train", "first", "test")
                        },
                    }
                    for name, facts in first.trained.items()
                },
                "starts": [
                    {
                        "method": start.method,
                        "step": start.step,
                        "norm": start.norm,
                        "sessions": start.sessions,
                        "values": {
                            cell: [outcome.values[start][cell] for outcome in found]
                            for cell in values
                        },
                    }
                    for start, values in first.values.items()
                ],
            }
            if first.searches:
                tasks[task.name]["searches"] = {
                    cell: [outcome.searches[cell] for outcome in found] for cell in first.searches
                }
    return {
        "format": FORMAT,
        "version": __version__,
        "machine": request.place.machine(),
        "settings": {
            "seeds": request.seeds,
            "rate": RATE,
            "steps": request.wanted.steps,
            "norms": [norm.value for norm in request.wanted.norms],
            "sessions": list(request.wanted.sessions),
            "budget": request.wanted.budget,
        },
        "tasks": tasks,
        "not_run": dict(not_run),
    }


def read_results(path: Path) -> dict[str, Any]:
    """Read the results that ``know eval`` wrote of forgettings in the converged regime.

    Raises:
        UsageError: the file is missing or does not hold such results.
    """
    try:
        results = json.loads(read_text(path, MAX_BYTES))
        if results["format"] != FORMAT:
            raise ValueError(f"format {results['format']!r}")
        for option, value in _OTHERS:
            if results.get(option) == value:
                raise UsageError(
                    f"{path}: is a result of 'know eval --{option} {value}'; give one without that "
                    "option, results.json"
                )
        if not results["tasks"]:
            raise ValueError("no tasks")
        if not 0 < results["settings"]["rate"] < 1:
            raise ValueError(f"rate {results['settings']['rate']}")
        for name, task in results["tasks"].items():
            _check_task(name, task)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{path}: is not a result of 'know eval' that this version can read "
            f"({type(error).__name__}: {error})"
        ) from error
    found: dict[str, Any] = results
    return found


def _check_task(name: str, task: Mapping[str, Any]) -> None:
    """Check that a task has what is computed with; else ValueError, KeyError or TypeError."""
    measure, seeds = task["measure"], len(task["seeds"])
    float(measure["scale"]), str(measure["name"]), str(measure["unit"])
    missing = set(_COMPARED_WITH) - {start["method"] for start in task["starts"]}
    if missing:
        raise ValueError(f"task {name}: no {min(missing)}")
    cells = task["starts"][0]["values"].keys()
    for start in task["starts"]:
        series_name(start), int(start["step"])
        if start["values"].keys() != cells or not cells:
            raise ValueError(f"task {name}: {start['method']} has other cells")
        for values in start["values"].values():
            if len(values) != seeds or not np.isfinite(np.asarray(values, np.float64)).all():
                raise ValueError(f"task {name}: {start['method']} has no number for each seed")


def start_name(start: Mapping[str, Any] | Start) -> str:
    """A start's name in tables: ``naive``, ``continuation ×2``, ``average ×2, S = 4``."""
    facts = vars(start) if isinstance(start, Start) else start
    if facts["method"] in UNPREDICTED:
        return str(facts["method"])
    factor = factor_name(RATE, facts["step"]).replace("x", "×")
    return f"{facts['method']} {factor}{_setting(facts)}"


def series_name(start: Mapping[str, Any]) -> str:
    """The name that all steps of a method share: ``continuation``, ``average, norm copy``."""
    return f"{start['method']}{_setting(start)}"


def _setting(start: Mapping[str, Any]) -> str:
    """The settings that differ from the defaults."""
    text = "" if start["sessions"] == SESSIONS else f", S = {start['sessions']}"
    return text if start["norm"] == _DEFAULT_NORM else f"{text}, norm {start['norm']}"


def comparisons(task: Mapping[str, Any]) -> dict[str, Comparison]:
    """Compare the starts of a task, by cell, and under :data:`ALL` over their mean.

    Args:
        task: one of ``tasks`` of :func:`to_json`.

    Raises:
        UsageError: scipy is not installed.
    """
    cells = list(task["starts"][0]["values"])
    found = {}
    for cell in (*cells, ALL):
        found[cell] = compare(
            {
                start_name(start): (
                    list(np.mean([start["values"][name] for name in cells], axis=0))
                    if cell == ALL
                    else start["values"][cell]
                )
                for start in task["starts"]
            }
        )
    return found
