"""The layer that feeds a BatchNorm, where names and shapes leave no doubt.

A wrong answer silently damages a model; no answer only means that running statistics are
copied. So a pair of names is trusted only on evidence from pairs of its own role, that is from
the same place in other blocks: somewhere the shapes must fit that could not fit by chance, and
nowhere may they fail. A network of one width that normalises *before* its convolutions gives no
such evidence, whatever its stem looks like.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from know_cli.names import Module, Path, Shape, generic, words
from know_cli.roles import is_norm_name

# A normalisation layer's word in a name, apart from other letters; digits may touch it.
_NORM = re.compile(
    r"(?<![a-z])(?:batch_?norm(?:alization)?(?:[123]d)?|normali[sz]ation|norm(?:[123]d)?|bn)(?![a-z])",
    re.IGNORECASE,
)
_LAYER_WORDS = ("conv", "convolution", "fc", "linear", "lin", "hidden", "dense", "Conv", "Dense")
_LAYER_LISTS = re.compile(r"(?:conv|convolution|lin|linear|layer|fc|dense|mlp)s?$")
_UPWARDS = frozenset("up ups dec decode decoder decoders generator gen synthesis unpool".split())
_TRANSPOSED = ("transpos", "convtrans", "deconv", "upconv", "upsampl", "upscal", "decod")
_ADAPTER = re.compile(r"lora|adapter|ia3|oft|hra|vera")
# Orders of more layers in one module than this are not searched.
_MOST_LAYERS = 4


class _Fit(Enum):
    """What the shapes of a BatchNorm and of the layer before it, by name, say."""

    WRONG = "outputs are not features"
    SURE = "only this layer's outputs have that width"
    POINTWISE = "fits, and hardly anybody groups convolutions of one pixel"
    RATIO = "fits, but a grouped convolution after it would, too"
    SQUARE = "fits whether it comes before or after"
    DEPTHWISE = "fits whether it comes before or after, with one input a channel"


@dataclass(frozen=True, slots=True)
class _Pair:
    """A BatchNorm, and the layer that is before it by its name.

    Attributes:
        norm: position of the BatchNorm's module.
        layer: position of the layer's module.
        container: path of the module that both are in.
        relation: how the one is found from the other, numbers and all.
        sequential: whether the numbers of a Sequential tell the order.
        fit: what the shapes say.
    """

    norm: int
    layer: int
    container: Path
    relation: tuple[str, str]
    sequential: bool
    fit: _Fit
    ratio: int


def find_sources(modules: Sequence[Module], norms: Sequence[int]) -> dict[int, Module]:
    """The layer whose output each BatchNorm normalises, where that is certain.

    Args:
        modules: of the checkpoint.
        norms: positions of those with running mean and variance.

    Returns:
        The feeding layer's module by the BatchNorm's position.
    """
    return _Search(modules, norms).run()


class _Search:
    def __init__(self, modules: Sequence[Module], norms: Sequence[int]) -> None:
        self.modules = modules
        self.norms = [position for position in norms if modules[position].unique]
        self.features = {
            position: _running(modules[position].shapes)[0] for position in self.norms
        }
        adapted = {
            module.path[:depth]
            for module in modules
            for depth, part in enumerate(module.path)
            if _ADAPTER.match(part)
        }
        self.layers: dict[Path, int] = {
            module.path: position
            for position, module in enumerate(modules)
            if set(module.shapes) in ({"weight"}, {"weight", "bias"})
            and len(module.shapes["weight"]) >= 2
            and module.unique
            and module.path
            and module.path not in adapted
        }
        self.norm_paths = {modules[position].path: position for position in self.norms}
        self.children = self._children()

    def _children(self) -> dict[Path, dict[str, int]]:
        """Container → child's name → the layer that it is, or the only one in it."""
        direct: dict[Path, list[Path]] = defaultdict(list)
        nested: Counter[Path] = Counter()
        for path in self.layers:
            direct[path[:-1]].append(path)
            if len(path) > 1:
                nested[path[:-2]] += 1
        with_norms = {path[:depth] for path in self.norm_paths for depth in (-1, -2)}
        children: dict[Path, dict[str, int]] = defaultdict(dict)
        for container, paths in direct.items():
            for path in paths:
                children[container][path[-1]] = self.layers[path]
            alone = len(paths) == 1 and not nested[container] and container not in with_norms
            if alone and container:
                children[container[:-1]].setdefault(container[-1], self.layers[paths[0]])
        return children

    # ---------------------------------------------------------------- pairs by name

    def _pairs(self) -> Iterator[_Pair]:
        for position in self.norms:
            path = self.modules[position].path
            if not path:
                continue
            container, name = path[:-1], path[-1]
            siblings = self.children.get(container, {})
            if not siblings and len(path) > 2:
                yield from self._from_lists(position, path)
                container, name = path[:-2], path[-2]
                siblings = self.children.get(container, {})
                if name != "adn" and not is_norm_name(name):
                    continue
            elif name.isdecimal():
                before = str(int(name) - 1)
                if before in siblings:
                    yield self._pair(position, siblings[before], container, ("#", "#"), True)
                continue
            for other in _partners(name):
                if other in siblings:
                    yield self._pair(position, siblings[other], container, (name, other))
                    break
            else:
                alone = [p for p in self._norms_in(container) if p != position]
                direct = [name for name in siblings if (*container, name) in self.layers]
                if len(direct) == len(siblings) == 1 and not alone:
                    (other,) = direct
                    yield self._pair(position, siblings[other], container, (name, other))

    def _norms_in(self, container: Path) -> list[int]:
        return self.norms_by_container.get(container, [])

    def _from_lists(self, position: int, path: Path) -> Iterator[_Pair]:
        """Lists of norms beside lists of layers: ``bns.3`` and ``convs.3``."""
        parent, name, number = path[:-2], path[-2], path[-1]
        if not number.isdecimal():
            return
        found = [
            (other, self.children[(*parent, other)][number])
            for other in self.lists.get(parent, ())
            if number in self.children[(*parent, other)]
        ]
        if len(found) == 1:
            other, layer = found[0]
            yield self._pair(position, layer, parent, (f"{name}.{number}", f"{other}.{number}"))

    def _pair(
        self,
        norm: int,
        layer: int,
        container: Path,
        relation: tuple[str, str],
        sequential: bool = False,
    ) -> _Pair:
        shape = self.modules[layer].shapes["weight"]
        features = self.features[norm]
        ratio = features // shape[1] if shape[1] else 0
        return _Pair(norm, layer, container, relation, sequential, _fit(shape, features), ratio)

    # ---------------------------------------------------------------- trust

    def run(self) -> dict[int, Module]:
        self.norms_by_container: dict[Path, list[int]] = defaultdict(list)
        for position in self.norms:
            path = self.modules[position].path
            self.norms_by_container[path[:-1]].append(position)
        self.lists: dict[Path, list[str]] = defaultdict(list)
        for container, names in self.children.items():
            if container and _LAYER_LISTS.match(container[-1]) and all(map(str.isdecimal, names)):
                self.lists[container[:-1]].append(container[-1])
        pairs = {pair.norm: pair for pair in self._pairs()}
        trusted = self._trusted(pairs.values())
        trusted.update(self._by_shapes(trusted, pairs))
        found = {
            pair.norm: pair.layer for pair in trusted.values() if not self._may_be_last(pair, trusted)
        }
        users = Counter(found.values())
        return {norm: self.modules[layer] for norm, layer in found.items() if users[layer] == 1}

    def _trusted(self, pairs: Iterable[_Pair]) -> dict[int, _Pair]:
        pairs = list(pairs)
        pools: dict[object, list[_Pair]] = defaultdict(list)
        for pair in pairs:
            for pool in _pools(pair):
                pools[pool].append(pair)
        evidence = {pool: _evidence(of) for pool, of in pools.items()}
        trusted = {}
        for pair in pairs:
            own, *wider = (evidence[pool] for pool in _pools(pair))
            if own is False or pair.fit is _Fit.WRONG or self._may_be_transposed(pair):
                continue
            if pair.fit is not _Fit.SURE:
                if False in wider:
                    continue
                certain = pair.sequential and pair.fit is not _Fit.SQUARE
                if not (certain or own or any(wider) or pair.fit is _Fit.POINTWISE):
                    continue
            trusted[pair.norm] = pair
        return trusted

    def _may_be_transposed(self, pair: _Pair) -> bool:
        """Whether a layer may be a transposed convolution, whose outputs come second.

        Where inputs and outputs differ the shape tells; else its name and its kernel, which is
        even where a transposed convolution doubles a picture without a rest.
        """
        if pair.fit in (_Fit.SURE, _Fit.DEPTHWISE):
            return False
        module = self.modules[pair.layer]
        kernel = module.shapes["weight"][2:]
        if pair.fit is _Fit.SQUARE and any(size % 2 == 0 for size in kernel):
            return True
        found = {word for part in module.path for word in words(part)}
        return bool(kernel) and any(
            word in _UPWARDS or word.startswith(_TRANSPOSED) for word in found
        )

    def _may_be_last(self, pair: _Pair, trusted: Mapping[int, _Pair]) -> bool:
        """Whether a norm may come after the blocks beside it, and not after the layer it names.

        A network that normalises before its convolutions ends with a norm. It is no such network
        if a norm within its blocks surely comes after its convolution.
        """
        if pair.sequential:
            return False
        inside = [norm for norm in self.inside.get(pair.container, ()) if norm != pair.norm]
        return bool(inside) and not any(norm in trusted for norm in inside)

    @property
    def inside(self) -> dict[Path, list[int]]:
        """Container → norms in numbered blocks within it."""
        if not hasattr(self, "_inside"):
            self._inside: dict[Path, list[int]] = defaultdict(list)
            for position in self.norms:
                path = self.modules[position].path
                numbered = [any(map(str.isdecimal, part)) for part in path[:-1]]
                for depth in range(len(path) - 1):
                    if any(numbered[depth:]):
                        self._inside[path[:depth]].append(position)
        return self._inside

    # ---------------------------------------------------------------- pairs by shape

    def _by_shapes(
        self, trusted: Mapping[int, _Pair], pairs: Mapping[int, _Pair]
    ) -> dict[int, _Pair]:
        """Norms whose names do not tell, in modules where the shapes leave one order only."""
        found: dict[int, _Pair] = {}
        roles: dict[object, list[Path]] = defaultdict(list)
        for container, norms in self.norms_by_container.items():
            children = self._before_norms(container)
            if not children or any(norm in pairs for norm in norms):
                continue
            if len(norms) == len(children) <= _MOST_LAYERS:
                names = tuple(self.modules[norm].path[-1] for norm in norms)
                roles[tuple(map(generic, container)), tuple(sorted(children)), names].append(
                    container
                )
            elif len(norms) < len(children):
                found.update(self._by_width(container, norms, children))
        for containers in roles.values():
            found.update(self._by_order(containers))
        return found

    def _before_norms(self, container: Path) -> dict[str, int]:
        """A module's layers; those without bias if there are as many as norms.

        A bias before a BatchNorm is of no use, unlike that of the layers around it.
        """
        children = self.children.get(container, {})
        plain = {n: p for n, p in children.items() if "bias" not in self.modules[p].shapes}
        return plain if len(plain) == len(self.norms_by_container[container]) else children

    def _by_width(
        self, container: Path, norms: Sequence[int], children: Mapping[str, int]
    ) -> Iterator[tuple[int, _Pair]]:
        """A stem and a head around blocks, each with a width that nothing else has."""
        if not any(len(self.modules[norm].path) > len(container) + 1 for norm in self.inside.get(container, ())):
            return
        widths = Counter(self.features[norm] for norm in norms)
        outputs = Counter(self.modules[layer].shapes["weight"][0] for layer in children.values())
        for norm in norms:
            width = self.features[norm]
            if widths[width] > 1 or outputs[width] != 1:
                continue
            for name, layer in children.items():
                if self.modules[layer].shapes["weight"][0] == width:
                    relation = self.modules[norm].path[-1], name
                    pair = self._pair(norm, layer, container, relation)
                    if pair.fit is _Fit.SURE:
                        yield norm, pair

    def _by_order(self, containers: Sequence[Path]) -> Iterator[tuple[int, _Pair]]:
        """The one order of layers that fits all blocks of a kind, unless norms may come first."""
        after: set[tuple[str, ...]] | None = None
        before: set[tuple[str, ...]] | None = None
        for container in containers:
            norms, children = self._ordered(container)
            if not norms:
                return
            shapes = {name: self.modules[layer].shapes["weight"] for name, layer in children.items()}
            widths = [self.features[norm] for norm in norms]
            orders = set(itertools.permutations(sorted(children)))
            fitting = {order for order in orders if _fits_after(order, shapes, widths)}
            leading = {order for order in orders if _fits_before(order, shapes, widths)}
            after = fitting if after is None else after & fitting
            before = leading if before is None else before & leading
        if after is None or len(after) != 1 or before:
            return
        (order,) = after
        for container in containers:
            norms, children = self._ordered(container)
            for norm, name in zip(norms, order, strict=True):
                relation = self.modules[norm].path[-1], name
                pair = self._pair(norm, children[name], container, relation)
                if not self._may_be_transposed(pair):
                    yield norm, pair

    def _ordered(self, container: Path) -> tuple[list[int], dict[str, int]]:
        """A module's norms in the order of their numbers, none if they have none; its layers."""
        norms = self.norms_by_container[container]
        names = [self.modules[norm].path[-1] for norm in norms]
        numbers = [re.findall(r"\d+", name) for name in names]
        if len(norms) > 1 and (
            len({generic(name) for name in names}) > 1 or any(len(found) != 1 for found in numbers)
        ):
            return [], {}
        order = sorted(norms, key=lambda norm: [int(x) for x in re.findall(r"\d+", self.modules[norm].path[-1])])
        return order, self._before_norms(container)


