"""What else the page of runs shows: how many checkpoints, where averages break, BatchNorm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from know_cli.errors import counted
from know_cli.evaluation.runs import plan
from know_cli.evaluation.runs.averages import AVERAGES, RE_ESTIMATED_ON, SPACED
from know_cli.evaluation.runs.results import (
    RunComparison,
    compare,
    difference,
    pretraining_values,
    treatment_values,
)
from know_cli.evaluation.runs.trial import CLOSED, PLAIN, RE_ESTIMATED, STORED
from know_cli.evaluation.runs.wording import difference_text, gain_text, percent, with_ends
from know_cli.evaluation.statistics import Estimate, mean_estimate
from know_cli.prediction.inspection import PARALLEL_STEPS

#: The averages that the page's first tables show.
SHOWN = ("average-3", "average-5")
_THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


def sweeps(tasks: Mapping[str, Any], compared: Mapping[str, RunComparison]) -> Iterator[str]:
    """What averages gain, by the number of checkpoints and their spacing."""
    swept = {name: task for name, task in tasks.items() if task["sweep"]}
    if not swept:
        return
    yield "### How many, how far apart"
    yield ""
    yield (
        "The mean of the last checkpoints − `last`, in the measure's unit, by their number and by "
        "the share of the run between two of them:"
    )
    yield ""
    for name, task in swept.items():
        scale = task["facts"]["measure"]["scale"]
        last = next(iter(task["values"][plan.LAST].values()))
        spacings = list(next(iter(task["sweep"].values())))
        yield from _head(name, spacings)
        for count, found in task["sweep"].items():
            row = (difference_text(difference(found[spacing], last), scale) for spacing in spacings)
            yield f"| {count} checkpoints | " + " | ".join(row) + " |"
        yield ""
    yield from _swept_gains({name: task for name, task in swept.items() if compared[name].helps})


def _head(name: str, spacings: Sequence[str]) -> Iterator[str]:
    """The head of a table by spacing, whose first column is called so."""
    shares = " | ".join(percent(float(spacing)) for spacing in spacings)
    yield f"| {name}{' ' * bool(name)}| {shares} |"
    yield "|---|" + "---:|" * len(spacings)


def _swept_gains(swept: Mapping[str, Any]) -> Iterator[str]:
    """The recovered gain by number and spacing, mean over tasks."""
    if not swept:
        return
    yield (
        f"Recovered gain of the mean by number and spacing, mean over the {len(swept)} of these "
        "tasks where annealing helps, and the lowest:"
    )
    yield ""
    sweep = next(iter(swept.values()))["sweep"]
    spacings = list(next(iter(sweep.values())))
    yield from _head("", spacings)
    for count in sweep:
        row = []
        for spacing in spacings:
            gains = []
            for task in swept.values():
                found = pretraining_values(task)
                both = {name: found[name] for name in (plan.LAST, plan.ORACLE)}
                swept_values = {count: task["sweep"][count][spacing]}
                gains.append(compare(both | swept_values).gains.get(count))
            known = [gain.value for gain in gains if gain is not None]
            row.append(f"{np.mean(known):+.2f} ({min(known):+.2f})" if known else "")
        yield f"| {count} checkpoints | " + " | ".join(row) + " |"
    yield ""


def fallen(tasks: Mapping[str, Any]) -> Iterator[str]:
    """What averages of the checkpoints of a run are worth whose rate falls to 0."""
    measured = {name: task for name, task in tasks.items() if plan.FALLING in task}
    if not measured:
        return
    found = {name: _of_falling(task[plan.FALLING]) for name, task in measured.items()}
    yield "### A run whose rate falls"
    yield ""
    yield (
        f"`{plan.FALLING}` is another run of the same length and the same initial weights whose "
        "rate falls to 0 in a line after the warm-up, as Hugging Face's Trainer lets it fall by "
        "default. Its end − `last`; then averages of its own last checkpoints − its end, in the "
        "measure's unit, by the share of the run between two of them:"
    )
    yield ""
    columns = [
        (start, f"{spacing:g}")
        for spacing in (plan.SPACING, plan.SPACINGS[-1])
        for start in (*SHOWN, SPACED.name)
    ]
    heads = (f"{start}, {percent(float(spacing))}" for start, spacing in columns)
    yield f"| task | {plan.FALLING} − last | {' | '.join(heads)} |"
    yield "|---|" + "---:|" * (1 + len(columns))
    for name, task in measured.items():
        scale = task["facts"]["measure"]["scale"]
        values = pretraining_values(task)
        row = [difference(values[plan.FALLING], values[plan.LAST])]
        row += [found[name][start][spacing] for start, spacing in columns]
        yield f"| {name} | {' | '.join(difference_text(one, scale) for one in row)} |"
    yield ""
    yield (
        "The number of tasks, out of "
        f"{len(measured)}, on which the average is significantly above the end of that run, and "
        "the number on which it is below:"
    )
    yield ""
    first = next(iter(found.values()))
    spacings = list(next(iter(first.values())))
    yield from _head("", spacings)
    for start in first:
        row_text = []
        for spacing in spacings:
            of = [one[start][spacing] for one in found.values()]
            above, below = sum(one.low > 0 for one in of), sum(one.high < 0 for one in of)
            row_text.append(f"{above}, {below}")
        yield f"| {start} | {' | '.join(row_text)} |"
    yield ""


def _of_falling(falling: Mapping[str, Any]) -> dict[str, dict[str, Estimate]]:
    """By average, by spacing, what it is worth beside the end of its run."""
    swept = {f"average-{count}": values for count, values in falling["sweep"].items()}
    return {
        start: {spacing: difference(of, falling["last"]) for spacing, of in values.items()}
        for start, values in (swept | {SPACED.name: falling["spaced"]}).items()
    }


def bundles(
    tasks: Mapping[str, Any], compared: Mapping[str, RunComparison], digests: Mapping[str, str]
) -> Iterator[str]:
    """What bundles are worth beside every average, paired by seed."""
    for name, digest in digests.items():
        of = {task: found for task, found in compared.items() if name in found.means}
        averages = [average.name for average in AVERAGES]
        yield f"### {name}"
        yield ""
        yield (
            f"What the bundle `{name}` ({digest}) predicts from the checkpoints of the averages of "
            "five, less each average, in the measure's unit, paired by seed with the 95 % interval "
            "of the mean. The last rows: the mean over the tasks where annealing helps of the "
            "difference in recovered gain, with its 95 % interval; and on how many of all tasks it "
            "is significantly above the average, and below."
        )
        yield ""
        yield f"| task | {' | '.join(f'{name} − {other}' for other in averages)} |"
        yield "|---|" + "---:|" * len(averages)
        above, below = Counter[str](), Counter[str]()
        for task in of:
            values = pretraining_values(tasks[task])
            scale = tasks[task]["facts"]["measure"]["scale"]
            row = []
            for other in averages:
                found = difference(values[name], values[other])
                above[other] += found.low > 0
                below[other] += found.high < 0
                row.append(difference_text(found, scale))
            yield f"| {task} | {' | '.join(row)} |"
        helped = [found.gains for found in of.values() if name in found.gains]
        gains = [
            mean_estimate([one[name].value - one[other].value for one in helped])
            if helped
            else None
            for other in averages
        ]
        yield (
            f"| recovered gain, {counted(len(helped), 'task')} | "
            f"{' | '.join(map(gain_text, gains))} |"
        )
        yield f"| above, of {len(of)} | {' | '.join(str(above[other]) for other in averages)} |"
        yield f"| below | {' | '.join(str(below[other]) for other in averages)} |"
        yield ""
        yield from _by_spacing(name, {task: tasks[task] for task in of if compared[task].helps})


def _by_spacing(name: str, tasks: Mapping[str, Any]) -> Iterator[str]:
    """The recovered gain of a bundle beside that of means, by spacing."""
    tasks = {task: found for task, found in tasks.items() if found["sweep"] and "spaced" in found}
    if not tasks:
        return
    spacings = list(next(iter(tasks.values()))["bundles"][name])
    others = (*SHOWN, SPACED.name)
    gains: dict[str, list[list[float]]] = {start: [] for start in (name, *others)}
    for task in tasks.values():
        found = pretraining_values(task)
        both = {start: found[start] for start in (plan.LAST, plan.ORACLE)}
        swept = {name: task["bundles"][name]}
        swept |= {start: task["sweep"][start.removeprefix("average-")] for start in SHOWN}
        swept[SPACED.name] = task["spaced"]
        of = [
            compare(both | {start: values[spacing] for start, values in swept.items()}).gains
            for spacing in spacings
        ]
        if all(gains.keys() <= one.keys() for one in of):
            for start, rows in gains.items():
                rows.append([one[start].value for one in of])
    if not gains[name]:
        return
    yield (
        "Recovered gain by the spacing of the checkpoints, mean over the "
        f"{counted(len(gains[name]), 'task')} where annealing helps, and the lowest; and the mean "
        "of the differences with its 95 % "
        "interval over tasks. In the last column it is each task's mean over the spacings:"
    )
    yield ""
    columns = [*(percent(float(spacing)) for spacing in spacings), "all"]
    yield f"| | {' | '.join(columns)} |"
    yield "|---|" + "---:|" * len(columns)
    tables = {start: _with_mean(rows) for start, rows in gains.items()}
    for start, table in tables.items():
        row = (f"{column.mean():+.2f} ({column.min():+.2f})" for column in table.T)
        yield f"| {start} | {' | '.join(row)} |"
    for start in others:
        apart = (mean_estimate(column.tolist()) for column in (tables[name] - tables[start]).T)
        yield f"| {name} − {start} | {' | '.join(map(with_ends, apart))} |"
    yield ""


def _with_mean(rows: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """Rows with their mean as a further column."""
    table = np.array(rows, dtype=np.float64)
    return np.hstack([table, table.mean(1, keepdims=True)])


def shapes(tasks: Mapping[str, Any], compared: Mapping[str, RunComparison]) -> Iterator[str]:
    """Where averaging breaks, by how parallel a run's steps are."""
    known = {
        name: task
        for name, task in tasks.items()
        if any(value is not None for value in task["shape"]["parallel"])
    }
    if not known:
        return
    start = SHOWN[-1]
    yield "### Where averaging breaks"
    yield ""
    yield (
        f"`parallel` is the mean cosine of the angle between successive steps from checkpoint to "
        f"checkpoint, `kept` the norm of {start} as a share of the mean norm of the checkpoints, "
        "over all weights together. The more a run still goes somewhere, the more parallel its "
        "steps are, and the less its mean is worth:"
    )
    yield ""
    yield f"| task | parallel | kept | {plan.longer(plan.MORE[-1])} − last | {start} − last |"
    yield "|---|" + "---:|" * 4
    ordered = sorted(known, key=lambda name: -_mean(tasks[name]["shape"]["parallel"]))
    for name in ordered:
        shape, found = tasks[name]["shape"], compared[name]
        scale = tasks[name]["facts"]["measure"]["scale"]
        more = found.differences[plan.longer(plan.MORE[-1])]
        yield (
            f"| {name} | {_mean(shape['parallel']):+.2f} | {_mean(shape['kept']):.3f} | "
            f"{difference_text(more, scale)} | {difference_text(found.differences[start], scale)} |"
        )
    yield ""
    pairs = [
        (parallel, mean - last)
        for name, task in known.items()
        for parallel, mean, last in zip(
            task["shape"]["parallel"],
            pretraining_values(task)[start],
            pretraining_values(task)[plan.LAST],
            strict=True,
        )
        if parallel is not None and mean is not None and last is not None
    ]
    yield (
        f"Of {counted(len(pairs), 'single run')}, a warning above a threshold of `parallel` would "
        "have been "
        f"given to so many, and so many of those warned, and of those not warned, lost by {start}:"
    )
    yield ""
    yield "| threshold | warned | of these lost | not warned | of these lost |"
    yield "|---:|" + "---:|" * 4
    for threshold in sorted({*_THRESHOLDS, PARALLEL_STEPS}):
        warned = [gain < 0 for parallel, gain in pairs if parallel > threshold]
        others = [gain < 0 for parallel, gain in pairs if parallel <= threshold]
        yield (
            f"| {_threshold_text(threshold)} | {len(warned)} | {_share(warned)} | {len(others)} | "
            f"{_share(others)} |"
        )
    yield ""


