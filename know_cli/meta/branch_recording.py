"""Records branches of one network from the zoo: trainings that all go on from one Θ0.

They are a folder of safetensors files: Θ0 as ``ckpt0`` and the branches as ``branch1``,
``branch2``, …, which ``know-predict`` reads as they are; ``longer``, Θ0 trained on by as many steps
as all branches together, and ``annealed``, the same while the rate falls to 0. ``branched.json``
has the setup, and the losses and accuracies of all of them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from know_cli.checkpoints import save_checkpoint
from know_cli.checkpoints.metadata import Branch
from know_cli.files import json_text, make_folder, write_text
from know_cli.forgetting.recorder import checkpoint_name, derived_seed
from know_cli.lab.averaging import combine
from know_cli.lab.data import DataSet
from know_cli.lab.fitting import one_thread
from know_cli.lab.machine import CPU
from know_cli.lab.stepping import Training
from know_cli.meta.branch_setup import BranchSetup
from know_cli.meta.recording import Task
from know_cli.meta.run_recording import State, copied, falling, measured_state, new_training
from know_cli.meta.series import NotUsableError

#: Not the record of ``know forget``, whose branches nothing says how to train.
BRANCH_RECORD = "branched.json"
FORMAT = 1
#: Names of what is measured: Θ0; a branch, as the mean over all; the mean of their weights; one
#: continuation by as many steps as all branches together, at the same rate or annealed.
NAIVE, BRANCH, AVERAGE, LONGER, ANNEALED = "naive", "branch", "average", "longer", "annealed"
# Random streams, after those of a run.
_BRANCH, _PART = range(82, 84)


def branch_file(index: int) -> str:
    """File name of Θ0 (0), or of a branch (1, 2, …)."""
    return f"branch{index}.safetensors" if index else checkpoint_name(0)


def continuation_file(name: str) -> str:
    """File name of what branches are compared with, :data:`LONGER` or :data:`ANNEALED`."""
    return f"{name}.safetensors"


@one_thread()
def record_branches(
    setup: BranchSetup, data: DataSet, folder: Path, device: torch.device = CPU
) -> dict[str, Any]:
    """Train Θ0, its branches, and what they are compared with, and write them.

    Args:
        setup: of the branches.
        data: the data set that the setup names.
        folder: for the files; created if missing.
        device: where the network is trained.

    Returns:
        The contents of ``branched.json``: the ``setup``; ``measured``, by name the ``loss`` and
        ``accuracy`` on ``train`` and ``test`` samples.

    Raises:
        NotUsableError: the training diverged.
        OutputError: the folder cannot be written.
    """
    make_folder(folder)
    task = Task(setup, data, device)
    run = new_training(setup, task)
    run.advance(setup.end, setup.rate)
    start = copied(run.model)
    branches = [_branch(run, setup, number) for number in range(1, setup.branches + 1)]
    ends = {}
    for name, schedule in (
        (LONGER, setup.rate),
        (ANNEALED, falling(setup.rate(setup.end), setup.end, setup.every_step)),
    ):
        other = run.branch()
        other.advance(setup.every_step, schedule)
        ends[name] = copied(other.model)
    single = [measured_state(run.model, state, task) for state in branches]
    mean = combine(branches, [1 / len(branches)] * len(branches))
    measured = {
        NAIVE: measured_state(run.model, start, task),
        BRANCH: {
            name: round(float(np.mean([found[name] for found in single])), 5) for name in single[0]
        },
        **{
            name: measured_state(run.model, state, task)
            for name, state in {AVERAGE: mean, **ends}.items()
        },
    }
    if not all(math.isfinite(found["train_loss"]) for found in measured.values()):
        raise NotUsableError("the training diverged")
    for index, state in enumerate([start, *branches]):
        seed = derived_seed(setup.seed, _BRANCH, index) if index else setup.seed
        fraction = setup.fraction if index else 1.0
        branch = Branch(index, fraction, seed, f"collected-{setup.seed}")
        save_checkpoint(folder / branch_file(index), state, {"format": "pt"} | branch.to_metadata())
    for name, state in ends.items():
        save_checkpoint(folder / continuation_file(name), state, {"format": "pt"})
    facts = {
        "format": FORMAT,
        "setup": setup.to_json(),
        "parameters": sum(t.numel() for t in start.values() if t.is_floating_point()),
        "measured": measured,
    }
    write_text(folder / BRANCH_RECORD, json_text(facts, indent=1), replace=True)
    return facts


def _branch(run: Training, setup: BranchSetup, number: int) -> State:
    """A branch's weights: Θ0 trained on with its optimiser's state, on samples of its own."""
    chosen = None
    if setup.fraction < 1:
        generator = torch.Generator().manual_seed(derived_seed(setup.seed, _PART, number))
        order = torch.randperm(setup.samples, generator=generator)
        chosen = order[: max(round(setup.fraction * setup.samples), 1)]
    branch = run.branch(derived_seed(setup.seed, _BRANCH, number), chosen)
    branch.advance(setup.steps, setup.rate)
    return copied(branch.model)
