"""Appearances of greyscale images: rotated, coloured, sketched, textured."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from know_cli.evaluation.tasks.examples import Examples
from know_cli.evaluation.tasks.task import permutation
from know_cli.forgetting.recorder import derived_seed


def _shares(images: Tensor) -> Tensor:
    """Standardised images ``[n, 1, H, W]`` scaled to brightness from 0, black, to 1, white."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return (images - low) / (high - low).clamp(min=1e-6)


def _rotated(shares: Tensor, generator: Generator) -> Tensor:
    """Rotated by a random angle."""
    angle = 2 * math.pi * torch.rand(len(shares), generator=generator)
    cosine, sine, zero = torch.cos(angle), torch.sin(angle), torch.zeros(len(shares))
    rows = torch.stack([cosine, -sine, zero, sine, cosine, zero], 1).view(-1, 2, 3)
    grid = nn.functional.affine_grid(rows, list(shares.shape), align_corners=False)
    turned = nn.functional.grid_sample(shares, grid, align_corners=False)
    return turned.expand(-1, 3, -1, -1)


def _coloured(shares: Tensor, generator: Generator) -> Tensor:
    """Recoloured from one random colour to another instead of from black to white."""
    first, second = torch.rand((2, len(shares), 3, 1, 1), generator=generator)
    return torch.lerp(first.expand(-1, -1, *shares.shape[2:]), second, shares)


def _sketched(shares: Tensor, generator: Generator) -> Tensor:
    """Drawn as dark lines where brightness changes, on grainy white paper."""
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    kernels = torch.stack([kernel, kernel.T]).unsqueeze(1)
    padded = nn.functional.pad(shares, (1, 1, 1, 1), mode="replicate")
    strength = nn.functional.conv2d(padded, kernels).square().sum(1, keepdim=True).sqrt()
    grain = 0.1 * torch.rand(shares.shape, generator=generator)
    return (1 - strength / 2 - grain).clamp(0, 1).expand(-1, 3, -1, -1)


def _textured(shares: Tensor, generator: Generator) -> Tensor:
    """Filled with stripes of a random direction and width, on a noisy background."""
    n, side = len(shares), shares.shape[-1]
    direction, width, phase = torch.rand((3, n, 1, 1, 1), generator=generator)
    line = torch.arange(side, dtype=torch.float32)
    along = torch.cos(math.pi * direction) * line + torch.sin(math.pi * direction) * line.view(
        -1, 1
    )
    stripes = (torch.sin((0.6 + 1.2 * width) * along + 2 * math.pi * phase) + 1) / 2
    noise = 0.3 * torch.rand(shares.shape, generator=generator)
    inside = (shares > 0.2).float()
    return (inside * (0.4 + 0.6 * stripes) + (1 - inside) * noise).expand(-1, 3, -1, -1)


#: Appearances by name; each maps brightness ``[n, 1, H, W]``, 0 to 1, and a generator to images
#: ``[n, 3, H, W]``, 0 to 1.
DOMAINS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "rotation": _rotated,
    "colour": _coloured,
    "sketch": _sketched,
    "texture": _textured,
}


def in_domain(examples: Examples, domain: str, *seed: int) -> Examples:
    """Change the appearance of examples to that of a domain.

    Args:
        examples: greyscale images ``[n, 1, H, W]`` of any scale.
        domain: a name in :data:`DOMAINS`.
        seed: of random numbers.

    Returns:
        Images ``[n, 3, H, W]`` float32 with mean near 0 and standard deviation near 1.
    """
    generator = torch.Generator().manual_seed(derived_seed(*seed))
    images = DOMAINS[domain](_shares(examples.inputs), generator)
    return Examples(((images - 0.5) / 0.3).contiguous(), examples.targets)


def mixed(examples: Examples, domains: list[str], *seed: int) -> Examples:
    """Change each example to one of the domains in turn."""
    parts = [
        in_domain(examples.take(torch.arange(number, len(examples), len(domains))), domain, *seed)
        for number, domain in enumerate(domains)
    ]
    together = Examples(
        torch.cat([part.inputs for part in parts]), torch.cat([part.targets for part in parts])
    )
    return together.take(permutation(len(together), *seed, len(domains)))
