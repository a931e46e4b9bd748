"""``know train --objective network --downstream``: another task, a fresh head, a few steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from know_cli.cli.train_network import network_markdown
from know_cli.errors import UsageError
from know_cli.lab.data import DataSet, Samples
from know_cli.lab.fitting import one_thread
from know_cli.lab.zoo import Design, Inputs, build
from know_cli.meta import network_downstream
from know_cli.meta.network_bundle import split_runs, teach_bundle
from know_cli.meta.network_data import NetworkRun, OtherTask, outputs
from know_cli.meta.network_downstream import check_examples, loss_downstream, with_other_tasks
from know_cli.meta.network_settings import NetworkSettings
from know_cli.meta.network_training import teach
from know_cli.meta.setup import Setup, draw_setup

SETTINGS = NetworkSettings(
    checkpoints=3, hidden=4, steps=3, runs=2, batch=16, downstream=0.5, downstream_steps=2
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def data_set(name: str, shape: tuple[int, int, int], classes: int) -> DataSet:
    """Noise; the brightness tells the class."""
    generator = torch.Generator().manual_seed(len(name))

    def samples(count: int) -> Samples:
        labels = torch.arange(count) % classes
        noise = torch.randint(0, 40, (count, *shape), generator=generator)
        return Samples((noise + 20 * labels[:, None, None, None]).byte(), labels)

    return DataSet(name, "image", samples(1200), samples(300), classes)


GREY, COLOURS = data_set("grey", (1, 8, 8), 4), data_set("colours", (3, 16, 16), 6)


def network(
    name: str, of: DataSet, shape: tuple[int, int, int], seed: int, architecture: str = "mlp"
) -> NetworkRun:
    generator = torch.Generator().manual_seed(seed)
    design = Design(architecture, Inputs("image", shape), of.classes)
    model = build(design, seed).eval().requires_grad_(False)
    first = dict(model.named_parameters())
    states = [
        {
            key: tensor.detach() + 0.02 * k * torch.randn(tensor.shape, generator=generator)
            for key, tensor in first.items()
        }
        for k in range(3)
    ]
    setup = replace(_drawn(), design=design, data_set=of.name, seed=seed)
    inputs, labels = (
        torch.randn(250, *shape, generator=generator),
        torch.arange(250) % of.classes,
    )
    return NetworkRun(name, setup, states, None, model, inputs, labels)


def _drawn() -> Setup:
    return draw_setup(0, {"grey": replace(GREY, name="digits")}, ["mlp"])


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> list[NetworkRun]:
    sets = {"grey": GREY, "colours": COLOURS}
    monkeypatch.setattr(network_downstream, "load", lambda name, folder: sets[name])
    return [
        *(network(name, GREY, (1, 8, 8), seed) for seed, name in enumerate("ab")),
        *(network(name, COLOURS, (3, 8, 8), seed) for seed, name in enumerate("cd")),
    ]


def test_other_tasks_are_of_other_data_sets_in_the_form_that_a_network_takes(
    networks: list[NetworkRun],
) -> None:
    grey, _, coloured, _ = with_other_tasks(networks, None)
    (task,) = grey.others
    assert (tuple(task.inputs.shape[1:]), task.classes) == ((1, 8, 8), 6)
    # Meta-training has the first half of what is read from files, and no test samples.
    assert len(task.labels) == len(COLOURS.train) // 2
    (task,) = coloured.others
    assert (tuple(task.inputs.shape[1:]), task.classes) == ((3, 8, 8), 4)
    assert torch.equal(task.inputs[:, 0], task.inputs[:, 2])
    for alone in (networks[:2], networks[2:]):
        with pytest.raises(UsageError, match="--downstream: of the data sets .* none is another"):
            with_other_tasks(alone, None)


def _weights(run: NetworkRun, factor: Tensor) -> dict[str, Tensor]:
    first, second = run.states[-1], run.states[0]
    return {name: first[name] + factor * (second[name] - first[name]) for name in first}


@pytest.mark.parametrize("examples", [(200,), (33,), (40, 300)])
def test_the_loss_is_that_after_the_steps_and_its_gradient_of_first_order(
    networks: list[NetworkRun], examples: tuple[int, ...]
) -> None:
    run = with_other_tasks(networks, None)[0]
    factor = torch.tensor(0.3, requires_grad=True)
    settings, generator = replace(SETTINGS, downstream_examples=examples), np.random.default_rng(5)
    loss = loss_downstream(run, _weights(run, factor), settings, generator)
    assert not run.model.training
    (found,) = torch.autograd.grad(loss, factor)
    # By hand: the same draws, Adam of its own, and the gradient where the steps ended.
    (task,), drawn = run.others, np.random.default_rng(5)
    drawn.integers(1)
    count = examples[drawn.integers(2)] if len(examples) == 2 else examples[0]
    order = torch.from_numpy(drawn.permutation(len(task.labels)))
    rate = 1e-3 * 10 ** drawn.random()
    weights = {name: tensor.detach().clone() for name, tensor in _weights(run, factor).items()}
    bound = weights["head.weight"].shape[1] ** -0.5
    for name, shape in (("weight", (6, round(bound**-2))), ("bias", (6,))):
        weights[f"head.{name}"] = torch.from_numpy(drawn.uniform(-bound, bound, shape)).float()
    drawn.integers(2**31)
    first = {name: tensor.clone() for name, tensor in weights.items()}
    means = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    squares = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    for step in (1, 2):
        rows = order[:count][torch.from_numpy(drawn.integers(count, size=32))]
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
        nn.functional.cross_entropy(
            outputs(run, leaves, task.inputs[rows]), task.labels[rows]
        ).backward()  # type: ignore[no-untyped-call]
        for name, leaf in leaves.items():
            slope = leaf.grad
            assert slope is not None
            means[name] = 0.9 * means[name] + 0.1 * slope
            squares[name] = 0.999 * squares[name] + 0.001 * slope**2
            upward = means[name] / (1 - 0.9**step)
            size = (squares[name] / (1 - 0.999**step)).sqrt() + 1e-8
            weights[name] = weights[name] - rate * upward / size
    assert generator.bit_generator.state == drawn.bit_generator.state
    unseen = order[count : count + 16]
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    by_hand = nn.functional.cross_entropy(
        outputs(run, leaves, task.inputs[unseen]), task.labels[unseen]
    )
    assert float(loss.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-4)
    by_hand.backward()  # type: ignore[no-untyped-call]
    wanted = 0.0
    for name in run.kinds:
        if not name.startswith("head."):
            slope = leaves[name].grad
            assert slope is not None
            wanted += float((slope * (run.states[0][name] - run.states[-1][name])).sum())
            assert not torch.equal(first[name], weights[name])
    assert float(found) == pytest.approx(wanted, rel=1e-3, abs=1e-6)


def test_few_and_many_examples_are_both_drawn(
    networks: list[NetworkRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, seen = with_other_tasks(networks, None), []
    settings = replace(SETTINGS, downstream_examples=(32, 472), steps=6)
    check_examples(runs, settings)
    assert min(len(task.labels) for run in runs for task in run.others) == 600
    rows_of = torch.from_numpy

    def counted(array: np.ndarray) -> Tensor:  # type: ignore[type-arg]
        seen.extend([int(array.max())] if array.shape == (32,) else [])
        return rows_of(array)

    monkeypatch.setattr(network_downstream.torch, "from_numpy", counted)
    taught, _ = teach(runs, settings)
    assert min(seen) < 32 < max(seen) < 472
    monkeypatch.undo()
    again, _ = teach(runs, settings)
    few, _ = teach(runs, replace(settings, downstream_examples=(32,)))
    assert torch.equal(taught.module.gate.weight, again.module.gate.weight)
    assert not torch.equal(taught.module.gate.weight, few.module.gate.weight)
    with pytest.raises(UsageError) as error:
        check_examples(runs, replace(settings, downstream_examples=(32, 585)))
    assert str(error.value) == (
        "--downstream-examples 585: another task has 600, and the loss after fine-tuning is of 16 "
        "more; give at most 584"
    )
    check_examples(runs, replace(settings, downstream_examples=(32, 584)))


def test_settings_say_which_numbers_of_examples_where_they_are_others() -> None:
    assert "downstream_examples" not in SETTINGS.to_json()
    other = replace(SETTINGS, downstream_examples=(40, 200)).to_json()
    assert other == SETTINGS.to_json() | {"downstream_examples": [40, 200]}


@pytest.mark.parametrize("steps", [1, 30])
def test_one_step_and_thirty_can_be_taught_through(networks: list[NetworkRun], steps: int) -> None:
    runs = with_other_tasks(networks, None)
    model, told = teach(
        runs, replace(SETTINGS, downstream_steps=steps, steps=2), lambda step, loss, model: loss
    )
    assert all(math.isfinite(loss) for loss in told)
    assert float(model.module.gate.weight.detach().abs().max()) > 0


def test_it_is_taught_with_and_the_page_says_so(networks: list[NetworkRun]) -> None:
    runs = with_other_tasks(networks, None)
    without, _ = teach(networks, replace(SETTINGS, downstream=0.0))
    taught, _ = teach(runs, SETTINGS)
    again, _ = teach(runs, SETTINGS)
    assert torch.equal(taught.module.gate.weight, again.module.gate.weight)
    assert not torch.equal(taught.module.gate.weight, without.module.gate.weight)
    bundle = teach_bundle(split_runs(runs, 0.5, 1), SETTINGS, {})
    page = network_markdown({**bundle.to_json(), "processor_seconds": 1})
    assert "with 0.5 of the loss on another task after 2 steps; " in page
    settings = replace(SETTINGS, downstream_examples=(40, 300))
    bundle = teach_bundle(split_runs(runs, 0.5, 1), settings, {})
    page = network_markdown({**bundle.to_json(), "processor_seconds": 1})
    assert "on another task after 2 steps on 40 or 300 examples of it; 1 s" in page


def test_batch_norm_is_fine_tuned_by_the_batch(networks: list[NetworkRun]) -> None:
    run = network("e", COLOURS, (3, 8, 8), 5, "resnet")
    for module in run.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = module.num_batches_tracked = None
            module.track_running_stats = False
    task = OtherTask(torch.randn(300, 3, 8, 8), torch.arange(300) % 3, 3)
    run = replace(run, others=(task,))
    factor = torch.tensor(0.5, requires_grad=True)
    loss = loss_downstream(run, _weights(run, factor), SETTINGS, np.random.default_rng(0))
    (slope,) = torch.autograd.grad(loss, factor)
    assert torch.isfinite(slope)
    assert float(slope) != 0
