"""The best that combining the checkpoints of a forgetting could do, known only in hindsight.

A predictor that multiplies each checkpoint's tensor by a coefficient of its choice cannot do
better than one that chooses with knowledge of the additional data. So where even this one gains
little, what the additional data teach is not in the checkpoints, and no coefficients can find it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import update_bn

from know_cli.evaluation.tasks import Examples
from know_cli.lab.fitting import one_thread

_ITERATIONS = 150
_BATCH = 64
_LEARNING_RATE = 0.02


@one_thread()
def best_combination(
    model: nn.Module, states: Sequence[Mapping[str, Tensor]], examples: Examples, seed: int
) -> None:
    """Set a network to the combination of checkpoints that fits some examples best.

    Each trained tensor becomes Θ0 + a·Θ0 + Σ c_k·(Θk − Θ0), with its own coefficients a and c_k.
    They start at 0 and are fitted to the cross entropy by Adam. Running statistics are
    re-estimated on the examples.

    Args:
        model: modified in place and left in evaluation mode.
        states: the checkpoints, Θ0 first, with all of the network's trained tensors.
        examples: to fit.
        seed: of the order of the examples and of dropout. The global random state is not
            changed.
    """
    names = [name for name, tensor in model.named_parameters() if tensor.requires_grad]
    device = examples.inputs.device
    states = [{name: tensor.to(device) for name, tensor in state.items()} for state in states]
    numbers = torch.zeros(len(names), len(states), device=device, requires_grad=True)
    model.load_state_dict({**model.state_dict(), **states[0]})
    model.train()
    step = torch.optim.Adam([numbers], _LEARNING_RATE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(_ITERATIONS):
            chosen = examples.take(torch.randperm(len(examples))[:_BATCH])
            # Buffers are passed in, so that running statistics of half-fitted weights
            # are not kept.
            buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
            weights = _combined(states, names, numbers) | buffers
            outputs = functional_call(model, weights, (chosen.inputs,))
            loss = nn.functional.cross_entropy(outputs, chosen.targets)
            step.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            step.step()
        fitted = _combined(states, names, numbers.detach())
        model.load_state_dict({**model.state_dict(), **fitted})
        # Batches of equal size: layers that normalise over the batch need several examples.
        order = torch.randperm(len(examples))[: len(examples) // _BATCH * _BATCH or None]
        update_bn((examples.inputs[part] for part in torch.split(order, _BATCH)), model)
    model.eval()


def _combined(
    states: Sequence[Mapping[str, Tensor]], names: Sequence[str], numbers: Tensor
) -> dict[str, Tensor]:
    """By name, the combination with the coefficients ``[names, checkpoints]``."""
    first = states[0]
    return {
        name: first[name] * (1 + row[0])
        + sum(row[k] * (states[k][name] - first[name]) for k in range(1, len(states)))
        for name, row in zip(names, numbers, strict=True)
    }
