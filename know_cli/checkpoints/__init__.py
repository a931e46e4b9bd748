"""Safetensors checkpoints: lazy reading, the aligned trajectory, atomic streamed output.

>>> from pathlib import Path
>>> import torch
>>> paths = [Path(f"ckpt{k}.safetensors") for k in range(2)]  # Θ0, Θ1
>>> for path in paths:
...     save_checkpoint(path, {"fc.weight": torch.ones(3, 2)}, {"format": "pt"})
>>> with open_checkpoint(paths[0]) as checkpoint:
...     checkpoint.tensors["fc.weight"].shape
(3, 2)
>>> with open_trajectory(paths) as trajectory:
...     [entry.path.name for entry in trajectory.entries("fc.weight")]
['ckpt0.safetensors', 'ckpt1.safetensors']
"""

from know_cli.checkpoints.alignment import check_same_model
from know_cli.checkpoints.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from know_cli.checkpoints.state import save_checkpoint
from know_cli.checkpoints.trajectory import Trajectory, open_trajectory
from know_cli.checkpoints.writer import CheckpointPart, CheckpointWriter, SharedPlace, Sink

__all__ = [
    "Checkpoint",
    "CheckpointPart",
    "CheckpointWriter",
    "SharedPlace",
    "Sink",
    "TensorEntry",
    "Trajectory",
    "check_same_model",
    "open_checkpoint",
    "open_trajectory",
    "save_checkpoint",
]
