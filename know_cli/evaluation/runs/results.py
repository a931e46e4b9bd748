"""The results of runs as JSON, and the comparisons that are computed from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from know_cli import __version__
from know_cli.checkpoints.json_text import MAX_BYTES
from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.errors import UsageError
from know_cli.evaluation.runs import plan
from know_cli.evaluation.runs.suite import RunOutcome
from know_cli.evaluation.statistics import Estimate, mean_estimate, recovered_gain
from know_cli.evaluation.suite import Request
from know_cli.files import read_text

FORMAT = 1
#: The treatment of running statistics of what a bundle predicts: that of the prediction.
PREDICTED = "predicted"
#: A value for each seed; None where it has not been measured.
Values = Sequence[float | None]


def to_json(
    request: Request,
    outcomes: Sequence[RunOutcome],
    not_run: Mapping[str, str],
    length: float = 1.0,
) -> dict[str, Any]:
    """All measured values, one per seed, without anything derived from them.

    Returns:
        ``machine``; ``settings``; ``not_run``, reasons by task; and by task its description,
        ``facts``, ``seeds``, processor ``seconds``, and in the seeds' order, null where a
        measure is missing: ``values`` by name and by treatment of running statistics, ``sweep``
        by count and by spacing, that of ``bundles`` by name and by spacing, ``spaced`` by
        spacing, ``shape`` of the run by
        part, ``cosine``, ``falling`` (its end, and averages of its checkpoints by count or
        :data:`~.averages.SPACED`, by spacing), and ``downstream`` (``values``, the ``factors`` of
        the rate that were chosen) by start.
    """
    tasks = {}
    for task in request.tasks:
        found = sorted((o for o in outcomes if o.task == task.name), key=lambda o: o.seed)
        found = [outcome for outcome in found if outcome.found["pretraining"]]
        if found:
            tasks[task.name] = {
                "title": task.title,
                "definition": plan.for_run(task, length).definition(),
                **_task([outcome.found for outcome in found]),
                "seeds": [outcome.seed for outcome in found],
            }
    return {
        "format": FORMAT,
        "trajectory": TrajectoryKind.RUN.value,
        "version": __version__,
        "machine": request.place.machine(),
        "settings": {
            "seeds": request.seeds,
            "length": length,
            "more": list(plan.MORE),
            "warm_up": plan.WARM_UP,
            "spacing": plan.SPACING,
            "rates": list(plan.RATES),
            **({"bundles": digests} if (digests := _digests(outcomes)) else {}),
        },
        "tasks": tasks,
        "not_run": dict(not_run),
    }


def _digests(outcomes: Sequence[RunOutcome]) -> dict[str, str]:
    """Of the bundles that were measured, by name."""
    return {
        name: one["digest"]
        for outcome in outcomes
        for name, one in outcome.found.get("bundles", {}).items()
    }


def _task(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One task, from what its seeds have measured."""
    first = found[0]["pretraining"]
    starts = list(dict.fromkeys(name for one in found for name in one["downstream"]))
    downstream = {
        name: {
            "values": [one["downstream"].get(name, {}).get("value") for one in found],
            "factors": [one["downstream"].get(name, {}).get("factor") for one in found],
        }
        for name in starts
    }
    cells = [value for one in found for value in one["downstream"].values()]
    cell: Mapping[str, Any] = cells[0] if cells else {}
    return {
        "facts": first["facts"]
        | {name: cell[name] for name in ("cell", "validated") if name in cell}
        | ({"downstream_tested": cell["tested"]} if cell else {}),
        "seconds": [_seconds(one) for one in found],
        "values": {
            name: {
                treatment: [one["pretraining"]["values"][name][treatment] for one in found]
                for treatment in treatments
            }
            for name, treatments in first["values"].items()
        }
        | {
            name: {PREDICTED: [one["bundles"].get(name, {}).get("value") for one in found]}
            for name in dict.fromkeys(name for one in found for name in one.get("bundles", {}))
        },
        # Results without bundles are what they were before there were any.
        **({"bundles": swept} if (swept := _swept_bundles(found)) else {}),
        **({"spaced": _spaced(found)} if any(one.get("spaced") for one in found) else {}),
        "sweep": _sweep([one["pretraining"]["sweep"] for one in found]),
        "shape": {
            part: [one["pretraining"].get("shape", {}).get(part) for one in found]
            for part in ("parallel", "kept")
        },
        "cosine": [one["cosine"] and one["cosine"]["value"] for one in found],
        **({"falling": _falling(found)} if any(one.get("falling") for one in found) else {}),
        "downstream": downstream,
    }


def _swept_bundles(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Values]]:
    """By bundle and spacing, one value per seed, None where it was not measured."""
    names = dict.fromkeys(name for one in found for name in one.get("bundles", {}))
    return {
        name: _by_spacing([one["bundles"].get(name, {}).get("sweep", {}) for one in found])
        for name in names
    }


def _spaced(found: Sequence[Mapping[str, Any]]) -> dict[str, Values]:
    """Of :data:`~.averages.SPACED` by spacing, one value per seed, None where there is none."""
    return _by_spacing([(one.get("spaced") or {}).get("sweep", {}) for one in found])