def _running(shapes: Mapping[str, Shape]) -> Shape:
    return shapes.get("running_mean") or shapes.get("moving_mean") or (0,)


def _fit(shape: Shape, features: int) -> _Fit:
    outputs, inputs = shape[:2]
    if outputs != features:
        return _Fit.WRONG
    if inputs == 1:
        return _Fit.DEPTHWISE
    if inputs == features:
        return _Fit.SQUARE
    # Nobody groups channels by three; pictures have three.
    if len(shape) == 2 or inputs == 3 or inputs > features or features % max(inputs, 1):
        return _Fit.SURE
    return _Fit.POINTWISE if max(shape[2:]) == 1 else _Fit.RATIO


def _pools(pair: _Pair) -> tuple[object, ...]:
    """The pairs that are evidence for one: those of its role, and those of the block it is in."""
    container = tuple(map(generic, pair.container))
    own = pair.sequential, container, tuple(map(generic, pair.relation))
    blocks = {_block(container), _block(container[:-1])} - {()}
    return (own, *((pair.sequential, block) for block in sorted(blocks)))


def _block(container: Path) -> Path:
    """The innermost numbered module around; empty if there is none."""
    for depth in range(len(container), 0, -1):
        if "#" in container[depth - 1]:
            return container[:depth]
    return ()


