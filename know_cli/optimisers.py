"""What optimisers keep of every weight, told by its name."""

from __future__ import annotations

from know_cli.names import Path, words

_OPTIMISERS = frozenset({"optim", "optims", "optimizer", "optimizers", "optimiser", "optimisers"})
_KEPT = frozenset({"state", "momentum", "step"})
_MOMENTS = (("exp", "avg"), ("exp", "avg", "sq"))


def is_of_optimiser(path: Path, leaf: str) -> bool:
    """Whether a parameter is what an optimiser keeps: ``exp_avg.fc.weight``, ``optimizer.state.0``.

    Networks that are optimisers themselves have weights below such a part.
    """
    parts = [words(part) for part in (*path, leaf)]
    if any(part in _MOMENTS for part in parts):
        return True
    return any(len(part) == 1 and part[0] in _OPTIMISERS for part in parts[:-1]) and any(
        _KEPT & {*part} for part in parts
    )
