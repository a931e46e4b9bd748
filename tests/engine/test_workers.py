"""Workers that each take a batch through all stages: in whatever order they finish."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from know_cli.checkpoints.checkpoint import Checkpoint, TensorEntry
from know_cli.checkpoints.header import TensorInfo
from know_cli.engine.batches import adjacent
from know_cli.engine.delivery import Delivery
from know_cli.engine.pipeline import Pipeline
from know_cli.engine.plan import Action, Batch, PlannedTensor, Segment
from know_cli.engine.settings import Settings
from know_cli.engine.written import Written
from know_cli.errors import CheckpointError
from know_cli.kinds import Kind
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request
from know_cli.prediction.together import open_together
from tests.support.trajectories import write_trajectory


def trajectory(bad: tuple[str, ...] = ()) -> list[dict[str, Tensor]]:
    """Tensors of several dtypes with more rows than a batch, each channel of which goes on."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (90, 700), "b.weight": (110, 331), "c.weight": (50, 1300, 3, 3)}
    found: list[dict[str, Tensor]] = [{} for _ in range(5)]
    for name, shape in shapes.items():
        dtype = {"b": torch.bfloat16}.get(name[0], torch.float32)
        value = torch.randn(shape, generator=generator)
        for state in found:
            value = value + 0.01 * torch.randn(shape, generator=generator)
            state[name] = value.to(dtype)
    for name in bad:
        found[2][name][-1, -1] = torch.inf
    return found


