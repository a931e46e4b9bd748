"""The results of a run as JSON, and as the Markdown that is generated from it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from know_cli import __version__
from know_cli.checkpoints.paths import factor_name
from know_cli.engine.plan import NormMode
from know_cli.errors import UsageError
from know_cli.evaluation.anchors import (
    ANCHORS,
    HINDSIGHT,
    LONGER,
    MORE_DATA,
    NAIVE,
    ORACLE,
    SCRATCH,
)
from know_cli.evaluation.protocol import SESSIONS, Outcome, Start
from know_cli.evaluation.running import Request
from know_cli.evaluation.statistics import (
    Comparison,
    Estimate,
    Status,
    compare,
    mean_estimate,
)
from know_cli.evaluation.tasks.task import RATE
from know_cli.methods.prediction import DEFAULT_WEIGHTS

FORMAT = 1
#: The mean over all cells of a task, as if it were a cell.
ALL = "all"
_DEFAULT_NORM = NormMode.RESCALE.value
# What every comparison needs; other anchors may be missing in results of another version.
_COMPARED_WITH = (SCRATCH, NAIVE, LONGER, ORACLE)


def to_json(
    request: Request, outcomes: Sequence[Outcome], not_run: Mapping[str, str]
) -> dict[str, Any]:
    """Everything that was measured, one value a seed, without anything derived from it.

    Returns:
        ``machine``; ``settings``; ``not_run``, reasons by task; and by task what it is, its
        ``seeds``, and lists in their order: processor ``seconds``, ``trained`` (by session and
        anchor the measures ``train``, ``first`` and ``test``) and ``starts`` (each with
        ``values`` by cell).
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
    return {
        "format": FORMAT,
        "version": __version__,
        "machine": machine(),
        "settings": {
            "seeds": request.seeds,
            "rate": RATE,
            "steps": request.wanted.steps,
            "norms": [norm.value for norm in request.wanted.norms],
            "sessions": list(request.wanted.sessions),
        },
        "tasks": tasks,
        "not_run": dict(not_run),
    }


def read_results(path: Path) -> dict[str, Any]:
    """Read what :func:`to_json` gave, as ``know eval`` writes it.

    Raises:
        UsageError: it is missing, or no such results.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if results["format"] != FORMAT:
            raise ValueError(f"format {results['format']!r}")
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
            f"{path}: is no result of 'know eval' that this version can read "
            f"({type(error).__name__}: {error})"
        ) from error
    found: dict[str, Any] = results
    return found


def _check_task(name: str, task: Mapping[str, Any]) -> None:
    """Raises ValueError, KeyError or TypeError where a task lacks what is computed with."""
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


def machine() -> dict[str, Any]:
    """What the results were computed on."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    return {
        "processor": processor,
        "cores": os.cpu_count() or 1,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def start_name(start: Mapping[str, Any] | Start) -> str:
    """A start for tables: ``naive``, ``continuation ×2``, ``average ×2, S = 4, norm copy``."""
    facts = vars(start) if isinstance(start, Start) else start
    if facts["method"] in ANCHORS:
        return str(facts["method"])
    factor = factor_name(RATE, facts["step"]).replace("x", "×")
    return f"{facts['method']} {factor}{_setting(facts)}"


def series_name(start: Mapping[str, Any]) -> str:
    """What the starts of a method have in common: ``continuation``, ``average, norm copy``."""
    return f"{start['method']}{_setting(start)}"


def _setting(start: Mapping[str, Any]) -> str:
    """What is not as usual."""
    text = "" if start["sessions"] == SESSIONS else f", S = {start['sessions']}"
    return text if start["norm"] == _DEFAULT_NORM else f"{text}, norm {start['norm']}"


