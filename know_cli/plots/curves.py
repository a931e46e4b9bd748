"""The results of an evaluation as curves: each method's worth after one, two, … steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from know_cli.errors import UsageError, counted
from know_cli.evaluation.anchors import LONGER, NAIVE, ORACLE, UNPREDICTED
from know_cli.evaluation.results import ALL, comparisons, series_name, start_name
from know_cli.evaluation.statistics import Comparison, Estimate, Status, mean_estimate
from know_cli.evaluation.variants import VARIANTS

#: Drawn by default, along with all of the user's bundles.
DEFAULT_METHODS = ("continuation", "retrodiction", "shrink-0.9", "average")


@dataclass(frozen=True)
class Curve:
    """One method over the steps.

    Attributes:
        name: of the method, with any setting that differs from the default.
        estimates: by number of steps, ascending from 0, which is no prediction.
    """

    name: str
    estimates: Mapping[int, Estimate]


@dataclass(frozen=True)
class Panel:
    """One task, or the mean over tasks.

    Attributes:
        title: the task's name.
        worth: what the task can show, in words.
        quantity: what is measured, and its unit, in one or two lines.
        curves: in the order of the picture's names.
        levels: by name, the estimates that do not depend on steps: ``longer`` and ``oracle``.
    """

    title: str
    worth: str
    quantity: str
    curves: tuple[Curve, ...]
    levels: Mapping[str, Estimate]


@dataclass(frozen=True)
class Curves:
    """All panels of a picture.

    Attributes:
        rate: sampling rate, which decides the factor of a number of steps.
        names: of all curves, in order.
        tasks: one panel per task, with paired differences from naive in the task's unit.
        summary: mean recovered gains over the data-limited tasks, with their interval over tasks
            by Student's t; None if there are fewer than two such tasks.
    """

    rate: float
    names: tuple[str, ...]
    tasks: tuple[Panel, ...]
    summary: Panel | None


def curves_of(
    results: Mapping[str, Any], tasks: Sequence[str], methods: Sequence[str] | None = None
) -> Curves:
    """Select tasks and methods of results and compare them over the steps.

    Curves show the mean over a task's cells.

    Args:
        results: of :func:`~know_cli.evaluation.results.read_results`.
        tasks: patterns of task names.
        methods: patterns of methods' names; None for :data:`DEFAULT_METHODS` and bundles.

    Raises:
        UsageError: a pattern matches nothing, or scipy is not installed.
    """
    chosen = {name: results["tasks"][name] for name in _matching(tasks, results["tasks"], "task")}
    starts = [s for t in chosen.values() for s in t["starts"] if s["method"] not in UNPREDICTED]
    every = list(dict.fromkeys(map(series_name, starts)))
    if not starts:
        raise UsageError("the results have no predictions, only baselines")
    names = _defaults(starts) if methods is None else _matching(methods, every, "method")
    if not names:
        raise UsageError(
            f"the results have none of the default methods; choose one, such as --method {every[0]}"
        )
    compared = {name: _compare(task, names) for name, task in chosen.items()}
    panels = tuple(_panel(name, chosen[name], compared[name], names) for name in chosen)
    limited = {
        name: found for name, found in compared.items() if found.status is Status.DATA_LIMITED
    }
    summary = _summary(chosen, limited, names) if len(limited) > 1 else None
    return Curves(results["settings"]["rate"], tuple(names), panels, summary)


def _matching(patterns: Sequence[str], names: Iterable[str], what: str) -> list[str]:
    """Names that match a pattern, in the order of the patterns."""
    names, found = list(names), []
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise UsageError(f"--{what} {pattern}: matches none of {', '.join(names)}")
        found += matched
    return list(dict.fromkeys(found))


def _defaults(starts: Sequence[Mapping[str, Any]]) -> list[str]:
    """The default methods, then bundles, each in the first setting of the run."""
    first: dict[str, str] = {}
    for start in starts:
        first.setdefault(start["method"], series_name(start))
    usual = {variant.label for variant in VARIANTS}
    bundles = [method for method in first if method not in usual]
    return [first[method] for method in (*DEFAULT_METHODS, *bundles) if method in first]


def _compare(task: Mapping[str, Any], names: Sequence[str]) -> Comparison:
    starts = [
        start
        for start in task["starts"]
        if start["method"] in UNPREDICTED or series_name(start) in names
    ]
    return comparisons({**task, "starts": starts})[ALL]


def _steps(task: Mapping[str, Any], name: str) -> dict[int, str]:
    """The name of a start in comparisons, by number of steps, ascending."""
    found = {
        start["step"]: start_name(start)
        for start in task["starts"]
        if start["method"] not in UNPREDICTED and series_name(start) == name
    }
    return dict(sorted(found.items()))


def _panel(title: str, task: Mapping[str, Any], found: Comparison, names: Sequence[str]) -> Panel:
    measure = task["measure"]
    scale = float(measure["scale"])
    differences = {
        name: Estimate(scale * e.value, scale * e.low, scale * e.high)
        for name, e in found.differences.items()
    }
    nothing = Estimate(0.0, 0.0, 0.0)
    return Panel(
        title=title,
        worth=found.status.value,
        quantity=f"{measure['name']}\nabove naive, {measure['unit']}",
        curves=tuple(
            Curve(name, {0: nothing} | {k: differences[s] for k, s in steps.items()})
            for name in names
            if (steps := _steps(task, name))
        ),
        levels={name: differences[name] for name in (LONGER, ORACLE)},
    )


def _summary(
    tasks: Mapping[str, Any], compared: Mapping[str, Comparison], names: Sequence[str]
) -> Panel:
    def over_tasks(starts: Mapping[str, str]) -> Estimate:
        return mean_estimate([compared[task].gains[start].value for task, start in starts.items()])

    curves = []
    for name in names:
        steps = {task: {0: NAIVE} | _steps(tasks[task], name) for task in compared}
        # A mean over fewer tasks would not be comparable with the others.
        shared = set.intersection(*(set(found) for found in steps.values()))
        if len(shared) > 1:
            estimates = {
                step: over_tasks({task: found[step] for task, found in steps.items()})
                for step in sorted(shared)
            }
            curves.append(Curve(name, estimates))
    return Panel(
        title="recovered gain",
        worth=f"over {counted(len(compared), 'data-limited task')}",
        quantity="share of the oracle's gain",
        curves=tuple(curves),
        levels={name: over_tasks(dict.fromkeys(compared, name)) for name in (LONGER, ORACLE)},
    )
