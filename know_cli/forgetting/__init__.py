"""Structured forgetting: nested subsets, and the recorder for training loops."""

from know_cli.forgetting.recorder import Recorder, TrainingSession
from know_cli.forgetting.subsets import nested_subsets, subset_sizes

__all__ = ["Recorder", "TrainingSession", "nested_subsets", "subset_sizes"]
