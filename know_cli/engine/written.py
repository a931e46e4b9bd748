"""What a worker has found out of the batch that it wrote, until it is that batch's turn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from know_cli.engine.plan import Batch
from know_cli.engine.running_statistics import Measured
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
