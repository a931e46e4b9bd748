"""Lightning's real Trainer on a tiny module: runs, forgettings and branches."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler

from know_cli.errors import EXIT_DONE, UsageError
from tests.support.command import Command
from tests.support.pages import documented

# Lightning advises to use more processes, and to log.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*is smaller than the logging interval"
)


@pytest.fixture(scope="module")
def real() -> Any:
    """Lightning's part of these tests."""
    return import_module("tests.support.lightning_module")


class Points(Dataset[tuple[Tensor, Tensor]]):
    """Twelve points; which were asked for is remembered."""

    def __init__(self) -> None:
        self.inputs = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
        self.seen: list[int] = []

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.seen.append(index)
        return self.inputs[index], self.inputs[index].sum()


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(torch.randn(3, 4))


class CountedStream(Stream):
    def __len__(self) -> int:
        return 3


def loader(data: Any = None) -> DataLoader[Any]:
    return DataLoader(data or Points(), batch_size=2)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


def test_a_run_is_kept_and_averaged(real: Any, tmp_path: Path, know: Command) -> None:
    module = real.Line()
    run = real.RunCallback(tmp_path / "run", every=2, last=2)
    real.trainer(run, max_epochs=2, accumulate_grad_batches=2).fit(module, loader())
    names = [path.name for path in run.run.kept]  # of six steps
    assert names == ["checkpoint-4.safetensors", "checkpoint-6.safetensors"]
    assert same(load_file(run.run.kept[-1]), weights(module))
    done = know("predict", "run", "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "2 checkpoints of a run, training steps 6 to 4, average" in done.stdout
    module.load_state_dict(load_file(tmp_path / "out"))
    both = [load_file(path)["layer.weight"].double() for path in run.run.kept]
    torch.testing.assert_close(weights(module)["layer.weight"], (sum(both) / 2).float())  # type: ignore[union-attr]


def test_a_forgetting_is_recorded_after_training(real: Any, tmp_path: Path) -> None:
    module, data = real.Line(), Points()
    real.trainer().fit(module, loader(data))
    trained = weights(module)
    data.seen.clear()
    paths = real.record_forgetting(
        real.trainer, module, loader(data), tmp_path / "f", sessions=3, rate=0.5
    )
    assert [path.stem for path in paths] == ["ckpt0", "ckpt1", "ckpt2"]
    assert same(load_file(paths[0]), trained)
    assert same(weights(module), trained)  # it is put back
    assert len(set(data.seen[:6])) == 6
    assert set(data.seen[6:]) < set(data.seen[:6])
    last = paths[2].read_bytes()
    paths[2].unlink()
    data.seen.clear()
    real.record_forgetting(real.trainer, module, loader(data), tmp_path / "f", sessions=3, rate=0.5)
    assert len(data.seen) == 3
    assert paths[2].read_bytes() == last


def test_branches_are_recorded_after_training(real: Any, tmp_path: Path) -> None:
    module = real.Line()
    real.trainer().fit(module, loader())
    trained = weights(module)
    paths = real.record_branches(
        real.trainer, module, loader(), tmp_path / "b", branches=2, rate=0.5
    )
    assert [path.stem for path in paths] == ["ckpt0", "branch1", "branch2"]
    assert same(weights(module), trained)
    assert not same(load_file(paths[1]), load_file(paths[2]))
    module.layer.weight.data += 1
    with pytest.raises(UsageError, match="ckpt0.safetensors: is another model than the one"):
        real.record_branches(real.trainer, module, loader(), tmp_path / "b", branches=2, rate=0.5)


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_loader_with_a_sampler_of_batches_is_recorded_as_one_with_their_size(
    real: Any, tmp_path: Path, drop_last: bool
) -> None:
    data = Points()
    sampler = BatchSampler(RandomSampler(data), batch_size=5, drop_last=drop_last)
    sampler.batch_size = np.int64(5)  # of a configuration
    recorded = []
    for name, one in (
        ("sampler", DataLoader(data, batch_sampler=sampler)),
        ("size", DataLoader(data, batch_size=5, drop_last=drop_last)),
    ):
        data.seen.clear()
        paths = real.record_forgetting(real.trainer, real.Line(), one, tmp_path / name, sessions=2)
        recorded.append([load_file(path) for path in paths])
        assert len(data.seen) == (5 if drop_last else 6)
    assert all(same(one, two) for one, two in zip(*recorded, strict=True))


def test_a_sampler_of_batches_that_does_not_tell_their_size_is_refused(
    real: Any, tmp_path: Path
) -> None:
    ragged = DataLoader(Points(), batch_sampler=[[0, 1, 2], [3]])
    for record in (real.record_forgetting, real.record_branches):
        with pytest.raises(UsageError, match="batch_sampler: list has no batch_size, which the"):
            record(real.trainer, real.Line(), ragged, tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_the_example_of_the_page(
    real: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = documented("lightning", every=20, branches=1, sessions=2)
    assert len([line for line in code.splitlines() if line]) <= 10
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(real.lightning, "Trainer", real.trainer_of_the_page)
    exec(code, {"module": real.Line(), "loader": loader()})
    assert sorted(path.stem for path in Path("run").iterdir()) == [
        f"checkpoint-{n}" for n in (20, 40, 60)
    ]
    assert len(list(Path("branches").glob("branch*.safetensors"))) == 1
    assert len(list(Path("forgetting").glob("ckpt*.safetensors"))) == 2


def test_workers_of_sessions_are_prepared_as_those_of_the_loader(real: Any, tmp_path: Path) -> None:
    def prepare(worker: int) -> None:
        (tmp_path / f"prepared-{len(list(tmp_path.glob('prepared-*')))}").touch()

    data = DataLoader(
        Points(), batch_size=2, num_workers=1, worker_init_fn=prepare,
        multiprocessing_context="fork",
    )  # fmt: skip
    real.record_forgetting(real.trainer, real.Line(), data, tmp_path / "f", sessions=3)
    assert len(list(tmp_path.glob("prepared-*"))) == 2


def test_a_buffer_with_nan_does_not_make_another_model(real: Any, tmp_path: Path) -> None:
    module = real.Line()
    module.register_buffer("largest", torch.tensor([float("nan"), 0.0]))
    module.register_buffer("step", torch.tensor(3, dtype=torch.bfloat16))
    given = (real.trainer, module, loader(), tmp_path / "f")
    assert len(real.record_forgetting(*given, sessions=2)) == 2
    assert len(real.record_forgetting(*given, sessions=2)) == 2  # goes on
    module.largest[1] = 1
    with pytest.raises(UsageError, match="is another model than the one that was trained"):
        real.record_forgetting(*given, sessions=2)


@pytest.mark.parametrize("again", [True, False])
def test_a_trainer_that_makes_no_step_is_refused(real: Any, tmp_path: Path, again: bool) -> None:
    """As one that has been fitted already does; its session would be a copy of the one before."""
    module, made = real.Line(), real.trainer(max_epochs=1 if again else 0)
    if again:
        made.fit(module, loader())
    trained = weights(module)
    with pytest.raises(UsageError, match="session 1: its training made no step; make a new Train"):
        real.record_forgetting(lambda: made, module, loader(), tmp_path / "f", sessions=3)
    assert [path.stem for path in (tmp_path / "f").glob("*.safetensors")] == ["ckpt0"]
    assert same(weights(module), trained)


def test_what_cannot_be_recorded(real: Any, tmp_path: Path) -> None:
    for stream in (Stream(), CountedStream()):
        with pytest.raises(UsageError, match="the loader's data set: is streamed"):
            real.record_branches(real.trainer, real.Line(), loader(stream), tmp_path / "b")
    callback = real.RunCallback(tmp_path / "run", every=5)
    with pytest.warns(UserWarning, match="has 1 of the 2 checkpoints that an average needs"):
        real.trainer(callback).fit(real.Line(), loader())
    with pytest.raises(UsageError, match="run: holds checkpoints of a run, up to step 5"):
        real.trainer(real.RunCallback(tmp_path / "run", every=5)).fit(real.Line(), loader())

    two = SimpleNamespace(world_size=2)
    with pytest.raises(UsageError, match="in one process, and the Trainer has 2"):
        real.record_branches(lambda: two, real.Line(), loader(), tmp_path / "two")

    class FSDPStrategy:
        pass

    given = SimpleNamespace(strategy=FSDPStrategy(), is_global_zero=True, global_step=0)
    with pytest.raises(UsageError, match="FSDPStrategy divides the weights"):
        callback.on_train_start(given, None)


def test_steps_are_counted_as_lightning_counts_them(real: Any, tmp_path: Path) -> None:
    """As the page says: with two optimisers each batch has two steps."""

    class Two(real.Line):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), lr=0.05) for _ in range(2)]

        def training_step(self, batch: Any) -> None:
            for optimiser in self.optimizers():
                self.manual_backward(super().training_step(batch))
                optimiser.step()

    run = real.RunCallback(tmp_path / "run", every=4, last=16)
    real.trainer(run).fit(Two(), loader())
    steps = [4, 8, 12]  # of six batches of two points
    assert [path.name for path in run.run.kept] == [f"checkpoint-{k}.safetensors" for k in steps]
