"""Hugging Face's real Trainer on a tiny model: runs, forgettings and branches."""

from __future__ import annotations

from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from know_cli.checkpoints.metadata import Branch, Session
from know_cli.errors import EXIT_DONE, UsageError
from tests.support.command import Command
from tests.support.pages import documented


@pytest.fixture(scope="module")
def real() -> Any:
    """Transformers' part of these tests."""
    return import_module("tests.support.transformers_model")


class Tokens(Dataset[dict[str, Tensor]]):
    """Twelve sequences; which were asked for is remembered."""

    def __init__(self) -> None:
        self.rows = torch.randint(16, (12, 8), generator=torch.Generator().manual_seed(0))
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.seen.append(index)
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Stream(IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Any:
        return iter(Tokens())


def trainer(real: Any, folder: Path, *callbacks: Any, data: Any = None, **more: Any) -> Any:
    return real.trainer(folder, *callbacks, data=data or Tokens(), **more)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


def test_a_run_is_kept_and_averaged(real: Any, tmp_path: Path, know: Command) -> None:
    made = trainer(real, tmp_path, real.RunCallback(tmp_path / "run", every=2, last=2))
    made.train()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoint-4", "checkpoint-6"]
    latest = tmp_path / "run" / "checkpoint-6"
    assert same(weights(real.GPT2LMHeadModel.from_pretrained(latest)), weights(made.model))
    assert "lm_head.weight" not in load_file(latest / "model.safetensors")  # tied to the embedding
    with safe_open(latest / "model.safetensors", "pt") as file:
        assert file.metadata()["know.training-step"] == "6"
    done = know("predict", "run", "-o", "averaged", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "2 checkpoints of a run, training steps 6 to 4, average" in done.stdout
    averaged = weights(real.GPT2LMHeadModel.from_pretrained(tmp_path / "averaged"))
    before = weights(real.GPT2LMHeadModel.from_pretrained(tmp_path / "run" / "checkpoint-4"))
    name = "transformer.h.0.mlp.c_fc.weight"
    expected = (before[name].double() + weights(made.model)[name].double()) / 2
    torch.testing.assert_close(averaged[name], expected.float())


def test_a_run_that_goes_on_from_a_checkpoint(real: Any, tmp_path: Path) -> None:
    """The steps after it were lost; their checkpoints are those of the second training."""
    given = {"save_strategy": "steps", "save_steps": 2}
    trainer(
        real, tmp_path, real.RunCallback(tmp_path / "run", every=2), max_steps=4, **given
    ).train()
    lost = tmp_path / "run" / "checkpoint-4" / "marked"
    lost.touch()
    again = trainer(
        real, tmp_path, real.RunCallback(tmp_path / "run", every=2), max_steps=6, **given
    )
    again.train(resume_from_checkpoint=str(tmp_path / "output" / "checkpoint-2"))
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert not lost.exists()


def test_a_forgetting_is_recorded_after_training(real: Any, tmp_path: Path) -> None:
    data = Tokens()
    made = trainer(real, tmp_path, data=data)
    made.train()
    trained = weights(made.model)
    data.seen.clear()
    paths = real.record_forgetting(made, tmp_path / "forgetting", sessions=3, rate=0.5, seed=1)
    assert [path.name for path in paths] == [f"ckpt{k}.safetensors" for k in range(3)]
    assert same(load_file(paths[0]), trained)
    assert same(weights(made.model), trained)  # it is put back
    assert not same(load_file(paths[1]), trained)
    # Half of six steps of two samples on six samples, a quarter on three.
    assert len(data.seen) == 6 + 3
    assert set(data.seen[6:]) < set(data.seen[:6])
    for index, path in enumerate(paths):
        with safe_open(path, "pt") as file:
            session = Session.from_metadata(file.metadata())
        assert session is not None
        assert (session.index, session.rate) == (index, 0.5)
    # What is there is not trained again.
    last = paths[2].read_bytes()
    paths[2].unlink()
    data.seen.clear()
    real.record_forgetting(made, tmp_path / "forgetting", sessions=3, rate=0.5, seed=1)
    assert len(data.seen) == 3
    assert paths[2].read_bytes() == last
    made.model.transformer.wte.weight.data += 1
    with pytest.raises(UsageError, match="ckpt0.safetensors: is another model than the one"):
        real.record_forgetting(made, tmp_path / "forgetting", sessions=3, rate=0.5, seed=1)


def test_branches_are_recorded_after_training(real: Any, tmp_path: Path, know: Command) -> None:
    made = trainer(real, tmp_path)
    made.train()
    trained = weights(made.model)
    paths = real.record_branches(
        made, tmp_path / "branches", branches=2, arguments={"max_steps": 3}
    )
    assert [path.stem for path in paths] == ["ckpt0", "branch1", "branch2"]
    assert same(load_file(paths[0]), trained)
    assert same(weights(made.model), trained)
    assert not same(load_file(paths[1]), load_file(paths[2]))
    with safe_open(paths[2], "pt") as file:
        branch = Branch.from_metadata(file.metadata())
    assert branch is not None
    assert (branch.index, branch.fraction) == (2, 1.0)
    assert made.args.max_steps == 6
    done = know("predict", *paths, "-o", "fused", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    made.model.load_state_dict(load_file(tmp_path / "fused"))
    name = "transformer.h.0.mlp.c_fc.weight"
    mean = sum(load_file(path)[name].double() for path in paths[1:]) / 2
    torch.testing.assert_close(weights(made.model)[name], torch.as_tensor(mean).float())


def test_the_example_of_the_page(
    real: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = documented("transformers", every=2, branches=1, sessions=2)
    assert len(code.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    made = trainer(real, tmp_path, num_train_epochs=1, max_steps=-1)
    data = Tokens()
    given = {"model": made.model, "args": made.args, "data": data}
    exec(code, given)
    assert sorted(path.name for path in Path("run").iterdir()) == [
        f"checkpoint-{n}" for n in (2, 4, 6)
    ]
    assert len(list(Path("branches").glob("branch*.safetensors"))) == 1
    assert len(list(Path("forgetting").glob("ckpt*.safetensors"))) == 2


def test_subsets_smaller_than_a_batch_that_would_be_dropped(real: Any, tmp_path: Path) -> None:
    made = trainer(real, tmp_path, per_device_train_batch_size=6, dataloader_drop_last=True,
                   max_steps=-1, num_train_epochs=1)  # fmt: skip
    paths = real.record_forgetting(made, tmp_path / "f", sessions=3)  # of 12, 6 and 3 samples
    states = [load_file(path) for path in paths]
    assert not any(same(one, two) for one, two in pairwise(states))


@pytest.mark.parametrize("trained", [True, False])
def test_sessions_have_the_optimiser_of_the_trainer(
    real: Any, tmp_path: Path, trained: bool
) -> None:
    seen = []

    class Counting(torch.optim.SGD):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            seen.append(self)

    made = trainer(real, tmp_path)
    made.optimizer_cls_and_kwargs = (Counting, {"lr": 0.1})
    if trained:
        made.train()
    real.record_forgetting(made, tmp_path / "f", sessions=3)
    assert len(seen) == 2 + trained

    made = trainer(real, tmp_path)
    made.optimizer = torch.optim.SGD(made.model.parameters(), lr=0.1)  # as from optimizers=
    if trained:
        made.train()
    with pytest.raises(UsageError, match="SGD was given as an object, and .* with AdamW; give the"):
        real.record_forgetting(made, tmp_path / "g", sessions=2)
    assert not (tmp_path / "g").exists()


def test_a_training_without_a_step_is_refused(real: Any, tmp_path: Path) -> None:
    made = trainer(real, tmp_path, max_steps=-1, num_train_epochs=1)
    with pytest.raises(UsageError, match="session 1: its training made no step; give num_train"):
        real.record_forgetting(made, tmp_path / "f", arguments={"num_train_epochs": 0})
    assert [path.stem for path in (tmp_path / "f").glob("*.safetensors")] == ["ckpt0"]


def test_what_cannot_be_recorded(
    real: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(real, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(real.TrainingArguments, "world_size", 2)
        for record in (real.record_branches, real.record_forgetting):
            with pytest.raises(UsageError, match="in one process, and this is one of 2"):
                record(made, tmp_path / "b")
    with pytest.raises(UsageError, match="arguments: max_step: is no argument of the Trainer"):
        real.record_branches(made, tmp_path / "b", branches=1, arguments={"max_step": 3})
    with pytest.raises(UsageError, match="arguments: train_batch_size: is no argument"):
        real.record_branches(made, tmp_path / "b", arguments={"train_batch_size": 3})
    streamed = trainer(real, tmp_path, data=Stream())
    with pytest.raises(UsageError, match="training data: is streamed"):
        real.record_forgetting(streamed, tmp_path / "f")
    with pytest.raises(UsageError, match="output_dir; name another folder"):
        trainer(real, tmp_path, real.RunCallback(tmp_path / "output", every=1)).train()
    few = trainer(real, tmp_path, real.RunCallback(tmp_path / "few", every=5))
    with pytest.warns(UserWarning, match="has 1 of the 2 checkpoints that an average needs"):
        few.train()
    with pytest.raises(UsageError, match="few: holds checkpoints of a run, up to step 5"):
        trainer(real, tmp_path, real.RunCallback(tmp_path / "few", every=5)).train()


@pytest.mark.parametrize(
    ("args", "model", "message"),
    [
        ({"fsdp": True}, None, "FSDP and DeepSpeed divide the weights; the Trainer's own"),
        ({"deepspeed": "zero3.json"}, None, "FSDP and DeepSpeed divide the weights"),
        ({}, SimpleNamespace(peft_config={}), "does not save adapters apart from their model"),
    ],
)
def test_models_that_no_process_has_whole(
    real: Any, args: dict[str, Any], model: Any, message: str, tmp_path: Path
) -> None:
    callback = real.RunCallback(tmp_path / "run", every=1)
    given = SimpleNamespace(output_dir=str(tmp_path), **args)
    state = SimpleNamespace(is_world_process_zero=True, global_step=0)
    with pytest.raises(UsageError, match=message):
        callback.on_train_begin(given, state, None, model=model)


def test_other_processes_write_nothing(real: Any, tmp_path: Path) -> None:
    callback = real.RunCallback(tmp_path / "run", every=1)
    state = SimpleNamespace(is_world_process_zero=False, global_step=3)
    callback.on_train_begin(SimpleNamespace(output_dir=""), state, None, model=nn.Linear(1, 1))
    callback.on_step_end(None, state, None, model=nn.Linear(1, 1))
    callback.on_train_end(None, state, None)
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_configuration_is_a_file(real: Any, tmp_path: Path) -> None:
    callback = real.RunCallback(tmp_path / "run", every=1)
    state = SimpleNamespace(is_world_process_zero=True, global_step=3)
    callback.on_step_end(None, state, None, model=nn.Linear(1, 1))
    assert (tmp_path / "run" / "checkpoint-3.safetensors").is_file()