def _threshold_text(threshold: float) -> str:
    return f"{threshold:+.2f}" + (", that of `know inspect`" if threshold == PARALLEL_STEPS else "")


def _mean(values: list[float | None]) -> float:
    return float(np.mean([value for value in values if value is not None]))


def _share(cases: list[bool]) -> str:
    return f"{sum(cases)} ({percent(sum(cases) / len(cases))})" if cases else ""


def shared_statistics(tasks: Mapping[str, Any]) -> Iterator[str]:
    """What re-estimating running statistics adds, and the closed form, where there are any."""
    with_norm = {name: found for name, task in tasks.items() if (found := treatment_values(task))}
    if not with_norm:
        return
    yield "### Running statistics"
    yield ""
    yield (
        f"Tasks with BatchNorm. Measured again on at most {RE_ESTIMATED_ON} examples of the "
        "pre-training, the statistics change the measure by as much, in its unit; the closed form "
        "is compared with the mean of the variances alone."
    )
    yield ""
    columns = [
        (name, RE_ESTIMATED, STORED if name in (plan.LAST, plan.ORACLE) else CLOSED)
        for name in (plan.LAST, plan.ORACLE, *SHOWN)
    ]
    columns += [(name, CLOSED, PLAIN) for name in SHOWN]
    yield "| task | " + " | ".join(f"{n}: {one} − {two}" for n, one, two in columns) + " |"
    yield "|---|" + "---:|" * len(columns)
    for task, found in with_norm.items():
        scale = tasks[task]["facts"]["measure"]["scale"]
        row = [
            difference_text(difference(found[name][one], found[name][two]), scale)
            for name, one, two in columns
        ]
        yield f"| {task} | " + " | ".join(row) + " |"
    yield ""
