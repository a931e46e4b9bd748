from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from know_cli.errors import UsageError
from know_cli.lab.fitting import one_thread
from know_cli.lab.stepping import Training


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3))


def noise(batch: Tensor, generator: torch.Generator) -> Tensor:
    return batch + 0.1 * torch.randn(batch.shape, generator=generator)


def training(optimiser: str = "adam") -> Training:
    inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(2))
    return Training(
        network(),
        inputs,
        torch.arange(40) % 3,
        batch_size=8,
        learning_rate=1e-2,
        seed=7,
        optimiser=optimiser,
        weight_decay=0.1,
        augmentation=noise,
    )


def weights(one: Training) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in one.model.parameters()])


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_a_training_continues_as_if_it_had_not_stopped(optimiser: str) -> None:
    whole, parts = training(optimiser), training(optimiser)
    whole.advance(13, lambda step: 1 / (1 + step))
    parts.advance(4, lambda step: 1 / (1 + step))
    branch = parts.branch()
    parts.advance(1, lambda step: 0.5)  # not seen by the branch
    branch.advance(9, lambda step: 1 / (1 + step))
    assert torch.equal(weights(branch), weights(whole))
    assert (branch.done, parts.done) == (13, 5)
    assert not torch.equal(weights(parts), weights(whole))


def test_training_leaves_the_random_state_alone() -> None:
    one = training()
    state = torch.random.get_rng_state()
    one.advance(2, lambda step: 1.0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_every_pass_sees_each_sample_once_in_another_order() -> None:
    seen: list[Tensor] = []

    class Sees(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            seen.append(inputs[:, 0].clone())
            return super().forward(inputs)

    one = Training(
        Sees(1, 2), torch.arange(9.0).view(9, 1), torch.arange(9) % 2,
        batch_size=4, learning_rate=1e-3, seed=1,
    )  # fmt: skip
    assert one.epoch_steps == 2
    one.advance(4, lambda step: 1.0)
    first, second = torch.cat(seen[:2]), torch.cat(seen[2:])
    assert len(set(first.tolist())) == len(set(second.tolist())) == 8  # the ninth is left out
    assert first.tolist() != second.tolist()


def test_the_rate_follows_the_schedule() -> None:
    one = Training(
        nn.Linear(1, 2, bias=False), torch.ones(4, 1), torch.zeros(4, dtype=torch.int64),
        batch_size=4, learning_rate=0.5, seed=0, optimiser="sgd",
    )  # fmt: skip
    with torch.no_grad():
        one.model.weight.zero_()  # type: ignore[operator]
    one.advance(1, lambda step: 0.5)
    # The gradient of the cross entropy at equal logits is ∓½, the rate ¼.
    assert weights(one).tolist() == [0.125, -0.125]
    one.advance(1, lambda step: 0.0)
    assert weights(one).tolist() == [0.125, -0.125]


def test_an_unknown_optimiser_is_named() -> None:
    with pytest.raises(UsageError, match="unknown optimiser 'lion'; choose from adam, sgd"):
        training("lion")
