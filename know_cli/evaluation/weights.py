"""Weights and data of trials: what is recorded, loaded, and told apart by a hash."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from torch import Tensor, nn

from know_cli.evaluation import cache
from know_cli.evaluation.tasks import Problem


def recorded(model: nn.Module) -> dict[str, Tensor]:
    """A network's state dict without frozen parameters, in main memory."""
    frozen = {name for name, tensor in model.named_parameters() if not tensor.requires_grad}
    return {name: t.cpu() for name, t in model.state_dict().items() if name not in frozen}


def load(model: nn.Module, state: Mapping[str, Tensor], fresh: Sequence[str] = ()) -> None:
    """Load a checkpoint into a network, except for modules that keep their fresh weights.

    Args:
        model: modified in place; tensors that the checkpoint lacks are unchanged.
        state: of the checkpoint; a name that the network lacks is an error.
        fresh: names of modules to leave out.
    """
    prefixes = tuple(f"{name}." for name in fresh)
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}
    model.load_state_dict({**model.state_dict(), **kept})


def data_key(problem: Problem) -> str:
    """A hash of all of a problem's data."""
    tensors = {"pool": problem.pool, "test": problem.test}
    facts = []
    for cell in problem.cells:
        tensors |= {f"{cell.name} pool": cell.pool, f"{cell.name} test": cell.test}
        facts.append([cell.name, asdict(cell.downstream)])
    # Cells often share examples.
    seen: dict[int, str] = {}
    for examples in tensors.values():
        for tensor in (examples.inputs, examples.targets):
            seen.setdefault(id(tensor), cache.tensors_key({"": tensor}))
    hashes = [
        [name, seen[id(examples.inputs)], seen[id(examples.targets)]]
        for name, examples in sorted(tensors.items())
    ]
    return cache.key(facts, hashes)
