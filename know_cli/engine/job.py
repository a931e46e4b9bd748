"""All that an execution needs, in one frozen object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from know_cli.checkpoints import Sink, Trajectory
from know_cli.engine.journal import Journal
from know_cli.engine.notices import Notices
from know_cli.engine.plan import Plan
from know_cli.engine.predictor import Predictors
from know_cli.engine.progress import Progress, Silent
from know_cli.engine.settings import Settings
from know_cli.ranks.alone import Ranks


@dataclass(frozen=True)
class OutputStep:
    """A checkpoint to write: after which step, where, and with which metadata.

    ``force`` allows what has come to be at ``path`` to be replaced.
    """

    step: int
    path: Path
    metadata: Mapping[str, str]
    force: bool = True


@dataclass(frozen=True)
class Job:
    """All that an execution needs.

    Attributes:
        trajectory: the inputs.
        plan: made for these inputs and settings; the whole, or a part of it.
        settings: the options that the engine follows.
        predictors: the method.
        outputs: in ascending order of step; the last is the one that the report is about.
        progress: is told of phases and parameters.
        notices: is told what the user should know.
        ranks: that share the work, of which this process is one.
        journal: of batches that an earlier run has finished, and for those of this one.
        open_sink: where each output goes; None is into a new checkpoint.
    """

    trajectory: Trajectory
    plan: Plan
    settings: Settings
    predictors: Predictors
    outputs: Sequence[OutputStep]
    progress: Progress = field(default_factory=Silent)
    notices: Notices = field(default_factory=Notices)
    ranks: Ranks = field(default_factory=Ranks)
    journal: Journal | None = None
    open_sink: Callable[[OutputStep], Sink] | None = None

    @cached_property
    def drops_cached(self) -> bool:
        """Whether inputs leave the page cache once they are read.

        It must not hold more for this run than the run may use itself.
        """
        inputs = sum(checkpoint.nbytes for checkpoint in self.trajectory.checkpoints)
        return inputs > self.settings.max_memory
