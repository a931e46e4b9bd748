"""The networks of the paper's larger experiments, from the libraries that keep them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from know_cli.errors import UsageError
from know_cli.evaluation.tasks.networks import seeded

# Of ImageNet's pictures, 0 to 1, as public checkpoints were trained with.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LEVELS = 255
#: Widths, blocks, heads and so on of PVTv2-B1 (Wang et al., arXiv 2106.13797), as published.
PVT_V2_B1: dict[str, Any] = {"hidden_sizes": [64, 128, 320, 512], "depths": [2, 2, 2, 2]}


def standardised(images: Tensor) -> Tensor:
    """Pictures as networks take them.

    Args:
        images: ``[n, 3, h, w]``, uint8 or shares from 0 to 1.
    """
    if images.dtype == torch.uint8:
        images = images.float() / _LEVELS
    mean, deviation = (
        torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (_MEAN, _DEVIATION)
    )
    return (images - mean) / deviation


def _standardise_first(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (standardised(inputs[0]), *inputs[1:])


def _logits(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor:
    found: Tensor = output.logits
    return found


def _pvt(classes: int, sizes: dict[str, Any]) -> nn.Module:
    try:
        from transformers import PvtV2Config, PvtV2ForImageClassification
    except ImportError as error:
        raise UsageError("PVTv2 needs transformers: pip install 'know-predict[paper]'") from error
    model: nn.Module = PvtV2ForImageClassification(PvtV2Config(num_labels=classes, **sizes))
    return model


def pvt_classifier(classes: int, seed: int) -> nn.Module:
    """PVTv2-B1 for pictures of any size, uint8 or shares; its head is ``classifier``.

    Tensors have the names of public checkpoints: what is done to inputs and outputs is done by
    hooks.

    Raises:
        UsageError: transformers is not installed.
    """
    model = seeded(lambda: _pvt(classes, PVT_V2_B1), seed)
    model.register_forward_pre_hook(_standardise_first)
    model.register_forward_hook(_logits)
    return model


def deep_lab(classes: int, seed: int) -> nn.Module:
    """DeepLabV3+ (Chen et al., arXiv 1802.02611) on a ResNet50; its head is ``segmentation_head``.

    Raises:
        UsageError: segmentation-models-pytorch is not installed, or cannot be used.
    """
    try:
        from segmentation_models_pytorch import DeepLabV3Plus
    except (ImportError, RuntimeError) as error:  # the latter from a torchvision of another torch
        raise UsageError(
            "DeepLabV3+ needs segmentation-models-pytorch, which cannot be imported "
            f"({type(error).__name__}: {error}): pip install 'know-predict[paper]'"
        ) from error

    model = seeded(lambda: DeepLabV3Plus("resnet50", encoder_weights=None, classes=classes), seed)
    model.register_forward_pre_hook(_standardise_first)
    return model


class PvtCaptioner(nn.Module):
    """PVTv2-B1's features, read by a transformer's decoder that says the next words.

    The encoder's tensors have the names that :func:`pvt_classifier` gives them.

    Args:
        words: size of the vocabulary.
        length: words of a caption.
        shape: ``(3, h, w)`` of a picture.
        width: features of a word.
        heads: of the decoder's attention.
        depth: its layers.
    """

    def __init__(
        self,
        words: int,
        length: int,
        shape: tuple[int, int, int],
        width: int = 256,
        heads: int = 8,
        depth: int = 3,
    ) -> None:
        super().__init__()
        self.shape, self.length = shape, length
        self.pvt_v2: Any = _pvt(2, PVT_V2_B1).pvt_v2
        self.project = nn.Linear(PVT_V2_B1["hidden_sizes"][-1], width)
        self.word_embeddings = nn.Embedding(words, width)
        self.position_embeddings = nn.Embedding(length, width)
        layer = nn.TransformerDecoderLayer(width, heads, 4 * width, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, depth)
        self.words = nn.Linear(width, words)

    #: Modules that a classifier lacks.
    FRESH = ("project", "word_embeddings", "position_embeddings", "decoder", "words", "classifier")

    def forward(self, inputs: Tensor) -> Tensor:
        """Map pictures with the words before, to logits of the next words.

        Args:
            inputs: int16 ``[n, 3 · h · w + captions · length]``: pixels from 0 to 255, then words.

        Returns:
            ``[n, words, captions · length]``.
        """
        n, (channels, height, width) = len(inputs), self.shape
        pixels = channels * height * width
        images = inputs[:, :pixels].view(n, channels, height, width).float() / _LEVELS
        before = inputs[:, pixels:].long().view(n, -1, self.length)
        captions = before.shape[1]
        seen = self.pvt_v2(standardised(images)).last_hidden_state.flatten(2).transpose(1, 2)
        seen = self.project(seen).repeat_interleave(captions, 0)
        x = self.word_embeddings(before.flatten(0, 1)) + self.position_embeddings.weight
        mask = nn.Transformer.generate_square_subsequent_mask(self.length, device=x.device)
        read = self.decoder(x, seen, tgt_mask=mask, tgt_is_causal=True)
        logits: Tensor = self.words(read).view(n, captions * self.length, -1).transpose(1, 2)
        return logits


def pvt_captioner(words: int, length: int, shape: tuple[int, int, int], seed: int) -> nn.Module:
    """A :class:`PvtCaptioner` with initial weights from a seed."""
    return seeded(lambda: PvtCaptioner(words, length, shape), seed)
