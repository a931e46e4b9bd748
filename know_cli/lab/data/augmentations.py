"""Random changes of a training batch, by name: images as float tensors, texts as tokens.

All draw random numbers on the generator's device, so a CPU generator gives the same batch anywhere.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn

from know_cli.lab.data.samples import Kind
from know_cli.lab.fitting import Augmentation

UNKNOWN_TOKEN = 0
_LARGEST_SHIFT = 1 / 8
_CUT_SIDE = 1 / 3
_LARGEST_TURN = math.radians(10)
_LARGEST_AFFINE_SHIFT, _LARGEST_ZOOM = 0.15, 0.3
_NOISE_DEVIATION = 0.2
_DROPPED_SHARE = 0.1


def _uniform(size: tuple[int, ...], like: Tensor, generator: Generator) -> Tensor:
    return torch.rand(size, generator=generator, device=generator.device).to(like.device)


def _integers(below: int, n: int, like: Tensor, generator: Generator) -> Tensor:
    drawn = torch.randint(below, (n,), generator=generator, device=generator.device)
    return drawn.to(like.device)


def none(inputs: Tensor, generator: Generator) -> Tensor:
    """Return the batch unchanged."""
    return inputs


def flip(images: Tensor, generator: Generator) -> Tensor:
    """Flip each image horizontally with probability one half."""
    chosen = _uniform((len(images), 1, 1, 1), images, generator) < 0.5
    return torch.where(chosen, images.flip(3), images)


def shift(images: Tensor, generator: Generator) -> Tensor:
    """Pad each image with zeros by an eighth of its side, and crop it back at random."""
    n, channels, height, width = images.shape
    border = max(1, round(max(height, width) * _LARGEST_SHIFT))
    padded = nn.functional.pad(images, (border,) * 4)
    rows, columns = (
        _integers(2 * border + 1, n, images, generator)[:, None]
        + torch.arange(side, device=images.device)
        for side in (height, width)
    )
    # Indexing one axis after the other is twice as fast as both at once.
    rows = rows.view(n, 1, height, 1).expand(n, channels, height, padded.shape[3])
    columns = columns.view(n, 1, 1, width).expand(n, channels, height, width)
    return padded.gather(2, rows).gather(3, columns)


def affine(images: Tensor, generator: Generator) -> Tensor:
    """Turn each image by up to 10°, shift it by up to 0.15 of its sides, and scale these by ±30 %.

    So the authors' release changes images; what comes in from outside is an image's border.
    """
    n = len(images)
    angle, across, down, wide, high = 2 * _uniform((5, n), images, generator) - 1
    cosine, sine = torch.cos(angle * _LARGEST_TURN), torch.sin(angle * _LARGEST_TURN)
    wide, high = 1 + _LARGEST_ZOOM * wide, 1 + _LARGEST_ZOOM * high
    # Positions run from −1 to 1.
    rows = [
        torch.stack([wide * cosine, -high * sine, 2 * _LARGEST_AFFINE_SHIFT * across], 1),
        torch.stack([wide * sine, high * cosine, 2 * _LARGEST_AFFINE_SHIFT * down], 1),
    ]
    grid = nn.functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def cutout(images: Tensor, generator: Generator) -> Tensor:
    """Zero a square with a third of the image's side, centred anywhere in the image."""
    n, _, height, width = images.shape
    side = max(1, round(max(height, width) * _CUT_SIDE))
    within = []
    for size in (height, width):
        start = _integers(size, n, images, generator)[:, None] - side // 2
        position = torch.arange(size, device=images.device)
        within.append((position >= start) & (position < start + side))
    cut = within[0][:, None, :, None] & within[1][:, None, None, :]
    return images.masked_fill(cut, 0.0)


def noise(images: Tensor, generator: Generator) -> Tensor:
    """Add Gaussian noise with a fifth of a standardised image's standard deviation."""
    drawn = torch.randn(images.shape, generator=generator, device=generator.device)
    return images + _NOISE_DEVIATION * drawn.to(images.device)


def token_dropout(tokens: Tensor, generator: Generator) -> Tensor:
    """Replace each token with probability 0.1 by the token for unknown characters."""
    dropped = _uniform(tuple(tokens.shape), tokens, generator) < _DROPPED_SHARE
    return tokens.masked_fill(dropped, UNKNOWN_TOKEN)


#: None, where it is to be said by name.
UNCHANGED = "none"
#: What the method's authors do to images; other collections draw among the rest.
AFFINE = "affine"
#: Augmentations by kind of inputs and name. Each takes standardised images ``[n, C, H, W]``
#: float32 or texts ``[n, length]`` int64, and a generator, and does not modify its input.
AUGMENTATIONS: dict[Kind, dict[str, Augmentation]] = {
    "image": {
        UNCHANGED: none,
        "flip": flip,
        "shift": shift,
        "cutout": cutout,
        "noise": noise,
        AFFINE: affine,
    },
    "text": {"none": none, "token-dropout": token_dropout},
}
