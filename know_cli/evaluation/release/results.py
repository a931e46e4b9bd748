"""The results of the release regime as JSON, and the comparisons that are computed from them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from know_cli import __version__
from know_cli.checkpoints.json_text import MAX_BYTES
from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.errors import UsageError
from know_cli.evaluation.anchors import NAIVE
from know_cli.evaluation.release.regime import Regime
from know_cli.evaluation.release.suite import ReleaseOutcome, ReleaseRequest
from know_cli.evaluation.release.task import ReleaseTask
from know_cli.evaluation.statistics import Estimate, clustered_estimate, mean_estimate
from know_cli.files import read_text

FORMAT = 1
#: The release's rate, as a factor of itself.
OWN_RATE = "1"
#: A value for each seed; None where it has not been measured.
Values = Sequence[float | None]


def to_json(
    request: ReleaseRequest, outcomes: Sequence[ReleaseOutcome], not_run: Mapping[str, str]
) -> dict[str, Any]:
    """All measured values, one per seed, without anything derived from them.

    Returns:
        ``machine``; ``settings``; ``not_run``, reasons by task; and by task its description,
        ``facts``, ``seeds``, ``trained`` (by state of the pre-training its ``steps``, ``samples``
        and the ``test`` of each seed), and ``cells``: by condition, by start, in the seeds' order,
        null where it is missing, the chosen ``factors``, the ``tuned`` values, and ``rates``, the
        ``values`` and ``validation`` by factor; and processor ``seconds``.
    """
    tasks = {}
    for task in request.tasks:
        found = sorted((o for o in outcomes if o.task == task.name), key=lambda o: o.seed)
        found = [outcome for outcome in found if outcome.found["cells"]]
        if found:
            tasks[task.name] = _task(task, found)
    return {
        "format": FORMAT,
        "trajectory": TrajectoryKind.FORGETTING.value,
        "regime": Regime.RELEASE.value,
        "version": __version__,
        "machine": request.place.machine(),
        "settings": {
            "seeds": request.seeds,
            "from": None if request.first is None else request.first.name,
            "precision": request.precision.value,
        },
        "tasks": tasks,
        "not_run": dict(not_run),
    }


def read_release(path: Path) -> dict[str, Any]:
    """Read the JSON that :func:`to_json` made.

    Raises:
        UsageError: the file cannot be read, or is no result of the release regime.
    """
    try:
        found = json.loads(read_text(path, MAX_BYTES))
        if found["regime"] != Regime.RELEASE.value or found["format"] != FORMAT:
            raise ValueError("another regime or format")
        for task in found["tasks"].values():
            for cell in task["cells"].values():
                at_own_rate(cell)
                at_tuned_rate(cell)
            float(task["facts"]["measure"]["scale"])
            max(int(one["size"]) for one in task["definition"]["downstream"])
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{path}: is no result of 'know eval --regime release' ({type(error).__name__}: "
            f"{error}); name the release.json that it wrote, or its folder"
        ) from error
    result: dict[str, Any] = found
    return result


def _task(task: ReleaseTask, outcomes: Sequence[ReleaseOutcome]) -> dict[str, Any]:
    found = [outcome.found for outcome in outcomes]
    first = found[0]["pretraining"]
    trained = {
        name: facts | {"test": [one["pretraining"]["trained"][name]["test"] for one in found]}
        for name, facts in first["trained"].items()
    }
    names = sorted(
        {name for one in found for name in one["cells"]}, key=lambda n: int(n.split()[0])
    )
    return {
        "title": task.title,
        "definition": task.definition(),
        "facts": first["facts"],
        "seeds": [outcome.seed for outcome in outcomes],
        "seconds": [_seconds(one) for one in found],
        "trained": trained,
        "cells": {name: _cell([one["cells"].get(name, {}) for one in found]) for name in names},
    }


def _seconds(found: Mapping[str, Any]) -> float:
    cells = [start["seconds"] for cell in found["cells"].values() for start in cell.values()]
    return round(float(found["pretraining"]["seconds"] + sum(cells)), 2)


def _cell(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One condition, from what its seeds have measured."""
    starts: dict[str, Any] = {}
    longest = max(found, key=len)
    for name in dict.fromkeys([*longest, *(name for one in found for name in one)]):
        each = [one.get(name) for one in found]
        factors = sorted({float(f) for start in each if start for f in start["rates"]})
        starts[name] = {
            "factors": [start and start["factor"] for start in each],
            "tuned": [start and start["rates"][f"{start['factor']:g}"]["value"] for start in each],
            "rates": {
                f"{factor:g}": {
                    key: [start and start["rates"].get(f"{factor:g}", {}).get(of) for start in each]
                    for key, of in (("values", "value"), ("validation", "validation"))
                }
                for factor in factors
            },
        }
    return starts


