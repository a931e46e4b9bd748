"""Normalisation layers, found by what they hold and what they are called.

Which layer feeds one is the business of :mod:`know_cli.sources`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from know_cli.names import Module, Path, Shape, extent, group_by_module, words
from know_cli.roles import ends_with_norm, is_called_norm, is_simulated, is_statistic, is_weight
from know_cli.sources import find_sources

Shapes = Mapping[str, Shape]

# What the factor and the offset of a normalisation layer are called, the first that is there.
_FACTORS = ("weight", "gamma", "scale", "g", "alpha", "w")
_OFFSETS = ("bias", "beta", "b", "shift", "offset")
# Pairs that, in one shape, only normalisation layers have; Snake has alpha and beta.
_AFFINE_PAIRS = (("weight", "bias"), ("gamma", "beta"), ("scale", "bias"), ("g", "b"))
_STATISTICS = (
    ("running_mean", "running_var"),
    ("moving_mean", "moving_variance"),
    ("moving_mean", "moving_var"),
)


@dataclass(frozen=True, slots=True)
class NormLayer:
    """One normalisation layer; tensors by their full names, None where it has no such.

    Attributes:
        prefix: name of the module, such as ``layer1.0.bn1``.
        weight: the factor a channel, whatever it is called.
        bias: the offset a channel.
        running_mean: statistics of BatchNorm.
        running_var: statistics of BatchNorm.
        num_batches_tracked: counter of BatchNorm.
        source_weight: weight of the convolution or linear layer whose output it normalises,
            along its first dimension, where that is certain and it has statistics.
        source_bias: that layer's bias.
        others: what else belongs to it, such as the threshold of a filter response
            normalisation.
        is_behind_activation: whether its running means show that an activation stands between
            it and the layer that names propose, which therefore is no source.
    """

    prefix: str
    weight: str | None = None
    bias: str | None = None
    running_mean: str | None = None
    running_var: str | None = None
    num_batches_tracked: str | None = None
    source_weight: str | None = None
    source_bias: str | None = None
    others: tuple[str, ...] = ()
    is_behind_activation: bool = False

    @property
    def has_statistics(self) -> bool:
        """Whether it keeps running statistics, as BatchNorm does."""
        return self.running_mean is not None

    @property
    def affine(self) -> tuple[str, ...]:
        """Names of its weight, bias and other parameters, as far as it has them."""
        return tuple(name for name in (self.weight, self.bias, *self.others) if name is not None)

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of its running statistics and counter, as far as it has them."""
        names = (self.running_mean, self.running_var, self.num_batches_tracked)
        return tuple(name for name in names if name is not None)


def find_norm_layers(shapes: Shapes) -> list[NormLayer]:
    """Find the normalisation layers of a checkpoint, sorted by prefix.

    A module is one if it has running mean and variance; if its name says so, and then every
    vector in it is its own; if its weight and bias have one shape, as no convolution or linear
    layer has; or if it is a lone vector beside a linear layer of that width in a Sequential.

    Args:
        shapes: shape of every tensor by name.
    """
    return norm_layers_of(group_by_module(shapes))


def norm_layers_of(modules: Sequence[Module]) -> list[NormLayer]:
    """As :func:`find_norm_layers`, of a checkpoint whose names were read."""
    found: dict[int, NormLayer] = {}
    for position, module in enumerate(modules):
        layer = _with_statistics(module) or _affine(module)
        if layer is not None:
            found[position] = layer
    for position, layer in _numbered(modules, found):
        found[position] = layer
    sources = find_sources(
        modules, [position for position, layer in found.items() if layer.has_statistics]
    )
    layers = []
    for position, layer in found.items():
        source = sources.get(position)
        if source is not None:
            layer = _fed_by(layer, source)
        layers.append(layer)
    for module in modules:
        layers.extend(_fused(module))
    return sorted(layers, key=lambda layer: layer.prefix)


def _fed_by(layer: NormLayer, source: Module) -> NormLayer:
    return NormLayer(
        layer.prefix,
        layer.weight,
        layer.bias,
        layer.running_mean,
        layer.running_var,
        layer.num_batches_tracked,
        source.tensors["weight"],
        source.tensors.get("bias"),
        layer.others,
    )


def _with_statistics(module: Module) -> NormLayer | None:
    for mean, variance in _STATISTICS:
        shape = module.shapes.get(mean, ())
        if len(shape) == 1 and module.shapes.get(variance) == shape:
            affine = [leaf for leaf in (*_FACTORS, *_OFFSETS) if module.shapes.get(leaf) == shape]
            return replace(
                _layer(module, affine),
                running_mean=module.tensors[mean],
                running_var=module.tensors[variance],
                num_batches_tracked=module.tensors.get("num_batches_tracked"),
            )
    return None


def _layer(module: Module, leaves: Sequence[str]) -> NormLayer:
    """A layer of the given parameters, the factor and the offset found among them."""
    factor = next((leaf for leaf in _FACTORS if leaf in leaves), None)
    offset = next((leaf for leaf in _OFFSETS if leaf in leaves), None)
    return NormLayer(
        module.prefix,
        None if factor is None else module.tensors[factor],
        None if offset is None else module.tensors[offset],
        others=tuple(module.tensors[leaf] for leaf in leaves if leaf not in (factor, offset)),
    )


