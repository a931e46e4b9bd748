"""Building blocks that several architectures share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from know_cli.lab.zoo.design import Choices, Inputs

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
}
#: Initialisations of networks that may lack normalisation.
HE = ("he_normal", "he_uniform")
#: Initialisations of transformers.
TRANSFORMER = ("truncated_normal", "xavier_uniform")


#: Final options of convolutional networks.
UNIT_CHOICES: Choices = {
    "bias": (False, False, True),
    "pooling": ("average", "average", "maximum"),
    "dropout": (0.0, 0.0, 0.2),
    "initial": HE,
}


def in_order(*layers: nn.Module) -> nn.Sequential:
    """A sequence of numbered layers, without identities."""
    return nn.Sequential(*(layer for layer in layers if not isinstance(layer, nn.Identity)))


def named(**layers: nn.Module) -> nn.Sequential:
    """A sequence of named layers, without identities."""
    model = nn.Sequential()
    for name, layer in layers.items():
        if not isinstance(layer, nn.Identity):
            model.add_module(name, layer)
    return model


def convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, *, groups: int = 1, bias: bool = False
) -> nn.Conv2d:
    """A convolution with an odd kernel; stride s turns n pixels into ⌈n / s⌉."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)


def normalisation(name: str, channels: int) -> nn.Module:
    """Normalisation of images: ``batch``, ``group``, or ``none``, the identity."""
    if name == "batch":
        return nn.BatchNorm2d(channels)
    if name == "group":
        return nn.GroupNorm(math.gcd(channels, 8), channels)
    return nn.Identity()


def token_normalisation(name: str, features: int) -> nn.Module:
    """Normalisation of each token ``[..., features]``: ``layer`` or ``rms``."""
    return nn.RMSNorm(features, eps=1e-6) if name == "rms" else nn.LayerNorm(features, eps=1e-6)


def global_pooling(name: str) -> nn.Sequential:
    """From ``[n, channels, height, width]`` to ``[n, channels]``: ``average`` or ``maximum``."""
    pooling = nn.AdaptiveMaxPool2d(1) if name == "maximum" else nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(pooling, nn.Flatten())


def dropout(share: float) -> nn.Module:
    """Dropout of a share of the features, 0 to 1; the identity for 0."""
    return nn.Dropout(share) if share else nn.Identity()


def classifier(pooling: str, channels: int, share: float, classes: int) -> dict[str, nn.Module]:
    """Named layers from images to logits: global pooling, dropout of a share, head."""
    return {
        "pool": global_pooling(pooling),
        "dropout": dropout(share),
        "head": nn.Linear(channels, classes),
    }


def stem_choices(inputs: Inputs) -> Choices:
    """Options of the stem: how much it shrinks images, and whether half of that is by pooling."""
    # Images of about 8×8 pixels keep the cost at a few milliseconds per step.
    if inputs.side < 16:
        return {"stem_stride": (1,), "stem_pool": (False,)}
    return {"stem_stride": (4,) if inputs.side < 48 else (8,), "stem_pool": (True, False)}


def stem_layers(
    channels: int, outputs: int, stride: int, *, pool: bool, bias: bool
) -> tuple[nn.Conv2d, nn.Module]:
    """First convolution and pooling, which together turn n pixels into ⌈n / stride⌉."""
    if pool:
        stem = convolution(channels, outputs, 3, stride // 2, bias=bias)
        return stem, nn.MaxPool2d(3, 2, padding=1)
    # A smaller kernel would skip pixels.
    kernel = max(3, 2 * (stride // 2) + 1)
    return convolution(channels, outputs, kernel, stride, bias=bias), nn.Identity()


def halvings(side: int, stages: int) -> list[int]:
    """Stride of each stage: 2 while two pixels remain, so that batches of one can be trained on."""
    strides = []
    for _ in range(stages):
        strides.append(2 if side > 2 else 1)
        side = math.ceil(side / strides[-1])
    return strides


def strides_in_stage(first: int, units: int) -> list[int]:
    """Stride of each unit of a stage; only the first shrinks the image."""
    return [first] + [1] * (units - 1)


def initialise(model: nn.Module, scheme: str) -> None:
    """Re-initialise the convolutional, linear and embedding layers of a network.

    Args:
        model: modified in place.
        scheme: ``he_normal`` (He et al., arXiv 1502.01852) with zero biases, or ``he_uniform``
            with PyTorch's own biases; both keep PyTorch's own initialisation of the layer
            ``head``, so that logits start small. ``truncated_normal`` with standard deviation
            0.02 and zero biases, as in BERT and ViT; ``xavier_uniform`` (Glorot and Bengio, 2010)
            with zero biases.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        if module is model.head and scheme in HE:
            continue
        if scheme == "he_normal":
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif scheme == "he_uniform":
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
        elif scheme == "xavier_uniform" or isinstance(module, nn.Conv2d):
            # 0.02 suits layers with hundreds of inputs; a depthwise kernel has nine.
            nn.init.xavier_uniform_(module.weight)
        else:
            nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None and scheme != "he_uniform":
            nn.init.zeros_(module.bias)


@torch.no_grad()
def damp(last_layers: Sequence[nn.Conv2d]) -> None:
    """Divide the last layer of each residual branch by the root of their number.

    Without normalisation, every branch would otherwise double the variance. This is a simple
    relative of Fixup (Zhang et al., arXiv 1901.09321) that leaves no gradient at zero.
    """
    for layer in last_layers:
        layer.weight /= math.sqrt(len(last_layers))


class LayerScale(nn.Module):
    """One learned factor per feature (Touvron et al., arXiv 2103.17239)."""

    def __init__(self, features: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((features,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """Scale ``[..., features]``."""
        return x * self.gamma


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Scaled dot-product attention of several heads (Vaswani et al., arXiv 1706.03762).

    Args:
        query: ``[n, tokens, features]``.
        key: ``[n, sources, features]``.
        value: as ``key``.
        heads: their number, a divisor of ``features``.

    Returns:
        ``[n, tokens, features]``.
    """

    def split(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2)

    mixed = nn.functional.scaled_dot_product_attention(split(query), split(key), split(value))
    return mixed.transpose(1, 2).flatten(2)
