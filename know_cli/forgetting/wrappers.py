"""The names that wrappers of a model add to those of its tensors."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

# Classes, by their names, that hold a model as their ``module``.
_HOLDERS = {
    "DataParallel",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "DeepSpeedEngine",
}
# Names that no model has but through a wrapper.
_WRAPPED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def inside_wrappers(model: nn.Module) -> set[str]:
    """Paths of what wrappers hold, such as ``module`` and ``encoder.module``."""
    return {
        f"{path}.module" if path else "module"
        for path, part in model.named_modules()
        if _HOLDERS & {base.__name__ for base in type(part).__mro__}
    }


def bare_name(name: str, wrapped: set[str]) -> str:
    """A tensor's name without the parts at the paths ``wrapped``, and those of any wrapper."""
    parts = name.split(".")
    paths = accumulate(parts, lambda path, part: f"{path}.{part}")
    return ".".join(
        part
        for part, path in zip(parts, paths, strict=True)
        if part not in _WRAPPED and path not in wrapped
    )
