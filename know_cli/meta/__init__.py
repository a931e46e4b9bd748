"""KNOWN's meta-training: windows from recorded trajectories, fitting, held-out figures."""

from know_cli.meta.training import Settings, train_bundle
from know_cli.meta.windows import Collection, Target, Windows, collect_windows, find_trajectories

__all__ = [
    "Collection",
    "Settings",
    "Target",
    "Windows",
    "collect_windows",
    "find_trajectories",
    "train_bundle",
]