@dataclass(frozen=True)
class Standing:
    """A start of one condition, in one of the two ways.

    Attributes:
        seeds: that have both it and Θ0.
        mean: over these.
        difference: from Θ0, paired, by Student's t; None of Θ0 itself.
    """

    seeds: int
    mean: float
    difference: Estimate | None


def at_own_rate(cell: Mapping[str, Any]) -> dict[str, Standing]:
    """Every start at the release's rate."""
    return _standings({name: start["rates"][OWN_RATE]["values"] for name, start in cell.items()})


def at_tuned_rate(cell: Mapping[str, Any]) -> dict[str, Standing]:
    """Every start at the rate that validation chose for it."""
    return _standings({name: start["tuned"] for name, start in cell.items()})


@dataclass(frozen=True)
class Pooled:
    """A start over all tasks that have it.

    Attributes:
        tasks: their number.
        trials: of all tasks, each of which counts as one.
        own, tuned: difference from Θ0 at the release's rate and at the one tuned for each, paired.
            Trials of a seed share classes and data, some of them Θ0, and are not taken to be
            independent: :func:`~know_cli.evaluation.statistics.clustered_estimate`.
    """

    tasks: int
    trials: int
    own: Estimate
    tuned: Estimate


def alike(tasks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tasks in groups that are pre-trained, fine-tuned and measured alike, in their order.

    Args:
        tasks: of the results, by name.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, task in tasks.items():
        protocol = [task["definition"][part] for part in ("recipe", "fine_tuning")]
        key = json.dumps([*protocol, task["facts"]["measure"]], sort_keys=True)
        groups.setdefault(key, {})[name] = task
    return list(groups.values())


def pooled(tasks: Mapping[str, Any], condition: str, base: str = NAIVE) -> dict[str, Pooled]:
    """Every start but one in a condition, over all tasks.

    Args:
        tasks: of the results, by name.
        condition: its name; tasks without it are left out.
        base: the start that the others are compared with; tasks without it are left out, too.
    """
    own: dict[str, dict[int, list[float]]] = {}
    tuned: dict[str, dict[int, list[float]]] = {}
    counts: Counter[str] = Counter()
    for task in tasks.values():
        cell = task["cells"].get(condition, {})
        for name, start in cell.items() if base in cell else ():
            values = (one["rates"][OWN_RATE]["values"] for one in (start, cell[base]))
            at_own = _differences(task["seeds"], *values)
            if name != base and at_own:
                counts[name] += 1
                best = _differences(task["seeds"], start["tuned"], cell[base]["tuned"])
                for found, differences in ((own, at_own), (tuned, best)):
                    of_start = found.setdefault(name, {})
                    for seed, difference in differences.items():
                        of_start.setdefault(seed, []).append(difference)
    return {
        name: Pooled(
            counts[name],
            sum(map(len, found.values())),
            clustered_estimate(found.values()),
            clustered_estimate(tuned[name].values()),
        )
        for name, found in own.items()
    }


def _differences(seeds: Sequence[int], first: Values, second: Values) -> dict[int, float]:
    """By seed, of those that have both."""
    return {
        seed: a - b
        for seed, a, b in zip(seeds, first, second, strict=True)
        if a is not None and b is not None
    }


def _standings(values: Mapping[str, Values]) -> dict[str, Standing]:
    naive = values[NAIVE]
    found = {}
    for name, own in values.items():
        pairs = paired(own, naive)
        if pairs:
            found[name] = Standing(
                len(pairs),
                float(np.mean([first for first, _ in pairs])),
                None if name == NAIVE else mean_estimate([a - b for a, b in pairs]),
            )
    return found


def paired(first: Values, second: Values) -> list[tuple[float, float]]:
    """The values of the seeds that have both."""
    return [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
