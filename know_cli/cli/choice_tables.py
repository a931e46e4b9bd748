"""What ``know choose`` shows: progress, the table of all candidates, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from know_cli.choosing.intervals import Difference, difference
from know_cli.choosing.search import BASE, Outcome, Standing, Trial
from know_cli.cli.tables import new_table
from know_cli.errors import counted

if TYPE_CHECKING:
    from rich.console import RenderableType

    from know_cli.choosing.measures import Result
    from know_cli.cli.output import Output
    from know_cli.engine.progress import Progress

_LINES_OF_OUTPUT = 5


class Watch:
    """Shows each measure as it is taken; a listener of a search."""

    def __init__(self, progress: Progress, talk: Output, budget: int) -> None:
        self._progress = progress
        self._talk = talk
        progress.phase("measuring", budget)

    def planned(self, trials: Sequence[Trial]) -> None:
        """Nothing is shown before there is something to see."""

    def measured(self, trial: Trial, result: Result) -> None:
        """One more measure; what failed is told with the end of its output.

        Θ0's is not, since that ends the search: the error tells it.
        """
        self._progress.advance(1)
        if result.value is None and trial.arm.start != BASE:
            self._talk.notice(
                f"warning: {trial.arm.name} with seed {trial.seed}: the measure {result.reason}"
            )
            for line in result.output.splitlines()[-_LINES_OF_OUTPUT:]:
                self._talk.notice(f"  {line}")


def outcome_tables(outcome: Outcome, *, minimise: bool) -> list[RenderableType]:
    """The table of all candidates, and what follows from it, in words."""
    table = new_table("start", "measures", "mean", "difference to Θ0", "95 % interval")
    base = next(s for s in outcome.standings if s.arm == outcome.base)
    sign = -1 if minimise else 1
    for standing in outcome.standings:
        table.add_row(*_row(standing, base, outcome, sign))
    lines: list[RenderableType] = ["In choosing:", table, ""]
    lines += verdict(outcome, sign)
    return lines


def verdict(outcome: Outcome, sign: int = 1) -> list[str]:
    """What was found, in a few lines."""
    if outcome.winner is None:
        others = [s for s in outcome.standings if s.arm.start != BASE]
        if all(standing.failed for standing in others):
            return ["No candidate could be measured. None of them: Θ0 is the start."]
        return ["The best candidate was below Θ0 in choosing. None of them: Θ0 is the start."]
    lines = []
    found = outcome.confirmed
    if found is None:
        lines.append(f"{outcome.winner.name} failed in the confirmation, so Θ0 is the start.")
    elif outcome.is_better:
        lines.append(
            f"{outcome.winner.name} is better than Θ0: {_text(found, sign)} on "
            f"{counted(found.pairs, 'seed')} that took no part in choosing."
        )
    else:
        lines.append(
            f"Not better than Θ0: {outcome.winner.name}, the best in choosing, has "
            f"{_text(found, sign)} on {counted(found.pairs, 'fresh seed')}, "
            f"{'which is worse' if found.high < 0 else 'which cannot be told from none'}."
        )
        more = outcome.more_measures
        if found.mean > 0 and more:
            lines.append(
                f"A difference of this size would be told by about {counted(more, 'more measure')}."
            )
    if outcome.choosing is not None:
        lines.append(
            f"(In choosing it had {sign * outcome.choosing.mean:+.4g}, which is too much by "
            "selection.)"
        )
    if outcome.random is not None:
        lines.append(
            f"A random direction of the same length has {_text(outcome.random, sign)} on "
            f"{counted(outcome.random.pairs, 'seed')}."
        )
    for start, name in outcome.at_edge:
        lines.append(
            f"The best {name} of {'Θ0' if start == BASE else start} is at the end of its values; "
            "give more of them."
        )
    return lines


def outcome_json(outcome: Outcome, *, minimise: bool) -> dict[str, Any]:
    """Plain types for a JSON file; measures are as the user's program gave them."""
    sign = -1 if minimise else 1
    return {
        "minimise": minimise,
        "measures": outcome.measures,
        "base": outcome.base.name,
        "winner": outcome.winner.name if outcome.winner else None,
        "is_better": outcome.is_better,
        "choosing": _json(outcome.choosing, sign),
        "confirmed": _json(outcome.confirmed, sign),
        "random_direction": _json(outcome.random, sign),
        "more_measures": outcome.more_measures,
        "at_edge": [list(pair) for pair in outcome.at_edge],
        "candidates": [
            {
                "start": standing.arm.start,
                "values": dict(standing.arm.values),
                "failed": standing.failed,
                "results": {str(k): sign * value for k, value in standing.results.items()},
            }
            for standing in outcome.standings
        ],
    }


def evidence_of(outcome: Outcome, *, minimise: bool) -> dict[str, Any]:
    """What the output's header says: what was chosen, and on what evidence."""
    content = outcome_json(outcome, minimise=minimise)
    kept = ("minimise", "measures", "base", "winner", "is_better", "confirmed")
    return {key: content[key] for key in kept}


def _row(standing: Standing, base: Standing, outcome: Outcome, sign: int) -> list[str]:
    name = standing.arm.name.replace(BASE, "Θ0", 1)
    if standing.failed or not standing.results:
        return [name, str(len(standing.results)), "failed", "", ""]
    cells = [name, str(len(standing.results)), f"{sign * standing.mean:.4g}"]
    if standing.arm == outcome.base:
        return [*cells, "", ""]
    shared = sorted(standing.results.keys() & base.results.keys())
    found = difference([standing.results[k] - base.results[k] for k in shared])
    low, high = sorted((sign * found.low, sign * found.high))
    interval = f"{low:+.3g} to {high:+.3g}" if math.isfinite(found.low) else "-"
    return [*cells, f"{sign * found.mean:+.3g}", interval]


def _text(found: Difference, sign: int) -> str:
    low, high = sorted((sign * found.low, sign * found.high))
    if not math.isfinite(low):
        return f"{sign * found.mean:+.4g}"
    return f"{sign * found.mean:+.4g} [{low:+.4g}, {high:+.4g}]"


def _json(found: Difference | None, sign: int) -> dict[str, Any] | None:
    if found is None:
        return None
    low, high = sorted((sign * found.low, sign * found.high))
    is_known = math.isfinite(low)
    return {
        "pairs": found.pairs,
        "mean": sign * found.mean,
        "low": low if is_known else None,
        "high": high if is_known else None,
    }
