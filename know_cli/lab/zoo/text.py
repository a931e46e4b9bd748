"""A small transformer encoder over tokens, named as BERT is (Devlin et al., arXiv 1810.04805)."""

from __future__ import annotations

from torch import Tensor, nn

from know_cli.errors import UsageError
from know_cli.lab.zoo.blocks import (
    ACTIVATIONS,
    TRANSFORMER,
    attention,
    initialise,
    token_normalisation,
)
from know_cli.lab.zoo.design import Architecture, Choices, Inputs

# A larger table of word embeddings would make up nearly the whole network.
_LARGEST_TABLE = 2_000_000
_MOST_HEADS = 4


class Embeddings(nn.Module):
    """The sum of a vector for each word and one for each position."""

    def __init__(self, vocabulary: int, length: int, width: int, norm: str, dropout: float) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, width)
        self.position_embeddings = nn.Embedding(length, width)
        self.LayerNorm = token_normalisation(norm, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """From int64 ``[n, tokens]`` to ``[n, tokens, width]``."""
        positions = self.position_embeddings.weight[: tokens.shape[1]]
        embedded: Tensor = self.dropout(self.LayerNorm(self.word_embeddings(tokens) + positions))
        return embedded


class SelfAttention(nn.Module):
    """Self-attention with separate matrices for queries, keys and values."""

    def __init__(self, width: int, heads: int, *, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=bias)
        self.value = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens ``[n, tokens, width]``."""
        return attention(self.query(x), self.key(x), self.value(x), self.heads)


class Output(nn.Module):
    """The end of a branch: a linear layer, the shortcut, and a normalisation if post-norm."""

    def __init__(self, inputs: int, width: int, norm: nn.Module, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, width)
        self.dropout = nn.Dropout(dropout)
        self.LayerNorm = norm

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """From ``[n, tokens, inputs]`` and ``[n, tokens, width]`` to ``[n, tokens, width]``."""
        result: Tensor = self.LayerNorm(shortcut + self.dropout(self.dense(x)))
        return result


class AttentionBranch(nn.Module):
    """Self-attention with its shortcut."""

    def __init__(
        self,
        width: int,
        heads: int,
        before: nn.Module,
        after: nn.Module,
        dropout: float,
        bias: bool,
    ) -> None:
        super().__init__()
        self.LayerNorm = before
        self.self = SelfAttention(width, heads, bias=bias)
        self.output = Output(width, width, after, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens ``[n, tokens, width]``."""
        mixed: Tensor = self.output(self.self(self.LayerNorm(x)), x)
        return mixed


class Intermediate(nn.Module):
    """The first half of the perceptron."""

    def __init__(self, width: int, hidden: int, before: nn.Module, activation: str) -> None:
        super().__init__()
        self.LayerNorm = before
        self.dense = nn.Linear(width, hidden)
        self.act = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """From ``[n, tokens, width]`` to ``[n, tokens, hidden]``."""
        wide: Tensor = self.act(self.dense(self.LayerNorm(x)))
        return wide


class Layer(nn.Module):
    """Attention and perceptron, normalised before each (pre-norm) or after each (post-norm)."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: int,
        *,
        activation: str,
        norm: str,
        norm_first: bool,
        bias: bool,
        dropout: float,
    ) -> None:
        super().__init__()

        def before() -> nn.Module:
            return token_normalisation(norm, width) if norm_first else nn.Identity()

        def after() -> nn.Module:
            return nn.Identity() if norm_first else token_normalisation(norm, width)

        self.attention = AttentionBranch(width, heads, before(), after(), dropout, bias)
        self.intermediate = Intermediate(width, mlp_ratio * width, before(), activation)
        self.output = Output(mlp_ratio * width, width, after(), dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``[n, tokens, width]``."""
        x = self.attention(x)
        result: Tensor = self.output(self.intermediate(x), x)
        return result


class Encoder(nn.Module):
    """Layers, and the final normalisation that pre-norm networks need."""

    def __init__(self, layers: list[Layer], norm: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Sequential(*layers)
        self.LayerNorm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``[n, tokens, width]``."""
        result: Tensor = self.LayerNorm(self.layer(x))
        return result


class TextEncoder(nn.Module):
    """Embeddings, an encoder, and a head on the mean of all tokens, including padding."""

    def __init__(
        self,
        inputs: Inputs,
        classes: int,
        *,
        heads: int,
        head_width: int,
        depth: int,
        mlp_ratio: int,
        activation: str,
        norm: str,
        norm_first: bool,
        bias: bool,
        dropout: float,
        initial: str,
    ) -> None:
        super().__init__()
        vocabulary, length = inputs.shape
        width = heads * head_width
        self.embeddings = Embeddings(vocabulary, length, width, norm, dropout)
        layers = [
            Layer(
                width,
                heads,
                mlp_ratio,
                activation=activation,
                norm=norm,
                norm_first=norm_first,
                bias=bias,
                dropout=dropout,
            )
            for _ in range(depth)
        ]
        last = token_normalisation(norm, width) if norm_first else nn.Identity()
        self.encoder = Encoder(layers, last)
        self.head = nn.Linear(width, classes)
        initialise(self, initial)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``[n, length]`` int64, or fewer of them, to logits ``[n, classes]``."""
        logits: Tensor = self.head(self.encoder(self.embeddings(tokens)).mean(1))
        return logits


def _choices(inputs: Inputs) -> Choices:
    vocabulary, length = inputs.shape
    # Long texts cost more, so they get smaller networks.
    widths = (16, 12, 8) if length <= 64 else (8, 12)
    head_widths = tuple(n for n in widths if vocabulary * n * _MOST_HEADS <= _LARGEST_TABLE)
    if not head_widths:
        raise UsageError(
            f"text of {vocabulary} words: the zoo's networks know at most "
            f"{_LARGEST_TABLE // (8 * _MOST_HEADS)}"
        )
    return {
        "heads": (2, 3, _MOST_HEADS),
        "head_width": head_widths,
        "depth": (1, 2, 3) if length <= 32 else (1, 2) if length <= 64 else (1, 1, 2),
        "mlp_ratio": (2, 2, 3, 4),
        "activation": ("gelu", "gelu", "relu", "silu"),
        "norm": ("layer", "layer", "rms"),
        "norm_first": (False, True),
        "bias": (True, True, False),
        "dropout": (0.0, 0.0, 0.1),
        "initial": TRANSFORMER,
    }


ARCHITECTURE = Architecture("text", _choices, TextEncoder)
