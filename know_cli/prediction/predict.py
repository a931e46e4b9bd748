"""From an opened request to a written checkpoint: what ``know predict`` does, as a library.

>>> from pathlib import Path
>>> import torch
>>> from safetensors.torch import load_file, save_file
>>> from know_cli.prediction.opening import open_prediction
>>> from know_cli.prediction.request import Request
>>> paths = [Path(f"ckpt{k}.safetensors") for k in range(3)]  # Θ0, Θ1, Θ2
>>> for k, path in enumerate(paths):
...     save_file({"fc.weight": torch.full((2, 2), 1 - k / 8)}, path)
>>> request = Request(paths, Path("out.safetensors"), method="linear")
>>> with open_prediction(request) as prediction:
...     report = prediction.execute()
>>> load_file("out.safetensors")["fc.weight"]
tensor([[1.1250, 1.1250],
        [1.1250, 1.1250]])
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from know_cli.checkpoints import Trajectory
from know_cli.checkpoints.checksum import digest_path, write_digest
from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.engine.job import Job, OutputStep
from know_cli.engine.journal import Journal, file_identity, remove_journals
from know_cli.engine.notices import Notices
from know_cli.engine.plan import Plan
from know_cli.engine.predictor import Predictors
from know_cli.engine.progress import Progress, Silent
from know_cli.engine.report import Report
from know_cli.engine.run import execute
from know_cli.methods.registry import HyperModelBundle
from know_cli.prediction.recipe import Arithmetic, Recipe
from know_cli.prediction.request import Request
from know_cli.ranks.alone import Ranks


@dataclass(frozen=True)
class Prediction:
    """A request with everything checked and planned; nothing is written yet.

    Attributes:
        request: what was asked for.
        trajectory: the open inputs, in order.
        bundle: the hyper-model's weights; None where the method reads none.
        recipe: all that the outputs' bytes depend on.
        plan: what happens to each tensor.
        outputs: what is written.
        predictors: what computes.
        notices: what the user should know, of opening and, later, of the run.
        ranks: that share the work, of which this process is one.
    """

    request: Request
    trajectory: Trajectory
    bundle: HyperModelBundle | None
    recipe: Recipe
    plan: Plan
    outputs: list[OutputStep]
    predictors: Predictors
    notices: Notices
    ranks: Ranks

    @property
    def files(self) -> list[Path]:
        """Every file and folder that is read or written."""
        inputs = self.trajectory.checkpoints
        files = [file for checkpoint in inputs for file in (checkpoint.path, *checkpoint.headers)]
        digests = [digest_path(output.path) for output in self.outputs]
        return [*files, *(output.path for output in self.outputs), *digests]

    def job(self, progress: Progress | None = None, journal: Journal | None = None) -> Job:
        """What the engine executes."""
        return Job(
            trajectory=self.trajectory,
            plan=self.plan,
            settings=self.request.settings,
            predictors=self.predictors,
            outputs=self.outputs,
            progress=progress or Silent(),
            notices=self.notices,
            ranks=self.ranks,
            journal=journal,
        )

    def execute(self, progress: Progress | None = None) -> Report:
        """Predict and write; see :func:`know_cli.engine.run.execute`."""
        progress = progress or Silent()
        with ExitStack() as stack:
            report = execute(self.job(progress, self.open_journal(stack)))
        self.complete(report, progress)
        return report

    def open_journal(self, stack: ExitStack) -> Journal | None:
        """The journal of a request that is to be resumed; the stack closes it."""
        if not self.request.resume:
            return None
        ranks = self.ranks
        return stack.enter_context(
            Journal(self.request.output, self._journal_key(), ranks.rank, ranks.size)
        )

    def complete(self, report: Report, progress: Progress) -> None:
        """Do what follows once the outputs are there: digests, and old journals go."""
        if self.ranks.rank == 0:
            remove_journals(self.request.output)
            for output in self.outputs:
                if self.request.checksum:
                    progress.phase(f"computing the digest of {output.path}")
                    digest = write_digest(output.path, replace=output.force)
                    report.digests.append(digest)
        report.notices = list(self.notices)

    def _journal_key(self) -> str:
        """Everything that the records of a journal depend on, as text."""
        files = [path for c in self.trajectory.checkpoints for path in c.headers]
        return json.dumps(
            {
                "recipe": self.recipe.identity(Arithmetic.of(self.predictors)),
                "files": [file_identity(path) for path in files],
                "batch_rows": self.plan.batch_rows,
                "stretch_rows": self.plan.stretch_rows,
                "outputs": [[output.step, dict(output.metadata)] for output in self.outputs],
                "tensors": [
                    (tensor.name, tensor.kind.value, tensor.action.value, tensor.whole)
                    for tensor in self.plan.tensors
                ],
            },
            sort_keys=True,
        )

    def describe(self) -> dict[str, Any]:
        """The recipe and how it is carried out, as plain types for a JSON report."""
        settings = self.request.settings
        return {
            **self.recipe.to_json(),
            **self._steps(),
            "checkpoints": [str(checkpoint.path) for checkpoint in self.trajectory.checkpoints],
            "device": ", ".join(map(str, self.predictors.devices)),
            "threads": settings.threads,
            "max_memory": settings.max_memory,
            "memory": self.plan.memory,
            "ranks": self.ranks.size,
        }

    def _steps(self) -> dict[str, Any]:
        if self.recipe.trajectory is not TrajectoryKind.RUN:
            return {}
        return {"training_steps": self.trajectory.training_steps}

    def close(self) -> None:
        """Close the inputs."""
        self.trajectory.close()

    def __enter__(self) -> Prediction:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
