"""Small networks that the zoo of classifiers lacks; outputs have the classes in dimension 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from know_cli.lab.zoo.blocks import (
    HE,
    TRANSFORMER,
    convolution,
    global_pooling,
    initialise,
    named,
)
from know_cli.lab.zoo.resnet import BasicBlock


def seeded(construct: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network with initial weights from a seed. The global random state is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return construct()


class CausalAttention(nn.Module):
    """Self-attention of each token to itself and the tokens before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens ``[n, tokens, width]``."""
        n, tokens, width = x.shape
        query, key, value = (
            part.view(n, tokens, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(x).chunk(3, -1)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        result: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return result


class CausalBlock(nn.Module):
    """Causal attention and a perceptron, each on normalised tokens and with a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = CausalAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``[n, tokens, width]``."""
        x = x + self.attn(self.norm1(x))
        result: Tensor = x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))
        return result


class LanguageModel(nn.Module):
    """A small decoder-only transformer (Radford et al., 2019).

    Args:
        vocabulary: number of tokens.
        length: the most tokens per text.
        width: features per token.
        heads: of the attention; a divisor of the width.
        depth: number of blocks.
    """

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, width)
        self.position_embeddings = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(CausalBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        initialise(self, TRANSFORMER[0])

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``[n, length]`` to logits of the next tokens, ``[n, vocabulary, length]``."""
        x = self.word_embeddings(tokens) + self.position_embeddings.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits.transpose(1, 2)


class LoraLinear(nn.Module):
    """A frozen linear layer plus a trained product of two thin matrices (arXiv 2106.09685).

    Args:
        layer: whose weights are kept and frozen.
        rank: of the product.
    """

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = layer
        self.lora_A = nn.Parameter(torch.empty(rank, layer.in_features))
        self.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        # As in the paper with α = 2 · rank.
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., inputs]`` to ``[..., outputs]``."""
        result: Tensor = self.base(x) + self.scale * (x @ self.lora_A.T @ self.lora_B.T)
        return result


def add_lora(model: LanguageModel, rank: int) -> None:
    """Freeze a language model and add a trained adapter to every matrix of its blocks."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for block in model.blocks:
        assert isinstance(block, CausalBlock)
        block.attn.qkv = LoraLinear(block.attn.qkv, rank)  # type: ignore[assignment]
        block.attn.proj = LoraLinear(block.attn.proj, rank)  # type: ignore[assignment]
        block.fc1 = LoraLinear(block.fc1, rank)  # type: ignore[assignment]
        block.fc2 = LoraLinear(block.fc2, rank)  # type: ignore[assignment]


class ResNet18(nn.Module):
    """ResNet18 (He et al., arXiv 1512.03385) for small images, without a stride before its stages.

    Args:
        channels: of the images.
        classes: number of outputs.
    """

    _STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        block = partial(BasicBlock, activation="relu", norm="batch", bias=False)
        width = self._STAGES[0][0]
        self.stem = named(conv1=convolution(channels, width, 3), bn1=nn.BatchNorm2d(width))
        stages = []
        for outputs, stride in self._STAGES:
            stages.append(nn.Sequential(block(width, outputs, stride), block(outputs, outputs, 1)))
            width = outputs
        self.stages = nn.Sequential(*stages)
        self.pool = global_pooling("average")
        self.head = nn.Linear(width, classes)
        initialise(self, HE[0])

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``[n, channels, h, w]`` to logits ``[n, classes]``."""
        features = self.pool(self.stages(torch.relu(self.stem(images))))
        logits: Tensor = self.head(features)
        return logits


class Segmenter(nn.Module):
    """An encoder and decoder with atrous pooling (DeepLabv3+, Chen et al., arXiv 1802.02611).

    Args:
        classes: of pixels, including the background.
    """

    _RATES = (2, 4)

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = _unit(3, 16, 3, stride=2)
        self.down = _unit(16, 32, 3, stride=2)
        self.deep = _unit(32, 32, 3)
        self.point = _unit(32, 16, 1)
        self.atrous = nn.ModuleList(_unit(32, 16, 3, dilation=rate) for rate in self._RATES)
        self.project = _unit(16 * (1 + len(self._RATES)), 32, 1)
        self.fuse = _unit(32 + 16, 24, 3)
        self.head = nn.Conv2d(24, classes, 1)
        initialise(self, HE[0])

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``[n, 3, h, w]`` to logits ``[n, classes, h, w]``."""
        low = self.stem(images)
        x = self.deep(self.down(low))
        x = self.project(torch.cat([self.point(x), *(layer(x) for layer in self.atrous)], 1))
        x = nn.functional.interpolate(x, low.shape[2:], mode="bilinear")
        logits: Tensor = self.head(self.fuse(torch.cat([x, low], 1)))
        return nn.functional.interpolate(logits, images.shape[2:], mode="bilinear")


def _unit(
    inputs: int, outputs: int, kernel: int, *, stride: int = 1, dilation: int = 1
) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)
    return named(conv=layer, bn=nn.BatchNorm2d(outputs), act=nn.ReLU())


class Captioner(nn.Module):
    """A convolutional encoder and a small decoder, which reads its features as a prefix.

    Args:
        vocabulary: number of words.
        length: words per caption.
        shape: (C, H, W) of the images; both sides are multiples of 8.
    """

    _WIDTH, _HEADS, _DEPTH = 32, 2, 2

    def __init__(self, vocabulary: int, length: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape
        channels, height, width = shape
        self.encoder = named(
            conv1=nn.Conv2d(channels, 16, 3, 2, 1), act1=nn.ReLU(),
            conv2=nn.Conv2d(16, 32, 3, 2, 1), act2=nn.ReLU(),
            conv3=nn.Conv2d(32, self._WIDTH, 3, 2, 1), act3=nn.ReLU(),
        )  # fmt: skip
        self.word_embeddings = nn.Embedding(vocabulary, self._WIDTH)
        tokens = (height // 8) * (width // 8)
        self.position_embeddings = nn.Embedding(tokens + length, self._WIDTH)
        self.blocks = nn.Sequential(
            *(CausalBlock(self._WIDTH, self._HEADS) for _ in range(self._DEPTH))
        )
        self.norm = nn.LayerNorm(self._WIDTH)
        self.head = nn.Linear(self._WIDTH, vocabulary)
        initialise(self, TRANSFORMER[0])

    def forward(self, inputs: Tensor) -> Tensor:
        """Map pixels and previous words, ``[n, C · H · W + length]``, to ``[n, words, length]``."""
        pixels = math.prod(self.shape)
        images, words = inputs[:, :pixels].view(-1, *self.shape), inputs[:, pixels:].long()
        seen = self.encoder(images).flatten(2).transpose(1, 2)
        x = torch.cat([seen, self.word_embeddings(words)], 1) + self.position_embeddings.weight
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, seen.shape[1] :])
        return logits.transpose(1, 2)
