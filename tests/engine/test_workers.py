"""Workers that each take a batch through all stages: in whatever order they finish."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from know_cli.engine.delivery import Delivery
from know_cli.engine.pipeline import Pipeline
from know_cli.engine.plan import Batch
from know_cli.engine.settings import Settings
from know_cli.engine.written import Written
from know_cli.errors import CheckpointError
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
    read = Pipeline.read

    def failing(self: Pipeline, batch: Batch, *arguments: Any) -> Batch:
        begun.append(batch)
        time.sleep(0.02)
        if len(begun) == 3:
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
