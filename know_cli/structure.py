"""What a tensor's module says of it, whatever the tensor is called.

A float beside a packed weight belongs to it; a vector beside running statistics is one of them;
all of a norm is the norm's.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass

from know_cli.names import Module, Path, Shape, extent, group_by_module, read_name, words
from know_cli.normalisation import norm_layers_of
from know_cli.roles import (
    is_codebook_statistic,
    is_index,
    is_mask,
    is_routing_bias,
    is_statistic,
    is_table,
)

#: Element types that can be predicted, by their safetensors names.
COMPUTABLE = frozenset({"F64", "F32", "F16", "BF16"})
# Integers that pack weights; the others count and point, or are truth values.
_INTEGERS = frozenset({"U8", "I8", "U16", "I16", "U32", "I32"})
_OTHERS = frozenset({"I64", "U64", "BOOL", "C64", "C128"})
# So many bytes in a row may count, one for each head or expert.
_MOST_COUNTERS = 512


@dataclass(frozen=True, slots=True)
class Facts:
    """What its module says of a tensor.

    Attributes:
        path: the module's name in parts, without wrappers.
        leaf: the tensor's name within the module.
        is_packed: it shares its module with a weight that cannot be computed, and is no bias.
        is_spectral: it is a singular vector that spectral norm keeps.
        is_statistic: it shares its module with running statistics, and is not trained.
        is_norm: it is the factor or offset of a normalisation layer.
        is_routing_bias: it balances the experts beside its module.
    """

    path: Path
    leaf: str
    is_packed: bool = False
    is_spectral: bool = False
    is_statistic: bool = False
    is_norm: bool = False
    is_routing_bias: bool = False


def find_facts(tensors: Mapping[str, tuple[Shape, str]]) -> dict[str, Facts]:
    """What their modules say of the tensors of a checkpoint.

    Args:
        tensors: name → (shape, safetensors dtype).
    """
    shapes = {name: shape for name, (shape, _) in tensors.items()}
    modules = group_by_module(shapes)
    norms = {name for layer in norm_layers_of(modules) for name in layer.affine}
    siblings: dict[Path, set[str]] = defaultdict(set)
    for module in modules:
        for depth in range(max(len(module.path) - 3, 0), len(module.path)):
            siblings[module.path[:depth]].add(module.path[depth])
    # I-BERT's LayerNorm counts in ``shift`` by how much its integers have to be made smaller. That
    # name is trained elsewhere, but never above a module that observes the layer's output.
    observed = {
        module.path[:-1]
        for module in modules
        if module.path[-1:] == ("activation",) and "act_scaling_factor" in module.tensors
    }
    averages = {
        module.path: {s for leaf, s in module.shapes.items() if is_statistic(leaf)}
        for module in modules
        if any(map(is_codebook_statistic, module.tensors))
    }
    facts: dict[str, Facts] = {}
    for module in modules:
        of_module = {leaf: tensors[name] for leaf, name in module.tensors.items()}
        packed = [leaf for leaf, tensor in of_module.items() if is_packed(leaf, *tensor)]
        packed = packed or _packed_by_company(of_module)
        statistics = {shape for leaf, shape in module.shapes.items() if is_statistic(leaf)}
        codebook = any(map(is_codebook_statistic, module.tensors))
        averaged = _averaged(module, statistics)
        runs = any(leaf.startswith(("running_", "moving_")) for leaf in module.tensors)
        for leaf, name in module.tensors.items():
            shape = module.shapes[leaf]
            is_norm = name in norms
            facts[name] = Facts(
                module.path,
                leaf,
                is_packed=bool(packed) and not _is_bias(leaf, packed),
                is_spectral=_is_spectral(module, leaf),
                is_statistic=codebook
                or shape in averaged
                or (extent(shape) > 1 and shape in averages.get(module.path[:-1], ()))
                or (
                    not is_norm
                    and leaf not in ("weight", "bias")
                    and (
                        runs
                        or (leaf == "scale" and shape in statistics)
                        or (leaf == "shift" and module.path in observed)
                    )
                ),
                is_norm=is_norm,
                is_routing_bias=is_routing_bias(
                    leaf, siblings[module.path[:-1]] if module.path else set(), module.path
                ),
            )
    for name in tensors.keys() - facts.keys():  # named beyond what is read like another one
        read = read_name(name)
        facts[name] = Facts(read.path, read.leaf)
    return facts


def is_packed(leaf: str, shape: Shape, dtype: str) -> bool:
    """Whether a tensor is a weight of a type that cannot be computed, and no index or mask."""
    if dtype in COMPUTABLE or 0 in shape:
        return False
    if dtype not in _INTEGERS | _OTHERS:
        return True  # float8 and float4 have no other use
    if leaf == "bias" or is_mask(leaf) or is_index(leaf):
        return False
    if "weight" in leaf:
        return max(shape, default=1) > 1
    return dtype in _INTEGERS and len(shape) > 1 and max(shape) > 1


def _averaged(module: Module, statistics: Set[Shape]) -> set[Shape]:
    """Shapes of tables that moving averages are kept for, and of counts of what they stand for.

    Args:
        module: that may hold such tables.
        statistics: shapes of its statistics; one of a table's shape is the sum of what its rows
            stand for.
    """
    tables = {
        shape
        for leaf, shape in module.shapes.items()
        if shape in statistics and extent(shape) > 1 and is_table(leaf) and not is_statistic(leaf)
    }
    return tables | {shape[:-1] for shape in tables}


# What a few values are called that the weights of a layer are chosen from.
_PALETTES = frozenset({"lut", "luts", "palette", "palettes", "codebook", "codebooks", "centroids"})
# What integers of 64 bits are called that are weights; others are tables of places or of tokens.
_CODES = frozenset({"codes", "qidxs"})
_NO_CODES = frozenset(
    {"pos", "position", "positions", "rel", "relative", "coords", "grid", "edge", "rng", "state"}
)


def _packed_by_company(tensors: Mapping[str, tuple[Shape, str]]) -> list[str]:
    """Of one module, integers that are weights only for what stands beside them.

    Indices of ``weight``, or into a palette; or codes, if nothing else in the module is a matrix,
    and they are more than all else in it. Places in a grid, masks and counters are not.

    Args:
        tensors: leaf → (shape, safetensors dtype).
    """
    floats = {leaf: shape for leaf, (shape, dtype) in tensors.items() if dtype in COMPUTABLE}
    has_palette = any(_PALETTES & set(words(leaf)) for leaf in floats)
    has_matrix = any(extent(shape) > 1 for shape in floats.values())
    largest = max((math.prod(shape) for shape in floats.values()), default=0)
    found = []
    for leaf, (shape, dtype) in tensors.items():
        named = set(words(leaf))
        if dtype in COMPUTABLE or dtype in ("BOOL", "C64") or is_mask(leaf) or _NO_CODES & named:
            continue
        if dtype in ("I64", "U64") and not (is_index(leaf) or _CODES & named):
            continue
        if is_index(leaf):
            is_weight = extent(shape) > 1 and (has_palette or "weight" in named)
        else:
            is_matrix, is_bytes = extent(shape) > 1, dtype in ("U8", "I8")
            fewest = 0 if is_matrix else _MOST_COUNTERS
            is_most = not has_matrix and math.prod(shape) > max(largest, fewest)
            is_weight = (is_matrix or is_bytes) and leaf != "bias" and (has_palette or is_most)
        if is_weight:
            found.append(leaf)
    return found


def _is_bias(leaf: str, packed: list[str]) -> bool:
    """``bias``, or the bias of one of several packed weights: ``down_proj_bias``."""
    stem = leaf.removesuffix("_bias")
    return leaf == "bias" or (stem != leaf and any(other.startswith(stem) for other in packed))


def _is_spectral(module: Module, leaf: str) -> bool:
    stem, _, last = leaf.rpartition("_")
    if last not in ("u", "v") or extent(module.shapes[leaf]) > 1:
        return "_spectral" in leaf
    return "_spectral" in stem or any(
        other in module.shapes and extent(module.shapes[other]) > 1
        for other in (stem, f"{stem}_orig", f"{stem}_bar")
    )