def _affine(module: Module) -> NormLayer | None:
    shapes = module.shapes
    if is_called_norm(module.path):
        leaves = _owned(module)
        if leaves:
            return _layer(module, leaves)
    has_matrix = any(is_weight(leaf) and extent(shape) > 1 for leaf, shape in shapes.items())
    for factor, offset in _AFFINE_PAIRS:
        if has_matrix and factor != "weight":
            continue  # they scale and shift what a linear layer or convolution gives
        if factor in shapes and shapes[factor] and shapes.get(offset) == shapes[factor]:
            return _layer(module, (factor, offset))
    return None


def _owned(module: Module) -> list[str]:
    """What a module that is called a norm owns: every vector in it, but for statistics.

    Beside running statistics, what is called neither factor nor offset is one of them. LayerNorm
    over several dimensions, or one over each head, has a factor of more; beside a bias
    of another shape it is the matrix of a linear layer, whatever that is called.
    """
    shapes = module.shapes
    leaves = [leaf for leaf in shapes if not (is_statistic(leaf) or is_simulated(leaf))]
    if any(leaf.startswith(("running_", "moving_")) for leaf in shapes):
        leaves = [leaf for leaf in leaves if leaf in (*_FACTORS, *_OFFSETS)]
    factor = next((leaf for leaf in _FACTORS if leaf in leaves), None)
    unlike = [
        leaf
        for leaf in leaves
        if factor and leaf in _OFFSETS and _core(shapes[leaf]) != _core(shapes[factor])
    ]
    if all(extent(shapes[leaf]) < 2 for leaf in leaves):
        return [leaf for leaf in leaves if leaf not in unlike]
    alone = len(leaves) == 1 and not ends_with_norm(module.path[-1])
    same = factor is not None and all(shapes[leaf] == shapes[factor] for leaf in leaves)
    return leaves if same and not alone else []


def _core(shape: Shape) -> Shape:
    return tuple(size for size in shape if size > 1)


def _numbered(
    modules: Sequence[Module], found: Mapping[int, NormLayer]
) -> Iterator[tuple[int, NormLayer]]:
    """Lone vectors in a Sequential that are RMSNorms, and not the slopes of a PReLU.

    A PReLU follows a convolution or a normalisation layer; what stands beside a linear layer, or
    first and before a convolution, and has its width is taken for a norm.
    """
    lists: dict[Path, list[int]] = {}
    for position, module in enumerate(modules):
        if module.path and module.path[-1].isdecimal() and module.unique:
            lists.setdefault(module.path[:-1], []).append(position)
    for positions in lists.values():
        positions.sort(key=lambda position: int(modules[position].path[-1]))
        norms = {position for position in positions if position in found}
        for index, position in enumerate(positions):
            module = modules[position]
            shape = module.shapes.get("weight", ())
            if len(module.shapes) > 1 or len(shape) != 1 or shape[0] < 2:
                continue
            before = positions[index - 1] if index else None
            after = positions[index + 1] if index + 1 < len(positions) else None
            width = None if before is None else _output_width(modules[before])
            if before in norms and _number(modules[before]) == _number(module) - 1:
                continue
            if width is None and before in norms:
                width = modules[before].shapes["weight"][0]
            following = () if after is None else modules[after].shapes.get("weight", ())
            if width == shape[0] or (
                following[1:2] == shape and (len(following) == 2 or before is None)
            ):
                norms.add(position)
                if position not in found:
                    yield position, NormLayer(module.prefix, module.tensors["weight"])


def _number(module: Module) -> int:
    return int(module.path[-1])


def _output_width(module: Module) -> int | None:
    """Outputs of a linear layer; None for other modules."""
    shape = module.shapes.get("weight", ())
    return shape[0] if len(shape) == 2 else None


def _fused(module: Module) -> Iterator[NormLayer]:
    """Norms that are parameters of a larger module: ``layer_norm_weight`` beside its matrix."""
    if is_called_norm(module.path) and all(extent(shape) < 2 for shape in module.shapes.values()):
        return
    groups: dict[str, list[str]] = {}
    for leaf, shape in module.shapes.items():
        stem, _, last = leaf.rpartition("_")
        if last not in (*_FACTORS, *_OFFSETS):
            stem = leaf
        # weight_norm's own parameters and limits on norms are scalars, or called otherwise.
        if extent(shape) == 1 and ends_with_norm(stem) and words(stem)[0] not in ("max", "weight"):
            groups.setdefault(stem, []).append(leaf)
    for stem, leaves in groups.items():
        ends = {leaf.removeprefix(stem).strip("_"): leaf for leaf in leaves}
        factor = next((ends[end] for end in ("", *_FACTORS) if end in ends), None)
        offset = next((ends[end] for end in _OFFSETS if end in ends), None)
        yield NormLayer(
            ".".join(part for part in (module.prefix, stem) if part),
            None if factor is None else module.tensors[factor],
            None if offset is None else module.tensors[offset],
            others=tuple(module.tensors[leaf] for leaf in leaves if leaf not in (factor, offset)),
        )
