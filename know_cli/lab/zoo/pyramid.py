"""A pyramid of transformer stages like PVT v2 (Wang et al., arXiv 2106.13797)."""

from __future__ import annotations

import math

from torch import Tensor, nn

from know_cli.lab.zoo.blocks import (
    ACTIVATIONS,
    TRANSFORMER,
    attention,
    convolution,
    halvings,
    initialise,
    token_normalisation,
)
from know_cli.lab.zoo.design import Architecture, Choices, Inputs


def to_tokens(images: Tensor) -> Tensor:
    """From ``[n, width, h, w]`` to ``[n, h · w, width]``."""
    return images.flatten(2).transpose(1, 2)


def to_images(tokens: Tensor, height: int) -> Tensor:
    """From ``[n, h · w, width]`` to ``[n, width, h, w]``."""
    n, count, width = tokens.shape
    return tokens.transpose(1, 2).reshape(n, width, height, count // height)


class OverlappingPatchEmbedding(nn.Module):
    """An overlapping convolution, whose kernel exceeds its stride, and a norm of the tokens."""

    def __init__(self, inputs: int, width: int, stride: int, norm: str) -> None:
        super().__init__()
        self.proj = convolution(inputs, width, max(2 * stride - 1, 3), stride, bias=True)
        self.norm = token_normalisation(norm, width)

    def forward(self, images: Tensor) -> tuple[Tensor, int]:
        """From ``[n, inputs, h, w]`` to ``[n, tokens, width]`` and the number of rows."""
        x = self.proj(images)
        return self.norm(to_tokens(x)), x.shape[2]


class SpatialReductionAttention(nn.Module):
    """Attention whose keys and values come from an image that a convolution reduced."""

    def __init__(self, width: int, heads: int, reduction: int, norm: str, *, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=bias)
        self.kv = nn.Linear(width, 2 * width, bias=bias)
        self.proj = nn.Linear(width, width)
        self.sr: nn.Module | None = None
        if reduction > 1:
            self.sr = nn.Conv2d(width, width, reduction, reduction)
            self.norm = token_normalisation(norm, width)

    def forward(self, x: Tensor, height: int) -> Tensor:
        """Mix tokens ``[n, tokens, width]`` that form an image of the given height."""
        source = x
        if self.sr is not None:
            source = self.norm(to_tokens(self.sr(to_images(x, height))))
        keys, values = self.kv(source).chunk(2, -1)
        mixed: Tensor = self.proj(attention(self.q(x), keys, values, self.heads))
        return mixed


class DepthwiseConvolution(nn.Module):
    """A 3×3 convolution of each feature, which also encodes the tokens' positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = convolution(width, width, 3, groups=width, bias=True)

    def forward(self, x: Tensor, height: int) -> Tensor:
        """Map tokens ``[n, tokens, width]`` that form an image of the given height."""
        return to_tokens(self.dwconv(to_images(x, height)))


class ConvolutionalMlp(nn.Module):
    """Two linear layers with a depthwise convolution between them."""

    def __init__(self, width: int, hidden: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.dwconv = DepthwiseConvolution(hidden)
        self.act = ACTIVATIONS[activation]()
        self.drop = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, height: int) -> Tensor:
        """Map tokens ``[n, tokens, width]`` that form an image of the given height."""
        mapped: Tensor = self.fc2(self.drop(self.act(self.dwconv(self.fc1(x), height))))
        return mapped


class Block(nn.Module):
    """Attention and convolutional perceptron, each on normalised tokens and with a shortcut."""

    def __init__(
        self,
        width: int,
        heads: int,
        reduction: int,
        mlp_ratio: int,
        *,
        activation: str,
        norm: str,
        bias: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.norm1 = token_normalisation(norm, width)
        self.attn = SpatialReductionAttention(width, heads, reduction, norm, bias=bias)
        self.norm2 = token_normalisation(norm, width)
        self.mlp = ConvolutionalMlp(width, mlp_ratio * width, activation, dropout)

    def forward(self, x: Tensor, height: int) -> Tensor:
        """Map tokens ``[n, tokens, width]`` that form an image of the given height."""
        x = x + self.attn(self.norm1(x), height)
        result: Tensor = x + self.mlp(self.norm2(x), height)
        return result


class Stage(nn.Module):
    """A patch embedding, blocks, and a normalisation."""

    def __init__(self, embedding: OverlappingPatchEmbedding, blocks: list[Block], norm: nn.Module):
        super().__init__()
        self.patch_embed = embedding
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm

    def forward(self, images: Tensor) -> Tensor:
        """From ``[n, inputs, h, w]`` to ``[n, width, ⌈h / stride⌉, ⌈w / stride⌉]``."""
        x, height = self.patch_embed(images)
        for block in self.blocks:
            x = block(x, height)
        return to_images(self.norm(x), height)


class PyramidTransformer(nn.Module):
    """Stages of fewer and wider tokens each, and a head on their mean."""

    def __init__(
        self,
        inputs: Inputs,
        classes: int,
        *,
        width: int,
        stages: int,
        blocks: int,
        heads: int,
        stem_stride: int,
        reduction: int,
        mlp_ratio: int,
        activation: str,
        norm: str,
        bias: bool,
        dropout: float,
        initial: str,
    ) -> None:
        super().__init__()
        stack = []
        channels, side = inputs.shape[0], inputs.side
        strides = [stem_stride, *halvings(math.ceil(side / stem_stride), stages - 1)]
        for number, stride in enumerate(strides):
            side = math.ceil(side / stride)
            # The number of heads grows with that of features, so that a head keeps its width.
            multiple = 2**number
            outputs = multiple * width
            layers = [
                Block(
                    outputs,
                    multiple * heads,
                    min(max(reduction // multiple, 1), side),
                    mlp_ratio,
                    activation=activation,
                    norm=norm,
                    bias=bias,
                    dropout=dropout,
                )
                for _ in range(blocks)
            ]
            embedding = OverlappingPatchEmbedding(channels, outputs, stride, norm)
            stack.append(Stage(embedding, layers, token_normalisation(norm, outputs)))
            channels = outputs
        self.stages = nn.Sequential(*stack)
        self.head = nn.Linear(channels, classes)
        initialise(self, initial)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``[n, channels, h, w]`` to logits ``[n, classes]``."""
        logits: Tensor = self.head(self.stages(images).mean((2, 3)))
        return logits


def _choices(inputs: Inputs) -> Choices:
    return {
        "width": (16, 24, 32),
        "stages": (2, 2, 3) if inputs.side >= 16 else (2,),
        "blocks": (1, 1, 2),
        "heads": (1, 2),
        "stem_stride": (2,) if inputs.side < 16 else (4,) if inputs.side < 48 else (8,),
        "reduction": (2, 4),
        "mlp_ratio": (2, 2, 3, 4),
        "activation": ("gelu", "gelu", "relu", "hardswish"),
        "norm": ("layer",),
        "bias": (True, True, False),
        "dropout": (0.0, 0.0, 0.1),
        "initial": TRANSFORMER,
    }


ARCHITECTURE = Architecture("image", _choices, PyramidTransformer)
