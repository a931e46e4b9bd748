"""``know bench``: what it counts, how it compares, and what its tables say."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from know_cli.benchmark import results, rivals, runs, tables
from know_cli.benchmark.devices import measure_device
from know_cli.benchmark.kernels import GEMM, GEMM_FLOP, flop, kernel_name, reference_name
from know_cli.benchmark.runs import COMMAND, PIPELINE, shapes, write_trajectory
from know_cli.benchmark.scaling import COPY
from know_cli.benchmark.timing import Times, median_ratio, take_turns
from know_cli.checkpoints import open_trajectory
from know_cli.errors import EXIT_DONE, EXIT_OUTPUT, EXIT_USAGE
from know_cli.known.module import Preparation
from know_cli.passes.native import native
from tests.support.bundles import random_bundle
from tests.support.command import Command, one_line

ROWS = 1000
# What the committed results have of earlier baselines.
KERAS = "Keras model (tf_keras), raw windows"
HALF = "kernel with bfloat16 products, {} windows"
COMMITTED = Path(results.__file__).parents[2] / "docs" / "results" / "speed.json"


def seconds(*values: float) -> Times:
    return Times(values, tuple(value / 2 for value in values))


def example(**more: Times) -> dict[str, Any]:
    kernels = {
        GEMM: seconds(1.0, 2.0, 3.0),
        kernel_name(Preparation.RAW): seconds(1.0, 1.0, 4.0),
        reference_name(Preparation.RAW): seconds(6.0, 7.0, 20.0),
        kernel_name(Preparation.SPREAD): seconds(1.0, 1.0, 1.0),
        reference_name(Preparation.SPREAD): seconds(5.0, 5.0, 5.0),
        **more,
    }
    times = {PIPELINE: seconds(4.0), COMMAND: seconds(9.0), COPY: seconds(0.5)}
    naive = {1: seconds(3.0, 1.0, 4.0), 2: seconds(2.0, 2.0, 1.0)}
    copy = {1: seconds(1.0, 0.5, 1.0)}
    runs = [(2_000_000, times, {"naive, float32": naive, f"{COPY}, float32": copy})]
    settings = {"checkpoints": 5, "rows": ROWS, "rounds": 3, "threads": 2}
    by_threads = {"K": {2: seconds(1.0), 1: seconds(1.9)}}
    return results.to_json(kernels, {}, runs, settings, by_threads, {"rounded": by_threads["K"]})


def test_floating_point_operations_are_those_of_the_folded_layers() -> None:
    layers = [(5, 64), (4, 64), (5, 8), (4, 8), *[(8, 64)] * 4, *[(8, 32)] * 2, *[(64, 32)] * 2, (64, 1)]  # fmt: skip
    assert flop(5) == 2 * sum(inputs * outputs for inputs, outputs in layers)
    assert flop(6) - flop(5) == 2 * 2 * (64 + 8)


def test_functions_take_turns_after_a_call_to_warm_up() -> None:
    calls: list[str] = []

    def called(name: str) -> Callable[[], None]:
        return lambda: calls.append(name)

    take_turns({"a": called("a"), "b": called("b")}, 1, before=called("-"))
    assert "".join(calls) == "-a-b-a-b"
    calls.clear()
    times = take_turns({"a": called("a"), "b": called("b")}, 3)
    assert "".join(calls) == "abababab"
    assert all(len(of.wall) == len(of.processor) == 3 for of in times.values())
    assert all(value >= 0 for of in times.values() for value in (*of.wall, *of.processor))


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    # The medians' own ratio would be 2: one busy round must not decide.
    assert median_ratio((2.0, 30.0, 1.0), (1.0, 10.0, 0.1)) == 3


def test_tables_are_computed_from_the_results() -> None:
    text = tables.to_markdown(example())
    assert "| reference module, raw windows | 6 × | 6.0 × | 6.0 × | yes |" in text
    assert "| reference module, spread windows | 6 × | 5.0 × | 5.0 × | no |" in text
    share = flop(5) * ROWS / GEMM_FLOP * 2
    assert (
        f"| matrix product's rate, spread windows | 55% | {share:.0%} | {share:.0%} | no |" in text
    )
    assert "| 2,000,000 | 4 | 2 | 9 | 0.5 | 8.0 | 0.50 |" in text
    rate = GEMM_FLOP / 2 / 1e9
    assert f"| matrix product |  | {rate:.1f} |  | {2 * rate:.1f} |" in text
    # A thousand parameters in 1.9 s and in one.
    assert "| K | 1,000 | 0.00 | 0.00 | 1.90 × |" in text
    assert "| rounded | 1,000 | 0.00 | 0.00 | 1.90 × |" in text
    assert "| naive, float32 | 2,000,000 | 0.67 | 1.00 | 1.50 × | 3.0 | 2.0 |" in text
    # What an earlier version measured, too, is listed like the rest: a parameter in 5 ms.
    text = tables.to_markdown(example(**{KERAS: seconds(5.0, 5.0, 12.0)}))
    gigaflops = flop(5) * ROWS / 5 / 1e9
    assert f"| {KERAS} | 0.00 | {gigaflops:.1f} | 0.00 | {2 * gigaflops:.1f} |" in text


def test_a_section_is_the_same_table_in_markdown_and_on_a_terminal() -> None:
    page = tables.to_markdown(example()).splitlines()
    found = list(tables.sections(example()))
    assert page[0] == f"# {found[0].title}" == "# How fast the engine is"
    assert [f"## {each.title}" for each in found[1:] if each.title] == [
        line for line in page if line.startswith("## ")
    ]
    with_rows = [each for each in found if each.rows]
    assert [each.header[0] for each in with_rows] == [
        "kernel", "the kernel against", "parameters", "", "", "",
    ]  # fmt: skip
    for each in with_rows:
        assert {len(row) for row in each.rows} == {len(each.header)}
        for row in each.rows:
            assert f"| {' | '.join(row)} |" in page
    assert {note for each in found for note in each.notes} <= set(page)


def test_warming_up_can_be_left_out() -> None:
    calls: list[int] = []
    take_turns({"a": lambda: calls.append(1)}, 2, warm_up=False)
    assert len(calls) == 2


def test_a_device_is_measured_in_its_own_memory() -> None:
    """The CPU is in the place of a device; Triton and compilers are for CUDA alone."""
    found = measure_device(random_bundle(5), torch.device("cpu"), 3000, 2)
    assert set(found) == {"torch operations", "reference module"}
    assert all(len(times.wall) == 2 and min(times.wall) > 0 for times in found.values())


def test_a_table_of_a_device() -> None:
    found = example()
    assert "None was measured" in tables.to_markdown(found)
    times = {"Triton kernel": {"wall": [2e-6, 1e-6, 5e-6], "processor": [0.0] * 3}}
    found["devices"] = {"cuda:0": {"model": "a GPU", **times}}
    found["settings"]["device_rows"] = 1000
    text = tables.to_markdown(found)
    assert "None was measured" not in text
    assert "## cuda:0: a GPU" in text
    # A thousand parameters in two microseconds.
    assert f"| Triton kernel | 500.00 | {5e8 * 2.67e-7:.1f} × |" in text


def test_bench_refuses_a_device_that_is_not_here(know: Command) -> None:
    for device, message in (("gpu", "is none of auto, cpu"), ("cuda:63", "CUDA device")):
        done = know("bench", "--device", device, "--sizes", "0")
        assert done.returncode == EXIT_USAGE
        assert message in one_line(done.stderr)


@pytest.mark.parametrize(("load", "words"), [(1.0, ": 1 on"), (99.0, "busy with other work")])
def test_the_load_of_the_machine_is_told(load: float, words: str) -> None:
    found = example()
    found["machine"]["load"] = load
    assert words in tables.to_markdown(found)
    assert ("busy" in tables.to_markdown(found)) == (load > found["machine"]["cores"])


@given(st.integers(1_000, 10**10))
def test_generated_checkpoints_are_of_about_the_size_asked_for(parameters: int) -> None:
    found = shapes(parameters)
    total = sum(int(np.prod(shape)) for shape in found.values())
    assert 0.2 * parameters <= total <= parameters
    assert total >= 0.95 * parameters or parameters < 100_000
    assert max(int(np.prod(shape)) for shape in found.values()) <= 1 << 24


def test_generated_checkpoints_are_a_trajectory_that_moves_ever_less(tmp_path: Path) -> None:
    paths = write_trajectory(tmp_path, 5000, 4)
    with open_trajectory(paths) as trajectory:
        assert {name: e.shape for name, e in trajectory.first.tensors.items()} == shapes(5000)
    flat = [np.fromfile(path, np.float32)[-2000:] for path in paths]
    lengths = [float(np.linalg.norm(b - a)) for a, b in itertools.pairwise(flat)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] > 0


def test_bench_measures_and_writes(
    tmp_path: Path, bundle_path: Path, know: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []

    def command(words: list[str], check: bool) -> None:
        """The command that is measured, in a process that is quick to start."""
        done = know(*words[words.index("predict") :], process=True)
        assert done.returncode == EXIT_DONE, done.stderr
        ran.append(done.returncode)

    monkeypatch.setattr(runs.subprocess, "run", command)
    done = know(
        "bench", "--sizes", "1e4", "--rows", 2000, "--rounds", 1, "--threads", 2, "--weights",
        bundle_path, "--folder", tmp_path, "--max-memory", "64M", "--json", "b.json", "--table",
        "b.md", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    assert len(ran) == 2  # one to warm up
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["settings"] == {"checkpoints": 5, "rows": 2000, "rounds": 1, "threads": 2}
    (run,) = found["runs"]
    assert 9_000 < run["parameters"] <= 10_000
    for times in (run[PIPELINE], run[COMMAND], run[COPY], *found["kernels"].values(), *(t for of in found["threads"].values() for t in of.values()),
                  *(t for of in run["threads"].values() for t in of.values()),
                  *(t for of in found["stages"].values() for t in of.values())):  # fmt: skip
        assert len(times["wall"]) == 1
        assert times["wall"][0] > 0
    assert len(found["stages"]) == (14 if native() else 0)
    assert (tmp_path / "b.md").read_text() == tables.to_markdown(found)
    for section in tables.sections(found):
        for text in (section.title, *section.notes, *section.header):
            assert text in done.stdout
        for row in section.rows:
            assert re.search(
                r"\s+".join(map(re.escape, row)).replace(r"\s+\s+", r"\s+"), done.stdout
            )
    # The generated checkpoints are gone.
    assert {path.name for path in tmp_path.iterdir()} == {"b.json", "b.md"}


MERGEKIT = """#!{python}
import json, pathlib, sys
recipe = json.loads(pathlib.Path(sys.argv[1]).read_text())
models = [pathlib.Path(of["model"]) for of in recipe["models"]]
assert len(models) == 5 and sum(of["parameters"]["weight"] for of in recipe["models"]) == 1
assert all((one / "config.json").is_file() for one in models)
out = pathlib.Path(sys.argv[2])
out.mkdir()
(out / "model.safetensors").write_bytes((models[0] / "model.safetensors").read_bytes())
sys.exit({code})
"""


@pytest.mark.parametrize("code", [0, 3])
def test_means_of_folders_are_compared_with_mergekit(
    tmp_path: Path, know: Command, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """With one that stands in for it."""
    tools = tmp_path / "tools"
    tools.mkdir()
    stand_in = tools / rivals.MERGEKIT_COMMAND
    stand_in.write_text(MERGEKIT.format(python=sys.executable, code=code))
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    monkeypatch.setattr(rivals, "_WIDTH", 8)
    monkeypatch.setattr(rivals, "_INNER", 16)
    monkeypatch.setattr(rivals, "_VOCABULARY", 32)
    done = know(
        "bench", "--sizes", "0", "--averages", "5000", "--rows", 1000, "--rounds", 1, "--threads", 1,
        "--folder", tmp_path, "--json", "b.json", cwd=tmp_path,
    )  # fmt: skip
    if code:
        assert done.returncode == EXIT_OUTPUT
        assert "mergekit-yaml failed with exit code 3: it said nothing" in done.stderr
    else:
        assert done.returncode == EXIT_DONE, done.stderr
        (run,) = json.loads((tmp_path / "b.json").read_text())["averages"]
        assert 4_000 < run["parameters"] < 6_000
        assert run["peaks"].keys() == {rivals.OWN, rivals.MERGEKIT}
        # The stand-in imports nothing that is large.
        assert 2**20 < run["peaks"][rivals.MERGEKIT] < run["peaks"][rivals.OWN]
        for name in (COPY, rivals.OWN, rivals.MERGEKIT):
            assert len(run[name]["wall"]) == 1
            assert re.search(rf"{re.escape(name)}\s+[0-9,]+\s+[0-9.]+", done.stdout)
    assert {path.name for path in tmp_path.iterdir()} - {"b.json"} == {"tools"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("--sizes much", EXIT_USAGE, "'much' is not a number of parameters from 1e3 to 1e11"),
        ("--sizes 1e5,10", EXIT_USAGE, "'10' is not a number of parameters"),
        ("--sizes nan", EXIT_USAGE, "'nan' is not a number of parameters"),
        ("--averages 7", EXIT_USAGE, "--averages 7: '7' is not a number of parameters"),
        ("--device-rows 5000", EXIT_USAGE, "is for a --device other than the CPU"),
        ("--folder missing", EXIT_OUTPUT, "missing: no such folder"),
        ("--json missing/b.json", EXIT_OUTPUT, "missing: no such folder"),
    ],
)
def test_bench_errors(arguments: str, code: int, words: str, tmp_path: Path, know: Command) -> None:
    done = know("bench", *arguments.split(), cwd=tmp_path, process=arguments == "--sizes much")
    assert done.returncode == code, done.stderr
    assert words in one_line(done.stderr)


def test_bench_asks_for_space_first(
    tmp_path: Path, know: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1000))  # type: ignore[attr-defined]
    done = know("bench", "--sizes", "1e5", "--folder", tmp_path, cwd=tmp_path)
    assert done.returncode == EXIT_OUTPUT
    assert "100,000 parameters need 2800000 bytes of disk, 1000 are free" in one_line(done.stderr)


def test_the_committed_tables_are_those_of_the_committed_results() -> None:
    text = COMMITTED.with_suffix(".md").read_text(encoding="utf-8")
    assert text == tables.to_markdown(json.loads(COMMITTED.read_text(encoding="utf-8")))


def test_the_page_on_speed_has_the_committed_results_of_the_native_kernel() -> None:
    path = COMMITTED.with_name("kernels.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".md").read_text(encoding="utf-8") == tables.to_markdown(found)

    def wall(of: dict[str, Any], threads: int) -> tuple[float, ...]:
        return tuple(of[str(threads)]["wall"])

    kernels = [found["threads"][f"{name}, spread windows"] for name in ("native kernel", "kernel")]
    native, torch_s = kernels
    runs = found["runs"][-1]["threads"]
    more, torch_more, whole, whole_half = (
        median_ratio(wall(of, 1), wall(of, 2))
        for of in (native, torch_s, runs["known, float32"], runs["known, bfloat16"])
    )

    def of_copy(method: str, dtype: str) -> float:
        copy = runs[f"{COPY}, {dtype}"]
        return median_ratio(wall(runs[f"{method}, {dtype}"], 2), wall(copy, 1))

    text = " ".join((COMMITTED.parents[2] / "docs" / "speed.md").read_text().split())
    assert (
        f"{median_ratio(wall(torch_s, 1), wall(native, 1)):.1f} times as fast as torch's operations on one "
        f"thread; a second thread gives {more:.2f} times as much (torch's operations {torch_more:.2f}), and "
        f"whole predictions of 50 million parameters {whole:.2f} times (float32) and {whole_half:.2f} times "
        "(bfloat16)"
    ) in text
    assert found["runs"][-1]["parameters"] == pytest.approx(5e7, rel=1e-3)
    assert (
        f"`--method naive` takes {of_copy('naive', 'float32'):.1f} times as long as a bare copy that is flushed "
        f"to disk, too, and `--method average` {of_copy('average', 'float32'):.1f} times (float32), "
        f"{of_copy('naive', 'bfloat16'):.1f} and {of_copy('average', 'bfloat16'):.1f} times (bfloat16"
    ) in text


def test_the_page_on_speed_has_the_committed_means_of_folders() -> None:
    path = COMMITTED.with_name("folders.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".md").read_text(encoding="utf-8") == tables.to_markdown(found)
    (run,) = found["averages"]
    own, theirs, copy = (tuple(run[name]["wall"]) for name in (rivals.OWN, rivals.MERGEKIT, COPY))
    peaks = [f"{run['peaks'][name] / 2**20:,.0f}" for name in (rivals.OWN, rivals.MERGEKIT)]
    text = " ".join((COMMITTED.parents[2] / "docs" / "speed.md").read_text().split())
    assert (
        f"takes {median_ratio(own, theirs):.2f} of mergekit's time, in {peaks[0]} MiB of memory instead of "
        f"{peaks[1]} ([measured](results/folders.md)), and {median_ratio(own, copy):.1f} times that of a bare copy"
    ) in text


def test_the_page_on_speed_has_what_was_measured_on_a_card() -> None:
    path = COMMITTED.with_name("gpu.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".md").read_text(encoding="utf-8") == tables.to_markdown(found)
    (card,) = found["devices"].values()
    rows = found["settings"]["device_rows"]
    triton, torch_s, module = (
        Times(tuple(card[name]["wall"]), ()).seconds
        for name in ("Triton kernel", "torch operations", "reference module")
    )
    largest = found["runs"][-1]
    pipeline, command, copy = (tuple(largest[name]["wall"]) for name in (PIPELINE, COMMAND, COPY))
    text = " ".join((COMMITTED.parents[2] / "docs" / "speed.md").read_text().split())
    assert (
        f"a step of {rows // 10**6} million parameters at {rows / triton / 1e6:,.0f} million a second, "
        f"{rows / triton * 2.67e-7:.0f} times the paper's rate on its authors' GPU, {torch_s / triton:.1f} "
        f"times that of torch's operations there and {module / triton:.1f} times the readable module's"
    ) in text
    assert (
        f"A whole prediction of {largest['parameters'] / 1e6:.0f} million takes "
        f"{Times(pipeline, ()).seconds:.1f} s, {median_ratio(pipeline, copy):.1f} times a bare copy; the "
        f"command, {Times(command, ()).seconds:.1f} s"
    ) in text


def test_the_page_on_speed_has_the_committed_results() -> None:
    found = json.loads(COMMITTED.read_text())
    kernels = {name: tuple(times["wall"]) for name, times in found["kernels"].items()}
    own = kernels[kernel_name(Preparation.RAW)]
    largest = found["runs"][-1]
    rate = largest["parameters"] / Times(tuple(largest[PIPELINE]["wall"]), ()).seconds / 1e6
    assert (found["settings"]["threads"], round(largest["parameters"], -6)) == (1, 10**9)
    text = " ".join((COMMITTED.parents[2] / "docs" / "speed.md").read_text().split())
    assert (
        f"{rate:.1f} million parameters per second per step in a checkpoint of a billion; "
        f"the kernel is {median_ratio(kernels[reference_name(Preparation.RAW)], own):.1f} times as fast as the "
        f"readable module and {median_ratio(kernels[KERAS], own):.1f} times as fast as the authors' Keras model"
    ) in text


def test_what_is_measured_no_more_is_told_as_it_was_recorded() -> None:
    found = json.loads(COMMITTED.read_text())
    kernels = {name: tuple(times["wall"]) for name, times in found["kernels"].items()}
    own = {preparation: kernels[kernel_name(preparation)] for preparation in Preparation}
    slower = {p: median_ratio(own[p], kernels[HALF.format(p.value)]) for p in Preparation}
    near = {(e["kind"], e["dtype"]): e["within_half"] for e in found["halves"]["spread"]}
    text = " ".join((COMMITTED.parent / "README.md").read_text(encoding="utf-8").split())
    ratio = median_ratio(kernels[KERAS], own[Preparation.RAW])
    assert f"The kernel was {ratio:.1f} times as fast as the same KNOWN in Keras" in text
    assert (
        f"ran at {slower[Preparation.RAW]:.2f} (raw windows) and "
        f"{slower[Preparation.SPREAD]:.2f} (spread windows) of its speed"
    ) in text
    lowest, highest = min(near, key=near.__getitem__), max(near, key=near.__getitem__)
    assert (lowest, highest) == (("conv", "F16"), ("bias", "BF16"))
    assert (f"{near[lowest]:.0%} (float16, conv) to {near[highest]:.1%} (bfloat16, bias)").replace(
        "%", " %"
    ) in text