def slow_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every third batch take much longer than those after it."""
    compute, count = Pipeline._compute, iter(range(10**6))

    def slow(self: Pipeline, *arguments: Any) -> None:
        if next(count) % 3 == 0:
            time.sleep(0.05)
        compute(self, *arguments)

    monkeypatch.setattr(Pipeline, "_compute", slow)


def tensor(name: str, count: int) -> PlannedTensor:
    return PlannedTensor(name, Kind.FC, Action.PREDICT, "", "F32", (count,), count, 4 * count)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3), st.sampled_from(["F32", "BF16"]), st.booleans()),
             min_size=1, max_size=12),
    st.integers(0, 20),
)  # fmt: skip
def test_what_lies_together_is_read_at_once(
    tensors: list[tuple[int, int, str, bool]], before: int
) -> None:
    """Tensors of some lengths, gaps before them, types, and whether each begins a file."""
    segments, entries, row, position, number = [], [], 0, 0, 0
    for count, gap, dtype, begins in tensors:
        number += begins
        position = (0 if begins else position) + gap
        start = before if not segments else 0  # a batch may begin within a tensor
        size = {"F32": 4, "BF16": 2}[dtype]
        end = position + (start + count) * size
        name = str(len(segments))
        entries.append(
            TensorEntry(TensorInfo(name, dtype, (start + count,), position, end), Path(str(number)))
        )
        segments.append(Segment(tensor(name, start + count), start, count, row))
        row, position = row + count, end
    found = list(adjacent(segments, entries))
    places = {
        segment.row + k: (entry.path, entry.dtype, entry.info.begin + (segment.start + k) * size)
        for segment, entry in zip(segments, entries, strict=True)
        for size in [{"F32": 4, "BF16": 2}[entry.dtype]]
        for k in range(segment.count)
    }
    read = {
        run.rows.start + k: (
            run.entry.path,
            run.entry.dtype,
            run.entry.info.begin + (run.start + k) * size,
        )
        for run in found
        for size in [{"F32": 4, "BF16": 2}[run.entry.dtype]]
        for k in range(run.rows.stop - run.rows.start)
    }
    assert read == places
    # And no two could have been one.
    for one, other in pairwise(found):
        size = {"F32": 4, "BF16": 2}[one.entry.dtype]
        after = one.entry.info.begin + (one.start + one.rows.stop - one.rows.start) * size
        assert (one.entry.path, one.entry.dtype, after) != (
            other.entry.path, other.entry.dtype, other.entry.info.begin,
        )  # fmt: skip


def test_tiny_tensors_are_read_many_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    states = [
        {f"layer{i}.weight": torch.randn(4, 4, generator=generator) for i in range(2000)}
        for _ in range(3)
    ]
    paths = write_trajectory(tmp_path, states)
    reads: list[int] = []
    read = Checkpoint.read_with

    def counted(self: Checkpoint, entry: TensorEntry, count: int, how: Any) -> None:
        reads.append(count)
        read(self, entry, count, how)

    request = Request(paths, tmp_path / "out", settings=Settings(), method="average")
    with open_prediction(request) as opened:
        monkeypatch.setattr(Checkpoint, "read_with", counted)
        opened.execute()
    assert len(reads) < 3 * 100
    found = load_file(tmp_path / "out")
    for name in ("layer0.weight", "layer1234.weight", "layer1999.weight"):
        mean = torch.stack([state[name].double() for state in states]).mean(0)
        torch.testing.assert_close(found[name], mean.float(), rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize(("method", "small"), [("known", 1 << 20), ("average", 3 << 20)])
def test_bytes_and_figures_do_not_depend_on_threads_or_memory(
    method: str, small: int, bundle_path: Path, tmp_path: Path
) -> None:
    paths = write_trajectory(tmp_path, trajectory())
    found = set()
    batches = set()
    for threads, memory in ((1, 1 << 30), (2, 1 << 30), (5, 1 << 30), (3, 9 << 20), (1, small)):
        settings = Settings(steps=2, threads=threads, max_memory=memory)
        request = Request(
            paths, tmp_path / "out", settings=settings, method=method, force=True,
            **{"weights": str(bundle_path)} if method == "known" else {},  # type: ignore[arg-type]
        )  # fmt: skip
        with open_prediction(request) as opened:
            batches.add(opened.plan.batch_rows)
            report = opened.execute()
        figures = str(report.to_json()["kinds"])
        found.add((figures, (tmp_path / "out").read_bytes()))
    assert len(batches) > 1
    assert len(found) == 1


def test_batches_are_taken_into_account_in_the_order_of_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_trajectory(tmp_path, trajectory())
    slow_at_first(monkeypatch)
    order: list[Batch] = []
    written: list[Batch] = []
    account, write = Delivery.account, Delivery.write

    def recorded(self: Delivery, one: Written) -> None:
        order.append(one.batch)
        account(self, one)

    def also_recorded(self: Delivery, batch: Batch, *arguments: Any) -> Written:
        found = write(self, batch, *arguments)
        written.append(batch)
        return found

    monkeypatch.setattr(Delivery, "account", recorded)
    monkeypatch.setattr(Delivery, "write", also_recorded)
    request = Request(paths, tmp_path / "out", settings=Settings(threads=4), method="average")
    with open_prediction(request) as opened:
        expected = list(opened.plan.batches())
        opened.execute()
    assert order == expected
    assert written != expected  # they did finish in another order


def test_after_an_error_no_batch_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_trajectory(tmp_path, trajectory())
    begun: list[Batch] = []
    numbers = iter(range(1, 10**6))
    read = Pipeline.read

    def failing(self: Pipeline, batch: Batch, *arguments: Any) -> Batch:
        begun.append(batch)
        number = next(numbers)
        time.sleep(0.02)
        if number == 3:
            raise CheckpointError("no more")
        return read(self, batch, *arguments)

    monkeypatch.setattr(Pipeline, "read", failing)
    request = Request(paths, tmp_path / "out", settings=Settings(threads=2), method="average")
    with open_prediction(request) as opened:
        total = len(list(opened.plan.batches()))
        with pytest.raises(CheckpointError, match="no more"):
            opened.execute()
    assert len(begun) <= 6 < total  # as many as are under way, and none that only waited


def test_memory_of_batches_is_given_back_before_tensors_are_predicted_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_trajectory(tmp_path, trajectory())
    pipelines: list[Pipeline] = []
    begin, wholes = Pipeline.__init__, Pipeline.predict_wholes

    def noted(self: Pipeline, *arguments: Any) -> None:
        begin(self, *arguments)
        pipelines.append(self)

    def checked(self: Pipeline) -> None:
        assert all(one._free.empty() for one in pipelines)
        wholes(self)

    monkeypatch.setattr(Pipeline, "__init__", noted)
    monkeypatch.setattr(Pipeline, "predict_wholes", checked)
    settings = Settings(threads=2)
    requests = [
        Request(paths, tmp_path / method, settings=settings, method=method)
        for method in ("tsv", "naive")
    ]
    for some in (requests[:1], requests):
        pipelines.clear()
        with open_together([replace(one, force=True) for one in some]) as opened:
            opened.execute()
        assert len(pipelines) == len(some)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("together", [False, True])
def test_the_error_is_that_of_the_first_batch(
    threads: int, together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever worker finds one first."""
    paths = write_trajectory(tmp_path, trajectory(("a.weight", "b.weight", "c.weight")))
    before = sorted(tmp_path.iterdir())
    read = Pipeline.read

    def slow(self: Pipeline, batch: Batch, *arguments: Any) -> Batch:
        if any(segment.tensor.name == "c.weight" for segment in batch.segments):
            time.sleep(0.05)
        return read(self, batch, *arguments)

    monkeypatch.setattr(Pipeline, "read", slow)
    requests = [
        Request(paths, tmp_path / method, settings=Settings(threads=threads), method=method)
        for method in ("average", "naive")[: 1 + together]
    ]
    with (
        pytest.raises(CheckpointError, match=r"ckpt2\.safetensors: tensor 'c\.weight'"),
        open_together(requests) as opened,
    ):
        opened.execute()
    assert sorted(tmp_path.iterdir()) == before
