"""Results of ``know bench`` as JSON; :mod:`know_cli.benchmark.tables` makes tables of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from know_cli import __version__
from know_cli.benchmark.scaling import Scaling
from know_cli.benchmark.timing import Times
from know_cli.lab.machine import machine

FORMAT = 1

Runs = Sequence[tuple[int, Mapping[str, Times], Scaling]]
#: See :func:`~know_cli.benchmark.rivals.measure_averages`.
Averages = tuple[int, Mapping[str, Times], Mapping[str, int]]


def to_json(
    kernels: Mapping[str, Times],
    devices: Mapping[str, Mapping[str, Times]],
    runs: Runs,
    settings: Mapping[str, int],
    threads: Scaling,
    stages: Scaling,
    averages: Sequence[Averages] = (),
) -> dict[str, Any]:
    """Results in plain types.

    Args:
        kernels: of :func:`~know_cli.benchmark.kernels.measure_kernels`.
        devices: of :func:`~know_cli.benchmark.devices.measure_device`, by the device's name.
        runs: of :func:`~know_cli.benchmark.runs.measure_runs`, smallest first.
        settings: ``checkpoints``, ``rows`` (of the kernels' windows), ``rounds``, ``threads``.
        threads: of :func:`~know_cli.benchmark.scaling.measure_threads`.
        stages: of :func:`~know_cli.benchmark.stages.measure_stages`.
        averages: of :func:`~know_cli.benchmark.rivals.measure_averages`.

    Returns:
        ``machine`` with its ``load`` (mean number of running and waiting processes over the last
        fifteen minutes; None where unknown); ``settings``; the seconds of every round by name in
        ``kernels``, by device and name in ``devices``, and in ``runs`` for each number of
        ``parameters``; by name and number of threads in ``threads``, of all
        and of each run, and in ``stages``; in ``averages`` also the ``peaks`` of memory, in bytes.
    """
    load = round(os.getloadavg()[2], 1) if hasattr(os, "getloadavg") else None
    return {
        "format": FORMAT,
        "version": __version__,
        "machine": {**machine(), "load": load},
        "settings": dict(settings),
        "kernels": {name: _times_json(times) for name, times in kernels.items()},
        "devices": {
            device: {
                "model": _model(device),
                **{name: _times_json(times) for name, times in of.items()},
            }
            for device, of in devices.items()
        },
        "runs": [
            {
                "parameters": count,
                **{name: _times_json(times) for name, times in of.items()},
                "threads": _scaling_json(scaling),
            }
            for count, of, scaling in runs
        ],
        "threads": _scaling_json(threads),
        "stages": _scaling_json(stages),
        "averages": [
            {
                "parameters": count,
                "peaks": peaks,
                **{name: _times_json(times) for name, times in of.items()},
            }
            for count, of, peaks in averages
        ],
    }


def _times_json(times: Times) -> dict[str, list[float]]:
    return {"wall": list(times.wall), "processor": list(times.processor)}


def _scaling_json(scaling: Scaling) -> dict[str, Any]:
    return {
        name: {str(count): _times_json(times) for count, times in of.items()}
        for name, of in scaling.items()
    }


def _model(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return device
