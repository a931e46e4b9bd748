"""Several predictions from the same checkpoints, in one pass over them.

>>> from pathlib import Path
>>> import torch
>>> from safetensors.torch import load_file, save_file
>>> from know_cli.prediction.request import Request
>>> from know_cli.prediction.together import open_together
>>> paths = [Path(f"ckpt{k}.safetensors") for k in range(2)]
>>> for k, path in enumerate(paths):
...     save_file({"fc.weight": torch.full((2, 2), 1 - k / 8)}, path)
>>> wanted = [
...     Request(paths, Path("shrunk.safetensors"), method="shrink", options={"lambda": 0.5}),
...     Request(paths, Path("moved.safetensors"), method="task-vector"),
... ]
>>> with open_together(wanted) as together:
...     reports = together.execute()
>>> float(load_file("shrunk.safetensors")["fc.weight"][0, 0])
0.5
>>> float(load_file("moved.safetensors")["fc.weight"][0, 0])
1.125
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from know_cli.checkpoints import open_trajectory
from know_cli.engine.devices import choose_devices
from know_cli.engine.notices import Notices
from know_cli.engine.progress import Progress, Silent
from know_cli.engine.report import Report
from know_cli.engine.together import execute_together
from know_cli.errors import UsageError
from know_cli.kinds import only_copied
from know_cli.prediction.opening import Reading, plan_prediction
from know_cli.prediction.predict import Prediction
from know_cli.prediction.request import Request
from know_cli.ranks.alone import Ranks


@dataclass(frozen=True)
class Together:
    """Predictions with everything checked and planned; nothing is written yet.

    Attributes:
        predictions: in the order of the requests, all of the same open inputs.
    """

    predictions: tuple[Prediction, ...]

    def execute(self, progress: Progress | None = None) -> list[Report]:
        """Predict and write all; see :func:`know_cli.engine.together.execute_together`."""
        progress = progress or Silent()
        with ExitStack() as stack:
            reports = execute_together(
                [one.job(progress, one.open_journal(stack)) for one in self.predictions]
            )
        for prediction, report in zip(self.predictions, reports, strict=True):
            prediction.complete(report, progress)
        return reports

    def close(self) -> None:
        """Close the inputs."""
        self.predictions[0].close()

    def __enter__(self) -> Together:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_together(
    requests: Sequence[Request],
    ranks: Ranks | None = None,
    tell: Callable[[str], None] | None = None,
) -> Together:
    """Check requests for the same checkpoints against the files, and plan them for one pass.

    Args:
        requests: at least one; they may differ in what is predicted and written, by which method
            and in how many steps.
        ranks: that share the work of a single request; None is this process alone.
        tell: is given what the user should know, line by line, each once.

    Raises:
        UsageError: options that cannot be followed, or two requests have an output in common, or
            there are several and several ranks.
        CheckpointError: inputs or a bundle that cannot be used.
        OutputError: an output that must not or cannot be written.
        PeerError: another rank has failed.
        ValueError: the requests are of other checkpoints, or differ in what has to be the same.
    """
    first, ranks = requests[0], ranks or Ranks()
    if len(requests) > 1 and ranks.size > 1:
        raise UsageError("several ranks share one prediction at a time")
    if any(_common(request) != _common(first) for request in requests):
        raise ValueError("requests for one pass differ in their checkpoints or settings")
    devices = choose_devices(first.device, ranks.local_rank if ranks.size > 1 else None)
    trajectory = open_trajectory(
        first.checkpoints,
        only_copied(first.settings.overrides),
        first.trajectory,
        max(request.chosen.fewest for request in requests),
    )
    try:
        reading = Reading(trajectory, first.settings.overrides, ranks, Notices(tell))
        predictions = tuple(
            plan_prediction(request, reading, devices, len(requests) - 1) for request in requests
        )
        _check_apart(predictions)
    except BaseException:
        trajectory.close()
        raise
    return Together(predictions)


def _common(request: Request) -> tuple[object, ...]:
    """What all requests of one pass have in common."""
    of = request.settings
    return (
        list(request.checkpoints), request.trajectory, request.device, request.rate,
        of.frozen, of.overrides, of.allow_nonfinite, of.max_memory, of.threads,
    )  # fmt: skip


def _check_apart(predictions: Sequence[Prediction]) -> None:
    # Links resolved: each has a temporary of its own where a file system has no locks.
    paths = Counter(os.path.realpath(output.path) for one in predictions for output in one.outputs)
    for path, count in paths.items():
        if count > 1:
            raise UsageError(
                f"{path}: would be written by {count} of the methods or steps; name one of them "
                "otherwise, or leave out --every-step"
            )
