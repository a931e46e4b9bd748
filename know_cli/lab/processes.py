"""Jobs distributed over several processes, each with one torch thread."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import multiprocessing

from know_cli.errors import OutputError

Result = TypeVar("Result")


def in_processes(
    function: Callable[..., Result],
    jobs: Sequence[tuple[Any, ...]],
    processes: int,
    folder: Path,
    prepare: Callable[..., None] | None = None,
    shared: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """Call a function for each job, yielding the results as they are finished.

    Closing the iterator, or throwing an exception into it, ends the processes.

    Args:
        function: defined at the top of a module, so that a process can import it.
        jobs: arguments of each call.
        processes: the most processes at a time.
        folder: that they write into, for the message if one is killed.
        prepare: called first in each process.
        shared: arguments of ``prepare``; tensors in them are shared, not copied.

    Yields:
        The results, in the order in which they are finished.

    Raises:
        OutputError: a process was killed.
    """
    executor = ProcessPoolExecutor(
        min(processes, len(jobs)),
        # Forked processes would inherit torch's threads in an unknown state; torch's context
        # shares tensors.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(prepare, shared),
    )
    try:
        futures = [executor.submit(function, *job) for job in jobs]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise OutputError(
            f"{folder}: a process ended unexpectedly, perhaps for lack of memory; run the "
            "same command again, with fewer --processes"
        ) from error
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()


def _start(prepare: Callable[..., None] | None, shared: tuple[Any, ...]) -> None:
    # Ctrl-C is handled by the main process, which then ends these.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    if prepare is not None:
        prepare(*shared)
