"""Safetensors checkpoints: lazy reading, the aligned trajectory, atomic streamed output."""

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
