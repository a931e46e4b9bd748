"""What more threads give: each kernel, and a whole prediction, with one and with several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import torch

from know_cli.benchmark.kernels import in_blocks, kernels_of, random_walks
from know_cli.benchmark.timing import Times, take_turns
from know_cli.kinds import Kind
from know_cli.known.bundle import Bundle
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request

Scaling = dict[str, dict[int, Times]]
#: What predictions are compared with.
COPY = "bare copy"


def measure_threads(bundle: Bundle, rows: int, rounds: int, threads: int) -> Scaling:
    """Time one step of each kernel with one thread and with several.

    Args:
        bundle: whose conv weights and preparation are used.
        rows: parameters per step.
        rounds: see :func:`~know_cli.benchmark.timing.take_turns`.
        threads: the most; more than one.

    Returns:
        Times by kernel and number of threads.
    """
    generator = torch.Generator().manual_seed(0)
    history, out = random_walks(bundle.checkpoints, rows, generator), torch.empty(rows)
    state = bundle.states[Kind.CONV]
    cases: dict[str, Callable[[], object]] = {}
    keys: dict[str, tuple[str, int]] = {}
    with ExitStack() as stack:
        for count in (1, threads):
            pool = stack.enter_context(
                ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
            )
            for name, kernel in kernels_of(state, bundle.checkpoints, bundle.preparation).items():
                label = f"{name}, {count}"
                keys[label] = name, count
                cases[label] = in_blocks(kernel, history, out, pool, count)
        return by_threads(take_turns(cases, rounds), keys)


def measure_predictions(
    request: Request, methods: Sequence[str], rounds: int, threads: int, copy: Callable[[], object]
) -> Scaling:
    """Time whole predictions by the library with one thread and with several, and a bare copy.

    Args:
        request: with inputs and an output, which is replaced.
        methods: their names.
        rounds: see :func:`~know_cli.benchmark.timing.take_turns`.
        threads: the most; more than one.
        copy: reads and writes the same bytes.

    Returns:
        Times by method and number of threads, and of the copy, by :data:`COPY`, with one.
    """
    cases: dict[str, Callable[[], object]] = {COPY: copy}
    keys: dict[str, tuple[str, int]] = {COPY: (COPY, 1)}
    for method in methods:
        for count in (1, threads):
            settings = replace(request.settings, threads=count, norm=None)
            weights = request.weights if method == request.method else None
            one = replace(request, method=method, weights=weights, options={}, settings=settings)

            def run(one: Request = one) -> None:
                with open_prediction(one) as prediction:
                    prediction.execute()

            keys[f"{method}, {count}"] = method, count
            cases[f"{method}, {count}"] = run
    return by_threads(take_turns(cases, rounds), keys)


def by_threads(found: dict[str, Times], keys: dict[str, tuple[str, int]]) -> Scaling:
    """Times by name and number of threads, from those by label and what each label stands for."""
    scaling: Scaling = {}
    for label, times in found.items():
        name, count = keys[label]
        scaling.setdefault(name, {})[count] = times
    return scaling
