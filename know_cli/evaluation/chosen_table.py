"""The part of an evaluation's page that is about the row ``chosen``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from know_cli.errors import counted
from know_cli.evaluation.anchors import CHOSEN, NAIVE
from know_cli.evaluation.chosen import HELD_BACK
from know_cli.evaluation.results import ALL
from know_cli.evaluation.statistics import Comparison, Estimate, mean_estimate

#: What the row is to reach: this share of the best candidate's gain, on the mean over tasks.
TARGET = 0.8


@dataclass(frozen=True)
class Search:
    """What the searches of one task came to, over its cells and seeds.

    Attributes:
        kept: share of them that kept Θ0.
        worse: share whose start scored below Θ0 on the test examples.
        fine_tunings: of one search, on average.
        chosen: the row's paired difference to Θ0, in the measure.
        best: name of the candidate, or Θ0, that has the largest mean on the test examples.
        hindsight: that one's paired difference to Θ0.
        gap: what more data are worth: oracle − base.
    """

    kept: float
    worse: float
    fine_tunings: float
    chosen: Estimate
    best: str
    hindsight: Estimate
    gap: float


def searched(task: Mapping[str, Any], compared: Mapping[str, Comparison]) -> Search:
    """Collect the searches of a task that has them.

    Raises:
        UsageError: scipy is not installed.
    """
    cells: Mapping[str, list[Mapping[str, Any]]] = task["searches"]
    every = [found for of_cell in cells.values() for found in of_cell]
    # By candidate the mean over cells, ``[seeds]``.
    values = {
        name: np.mean([[one["candidates"][name] for one in c] for c in cells.values()], axis=0)
        for name in every[0]["candidates"]
    }
    best = max(values, key=lambda name: float(values[name].mean()))
    below = [one["candidates"][one["start"]] < one["candidates"][NAIVE] for one in every]
    return Search(
        float(np.mean([one["start"] == NAIVE for one in every])),
        float(np.mean(below)),
        float(np.mean([one["fine_tunings"] for one in every])),
        compared[ALL].differences[CHOSEN],
        best,
        mean_estimate(list(values[best] - values[NAIVE])),
        compared[ALL].oracle.value,
    )


def choosing_section(
    results: Mapping[str, Any], compared: Mapping[str, Mapping[str, Comparison]]
) -> Iterator[str]:
    """The lines of the section; none where nothing was chosen."""
    found = {
        name: searched(task, compared[name])
        for name, task in results["tasks"].items()
        if "searches" in task
    }
    if not found:
        return
    yield "## Choosing"
    yield ""
    yield (
        "`chosen` is what `know choose` would have written for each downstream condition: its "
        f"usual candidates, at most {counted(results['settings']['budget'], 'fine-tuning')} with "
        "the task's "
        f"own recipe on {1 - HELD_BACK:.0%} of the first repetition's examples, measured on the "
        "others, which differ with each seed. The test examples only score. The best candidate in "
        "hindsight is the one, Θ0 among them, with the largest mean on the test examples, so it is "
        "too good by selection."
    )
    yield ""
    yield (
        "| task | Θ0 kept | worse than Θ0 | fine-tunings | chosen − naive | best candidate in "
        "hindsight | its difference to naive |"
    )
    yield "|---|" + "---:|" * 4 + "---|---:|"
    for name, one in found.items():
        scale = results["tasks"][name]["measure"]["scale"]
        yield (
            f"| {name} | {one.kept:.0%} | {one.worse:.0%} | {one.fine_tunings:.0f} | "
            f"{_text(one.chosen, scale)} | {one.best} | {_text(one.hindsight, scale)} |"
        )
    yield ""
    below = [name for name, one in found.items() if one.chosen.high < 0]
    listed = ", ".join(f"`{name}`" for name in below) or "no task"
    if any(np.isfinite(one.chosen.half_width) for one in found.values()):
        yield f"Significantly below Θ0: {listed}; the target is none."
    else:
        yield "One seed has no interval, so whether any task is significantly below Θ0 is not told."
    limited = [one for one in found.values() if one.gap > 0]
    if limited:
        own = float(np.mean([one.chosen.value / one.gap for one in limited]))
        best = float(np.mean([one.hindsight.value / one.gap for one in limited]))
        verdict = "met" if best <= 0 or own >= TARGET * best else "missed"
        yield (
            f"Gain over Θ0 in units of oracle − base, mean over {counted(len(limited), 'task')}: "
            f"{own:+.3f} "
            f"chosen, {best:+.3f} the best candidate in hindsight; the target of {TARGET:.0%} of "
            f"that is {verdict}."
        )
    yield ""


def _text(estimate: Estimate, scale: float) -> str:
    if not np.isfinite(estimate.half_width):  # of a single seed
        return f"{scale * estimate.value:+.2f}"
    return f"{scale * estimate.value:+.2f} ± {scale * estimate.half_width:.2f}"
