"""Recorded trajectories: of a few values, and of small networks as they are collected."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from know_cli.forgetting import Recorder, nested_subsets
from know_cli.lab.data import DataSet, load
from know_cli.lab.fitting import one_thread
from know_cli.meta.recording import record_trajectory
from know_cli.meta.series import save_series
from know_cli.meta.setup import Setup, draw_setup

State = Mapping[str, torch.Tensor]


def record(
    folder: Path, state_of: Callable[[int], State], *, seed: int, sessions: int = 7, before: int = 0
) -> str:
    """A trajectory whose checkpoints are a function of the session's index."""
    subsets = nested_subsets(1000, 0.5, sessions + before, seed)
    made = Recorder(folder, subsets, rate=0.5, seed=seed, before=before, function="hand-made")
    for session in made:
        made.save(session, state_of(session.index))
    return made.trajectory


def brief_setup(architecture: str, seed: int) -> Setup:
    """Of a forgetting on the digits whose four sessions train for as long as each other."""
    data = load("digits")
    drawn = draw_setup(seed, {"digits": data}, [architecture])
    return replace(
        drawn, samples=60, rate=0.8, sessions=4, continuations=0, start=None, epochs=3, later_epochs=1.0,
        later_rate=1.0, learning_rate=0.004, batch_size=8, optimiser="adam", schedule="constant",
    )  # fmt: skip


def collect_brief(
    make_folder: Callable[[str], Path], networks: Iterable[tuple[str, int]]
) -> tuple[Path, Path]:
    """Those of :func:`brief_setup`, whole, by architecture and seed."""
    setups = [(brief_setup(*drawn), load("digits")) for drawn in networks]
    return collect_forgettings(make_folder, setups, rows=40_000)


def collect_forgettings(
    make_folder: Callable[[str], Path], setups: Iterable[tuple[Setup, DataSet]], rows: int
) -> tuple[Path, Path]:
    """The files of collected forgettings, and the checkpoints that these are of."""
    files, checkpoints = (make_folder(name) for name in ("files", "checkpoints"))
    with one_thread():
        for number, (setup, data) in enumerate(setups):
            name = f"{number:05d}"
            series = record_trajectory(setup, data, checkpoints / name, rows_per_tensor=rows)
            save_series(series, files / f"{name}.safetensors")
    return files, checkpoints


def counting(index: int) -> State:
    """Values that tell where they are from: 100 × tensor + 10 × index + element."""
    return {
        "conv.weight": (100 + 10 * index + torch.arange(2.0)).view(1, 2, 1, 1),
        "head.weight": (200 + 10 * index + torch.arange(4.0)).view(2, 2),
        "head.bias": 300 + 10 * index + torch.arange(2.0),
        "norm.weight": 400 + 10.0 * index + torch.zeros(1),
        "norm.bias": 500 + 10.0 * index + torch.zeros(1),
        "norm.running_mean": 600 + 10.0 * index + torch.zeros(1),
        "norm.running_var": 700 + 10.0 * index + torch.zeros(1),
        "norm.num_batches_tracked": torch.tensor(index),
        "frozen.bias": torch.ones(3),
    }


def geometric(seed: int) -> Callable[[int], State]:
    """A law: every parameter decays towards a value of its own by a factor of its trajectory."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv.weight": (4, 3, 3, 3), "head.weight": (10, 12), "head.bias": (40,)}
    limits = {n: 0.3 * torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    sizes = {n: 0.1 * torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    decay = 0.6 + 0.3 * float(torch.rand((), generator=generator))
    return lambda index: {name: limits[name] + sizes[name] * decay**index for name in shapes}
