"""Normalisation layers, found by the names of their tensors, and the layers that feed them.

A wrong answer to "which layer feeds this one" silently damages a model; no answer only means
that running statistics are copied. So naming rules are trusted a whole checkpoint at a time:
one pair whose shapes do not fit, as in networks that normalise *before* the convolution of the
same number, and the rule is not used at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]

# Words of a module's name that say it is a normalisation layer; any that ends in "norm" does,
# too ("layernorm", and CLIP's "layrnorm").
_WORDS = frozenset({"norms", "normalization", "normalisation", "ln", "bn", "gn"})
_TRANSPOSED = ("transpos", "convtrans", "deconv", "upconv", "upsampl")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# What the normalisation of a convolution or linear layer is called → what that layer is.
_PAIRS = (
    ("normalization", "convolution"),
    ("batch_norm", "conv"),
    ("batchnorm", "conv"),
    ("bn", "conv"),
    ("norm", "conv"),
    ("bn", "fc"),
    ("norm", "fc"),
    ("bn", "linear"),
    ("norm", "linear"),
    ("bn", "hidden"),
    ("norm", "hidden"),
)
_SEQUENTIAL = "number before"


@dataclass(frozen=True, slots=True)
class NormLayer:
    """One normalisation layer; tensors by their full names, None where it has no such.

    Attributes:
        prefix: name of the module, such as ``layer1.0.bn1``.
        weight: the factor a channel.
        bias: the offset a channel.
        running_mean: statistics of BatchNorm.
        running_var: statistics of BatchNorm.
        num_batches_tracked: counter of BatchNorm.
        source_weight: weight of the convolution or linear layer whose output it normalises,
            where the names tell and it has statistics.
        source_bias: that layer's bias.
    """

    prefix: str
    weight: str | None = None
    bias: str | None = None
    running_mean: str | None = None
    running_var: str | None = None
    num_batches_tracked: str | None = None
    source_weight: str | None = None
    source_bias: str | None = None

    @property
    def has_statistics(self) -> bool:
        """Whether it keeps running statistics, as BatchNorm does."""
        return self.running_mean is not None

    @property
    def affine(self) -> tuple[str, ...]:
        """Names of its weight and bias, as far as it has them."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of its running statistics and counter, as far as it has them."""
        names = (self.running_mean, self.running_var, self.num_batches_tracked)
        return tuple(name for name in names if name is not None)


def find_norm_layers(shapes: Shapes) -> list[NormLayer]:
    """Find the normalisation layers of a checkpoint, sorted by prefix.

    A module is one if it has running_mean and running_var; if its name says so and its weight
    has one dimension; or if weight and bias have one dimension and one shape, as no convolution
    or linear layer has (ConvNeXt's numbered LayerNorm).

    Args:
        shapes: shape of every tensor by name.
    """
    prefixes = sorted({name.rpartition(".")[0] for name in shapes})
    with_statistics = {
        prefix: shapes[_join(prefix, "running_mean")]
        for prefix in prefixes
        if len(shapes.get(_join(prefix, "running_mean"), ())) == 1
        and shapes.get(_join(prefix, "running_var")) == shapes[_join(prefix, "running_mean")]
    }
    sources = _find_sources(shapes, with_statistics)
    layers = []
    for prefix in prefixes:
        if prefix in with_statistics:
            source = sources.get(prefix)
            layers.append(
                NormLayer(
                    prefix,
                    _present(shapes, prefix, "weight"),
                    _present(shapes, prefix, "bias"),
                    _join(prefix, "running_mean"),
                    _join(prefix, "running_var"),
                    _present(shapes, prefix, "num_batches_tracked"),
                    None if source is None else _join(source, "weight"),
                    None if source is None else _present(shapes, source, "bias"),
                )
            )
        else:
            affine = _affine(shapes, prefix)
            if affine and (len(affine) == 2 or _is_called_norm(prefix)):
                layers.append(NormLayer(prefix, *affine))
    return layers


def _affine(shapes: Shapes, prefix: str) -> tuple[str, ...]:
    """Weight, and bias of the same shape, of a module whose weight has one dimension."""
    for weight, bias in (("weight", "bias"), ("gamma", "beta")):
        shape = shapes.get(_join(prefix, weight), ())
        if len(shape) == 1:
            same = shapes.get(_join(prefix, bias)) == shape
            return (_join(prefix, weight), _join(prefix, bias))[: 1 + same]
    return ()


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _present(shapes: Shapes, prefix: str, name: str) -> str | None:
    full = _join(prefix, name)
    return full if full in shapes else None


def _is_called_norm(prefix: str) -> bool:
    """Whether the module, or the list that a numbered module stands in, is named so."""
    parts = [part for part in prefix.split(".") if not part.isdigit()]
    words = _WORD.findall(parts[-1]) if parts else []
    return any(word.lower() in _WORDS or word.lower().endswith("norm") for word in words)


def _find_sources(shapes: Shapes, layers: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Prefix of the layer that feeds each normalisation layer, where the names tell."""
    candidates: dict[str, dict[str, str]] = {}
    for prefix in layers:
        for rule, source in _candidates(prefix):
            shape = shapes.get(_join(source, "weight"), ())
            if len(shape) >= 2 and not _may_be_transposed(source, shape):
                candidates.setdefault(rule, {})[prefix] = source
    found: dict[str, str] = {}
    for rule in (*(f"{norm} {layer}" for norm, layer in _PAIRS), _SEQUENTIAL):
        pairs = candidates.get(rule, {})
        if _is_trusted(shapes, layers, pairs):
            for prefix, source in pairs.items():
                found.setdefault(prefix, source)
    return found


def _may_be_transposed(prefix: str, shape: tuple[int, ...]) -> bool:
    """Whether a layer may be a transposed convolution, whose outputs come second, by its name.

    Only where inputs and outputs differ does the shape tell.
    """
    words = {word.lower() for part in prefix.split(".") for word in _WORD.findall(part)}
    return shape[0] == shape[1] and any(
        word in ("up", "ups") or word.startswith(_TRANSPOSED) for word in words
    )


def _candidates(prefix: str) -> Iterator[tuple[str, str]]:
    """Names that the layer before may have: (rule, prefix of that layer)."""
    parent, _, module = prefix.rpartition(".")
    if module.isdigit():
        if int(module) > 0:
            yield _SEQUENTIAL, _join(parent, str(int(module) - 1))
        return
    for norm, layer in _PAIRS:
        if re.search(rf"(?:^|_|(?<=\d)){norm}(?:$|_|(?=\d))", module):
            yield f"{norm} {layer}", _join(parent, module.replace(norm, layer))


def _is_trusted(
    shapes: Shapes, layers: Mapping[str, tuple[int, ...]], pairs: Mapping[str, str]
) -> bool:
    """Whether a rule fits everywhere, and somewhere could not fit by chance."""
    evidence = False
    for prefix, source in pairs.items():
        (features,) = layers[prefix]
        outputs, inputs, *_ = shapes[_join(source, "weight")]
        if outputs != features:
            return False
        # A depthwise convolution has one input a channel whatever comes before it.
        evidence = evidence or inputs not in (1, features)
    return evidence
