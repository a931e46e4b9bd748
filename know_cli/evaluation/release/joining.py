"""Results of the release regime from several machines as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from know_cli.errors import UsageError

_Results = Mapping[str, Any]
# By seed: the results that it is taken from, 0 or 1, and its position in them.
_Sources = Mapping[int, Sequence[tuple[int, int]]]


def joined(results: _Results, other: _Results) -> dict[str, Any]:
    """Results with the tasks, seeds and starts that others add.

    What both have is taken from the first. Starts are compared with the Θ0 of their own seed: where
    another machine trained another one, rounding as it does, nothing of that seed is added.

    Args:
        results: as :func:`~know_cli.evaluation.release.results.to_json` returns them.
        other: likewise.

    Returns:
        The same form, with ``joined``: the ``machine`` and the ``version`` of all that were added.

    Raises:
        UsageError: a task has another definition in the other.
    """
    tasks = dict(results["tasks"])
    for name, task in other["tasks"].items():
        tasks[name] = _task(name, tasks[name], task) if name in tasks else task
    facts = [{"machine": other["machine"], "version": other["version"]}, *other.get("joined", [])]
    added = list(results.get("joined", []))
    known = [{"machine": results["machine"], "version": results["version"]}, *added]
    added += [one for one in facts if one not in known]
    not_run = {**other["not_run"], **results["not_run"]}
    return {
        **results,
        "tasks": tasks,
        "not_run": {name: reason for name, reason in not_run.items() if name not in tasks},
        "joined": added,
    }


def _task(name: str, first: _Results, second: _Results) -> dict[str, Any]:
    if first["definition"] != second["definition"]:
        raise UsageError(f"--join: the task {name} has another definition there; evaluate it again")
    both = (first, second)
    sources = _sources(both)
    trained = {
        state: {
            **facts,
            "test": _of_seeds(sources, [one["trained"][state]["test"] for one in both]),
        }
        for state, facts in first["trained"].items()
    }
    names = sorted({*first["cells"], *second["cells"]}, key=lambda cell: int(cell.split()[0]))
    return {
        **first,
        "seeds": list(sources),
        "seconds": [
            round(sum(both[of]["seconds"][at] for of, at in places), 2)
            for places in sources.values()
        ],
        "trained": trained,
        "cells": {
            cell: _cell(sources, [one["cells"].get(cell, {}) for one in both]) for cell in names
        },
    }


def _sources(both: Sequence[_Results]) -> dict[int, list[tuple[int, int]]]:
    """By seed, in order, where it is taken from: two places if both add to it."""
    found: dict[int, list[tuple[int, int]]] = {}
    tests: dict[int, list[float]] = {}
    starts: dict[int, set[tuple[str, str]]] = {}
    for number, task in enumerate(both):
        for position, seed in enumerate(task["seeds"]):
            tested = [facts["test"][position] for facts in task["trained"].values()]
            known, own = starts.setdefault(seed, set()), _starts(task, position)
            if tests.setdefault(seed, tested) == tested and not own <= known:
                found.setdefault(seed, []).append((number, position))
                known |= own
    return dict(sorted(found.items()))


def _starts(task: _Results, position: int) -> set[tuple[str, str]]:
    """The conditions and starts that a seed has."""
    return {
        (name, start)
        for name, cell in task["cells"].items()
        for start, of in cell.items()
        if of["tuned"][position] is not None
    }


def _of_seeds(sources: _Sources, values: Sequence[Sequence[Any] | None]) -> list[Any]:
    """The value of each seed, from the first that has it; None where none has."""
    found = []
    for places in sources.values():
        here = [of[at] for number, at in places if (of := values[number]) is not None]
        found.append(next((value for value in here if value is not None), None))
    return found


def _cell(sources: _Sources, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in dict.fromkeys(start for cell in cells for start in cell):
        starts = [cell.get(name) for cell in cells]
        # All of a seed's fine-tunings are from one machine, as the choice of the rate is.
        own = {seed: _measured(places, starts) for seed, places in sources.items()}
        factors = {factor for start in starts if start for factor in start["rates"]}
        found[name] = {
            key: _of_seeds(own, [start and start[key] for start in starts])
            for key in ("factors", "tuned")
        } | {
            "rates": {
                factor: {
                    key: _of_seeds(own, [_rates(start, factor, key) for start in starts])
                    for key in ("values", "validation")
                }
                for factor in sorted(factors, key=float)
            }
        }
    return found


def _measured(
    places: Sequence[tuple[int, int]], starts: Sequence[Mapping[str, Any] | None]
) -> list[tuple[int, int]]:
    """The first of a seed's places where a start was measured, if there is one."""
    there = [
        (of, at) for of, at in places if (start := starts[of]) and start["tuned"][at] is not None
    ]
    return there[:1]


def _rates(start: Mapping[str, Any] | None, factor: str, key: str) -> Sequence[Any] | None:
    found: Sequence[Any] | None = start["rates"].get(factor, {}).get(key) if start else None
    return found
