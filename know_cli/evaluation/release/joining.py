"""Results of the release regime from several machines as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from know_cli.errors import UsageError, counted
from know_cli.evaluation.precision import Precision
from know_cli.evaluation.release.results import read_release

_Results = Mapping[str, Any]
# By seed: the results that it is taken from, 0 or 1, and its position in them.
_Sources = Mapping[int, Sequence[tuple[int, int]]]


def read_joinable(path: Path) -> dict[str, Any]:
    """Read the JSON of :func:`~know_cli.evaluation.release.results.to_json`, all of it checked.

    Raises:
        UsageError: the file cannot be read, is no result of the release regime, or is damaged.
    """
    found = read_release(path)
    try:
        for one in [found, *found.get("joined", [])]:
            dict(one["machine"])
            str(one["version"])
        dict(found["not_run"])
        dict(found["settings"])
        for task in found["tasks"].values():
            _check(task)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{path}: is damaged ({type(error).__name__}: {error}); write it again with 'know eval "
            "--regime release'"
        ) from error
    return found


def _check(task: _Results) -> None:
    seeds = task["seeds"]
    if not all(isinstance(seed, int) for seed in seeds) or len({*seeds}) != len(seeds):
        raise ValueError(f"seeds {seeds}")
    lists = [task["seconds"], *(facts["test"] for facts in task["trained"].values())]
    for name, cell in task["cells"].items():
        int(name.split()[0])
        for start in cell.values():
            lists += [start["factors"], start["tuned"]]
            for factor, rate in start["rates"].items():
                float(factor)
                lists += [rate["values"], rate["validation"]]
    if any(len(values) != len(seeds) for values in lists):
        raise ValueError(f"values for others than {counted(len(seeds), 'seed')}")


def joined(results: _Results, other: _Results) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Results with the tasks, seeds and starts that others add.

    What both have is taken from the first. Starts are compared with the Θ0 of their own seed: where
    another machine trained another one, rounding as it does, nothing of that seed is added.

    Args:
        results: as :func:`~know_cli.evaluation.release.results.to_json` returns them.
        other: likewise.

    Returns:
        The same form, with ``joined``: the ``machine`` and the ``version`` of all that were added;
        and by task the seeds of the other that were left out for their Θ0.

    Raises:
        UsageError: the other's are of another Θ0 that was given, in another precision, or a task
            has another definition there.
    """
    for name, usual in (("from", None), ("precision", Precision.FLOAT32.value)):
        here, there = (one["settings"].get(name, usual) for one in (results, other))
        if here != there:
            raise UsageError(
                f"--{name} was {there or 'left out'} there and {here or 'left out'} in the others; "
                "these are not compared"
            )
    tasks, adds = dict(results["tasks"]), False
    left_out: dict[str, list[int]] = {}
    for name, task in other["tasks"].items():
        if name not in tasks:
            tasks[name], adds = task, True
            continue
        sources = _sources([tasks[name], task])
        tasks[name] = _task(name, tasks[name], task, sources)
        adds |= any(number for places in sources.values() for number, _ in places)
        refused = [seed for seed in task["seeds"] if _is_other(results["tasks"][name], task, seed)]
        left_out |= {name: refused} if refused else {}
    added = list(results.get("joined", []))
    known = [_origin(results), *added]
    if adds:
        origins = [_origin(other), *other.get("joined", [])]
        added += [one for one in origins if one not in known]
    not_run = {**other["not_run"], **results["not_run"]}
    most = max((len(task["seeds"]) for task in tasks.values()), default=0)
    return {
        **results,
        "settings": {**results["settings"], "seeds": most},
        "tasks": tasks,
        "not_run": {name: reason for name, reason in not_run.items() if name not in tasks},
        **({"joined": added} if added else {}),
    }, left_out


def _origin(results: _Results) -> dict[str, Any]:
    return {"machine": results["machine"], "version": results["version"]}


def _tested(task: _Results, seed: int) -> list[float]:
    """What a seed's pre-training came to, by which its Θ0 is known."""
    position = task["seeds"].index(seed)
    return [facts["test"][position] for facts in task["trained"].values()]


def _is_other(first: _Results, second: _Results, seed: int) -> bool:
    return seed in first["seeds"] and _tested(first, seed) != _tested(second, seed)


def _task(name: str, first: _Results, second: _Results, sources: _Sources) -> dict[str, Any]:
    same = first["definition"] == second["definition"]
    if not same or first["trained"].keys() != second["trained"].keys():
        raise UsageError(f"the task {name} has another definition there; evaluate it again")
    both = (first, second)
    trained = {
        state: {
            **facts,
            "test": _of_seeds(sources, [one["trained"][state]["test"] for one in both]),
        }
        for state, facts in first["trained"].items()
    }
    names = sorted({*first["cells"], *second["cells"]}, key=lambda cell: int(cell.split()[0]))
    cells = {cell: _cell(sources, [one["cells"].get(cell, {}) for one in both]) for cell in names}
    return {
        **first,
        "seeds": list(sources),
        "seconds": [
            round(sum(both[of]["seconds"][at] for of, at in places), 2)
            for places in sources.values()
        ],
        "trained": trained,
        "cells": {name: cell for name, cell in cells.items() if cell},
    }


def _sources(both: Sequence[_Results]) -> dict[int, list[tuple[int, int]]]:
    """By seed, in order, where it is taken from: two places if both add to it."""
    found: dict[int, list[tuple[int, int]]] = {}
    starts: dict[int, set[tuple[str, str]]] = {}
    for number, task in enumerate(both):
        for position, seed in enumerate(task["seeds"]):
            known, own = starts.setdefault(seed, set()), _starts(task, position)
            if not own <= known and not (number and _is_other(both[0], task, seed)):
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
        if not any(own.values()):
            continue
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
