"""The layer that feeds a BatchNorm, where names and shapes leave no doubt.

A wrong answer silently damages a model; no answer only means that running statistics are
copied. So a pair of names is trusted only on evidence from pairs of its own role, that is from
the same place in other blocks: somewhere the shapes must fit that could not fit by chance, and
nowhere may they fail. A network of one width that normalises *before* its convolutions gives no
such evidence, whatever its stem looks like.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from know_cli.names import Module, Path, Shape, generic, words
from know_cli.pairs import Fit, Layout, Pair, is_plain, takes

# Words of names that a transposed convolution may have, and those where others are common, too.
_UPWARDS = ("transpos", "convtrans", "deconv", "upconv", "upsampl", "upscal", "unpool")
_UP = frozenset({"up", "ups"})
_DECODING = ("decod", "generat", "synthes")
_DECODE = frozenset({"dec", "gen"})
# Orders of more layers in one module than this are not searched.
_MOST_LAYERS = 4
# In so many different places a relation must be proven to be trusted where nothing proves it.
_MANY_ROLES = 4

# What the pairs of a role say together: True that they are right, False that they are not.
Evidence = Mapping[object, bool | None]


def find_sources(modules: Sequence[Module], norms: Sequence[int]) -> dict[int, Module]:
    """The layer whose output each BatchNorm normalises, where that is certain.

    Args:
        modules: of the checkpoint.
        norms: positions of those with running mean and variance.

    Returns:
        The feeding layer's module by the BatchNorm's position.
    """
    layout = Layout(modules, norms)
    pairs = {pair.norm: pair for pair in _check_pictures(list(layout.pairs()))}
    trusted = {**_trusted(layout, pairs), **_trusted_by_shape(layout, pairs)}
    found = _without_last(layout, trusted)
    found.update((norm, pair.layer) for norm, pair in _trusted_before(layout, pairs).items())
    known = {*found.values(), *(pair.layer for pair in pairs.values())}
    found = _without_sums(layout, found, known)
    users = Counter(found.values())
    return {norm: modules[layer] for norm, layer in found.items() if users[layer] == 1}


def _without_last(layout: Layout, trusted: Mapping[int, Pair]) -> dict[int, int]:
    """The layers of norms, but of those norms that may come after the blocks beside them.

    A network that normalises before its convolutions ends with a norm, which may be named like
    the stem's. It is no such network if a norm within its blocks comes after its convolution.
    """
    proven = {
        container: len(inside & trusted.keys()) for container, inside in layout.blocks_in.items()
    }
    found = {}
    for norm, pair in trusted.items():
        inside = layout.blocks_in.get(pair.container, set())
        own = norm in inside
        if pair.sequential or len(inside) == own or proven[pair.container] > own:
            found[norm] = pair.layer
    return found


def _without_sums(layout: Layout, found: Mapping[int, int], known: Set[int]) -> dict[int, int]:
    """The layers of norms, but of those to which another layer's output may be added.

    That is one beside it that has no norm of its own, and as many outputs. (A layer with a bias
    beside one without is no part of a sum, but of an attention.)
    """
    others = set()
    for container, children in layout.children.items():
        for layer in children.values():
            if layer not in known:
                shape = layout.weight(layer)
                inputs = 0 if max(shape[2:], default=0) == 1 else shape[1]
                others.add((container, len(layout.modules[layer].shapes), shape[0], inputs))
    result = {}
    for norm, layer in found.items():
        outputs, inputs = layout.weight(layer)[:2]
        alike = layout.modules[layer].path[:-1], len(layout.modules[layer].shapes), outputs
        if layout.name(norm).isdecimal() or not {(*alike, inputs), (*alike, 0)} & others:
            result[norm] = layer
    return result


# ------------------------------------------------------------------ evidence


def _check_pictures(pairs: Sequence[Pair]) -> Iterator[Pair]:
    """Three inputs are those of a picture if only one layer of a role has them."""
    pictures = Counter(_role(pair) for pair in pairs if pair.fit is Fit.PICTURE)
    for pair in pairs:
        if pair.fit is Fit.PICTURE:
            yield replace(pair, fit=Fit.SURE if pictures[_role(pair)] == 1 else Fit.RATIO)
        else:
            yield pair


def _role(pair: Pair) -> object:
    """The same place in other blocks; in one flat Sequential, all of its places."""
    container = tuple(map(generic, pair.container))
    if pair.sequential and "#" in "".join(container):
        return container, pair.relation
    return container, tuple(map(generic, pair.relation))


def _blocks(pair: Pair) -> list[object]:
    """The numbered blocks that a pair is in: the innermost, and the one around its container."""
    container = tuple(map(generic, pair.container))
    found = {_block(container), _block(container[:-1])} - {()}
    return [(pair.sequential, block) for block in sorted(found)]


def _block(container: Path) -> Path:
    """The innermost numbered module around; empty if there is none."""
    for depth in range(len(container), 0, -1):
        if "#" in container[depth - 1]:
            return container[:depth]
    return ()


def _gather(layout: Layout, pairs: Iterable[Pair]) -> Evidence:
    """The evidence for every role and block."""
    pools: dict[object, list[Pair]] = defaultdict(list)
    for pair in pairs:
        for pool in (_role(pair), *_blocks(pair)):
            pools[pool].append(pair)
    return {pool: _evidence(layout, of) for pool, of in pools.items()}


def _evidence(layout: Layout, pairs: Sequence[Pair]) -> bool | None:
    """True if all fit and one could not by chance, False if one does not fit, None in doubt."""
    if any(pair.fit is Fit.WRONG for pair in pairs):
        return False
    if any(pair.fit is Fit.SURE for pair in pairs):
        return True
    # Grouped convolutions of a network that normalises first have one ratio of outputs to
    # inputs, or there is only one width.
    ratios: dict[object, set[int]] = defaultdict(set)
    for pair in pairs:
        if pair.fit in (Fit.POINTWISE, Fit.RATIO, Fit.SQUARE):
            ratios[tuple(map(generic, pair.container)), pair.relation].add(pair.ratio)
    widths = {layout.features(pair.norm) for pair in pairs}
    grows = any(
        pair.fit in (Fit.POINTWISE, Fit.RATIO) and layout.weight(pair.layer)[1] in widths
        for pair in pairs
    )
    return True if grows or any(len(found) > 1 for found in ratios.values()) else None


@dataclass(frozen=True, slots=True)
class _Everywhere:
    """What relations are worth over the whole checkpoint.

    Attributes:
        proven: those with evidence in many roles in numbered blocks.
        somewhere: those, numbers left out, with evidence in a numbered block.

    Neither has those that do not fit somewhere.
    """

    proven: frozenset[tuple[str, str]]
    somewhere: frozenset[tuple[str, ...]]


def _look_everywhere(pairs: Iterable[Pair], evidence: Evidence) -> _Everywhere:
    proven: dict[tuple[str, str], set[object]] = defaultdict(set)
    wrong: set[tuple[str, ...]] = set()
    somewhere: set[tuple[str, ...]] = set()
    for pair in pairs:
        role, alike = _role(pair), tuple(map(generic, pair.relation))
        if evidence[role] is False:
            wrong.update((pair.relation, alike))
        elif evidence[role] and _blocks(pair):
            proven[pair.relation].add(role)
            somewhere.add(alike)
    many = {relation for relation, roles in proven.items() if len(roles) >= _MANY_ROLES}
    return _Everywhere(frozenset(many - wrong), frozenset(somewhere - wrong))


# ------------------------------------------------------------------ trust


def _trusted(layout: Layout, pairs: Mapping[int, Pair]) -> dict[int, Pair]:
    """Pairs by name that their role, their block, or their shape alone proves."""
    evidence = _gather(layout, pairs.values())
    everywhere = _look_everywhere(
        (pair for pair in pairs.values() if not pair.sequential), evidence
    )
    trusted = {}
    for norm, pair in pairs.items():
        own = evidence[_role(pair)]
        around = [evidence[block] for block in _blocks(pair)]
        if pair.sequential:
            # The order is certain; what remains is a transposed convolution.
            proven = own or _cannot_enlarge(layout, pair)
        else:
            proven = own or pair.relation in everywhere.proven or _is_stem(layout, pair, everywhere)
        if (
            own is not False
            and pair.fit is not Fit.WRONG
            and not _may_be_transposed(layout, pair, bool(proven) and not pair.sequential)
            and (pair.fit is Fit.SURE or False not in around)
            and (
                proven
                or pair.fit in (Fit.SURE, Fit.POINTWISE)
                or (any(around) and not pair.sequential)
            )
        ):
            trusted[norm] = pair
    return trusted


def _trusted_before(layout: Layout, pairs: Mapping[int, Pair]) -> dict[int, Pair]:
    """In networks that surely normalise first, the layer before the one of the norm's name.

    That layer's own norm must have as many features as it has inputs: after a grouped
    convolution channels may be shuffled.
    """
    evidence = _gather(layout, pairs.values())
    before = list(_check_pictures(list(layout.pairs_before(pairs))))
    shifted = _gather(layout, before)
    sure = {_role(pair) for pair in before if pair.fit is Fit.SURE}
    inputs = {pair.layer: layout.features(norm) for norm, pair in pairs.items()}
    return {
        pair.norm: pair
        for pair in before
        if evidence[_role(pairs[pair.norm])] is False
        and shifted[_role(pair)]
        and _role(pair) in sure
        and inputs.get(pair.layer) == layout.weight(pair.layer)[1]
        and not _may_be_transposed(layout, pair, False)
    }


def _is_stem(layout: Layout, pair: Pair, everywhere: _Everywhere) -> bool:
    """Whether a layer reads pictures of one channel, before blocks that prove its relation."""
    return (
        pair.fit is Fit.DEPTHWISE
        and bool(layout.blocks_in.get(pair.container))
        and tuple(map(generic, pair.relation)) in everywhere.somewhere
    )


def _cannot_enlarge(layout: Layout, pair: Pair) -> bool:
    """Whether a layer is surely no transposed convolution, by its shape."""
    kernel = layout.weight(pair.layer)[2:]
    return pair.fit is not Fit.SQUARE or max(kernel, default=1) == 1


def _may_be_transposed(layout: Layout, pair: Pair, proven: bool) -> bool:
    """Whether a layer may be a transposed convolution, whose outputs come second.

    Where inputs and outputs differ the shape tells; else its name and its kernel, which is even
    where a transposed convolution doubles a picture without a rest.

    Args:
        layout: where it is.
        pair: of which it is the layer.
        proven: whether others in its role prove that it is none; decoders have convolutions, too.
    """
    kernel = layout.weight(pair.layer)[2:]
    if pair.fit in (Fit.SURE, Fit.DEPTHWISE) or not kernel:
        return False
    if pair.fit is Fit.SQUARE and any(size % 2 == 0 for size in kernel):
        return True
    found = {word for part in layout.modules[pair.layer].path for word in words(part)}
    if found & _UP or any(word.startswith(_UPWARDS) for word in found):
        return True
    decodes = found & _DECODE or any(word.startswith(_DECODING) for word in found)
    return bool(decodes) and not proven


# ------------------------------------------------------------------ shapes alone


def _trusted_by_shape(layout: Layout, pairs: Mapping[int, Pair]) -> dict[int, Pair]:
    """Norms whose names do not tell, in modules whose shapes leave one answer only."""
    found: dict[int, Pair] = {}
    roles: dict[object, list[Path]] = defaultdict(list)
    for container, norms in layout.norms_in.items():
        names = [layout.name(norm) for norm in norms]
        if any(norm in pairs for norm in norms) or not all(map(is_plain, names)):
            continue
        children = layout.layers_before_norms(container)
        if layout.blocks_in.get(container):
            found.update(_by_width(layout, container))
        elif len(norms) == len(children) <= _MOST_LAYERS:
            role = tuple(map(generic, container)), tuple(sorted(children)), tuple(sorted(names))
            roles[role].append(container)
    for containers in roles.values():
        found.update(_by_order(layout, containers))
    return found


def _by_width(layout: Layout, container: Path) -> Iterator[tuple[int, Pair]]:
    """A stem and a head around blocks, each with a width that nothing else there has."""
    layers: dict[int, list[str]] = defaultdict(list)
    children = layout.children.get(container, {})
    for name, layer in children.items():
        layers[layout.weight(layer)[0]].append(name)
    norms: dict[int, list[int]] = defaultdict(list)
    for norm in layout.norms_in[container]:
        norms[layout.features(norm)].append(norm)
    for width, (norm, *more) in norms.items():
        if not more and len(layers[width]) == 1:
            (name,) = layers[width]
            pair = layout.pair(norm, children[name], container, (layout.name(norm), name))
            if pair.fit in (Fit.SURE, Fit.PICTURE, Fit.POINTWISE):
                yield norm, pair


def _by_order(layout: Layout, containers: Sequence[Path]) -> Iterator[tuple[int, Pair]]:
    """The one order of layers that fits all blocks of a kind, unless norms may come first."""
    after: set[tuple[str, ...]] | None = None
    before: set[tuple[str, ...]] | None = None
    for container in containers:
        norms = layout.ordered_norms(container)
        shapes = {
            name: layout.weight(layer)
            for name, layer in layout.layers_before_norms(container).items()
        }
        widths = [layout.features(norm) for norm in norms]
        if not norms:
            return
        orders = list(itertools.permutations(sorted(shapes)))
        fitting = {order for order in orders if _fits_after(order, shapes, widths)}
        leading = {order for order in orders if _fits_before(order, shapes, widths)}
        after = fitting if after is None else after & fitting
        before = leading if before is None else before & leading
    if after is None or len(after) != 1 or before:
        return
    (order,) = after
    for container in containers:
        layers = layout.layers_before_norms(container)
        for norm, name in zip(layout.ordered_norms(container), order, strict=True):
            pair = layout.pair(norm, layers[name], container, (layout.name(norm), name))
            if not _may_be_transposed(layout, pair, False):
                yield norm, pair


def _fits_after(order: Sequence[str], shapes: Mapping[str, Shape], widths: Sequence[int]) -> bool:
    """Whether each layer gives what the norm after it normalises, and the next one takes it."""
    gives = all(shapes[name][0] == width for name, width in zip(order, widths, strict=True))
    return gives and all(
        takes(shapes[name], width) for name, width in zip(order[1:], widths, strict=False)
    )


def _fits_before(order: Sequence[str], shapes: Mapping[str, Shape], widths: Sequence[int]) -> bool:
    """Whether each layer takes what the norm before it normalises, and gives the next norm its."""
    reads = all(takes(shapes[name], width) for name, width in zip(order, widths, strict=True))
    return reads and all(
        shapes[name][0] == width for name, width in zip(order, widths[1:], strict=False)
    )
