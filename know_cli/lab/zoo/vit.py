"""Vision Transformer, pre-norm (Dosovitskiy et al., arXiv 2010.11929)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from know_cli.lab.zoo.blocks import (
    ACTIVATIONS,
    TRANSFORMER,
    LayerScale,
    attention,
    initialise,
    token_normalisation,
)
from know_cli.lab.zoo.design import Architecture, Choices, Inputs

_INITIAL_LAYER_SCALE = 0.1


class PatchEmbedding(nn.Module):
    """Maps each patch of the image linearly to a token."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        """From ``[n, channels, h, w]`` to ``[n, tokens, width]``."""
        tokens: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return tokens


class Attention(nn.Module):
    """Self-attention with one matrix for queries, keys and values."""

    def __init__(self, width: int, heads: int, *, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens ``[n, tokens, width]``."""
        query, key, value = self.qkv(x).chunk(3, -1)
        mixed: Tensor = self.proj(attention(query, key, value, self.heads))
        return mixed


class Mlp(nn.Module):
    """Two linear layers, applied to each token."""

    def __init__(self, width: int, hidden: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = ACTIVATIONS[activation]()
        self.drop = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``[n, tokens, width]``."""
        mapped: Tensor = self.fc2(self.drop(self.act(self.fc1(x))))
        return mapped


class Block(nn.Module):
    """Attention and perceptron, each on normalised tokens and with a shortcut."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: int,
        *,
        activation: str,
        norm: str,
        bias: bool,
        layer_scale: bool,
        dropout: float,
    ) -> None:
        super().__init__()

        def scale() -> nn.Module:
            return LayerScale(width, _INITIAL_LAYER_SCALE) if layer_scale else nn.Identity()

        self.norm1 = token_normalisation(norm, width)
        self.attn = Attention(width, heads, bias=bias)
        self.ls1 = scale()
        self.norm2 = token_normalisation(norm, width)
        self.mlp = Mlp(width, mlp_ratio * width, activation, dropout)
        self.ls2 = scale()

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``[n, tokens, width]``."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        result: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return result


class VisionTransformer(nn.Module):
    """Patches and positions, blocks, and a head on the class token or on the mean token."""

    def __init__(
        self,
        inputs: Inputs,
        classes: int,
        *,
        patch: int,
        heads: int,
        head_width: int,
        depth: int,
        mlp_ratio: int,
        activation: str,
        norm: str,
        bias: bool,
        pooling: str,
        layer_scale: bool,
        dropout: float,
        initial: str,
    ) -> None:
        super().__init__()
        channels, height, around = inputs.shape
        width = heads * head_width
        tokens = (height // patch) * (around // patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if pooling == "token" else None
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens + (self.cls_token is not None), width))
        self.patch_embed = PatchEmbedding(channels, width, patch)
        self.pos_drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(
            *(
                Block(
                    width,
                    heads,
                    mlp_ratio,
                    activation=activation,
                    norm=norm,
                    bias=bias,
                    layer_scale=layer_scale,
                    dropout=dropout,
                )
                for _ in range(depth)
            )
        )
        self.norm = token_normalisation(norm, width)
        self.head = nn.Linear(width, classes)
        initialise(self, initial)
        for parameter in (self.pos_embed, self.cls_token):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``[n, channels, h, w]`` to logits ``[n, classes]``."""
        x = self.patch_embed(images)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1)
        x = self.norm(self.blocks(self.pos_drop(x + self.pos_embed)))
        logits: Tensor = self.head(x.mean(1) if self.cls_token is None else x[:, 0])
        return logits


def _choices(inputs: Inputs) -> Choices:
    side = inputs.side
    # From 16 to 64 tokens, preferably few, of whole patches where the side has such divisors.
    patches = [n for n in range(2, side) if side % n == 0 and 4 <= side // n <= 8]
    return {
        "patch": (*patches[1:], *patches[1:], *patches[:1]) or (side // 4,),
        "heads": (2, 3, 4),
        "head_width": (8, 12, 16),
        "depth": (2, 2, 3, 4),
        "mlp_ratio": (2, 3, 4),
        "activation": ("gelu", "gelu", "relu", "silu"),
        "norm": ("layer",),
        "bias": (True, True, False),
        "pooling": ("token", "mean"),
        "layer_scale": (False, False, True),
        "dropout": (0.0, 0.0, 0.1),
        "initial": TRANSFORMER,
    }


ARCHITECTURE = Architecture("image", _choices, VisionTransformer)
