"""The starts that an evaluation compares, and the outcome of a trial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from know_cli.engine.settings import NormMode
from know_cli.evaluation.variants import Variant

#: Number of checkpoints of a forgetting.
SESSIONS = 5


@dataclass(frozen=True)
class Wanted:
    """What is to be evaluated.

    Attributes:
        variants: the methods.
        steps: the most steps of each.
        norms: treatments of normalisation layers, each combined with every method.
        sessions: numbers of checkpoints to predict from, counted from the first of the
            trajectory, each combined with every method that can read that many.
        keep: whether checkpoints are kept.
        budget: fine-tunings of the search for a start, for each cell; 0 searches for none.
    """

    variants: Sequence[Variant]
    steps: int = 3
    norms: Sequence[NormMode] = (NormMode.RESCALE,)
    sessions: Sequence[int] = (SESSIONS,)
    keep: bool = True
    budget: int = 0


@dataclass(frozen=True)
class Start:
    """What a fine-tuning starts from.

    Attributes:
        method: an anchor's name or a variant's label.
        step: of the prediction; 0 for an anchor.
        norm: treatment of normalisation layers; empty for an anchor.
        sessions: number of checkpoints predicted from; 0 for an anchor.
    """

    method: str
    step: int = 0
    norm: str = ""
    sessions: int = 0


@dataclass
class Outcome:
    """The outcome of one task with one seed.

    Attributes:
        task: name of the task.
        seed: of the trial.
        trained: for each session, as text, and for ``longer``, ``hindsight``, ``more-data`` and
            ``oracle``: ``samples``; the pre-training's measure on the samples trained on
            (``train``), on those of session 0 (``first``) and on others (``test``); and ``key``,
            the hash of the weights.
        facts: in plain types: ``parameters`` of one checkpoint; ``pretraining_measure`` and
            ``measure``, each with ``name``, ``unit`` and ``scale``; ``tested``, the number of
            test examples by cell.
        values: downstream measurements by start and name of the cell.
        searches: what was chosen and on what evidence, by cell; see
            :class:`Chosen`.
        seconds: processor time of this run and of the earlier ones whose results it used.
        computed: number of trainings, predictions and fine-tunings of this run.
    """

    task: str
    seed: int
    trained: dict[str, dict[str, Any]]
    facts: dict[str, Any]
    values: dict[Start, dict[str, float]] = field(default_factory=dict)
    searches: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0
    computed: int = 0


@dataclass(frozen=True)
class Chosen:
    """What was chosen for one cell.

    Attributes:
        cell: its name.
        value: of the chosen start, on the test examples.
        facts: in plain types: ``start`` and ``winner`` (of choosing; None if all others were
            significantly below Θ0, or failed), ``confirmed`` (``mean``, ``low`` and ``high`` of
            the winner's difference to Θ0 on held back examples; None where there is none),
            ``fine_tunings`` that it took, and
            ``candidates``, the value of each on the test examples.
    """

    cell: str
    value: float
    facts: dict[str, Any]
