"""Where evaluations and collections train: devices in turn, and the same protocol on each."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from know_cli.cli.options import usable_cores, usual_processes
from know_cli.evaluation import cache, hindsight, jobs
from know_cli.evaluation.branches.plan import find_branch_tasks
from know_cli.evaluation.branches.trial import BranchTrial
from know_cli.evaluation.jobs import Trials
from know_cli.evaluation.place import Place, in_precision
from know_cli.evaluation.precision import Precision
from know_cli.evaluation.runs.trial import RunTrial
from know_cli.evaluation.starts import Wanted
from know_cli.evaluation.tasks import TASKS, Downstream, Examples
from know_cli.evaluation.trial import Trial
from know_cli.evaluation.variants import find_variants
from know_cli.lab.data import available, load
from know_cli.meta.collecting import Request
from know_cli.meta.collecting import collect as collect_trajectories
from know_cli.meta.run_collecting import RunRequest, collect_runs
from tests.support.command import Command, one_line

CARDS = tuple(torch.device("cuda", number) for number in range(3))
_TASK = TASKS["text-language-model"]
TINY = replace(
    _TASK,
    samples=34,
    recipe=replace(_TASK.recipe, epochs=1, batch_size=16),
    downstream=(Downstream(8, 1, repetitions=1),),
    tested=40,
)
# Found whether there is a card or not, so that a name that is gone is noticed everywhere.
BRANCHES = [find_branch_tasks([name])[0] for name in ("orders-text-*", "tasks-*")]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def _seen(request: Trials, extra: str, task: str, seed: int) -> tuple[str, str, int, str]:
    return extra, task, seed, str(request.place.device)


def test_trials_take_the_devices_in_turn(tmp_path: Path) -> None:
    request = Trials(folder=tmp_path, tasks=["a", "b"], seeds=2, devices=CARDS)
    found = list(jobs.run(_seen, request, "shared"))
    assert found == [
        ("shared", "a", 0, "cuda:0"),
        ("shared", "b", 0, "cuda:1"),
        ("shared", "a", 1, "cuda:2"),
        ("shared", "b", 1, "cuda:0"),
    ]


def test_what_another_processor_trained_has_another_key() -> None:
    devices = [torch.device(name) for name in ("cpu", "cuda:0", "mps")]
    facts = [Place(device, precision).facts() for device in devices for precision in Precision]
    assert facts[0] == []  # as before there was a choice
    assert len({cache.key("trial", *of) for of in facts}) == 6
    assert Place(CARDS[0]).facts() == Place(CARDS[1]).facts()


def test_a_network_in_bfloat16_keeps_its_weights_and_outputs_in_float32() -> None:
    seen: list[torch.dtype] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.layer(x)
            seen.append(found.dtype)
            if len(x) == 1:
                raise RuntimeError("one is too few")
            return found

    torch.manual_seed(0)
    plain = Watched()
    model = in_precision(copy.deepcopy(plain), Place(precision=Precision.BFLOAT16))
    assert in_precision(plain, Place()) is plain
    x = torch.randn(3, 8)
    for one in (model, copy.deepcopy(model)):
        out = one(x)
        assert seen.pop() == torch.bfloat16
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, plain(x), rtol=0.02, atol=0.02)
        assert seen.pop() == torch.float32  # the network beside it is as it was
        out.sum().backward()
        grads = [parameter.grad for parameter in one.parameters()]
        assert {grad.dtype for grad in grads if grad is not None} == {torch.float32}
    with pytest.raises(RuntimeError, match="one is too few"):
        model(x[:1])
    assert not torch.is_autocast_enabled("cpu")


def test_results_tell_of_the_precision() -> None:
    usual, other = (Place(precision=precision).machine() for precision in Precision)
    assert other["processor"] == f"{usual['processor']}, in bfloat16"
    assert {**other, "processor": usual["processor"]} == usual


def test_trials_in_bfloat16_are_trials_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hindsight, "_ITERATIONS", 2)
    wanted = Wanted(tuple(find_variants(["average"])), steps=1)
    first = Trial(TINY, 1, tmp_path, None)
    other = Trial(TINY, 1, tmp_path, None, Place(precision=Precision.BFLOAT16))
    assert first.key != other.key
    values = [one.run(wanted).values for one in (first, other)]
    assert values[0].keys() == values[1].keys()
    weights = [load_file(one.folder / "ckpt0.safetensors") for one in (first, other)]
    assert all(tensor.dtype != torch.bfloat16 for tensor in weights[1].values())
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    "arguments",
    [
        ("eval", "-o", "out"),
        ("eval", "-o", "out", "--trajectory", "run"),
        ("eval", "-o", "out", "--trajectory", "branches"),
        ("eval", "-o", "out", "--regime", "release"),
        ("collect", "out"),
        ("collect", "out", "--regime", "run"),
    ],
)
def test_a_device_that_is_not_there_is_named(
    arguments: tuple[str, ...], tmp_path: Path, know: Command
) -> None:
    done = know(*arguments, "--device", "cuda:99", cwd=tmp_path)
    assert done.returncode == 2
    assert "--device cuda:99: torch sees" in one_line(done.stderr)
    assert not list(tmp_path.iterdir())


class OnACard:
    """Labels that, as those on a card, have to be moved before numpy can read them."""

    def __init__(self, labels: torch.Tensor) -> None:
        self.cpu, self.dim = labels.cpu, labels.dim
        self._count = len(labels)

    def __len__(self) -> int:
        return self._count

    def numpy(self) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def test_subsets_are_drawn_wherever_the_labels_are(tmp_path: Path) -> None:
    trial, other = (Trial(TINY, 1, tmp_path, None) for _ in range(2))
    inputs, labels = torch.zeros(68, 1), torch.arange(68) % 5
    trial.problem = replace(trial.problem, pool=Examples(inputs, labels))
    moved = Examples(inputs, OnACard(labels))  # type: ignore[arg-type]
    other.problem = replace(other.problem, pool=moved)
    pairs = list(zip(trial._subsets, other._subsets, strict=True))
    assert len(pairs) == 6
    assert all((one == two).all() for one, two in pairs)


def test_without_a_choice_there_is_a_trial_a_core_or_a_card(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert usual_processes("cpu") == usable_cores()
    monkeypatch.setattr("know_cli.engine.devices.choose_devices", lambda name: CARDS)
    assert usual_processes("cuda:all") == 3


@needs_cuda
def test_a_forgetting_is_measured_on_a_card(tmp_path: Path) -> None:
    wanted = Wanted(tuple(find_variants(["continuation"])), steps=1)
    first = Trial(TINY, 1, tmp_path, None, Place(CARDS[0]))
    assert first.problem.pool.inputs.is_cuda
    outcome = first.run(wanted)
    again = Trial(TINY, 1, tmp_path, None, Place(CARDS[0])).run(wanted)
    assert again.computed == 0
    assert again.values == outcome.values
    assert Trial(TINY, 1, tmp_path, None).key != first.key


@needs_cuda
def test_runs_and_branches_are_measured_on_a_card(tmp_path: Path) -> None:
    run = RunTrial(TINY, 0, tmp_path, None, 0.2, Place(CARDS[0]))
    assert set(run.pretraining()["values"]) >= {"last", "average-5"}
    for task in BRANCHES:
        found = BranchTrial(task, 0, tmp_path, None, 0.02, Place(CARDS[0])).run()
        assert len(found["branches"]) > 1


@needs_cuda
def test_trajectories_and_runs_are_collected_on_a_card(tmp_path: Path) -> None:
    assert "digits" in available()
    assert load("digits").classes == 10
    device = CARDS[0]
    request = Request(
        tmp_path / "a", 2, ["digits"], architectures=["mlp", "cnn"], device=device
    )  # fmt: skip
    assert [one.reason for one in collect_trajectories(request)] == ["", ""]
    runs = RunRequest(tmp_path / "b", 1, ["digits"], architectures=["cnn"], device=device)
    assert [one.reason for one in collect_runs(runs)] == [""]
