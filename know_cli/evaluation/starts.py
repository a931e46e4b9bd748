"""The starts that an evaluation compares, and what measuring one yields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from know_cli.engine.settings import NormMode
from know_cli.evaluation.variants import Variant

#: Checkpoints of a forgetting.
SESSIONS = 5


@dataclass(frozen=True)
class Wanted:
    """What is to be evaluated.

    Attributes:
        variants: the methods.
        steps: the most steps of each.
        norms: treatments of normalisation layers, each with every method.
        sessions: numbers of checkpoints that are predicted from, the first ones of the
            trajectory, each with every method that can read so many.
        keep: whether checkpoints are kept.
    """

    variants: Sequence[Variant]
    steps: int = 3
    norms: Sequence[NormMode] = (NormMode.RESCALE,)
    sessions: Sequence[int] = (SESSIONS,)
    keep: bool = True


@dataclass(frozen=True)
class Start:
    """Where a fine-tuning starts from.

    Attributes:
        method: an anchor's name or a variant's label.
        step: of the prediction; 0 for an anchor.
        norm: treatment of normalisation layers; empty for an anchor.
        sessions: checkpoints that were predicted from; 0 for an anchor.
    """

    method: str
    step: int = 0
    norm: str = ""
    sessions: int = 0


@dataclass
class Outcome:
    """What came out of one task with one seed.

    Attributes:
        task: its name.
        seed: the seed.
        trained: for each session, as text, and for ``longer``, ``hindsight``, ``more-data`` and
            ``oracle``: ``samples``, and the pre-training's measure on the samples trained on
            (``train``), on those of session 0 (``first``) and on others (``test``); and ``key``,
            the hash of its weights.
        facts: as JSON: ``parameters`` of one checkpoint; ``pretraining_measure`` and
            ``measure``, each with ``name``, ``unit`` and ``scale``; ``tested``, by cell the
            number of its test examples.
        values: by start and by the name of the cell, what was measured downstream.
        seconds: of processor time, of this run and of those that trained what was found.
        computed: how many trainings, predictions and fine-tunings this run did.
    """

    task: str
    seed: int
    trained: dict[str, dict[str, Any]]
    facts: dict[str, Any]
    values: dict[Start, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0
    computed: int = 0
