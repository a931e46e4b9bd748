"""Structured forgetting, branches and runs: subsets, and the recorders for training loops."""

from know_cli.forgetting.branches import BranchRecorder
from know_cli.forgetting.recorder import Recorder, TrainingSession
from know_cli.forgetting.runs import RunRecorder
from know_cli.forgetting.subsets import nested_subsets, subset_sizes

__all__ = [
    "BranchRecorder",
    "Recorder",
    "RunRecorder",
    "TrainingSession",
    "nested_subsets",
    "subset_sizes",
]
