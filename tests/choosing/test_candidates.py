"""The usual candidates of each kind of trajectory."""

from __future__ import annotations

import pytest

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.choosing.candidates import choose_candidates


@pytest.mark.parametrize(
    ("kind", "checkpoints", "counts"),
    [
        (TrajectoryKind.FORGETTING, 3, []),
        (TrajectoryKind.FORGETTING, 4, ["forgotten=3"]),
        (TrajectoryKind.FORGETTING, 5, ["forgotten=3"]),
        (TrajectoryKind.RUN, 2, []),
        (TrajectoryKind.RUN, 5, ["last=2", "last=3"]),
        (TrajectoryKind.RUN, 9, ["last=2", "last=3", "last=5"]),
        (TrajectoryKind.BRANCHES, 5, []),
    ],
)
def test_no_usual_candidate_averages_more_checkpoints_than_there_are_or_all_of_them_twice(
    kind: TrajectoryKind, checkpoints: int, counts: list[str]
) -> None:
    texts = [candidate.text for candidate in choose_candidates((), checkpoints, kind)]
    assert "average" in texts
    assert len(set(texts)) == len(texts)
    assert [
        text.partition(",")[2] for text in texts if "forgotten=" in text or "last=" in text
    ] == (counts)
    assert ("average,shape=exponential" in texts) is (kind is TrajectoryKind.RUN)