def comparisons(task: Mapping[str, Any]) -> dict[str, Comparison]:
    """By cell, and under :data:`ALL` for their mean, the comparison of the starts of a task.

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


# --- Markdown ----------------------------------------------------------------------------------


def to_markdown(results: Mapping[str, Any]) -> str:
    """The tables of :func:`to_json`'s results, with every number computed from them.

    Raises:
        UsageError: scipy is not installed.
    """
    compared = {name: comparisons(task) for name, task in results["tasks"].items()}
    lines = [
        *_heading(results),
        *_reading(compared),
        *_explanation(results),
        *_overview(results, compared),
        *_methods(compared),
    ]
    for name, task in results["tasks"].items():
        lines += _task(name, task, compared[name])
    if results["not_run"]:
        lines += ["## Not run here", "", "| task | reason |", "|---|---|"]
        lines += [f"| {name} | {reason} |" for name, reason in results["not_run"].items()]
        lines.append("")
    return "\n".join(lines)


def _heading(results: Mapping[str, Any]) -> Iterator[str]:
    of, settings = results["machine"], results["settings"]
    seconds = sum(sum(task["seconds"]) for task in results["tasks"].values())
    yield "# What predicted weights are worth"
    yield ""
    yield (
        "Generated by `know eval`; every number is computed from its JSON. "
        f"{len(results['tasks'])} tasks, {settings['seeds']} seeds each; {seconds / 3600:.2f} "
        f"hours of processor time on {of['processor']} ({of['cores']} cores, "
        f"{of['system']}, Python {of['python']}, torch {of['torch']}), "
        f"know-predict {results['version']}."
    )
    yield ""


def _explanation(results: Mapping[str, Any]) -> Iterator[str]:
    settings = results["settings"]
    yield "## How it is measured"
    yield ""
    yield (
        f"Θ0 is trained on D0, and forgets on ever smaller parts of it (S = {SESSIONS} sessions, "
        f"r = {settings['rate']:g}). From these checkpoints every method predicts, and every start "
        "is fine-tuned with the same examples, order and fresh head. `naive` is Θ0 itself; "
        "`scratch` fresh weights; `last` the most-forgotten checkpoint; `longer` Θ0 trained on "
        "with D0 for as many steps as the forgetting took; `hindsight` the sessions' checkpoints "
        "combined, tensor by tensor, with the numbers that fit the additional data best, which "
        "no predictor can know; `oracle` Θ0 trained on with really "
        "twice the data, `more-data` a network trained on twice the data from the beginning."
    )
    yield ""
    yield (
        "Differences are paired, in each task's unit, with the 95 % interval of their mean over "
        "seeds by Student's t. **Recovered gain** is (method − base) / (oracle − base), where the "
        "base is the better of `naive` and `longer`: 1 is as good as the data, 0 no better than "
        "what the same time buys without a prediction. It is a ratio of means, with the 95 % "
        "interval of the bootstrap over seeds, and only given where a task is *data-limited*: "
        "`naive` is better than `scratch`, and `oracle` better than the base, both significantly."
    )
    yield ""


def _limited(compared: Mapping[str, Mapping[str, Comparison]]) -> dict[str, Comparison]:
    """Of the data-limited tasks, the comparison over all cells."""
    return {
        name: cells[ALL]
        for name, cells in compared.items()
        if cells[ALL].status is Status.DATA_LIMITED
    }


def _starts(limited: Mapping[str, Comparison]) -> list[str]:
    """Names of all starts that have recovered gains."""
    return list(dict.fromkeys(name for found in limited.values() for name in found.gains))


def _gains(limited: Mapping[str, Comparison], start: str) -> dict[str, Estimate]:
    """By task, the recovered gain of a start."""
    return {name: found.gains[start] for name, found in limited.items() if start in found.gains}


def _reading(compared: Mapping[str, Mapping[str, Comparison]]) -> Iterator[str]:
    """What the tables say, in sentences that hold for whatever they say."""
    limited = _limited(compared)
    yield "## In short"
    yield ""
    yield (
        f"- On {_listed(limited)} twice the data really help what comes after: "
        f"{len(limited)} of {len(compared)} tasks, and only these say what a prediction is worth."
    )
    for status in Status:
        names = [name for name, cells in compared.items() if cells[ALL].status is status]
        if names and status is not Status.DATA_LIMITED:
            yield f"- Not counted, because {_REASONS[status]}: {_listed(names)}."
    if not limited:
        yield ""
        return
    for start in _starts(limited):
        if start.partition(" ")[0] == DEFAULT_WEIGHTS and "," not in start:
            yield f"- The default of `know-predict`, {_sentence(start, _gains(limited, start))}."
    predicted = [name for name in _starts(limited) if name not in ANCHORS]
    if predicted:
        means = {
            name: np.mean([gain.value for gain in _gains(limited, name).values()])
            for name in predicted
        }
        best = max(means, key=lambda name: float(means[name]))
        yield f"- The best of all predictions is {_sentence(best, _gains(limited, best))}."
    if HINDSIGHT in _starts(limited):
        yield (
            "- The numbers that fit the additional data best, "
            f"{_sentence(HINDSIGHT, _gains(limited, HINDSIGHT))}: so much of what the data would "
            "teach is in the checkpoints."
        )
    yield ""


_REASONS = {
    Status.NO_TRANSFER: "the pre-training itself is of no use",
    Status.LONGER: "training longer on the same data explains what more data give",
    Status.NO_GAIN: "more data do not help",
    Status.UNKNOWN: "there are too few seeds",
}


def _listed(names: Collection[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "no task"


def _sentence(start: str, gains: Mapping[str, Estimate]) -> str:
    """A start with its mean recovered gain, and on which tasks it is surely above or below 0."""
    mean = mean_estimate([gain.value for gain in gains.values()])
    above = [name for name, gain in gains.items() if gain.low > 0]
    below = [name for name, gain in gains.items() if gain.high < 0]
    return (
        f"`{start}`: recovers {mean.value:+.2f} of what the data would give, mean over tasks "
        f"(95 % interval {mean.low:+.2f} to {mean.high:+.2f}); surely above zero on "
        f"{_listed(above)}, surely below on {_listed(below)}"
    )


def _overview(
    results: Mapping[str, Any], compared: Mapping[str, Mapping[str, Comparison]]
) -> Iterator[str]:
    yield "## Tasks"
    yield ""
    yield (
        "| task | measure | parameters | seconds a seed | scratch | naive | longer − naive | "
        "oracle − naive | oracle − base | worth |"
    )
    yield "|---|---|" + "---:|" * 7 + "---|"
    for name, task in results["tasks"].items():
        whole, scale = compared[name][ALL], task["measure"]["scale"]
        yield (
            "| "
            + " | ".join(
                (
                    f"[{name}](#{name})",
                    task["measure"]["name"],
                    f"{task['parameters']:,}",
                    f"{np.mean(task['seconds']):.0f}",
                    f"{scale * whole.means[SCRATCH]:.2f}",
                    f"{scale * whole.means[NAIVE]:.2f}",
                    _difference(whole.differences[LONGER], scale),
                    _difference(whole.differences[ORACLE], scale),
                    _difference(whole.oracle, scale),
                    whole.status.value,
                )
            )
            + " |"
        )
    yield ""


def _methods(compared: Mapping[str, Mapping[str, Comparison]]) -> Iterator[str]:
    limited = _limited(compared)
    yield "## Methods"
    yield ""
    if not limited:
        yield "No task of this run is data-limited: nothing can be said about recovered gains."
        yield ""
        return
    yield (
        f"Recovered gain on the {len(limited)} data-limited tasks, the mean over each task's "
        "cells, with the 95 % interval of that mean over tasks by Student's t, and on how many of "
        "them its own interval lies wholly above or below zero."
    )
    yield ""
    yield "| start | mean recovered gain | lowest | highest | above zero | below zero |"
    yield "|---|" + "---:|" * 5
    for name in _starts(limited):
        gains = list(_gains(limited, name).values())
        values = [gain.value for gain in gains]
        above = sum(gain.low > 0 for gain in gains)
        below = sum(gain.high < 0 for gain in gains)
        yield (
            f"| {name} | {_difference(mean_estimate(values), 1)} | {min(values):+.2f} | "
            f"{max(values):+.2f} | {above} | {below} |"
        )
    yield ""


def _task(name: str, task: Mapping[str, Any], cells: Mapping[str, Comparison]) -> Iterator[str]:
    scale, unit = task["measure"]["scale"], task["measure"]["unit"]
    before = task["pretraining_measure"]
    yield f"## {name}"
    yield ""
    yield (
        f"{task['title'][0].upper()}{task['title'][1:]}. {before['name'].capitalize()} of the "
        f"pre-training, in {before['unit']}, mean over {len(task['seeds'])} seeds:"
    )
    yield ""
    yield "| trained | samples | on them | on those of session 0 | on others |"
    yield "|---|" + "---:|" * 4
    for key in (*map(str, range(SESSIONS)), LONGER, HINDSIGHT, MORE_DATA, ORACLE):
        facts = task["trained"][key]
        label = f"session {key}" if key.isdigit() else key
        shown = " | ".join(
            f"{before['scale'] * np.mean(facts[part]):.2f}" for part in ("train", "first", "test")
        )
        yield f"| {label} | {facts['samples']:,} | {shown} |"
    yield ""
    tested = ", ".join(f"{cell}: {count:,}" for cell, count in task["tested"].items())
    yield f"Downstream, {task['measure']['name']} in {unit} (test examples: {tested}):"
    yield ""
    yield "| start | " + " | ".join(f"{cell} | gain" for cell in cells) + " |"
    yield "|---|" + "---:|" * (2 * len(cells))
    yield "| worth | " + " | ".join(f"{found.status.value} | " for found in cells.values()) + " |"
    for start in cells[ALL].means:
        row = []
        for found in cells.values():
            row.append(
                f"{scale * found.means[start]:.2f}"
                if start == NAIVE
                else _difference(found.differences[start], scale)
            )
            row.append(_gain(found.gains.get(start)))
        yield f"| {start} | " + " | ".join(row) + " |"
    yield ""


def _difference(estimate: Estimate, scale: float) -> str:
    return f"{scale * estimate.value:+.2f} ± {scale * estimate.half_width:.2f}"


def _gain(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return f"{estimate.value:+.2f} ({estimate.low:+.2f} to {estimate.high:+.2f})"
