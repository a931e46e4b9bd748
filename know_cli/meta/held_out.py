"""KNOWN's scores on held-out trajectories: group by group, kind by kind, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from know_cli.errors import UsageError
from know_cli.kinds import PREDICTED_KINDS, Kind
from know_cli.known.bundle import Bundle
from know_cli.meta.scores import Scores, least_squares, measure, predict
from know_cli.meta.split import TRAJECTORIES, Split
from know_cli.meta.windows import Collection, RecordedTrajectory

#: Scores by group of held-out trajectories, kind and number of steps.
Table = dict[str, dict[Kind, dict[int, Scores]]]

#: Sub-groups of the held-out trajectories, by whether more data would have helped.
DATA_LIMITED, NOT_DATA_LIMITED = "data-limited", "not data-limited"
_DIGITS = 4
_OWN = "this KNOWN"


def evaluate(
    bundle: Bundle,
    collection: Collection,
    parts: Split,
    others: Mapping[str, Bundle] | None = None,
) -> Table:
    """Measure a bundle on all groups of held-out trajectories.

    Beside the groups of the split there are two more, where that was recorded: of the held-out
    trajectories with known architectures and data sets, those that are data-limited and those
    that are not.

    Args:
        bundle: to measure.
        collection: windows for its S, with targets for as many steps as are to be scored.
        parts: which trajectories are held out.
        others: further bundles for the same S, by name, for comparison.

    Returns:
        Scores by group, kind and number of steps.

    Raises:
        UsageError: a bundle reads another number of checkpoints than the windows have.
    """
    others = others or {}
    for name, one in {_OWN: bundle, **others}.items():
        found = collection.windows[PREDICTED_KINDS[0]].windows.shape[1]
        if one.checkpoints != found:
            raise UsageError(f"{name}: reads {one.checkpoints} checkpoints, not {found}")
    groups = dict(_groups(collection.trajectories, parts))
    table: Table = {group: {} for group in groups}
    for kind in PREDICTED_KINDS:
        windows = collection.windows[kind]
        training, held_out = windows.of(parts.training), windows.of(parts.all_held_out)
        # The groups overlap; each window is predicted once.
        answers = {
            name: predict(one.module(kind), held_out.windows, windows.steps)
            for name, one in {_OWN: bundle, **others}.items()
            if len(held_out)
        }
        for step in range(1, windows.steps + 1):
            rule = least_squares(training.with_target(step))
            there = held_out.has_target(step)
            for group, numbers in groups.items():
                rows = there & np.isin(held_out.trajectory, numbers)
                if not rows.any():
                    continue
                found = {name: answer[rows, step - 1] for name, answer in answers.items()}
                own = found.pop(_OWN)
                table[group].setdefault(kind, {})[step] = measure(
                    own, held_out.rows(rows).with_target(step), rule, found
                )
    return {group: kinds for group, kinds in table.items() if kinds}


def _groups(
    trajectories: list[RecordedTrajectory], parts: Split
) -> Iterator[tuple[str, list[int]]]:
    yield from parts.held_out.items()
    known = parts.held_out.get(TRAJECTORIES, [])
    for name, wanted in ((DATA_LIMITED, True), (NOT_DATA_LIMITED, False)):
        numbers = [number for number in known if trajectories[number].data_limited is wanted]
        if numbers:
            yield name, numbers


def to_json(table: Table) -> dict[str, Any]:
    """A table in plain types, with floats rounded to four decimal places."""
    return {
        group: {
            kind.value: {
                str(step): _rounded({k: v for k, v in asdict(found).items() if v != {}})
                for step, found in steps.items()
            }
            for kind, steps in kinds.items()
        }
        for group, kinds in table.items()
    }


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _rounded(value)
        if isinstance(value, Mapping)
        else round(value, _DIGITS)
        if isinstance(value, float)
        else value
        for key, value in values.items()
    }
