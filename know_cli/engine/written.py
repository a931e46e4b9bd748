"""What a worker has found out of the batch that it wrote, until it is that batch's turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from know_cli.engine.plan import Batch
from know_cli.engine.running_statistics import Measured
from know_cli.engine.settings import MAX_STEPS
from know_cli.kinds import Kind
from know_cli.passes.numbers import Sums


@dataclass
class Written:
    """What is to be known of a batch that is written, and not taken in yet.

    Attributes:
        batch: which one.
        data: what was written, for the journal, in its order.
        changes: of each stretch its kind and the sums of the last step's change.
        measured: what rescaling needs to know.
        facts: counts, and which rows were copied, for the journal, too.
    """

    batch: Batch
    data: list[memoryview] = field(default_factory=list)
    changes: list[tuple[Kind, Sums]] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def can_be_of(batch: Batch, facts: Any) -> bool:
    """Whether what a journal has noted of a batch can be of this one.

    A journal can be damaged, or another program's; what one has is in :class:`Written`.
    """
    names = {segment.tensor.name for segment in batch.segments}
    return (
        isinstance(facts, dict)
        and facts.keys() == {"frozen", "replaced", "copied", "truncation"}
        and _is_count(facts["frozen"], batch.rows)
        and isinstance(facts["replaced"], dict)
        and all(
            name in names and _is_count(count, batch.rows * MAX_STEPS)
            for name, count in facts["replaced"].items()
        )
        and isinstance(facts["copied"], list)
        and all(_is_count(row, batch.rows - 1) for row in facts["copied"])
        and (facts["truncation"] is None or isinstance(facts["truncation"], float))
    )


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def copied_rows(batch: Batch, rows: Sequence[int]) -> Counter[str]:
    """How many of a batch's rows are of each tensor."""
    found: Counter[str] = Counter()
    places = np.asarray(rows, dtype=np.int64)
    for segment in batch.segments if rows else ():
        inside = (places >= segment.row) & (places < segment.row + segment.count)
        found[segment.tensor.name] += int(np.count_nonzero(inside))
    return +found