def _evidence(pairs: Sequence[_Pair]) -> bool | None:
    """True if the pairs of a role fit and one could not by chance, False if one does not fit."""
    if any(pair.fit is _Fit.WRONG for pair in pairs):
        return False
    if any(pair.fit is _Fit.SURE for pair in pairs):
        return True
    # A grouped convolution has the same number of groups in all blocks, or nearly so: where
    # the ratio of outputs to inputs is sometimes 1 and sometimes 2, the width changes there.
    ratios: dict[object, set[int]] = defaultdict(set)
    for pair in pairs:
        if pair.fit in (_Fit.POINTWISE, _Fit.RATIO, _Fit.SQUARE):
            ratios[tuple(map(generic, pair.container)), pair.relation].add(pair.ratio)
    return True if any(len(found) > 1 for found in ratios.values()) else None


def _partners(name: str) -> Iterator[str]:
    """Names that the layer before a norm of this name may have, the most likely first."""
    if name == "adn":  # MONAI: activation, dropout and norm in one
        yield "conv"
        return
    for match in _NORM.finditer(name):
        start, end = match.span()
        for word in _LAYER_WORDS:
            yield name[:start] + word + name[end:]
        left, right = name[:start].rstrip("_-/"), name[end:].lstrip("_-/")
        rest = left + ("_" if left and right else "") + right
        if rest and not rest.isdecimal():
            yield rest


def _takes(shape: Shape, width: int) -> bool:
    """Whether a layer can read so many channels, with one group or several."""
    outputs, inputs = shape[:2]
    if inputs == 1 and len(shape) > 2:
        return outputs == width
    if inputs == width or inputs == 0 or max(shape[2:], default=1) == 1:
        return inputs == width
    return width % inputs == 0 and outputs % (width // inputs) == 0


def _fits_after(order: Sequence[str], shapes: Mapping[str, Shape], widths: Sequence[int]) -> bool:
    return all(shapes[name][0] == width for name, width in zip(order, widths, strict=True)) and all(
        _takes(shapes[name], width) for name, width in zip(order[1:], widths, strict=False)
    )


def _fits_before(order: Sequence[str], shapes: Mapping[str, Shape], widths: Sequence[int]) -> bool:
    return all(_takes(shapes[name], width) for name, width in zip(order, widths, strict=True)) and all(
        shapes[name][0] == width for name, width in zip(order, widths[1:], strict=False)
    )