def _by_spacing(sweeps: Sequence[Mapping[str, float]]) -> dict[str, Values]:
    """The values of each seed's sweep by spacing, None where it has none."""
    return {
        f"{spacing:g}": [sweep.get(f"{spacing:g}") for sweep in sweeps] for spacing in plan.SPACINGS
    }


def _falling(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the run whose rate falls: its end, and averages of its checkpoints."""
    each = [one.get("falling") or {} for one in found]
    return {
        "last": [one.get("value") for one in each],
        "sweep": _sweep([one.get("sweep", {}) for one in each]),
        "spaced": _by_spacing([one.get("spaced", {}) for one in each]),
    }


def _sweep(found: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, Values]]:
    """By count and spacing, one value per seed; nothing if no seed was swept."""
    first = next((one for one in found if one), {})
    return {
        count: {
            spacing: [one[count][spacing] if one else None for one in found] for spacing in spacings
        }
        for count, spacings in first.items()
    }


def _seconds(found: Mapping[str, Any]) -> float:
    more = [*found["downstream"].values(), *found.get("bundles", {}).values()]
    alone = (found.get(name) for name in ("pretraining", "cosine", "falling", "spaced"))
    parts = [*alone, *more]
    return round(float(sum(part["seconds"] for part in parts if part)), 2)


def read_results(path: Path) -> dict[str, Any]:
    """Read the results that ``know eval --trajectory run`` wrote.

    Raises:
        UsageError: the file is missing or does not hold such results.
    """
    try:
        results: dict[str, Any] = json.loads(read_text(path, MAX_BYTES))
        if (results["format"], results["trajectory"]) != (FORMAT, TrajectoryKind.RUN.value):
            raise ValueError(f"format {results['format']!r} of {results['trajectory']!r}")
        for task in results["tasks"].values():
            compare(pretraining_values(task))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{path}: is not a result of 'know eval --trajectory run' that this version can read "
            f"({type(error).__name__}: {error})"
        ) from error
    return results


@dataclass(frozen=True)
class RunComparison:
    """A comparison of what comes of a run, by one measure.

    Attributes:
        seeds: that have both ``last`` and the oracle.
        means: by name, over the seeds that have it.
        differences: by name, from ``last``, paired, by Student's t.
        helps: whether the most annealing is significantly better than ``last``.
        beyond: whether it is significantly better than as many steps at the same rate, too;
            otherwise the run was too far from its end for annealing to be what helps.
        gains: by name, (method − last) / (annealed − last); empty unless annealing helps.
    """

    seeds: int
    means: Mapping[str, float]
    differences: Mapping[str, Estimate]
    helps: bool
    beyond: bool
    gains: Mapping[str, Estimate]


def pretraining_values(task: Mapping[str, Any]) -> dict[str, Values]:
    """The pre-training's measure by name, with the treatment of running statistics each has first.

    Averages have that which needs no data: the closed form.
    """
    found: dict[str, Values] = {
        name: next(iter(treatments.values())) for name, treatments in task["values"].items()
    }
    if any(value is not None for value in task["cosine"]):
        found[plan.COSINE] = task["cosine"]
    if plan.FALLING in task:
        found[plan.FALLING] = task[plan.FALLING]["last"]
    return found


def downstream_values(task: Mapping[str, Any]) -> dict[str, Values]:
    """The downstream measure by start; empty if it was not measured."""
    return {name: start["values"] for name, start in task["downstream"].items()}


def treatment_values(task: Mapping[str, Any]) -> dict[str, dict[str, Values]]:
    """By name, the values by treatment of running statistics, of those that have several."""
    return {name: found for name, found in task["values"].items() if len(found) > 1}


def compare(values: Mapping[str, Values]) -> RunComparison:
    """Compare everything with the end of the run.

    Args:
        values: by name, one per seed, None where it is missing; ``last`` and the oracle are
            among them.

    Raises:
        UsageError: scipy is not installed.
    """
    last, oracle = values[plan.LAST], values[plan.ORACLE]
    whole = difference(oracle, last)
    helps = whole.low > 0
    same_rate = values.get(plan.longer(plan.MORE[-1]))
    beyond = helps and same_rate is not None and difference(oracle, same_rate).low > 0
    gains = {}
    if helps:
        for name, found in values.items():
            method, base, best = _common(found, last, oracle)
            if len(method) > 1 and np.mean(best) > np.mean(base):
                gains[name] = recovered_gain(method, base, best)
    return RunComparison(
        seeds=len(_common(last, oracle)[0]),
        means={name: float(np.mean(_common(found)[0])) for name, found in values.items()},
        differences={
            name: difference(found, last) for name, found in values.items() if name != plan.LAST
        },
        helps=helps,
        beyond=beyond,
        gains=gains,
    )


def difference(first: Values, second: Values) -> Estimate:
    """The mean of first − second over the seeds that have both, by Student's t."""
    one, other = _common(first, second)
    return mean_estimate([a - b for a, b in zip(one, other, strict=True)])


def _common(*columns: Values) -> tuple[list[float], ...]:
    """The columns with the rows that all of them have."""
    rows = [row for row in zip(*columns, strict=True) if None not in row]
    return tuple([float(row[k]) for row in rows] for k in range(len(columns)))
