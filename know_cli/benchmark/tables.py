"""Tables of ``know bench``, with every number computed from its JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from know_cli.benchmark.kernels import (
    GEMM,
    GEMM_FLOP,
    flop,
    kernel_name,
    native_name,
    reference_name,
)
from know_cli.benchmark.rivals import MERGEKIT, OWN
from know_cli.benchmark.runs import COMMAND, PIPELINE
from know_cli.benchmark.scaling import COPY
from know_cli.benchmark.timing import Times, median_ratio
from know_cli.errors import counted
from know_cli.known.preparation import Preparation

# Speed targets of the kernel.
_TARGET_REFERENCE, _TARGET_GEMM = 6.0, 0.55
# The paper's time per parameter, on its authors' GPU.
_PAPER_SECONDS = 2.67e-7


@dataclass(frozen=True)
class Section:
    """A section of the report: title, paragraphs and table.

    Attributes:
        title: heading; empty where the section continues the previous one.
        notes: paragraphs before the table.
        header: column titles; the first column has names, the others numbers.
        rows: cells, as many per row as in the header; without rows there is no table.
    """

    title: str
    notes: tuple[str, ...] = ()
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def to_markdown(results: Mapping[str, Any]) -> str:
    """A Markdown page of the results of :func:`~know_cli.benchmark.results.to_json`."""
    lines = []
    for number, section in enumerate(sections(results)):
        if section.title:
            lines += [f"{'##' if number else '#'} {section.title}", ""]
        for note in section.notes:
            lines += [note, ""]
        if section.rows:
            lines += [_line(section.header), "|---" + "|---:" * (len(section.header) - 1) + "|"]
            lines += [*map(_line, section.rows), ""]
    return "\n".join(lines)


def _times(of: Mapping[str, Sequence[float]]) -> Times:
    return Times(tuple(of["wall"]), tuple(of["processor"]))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def sections(results: Mapping[str, Any]) -> Iterator[Section]:
    """The report on results, the first section being its heading.

    Kernels and baselines that only an earlier version measured are listed like the others.
    """
    kernels = {name: _times(of) for name, of in results["kernels"].items()}
    yield _heading(results)
    yield _kernels(kernels, results["settings"])
    yield _targets(kernels, results["settings"])
    yield from _devices(results)
    if results["runs"]:
        yield _runs(results)
    yield from _threads(results)
    yield from _stages(results)
    yield from _averages(results)


def _threads(results: Mapping[str, Any]) -> Iterator[Section]:
    """What more threads give, where that was measured."""
    count, most = results["settings"]["rows"], results["settings"]["threads"]
    rows = [_thread_row(name, count, of) for name, of in results.get("threads", {}).items()]
    if rows:
        yield Section(
            "Threads",
            (f"Million parameters per second with one thread and with {most}, in turn.",),
            _thread_header(most),
            tuple(rows),
        )
    rows = []
    for run in results["runs"]:
        found = run.get("threads", {})
        for name, of in found.items():
            method, _, dtype = name.partition(", ")
            if method != COPY:
                copy = found.get(f"{COPY}, {dtype}")
                row = _thread_row(name, run["parameters"], of)
                rows.append((*row, *(_of_copy(times, copy) for times in _in_order(of))))
    if rows:
        yield Section(
            "Threads, whole predictions",
            (
                "They read, check, compute, write and flush to disk, without the start of Python "
                f"and torch. The last columns have their time as a multiple of a {COPY}'s of the "
                "same bytes, flushed, too.",
            ),
            (*_thread_header(most), "one thread / copy", f"{most} threads / copy"),
            tuple(rows),
        )


def _thread_header(threads: int) -> tuple[str, ...]:
    return "", "parameters", "one thread", f"{threads} threads", "ratio"


def _thread_row(name: str, parameters: int, of: Mapping[str, Any]) -> tuple[str, ...]:
    one, several = (_times(times) for times in _in_order(of))
    return (
        name,
        f"{parameters:,}",
        f"{parameters / one.seconds / 1e6:.2f}",
        f"{parameters / several.seconds / 1e6:.2f}",
        f"{median_ratio(one.wall, several.wall):.2f} ×",
    )


def _in_order(of: Mapping[str, Any]) -> list[Any]:
    """Times by number of threads, the fewest first."""
    return [of[number] for number in sorted(of, key=int)]


def _of_copy(times: Mapping[str, Any], copy: Mapping[str, Any] | None) -> str:
    """A prediction's time as a multiple of a copy's; empty where none was measured."""
    if copy is None:
        return ""
    return f"{median_ratio(_times(times).wall, _times(copy['1']).wall):.1f}"


def _stages(results: Mapping[str, Any]) -> Iterator[Section]:
    """What is done around a method, where that was measured."""
    found, count = results.get("stages", {}), results["settings"]["rows"]
    rows = [_thread_row(name, count, of) for name, of in found.items() if len(of) > 1]
    if rows:
        yield Section(
            "Around the method",
            (
                "Million parameters per second of what is done with each, stage by stage; bytes in "
                "and out are those of one checkpoint, to and from the page cache. A prediction "
                "from five checkpoints reads five times, and does each of the others once.",
            ),
            _thread_header(results["settings"]["threads"]),
            tuple(rows),
        )


def _averages(results: Mapping[str, Any]) -> Iterator[Section]:
    """The mean of folders as users run it, where that was measured."""
    rows = []
    for run in results.get("averages", ()):
        copy = _times(run[COPY])
        for name in (COPY, OWN, MERGEKIT):
            if name in run:
                times = _times(run[name])
                peak = run["peaks"].get(name)
                rows.append(
                    (
                        name,
                        f"{run['parameters']:,}",
                        f"{times.seconds:.3g}",
                        f"{median_ratio(times.wall, copy.wall):.1f}",
                        f"{peak / 2**20:,.0f}" if peak else "",
                    )
                )
    if rows:
        yield Section(
            "The mean of five folders",
            (
                "A language model of Llama's form in bfloat16, five folders that are read "
                "into the page cache before each: every command from its start to its end, with "
                "the start of Python and torch. "
                "mergekit is there if it was installed (extra `bench`).",
            ),
            ("", "parameters", "seconds", f"/ {COPY}", "most memory, MiB"),
            tuple(rows),
        )


def _heading(results: Mapping[str, Any]) -> Section:
    of, settings = results["machine"], results["settings"]
    threads = counted(settings["threads"], "thread")
    notes = [
        f"Generated by `know bench`; every number is computed from its JSON. {of['processor']} "
        f"({of['cores']} cores, {of['system']}, Python {of['python']}, torch {of['torch']}), "
        f"know-predict {results['version']}, {threads}, S = {settings['checkpoints']}, "
        f"{counted(settings['rounds'], 'round')} in which everything that is compared takes turns, "
        "after one round to warm up. Whole predictions run for at most 3 rounds, and for a single "
        "one "
        "without warm-up from 100 million parameters on. Times are medians; a ratio is the median "
        "of the rounds' ratios."
    ]
    if of["load"] is not None:
        busy = of["load"] > of["cores"]
        notes.append(
            f"Load of the machine over the last fifteen minutes: {of['load']:g} on {of['cores']} "
            "cores"
            + (
                ": it was busy with other work, so wall-clock times are longer than on a free "
                "machine and vary between rounds; processor time is the steadier measure here."
                if busy
                else "."
            )
        )
    return Section("How fast the engine is", tuple(notes))


def _rate(
    name: str, times: Times, settings: Mapping[str, int], processor: bool
) -> tuple[float, float]:
    """Parameters per second, 0 for a matrix product, and floating-point operations per second."""
    seconds = times.processor_seconds if processor else times.seconds
    if name == GEMM:
        return 0.0, GEMM_FLOP / seconds
    rate = settings["rows"] / seconds
    return rate, rate * flop(settings["checkpoints"])


def _kernels(kernels: Mapping[str, Times], settings: Mapping[str, int]) -> Section:
    rows = []
    for name, times in kernels.items():
        cells = []
        for processor in (False, True):
            rate, flops = _rate(name, times, settings, processor)
            cells += [f"{rate / 1e6:.2f}" if rate else "", f"{flops / 1e9:.1f}"]
        rows.append((name, *cells))
    return Section(
        "The kernel alone",
        (
            f"One step of {settings['rows']:,} parameters in memory. A parameter counts as "
            f"{flop(settings['checkpoints']):,} floating-point operations per step, those of the "
            "folded algebra's matrix products, whoever computes it. `matrix product` is torch's, "
            "of 1024 × 1024 float32 matrices.",
        ),
        (
            "kernel",
            "million parameters/s",
            "GFLOP/s",
            "million parameters/s of processor time",
            "GFLOP/s of processor time",
        ),
        tuple(rows),
    )


def _targets(kernels: Mapping[str, Times], settings: Mapping[str, int]) -> Section:
    rows = []
    for preparation in Preparation:
        own = kernels.get(native_name(preparation), kernels[kernel_name(preparation)])
        baseline = reference_name(preparation)
        clock = median_ratio(kernels[baseline].wall, own.wall)
        processor = median_ratio(kernels[baseline].processor, own.processor)
        rows.append(
            (
                baseline,
                f"{_TARGET_REFERENCE:g} ×",
                f"{clock:.1f} ×",
                f"{processor:.1f} ×",
                _met(clock, processor, _TARGET_REFERENCE),
            )
        )
        work = flop(settings["checkpoints"]) * settings["rows"] / GEMM_FLOP
        clock = work * median_ratio(kernels[GEMM].wall, own.wall)
        processor = work * median_ratio(kernels[GEMM].processor, own.processor)
        rows.append(
            (
                f"{GEMM}'s rate, {preparation.value} windows",
                f"{_TARGET_GEMM:.0%}",
                f"{clock:.0%}",
                f"{processor:.0%}",
                _met(clock, processor, _TARGET_GEMM),
            )
        )
    return Section(
        "",
        (
            *(
                ("The native kernel, which is used wherever it was compiled.",)
                if native_name(Preparation.RAW) in kernels
                else ()
            ),
            "Operations that torch does not fuse wait for the cache between two products, and "
            "windows prepared by spread take some operations more. The docstring of "
            "`know_cli/known/torch_kernel.py` says where the kernel's time goes and what was "
            "tried.",
        ),
        ("the kernel against", "target", "wall clock", "processor time", "met"),
        tuple(rows),
    )


def _met(clock: float, processor: float, target: float) -> str:
    reached = {clock >= target, processor >= target}
    if reached == {True}:
        return "yes"
    return "no" if reached == {False} else "by one of the two"


def _devices(results: Mapping[str, Any]) -> Iterator[Section]:
    if not results["devices"]:
        yield Section(
            "GPUs", ("None was measured: the machine has none, or `--device` named none.",)
        )
    count = results["settings"].get("device_rows", results["settings"]["rows"])
    for device, found in results["devices"].items():
        rows = []
        for name, of in found.items():
            if name != "model":
                rate = count / _times(of).seconds
                rows.append((name, f"{rate / 1e6:.2f}", f"{rate * _PAPER_SECONDS:.1f} ×"))
        yield Section(
            f"{device}: {found['model']}",
            (
                f"One step of {count:,} parameters in the device's memory, by the wall clock. The "
                f"paper reports {_PAPER_SECONDS:g} s per parameter on its authors' GPU.",
            ),
            ("kernel", "million parameters/s", "against the paper"),
            tuple(rows),
        )


def _runs(results: Mapping[str, Any]) -> Section:
    rows = []
    for run in results["runs"]:
        pipeline, command, copy = (_times(run[name]) for name in (PIPELINE, COMMAND, COPY))
        rows.append(
            (
                f"{run['parameters']:,}",
                f"{pipeline.seconds:.3g}",
                f"{pipeline.processor_seconds:.3g}",
                f"{command.seconds:.3g}",
                f"{copy.seconds:.3g}",
                f"{median_ratio(pipeline.wall, copy.wall):.1f}",
                f"{run['parameters'] / pipeline.seconds / 1e6:.2f}",
            )
        )
    return Section(
        "Whole predictions",
        (
            f"Seconds to predict one step from {results['settings']['checkpoints']} generated "
            "float32 checkpoints on disk, in the page cache as far as they fit. "
            f"`{PIPELINE}` is the library: open, check, plan, read, compute, write, flush to disk. "
            f"`{COMMAND}` is `know predict`, including the start of Python and torch. `{COPY}` "
            "reads the same bytes, and writes and flushes one checkpoint.",
        ),
        (
            "parameters",
            PIPELINE,
            f"{PIPELINE}, processor time",
            COMMAND,
            COPY,
            f"{PIPELINE} / {COPY}",
            "million parameters/s",
        ),
        tuple(rows),
    )
