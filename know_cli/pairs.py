"""BatchNorms and the layers that may feed them, found by name or by the order that widths allow.

What is found here is a guess; :mod:`know_cli.sources` decides which of them are trusted.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from know_cli.names import Module, Path, Shape, words
from know_cli.roles import is_norm_name

# A normalisation layer's word in a name, apart from other letters; digits may touch it.
_NORM = re.compile(
    r"(?<![a-z])(?:batch_?norm(?:alization)?(?:[123]d)?|normali[sz]ation|norm(?:[123]d)?|bn)"
    r"(?![a-z])",
    re.IGNORECASE,
)
_LAYER_WORDS = ("conv", "convolution", "fc", "linear", "lin", "hidden", "dense", "Conv", "Dense")
_LAYER_LISTS = re.compile(r"(?:conv|convolution|lin|linear|layer|fc|dense|mlp)s?$")
_ADAPTER = re.compile(r"lora|adapter|ia3|oft|hra|vera")
_NUMBER = re.compile(r"\d+")
_UNDERSCORE = re.compile("(?<=[0-9])_")
# Blocks do not hold layers more levels down than this.
_DEEPEST = 5


class Fit(Enum):
    """What the shapes of a BatchNorm and of the layer that may be before it say."""

    WRONG = "outputs are not features"
    SURE = "fits, and would not the other way round"
    PICTURE = "fits, and three inputs are those of a picture, or rarely of a group"
    POINTWISE = "fits, unless it is a grouped convolution of one pixel, which hardly anybody uses"
    RATIO = "fits, but a grouped convolution after the norm would, too"
    SQUARE = "fits whether it comes before or after"
    DEPTHWISE = "fits whether it comes before or after, with one input a channel"


@dataclass(frozen=True, slots=True)
class Pair:
    """A BatchNorm, and the layer that may feed it.

    Attributes:
        norm: position of the BatchNorm's module.
        layer: position of the layer's module.
        container: path of the module that both are in.
        relation: their names within it, which make up its role together with its place.
        sequential: whether the numbers of a Sequential tell the order.
        fit: what the shapes say.
        ratio: features for each input.
    """

    norm: int
    layer: int
    container: Path
    relation: tuple[str, str]
    sequential: bool
    fit: Fit
    ratio: int


class Layout:
    """Where the layers and BatchNorms of a checkpoint are.

    Attributes:
        modules: of the checkpoint.
        norms: positions of those with running mean and variance.
        children: container → child's name → the layer that it is, or the only one in it.
        norms_in: container → norms in it.
        blocks_in: container → norms in numbered blocks within it.
    """

    def __init__(self, modules: Sequence[Module], norms: Sequence[int]) -> None:
        self.modules = modules
        self.norms = [position for position in norms if modules[position].unique]
        self._layers = {
            module.path: position
            for position, module in enumerate(modules)
            if set(module.shapes) in ({"weight"}, {"weight", "bias"})
            and len(module.shapes["weight"]) >= 2
            and module.unique
            and module.path
        }
        for module in modules:
            for depth, part in enumerate(module.path):
                if _ADAPTER.match(part):  # the weight is not all that feeds the norm
                    self._layers.pop(module.path[:depth], None)
        self.norms_in: dict[Path, list[int]] = defaultdict(list)
        self.blocks_in: dict[Path, set[int]] = defaultdict(set)
        for position in self.norms:
            path = modules[position].path
            self.norms_in[path[:-1]].append(position)
            numbered = [_NUMBER.search(part) is not None for part in path[:-1]]
            last = max((depth for depth, found in enumerate(numbered) if found), default=-1)
            for depth in range(last + 1):
                self.blocks_in[path[:depth]].add(position)
        self.children = self._find_children()
        self._inner: dict[Path, set[str]] = defaultdict(set)
        for path in self._layers:
            for depth in range(max(len(path) - _DEEPEST, 0), len(path)):
                self._inner[path[:depth]].add(path[depth])
        # What stands before an underscore in a child's name → the children.
        self._longer: dict[Path, list[str]] = defaultdict(list)
        for container, names in self.children.items():
            for name in names:
                for match in _UNDERSCORE.finditer(name):
                    start = (*container, name[: match.start()])
                    self._longer[start].append(name)
        self._lists: dict[Path, list[str]] = defaultdict(list)
        for container, names in self.children.items():
            if container and _LAYER_LISTS.match(container[-1]) and all(map(str.isdecimal, names)):
                self._lists[container[:-1]].append(container[-1])

    def _find_children(self) -> dict[Path, dict[str, int]]:
        direct: dict[Path, list[Path]] = defaultdict(list)
        nested: Counter[Path] = Counter()
        for path in self._layers:
            direct[path[:-1]].append(path)
            if len(path) > 1:
                nested[path[:-2]] += 1
        with_norms = {self.modules[norm].path[:depth] for norm in self.norms for depth in (-1, -2)}
        paths_of_tensors = {module.path for module in self.modules}
        children: dict[Path, dict[str, int]] = defaultdict(dict)
        for container, paths in direct.items():
            for path in paths:
                children[container][path[-1]] = self._layers[path]
        for container, paths in direct.items():
            alone = len(paths) == 1 and not nested[container] and container not in with_norms
            # A module with parameters of its own does something with its layer's output.
            if alone and container and container not in paths_of_tensors:
                children[container[:-1]].setdefault(container[-1], self._layers[paths[0]])
        return children

    def weight(self, layer: int) -> Shape:
        """Shape of a layer's weight."""
        return self.modules[layer].shapes["weight"]

    def name(self, position: int) -> str:
        """A module's name in its container; empty for a model that is one layer."""
        return "".join(self.modules[position].path[-1:])

    def features(self, norm: int) -> int:
        """Channels that a BatchNorm normalises."""
        shapes = self.modules[norm].shapes
        return (shapes.get("running_mean") or shapes["moving_mean"])[0]

    def pair(
        self,
        norm: int,
        layer: int,
        container: Path,
        relation: tuple[str, str],
        sequential: bool = False,
    ) -> Pair:
        """A pair, with what its shapes say."""
        shape, features = self.weight(layer), self.features(norm)
        ratio = features // shape[1] if shape[1] else 0
        return Pair(norm, layer, container, relation, sequential, fit(shape, features), ratio)

    # ------------------------------------------------------------------ by name

    def pairs(self) -> Iterator[Pair]:
        """The layer of each norm's name or number, or the only one beside it."""
        for norm in self.norms:
            path = self.modules[norm].path
            if not path:
                continue
            container, name = path[:-1], path[-1]
            siblings = self.children.get(container, {})
            if siblings and name.isdecimal():
                before = str(int(name) - 1)
                if before in siblings:
                    yield self.pair(norm, siblings[before], container, (name, before), True)
                continue
            if not siblings and len(path) > 1:
                yield from self._from_lists(norm, path)
                container, name = path[:-2], path[-2]
                siblings = self.children.get(container, {})
                if name != "adn" and not is_norm_name(name):
                    continue
            other = self._partner(name, container)
            if other is None and is_plain(name) and len(self.norms_in[path[:-1]]) == 1:
                direct = [name for name in siblings if (*container, name) in self._layers]
                if len(direct) == len(self._inner[container]) == 1:
                    other = direct[0]
            if other is not None:
                yield self.pair(norm, siblings[other], container, (name, other))

    def _partner(self, name: str, container: Path) -> str | None:
        """The layer before a norm, by their names: ``bn1`` and ``conv1``, or ``conv1_1x1``."""
        siblings = self.children.get(container, {})
        names = list(_partners(name))
        for other in names:
            if other in siblings:
                return other
        longer = {
            sibling
            for other in names
            if other[-1:].isdecimal()
            for sibling in self._longer.get((*container, other), ())
        }
        return longer.pop() if len(longer) == 1 else None

    def _from_lists(self, norm: int, path: Path) -> Iterator[Pair]:
        """Lists of norms beside lists of layers: ``bns.3`` and ``convs.3``."""
        parent, name, number = path[:-2], path[-2], path[-1]
        if not number.isdecimal():
            return
        found = {}
        for other in self._lists.get(parent, ()):
            items = self.children.get((*parent, other), {})
            if number in items:
                found[other] = items[number]
        if len(found) == 1:
            ((other, layer),) = found.items()
            yield self.pair(norm, layer, parent, (f"{name}.{number}", f"{other}.{number}"))

    def pairs_before(self, pairs: Mapping[int, Pair]) -> Iterator[Pair]:
        """The layer before the one of each norm's name, for norms that come first.

        ``bn2`` and ``conv1``, or ``conv2.bn`` and ``conv1.conv``.
        """
        for norm, pair in pairs.items():
            if pair.sequential:
                continue
            name, other = pair.relation
            earlier = _one_less(other)
            siblings = self.children.get(pair.container, {})
            if earlier in siblings:
                yield self.pair(norm, siblings[earlier], pair.container, (name, earlier))
            elif pair.container and _NUMBER.search(name) is None:
                *parent, block = pair.container
                earlier = _one_less(block)
                siblings = self.children.get((*parent, earlier), {})
                if other in siblings:
                    relation = f"{block}.{name}", f"{earlier}.{other}"
                    yield self.pair(norm, siblings[other], tuple(parent), relation)

    # ------------------------------------------------------------------ by order

    def layers_before_norms(self, container: Path) -> dict[str, int]:
        """A module's layers; those without bias, if there are as many as norms.

        A bias before a BatchNorm is of no use, unlike that of the layers around it.
        """
        children = self.children.get(container, {})
        plain = {name: at for name, at in children.items() if "bias" not in self.modules[at].shapes}
        return plain if len(plain) == len(self.norms_in[container]) else children

    def ordered_norms(self, container: Path) -> list[int]:
        """A module's norms by their numbers; none if they are not numbered alike."""
        norms = self.norms_in[container]
        numbers = {norm: _NUMBER.findall(self.name(norm)) for norm in norms}
        alike = {_NUMBER.sub("", self.name(norm)) for norm in norms}
        if len(norms) > 1 and (len(alike) > 1 or any(len(of) != 1 for of in numbers.values())):
            return []
        return sorted(norms, key=lambda norm: [int(number) for number in numbers[norm]])


def fit(shape: Shape, features: int) -> Fit:
    """What the shapes of a layer's weight and of a BatchNorm say.

    Args:
        shape: of the weight, ``[outputs, inputs, …]``.
        features: of the BatchNorm.
    """
    outputs, inputs = shape[:2]
    if outputs != features:
        return Fit.WRONG
    if inputs == features:
        return Fit.SQUARE
    if inputs == 1:
        return Fit.DEPTHWISE
    if len(shape) == 2 or inputs > features or features % max(inputs, 1):
        return Fit.SURE  # linear layers have no groups
    if inputs == 3:
        return Fit.PICTURE
    return Fit.POINTWISE if max(shape[2:]) == 1 else Fit.RATIO


def takes(shape: Shape, width: int) -> bool:
    """Whether a layer can read so many channels, with one group or several."""
    outputs, inputs = shape[:2]
    if inputs == 1 and len(shape) > 2:
        return outputs == width
    if inputs == width or inputs == 0 or max(shape[2:], default=1) == 1:
        return inputs == width
    return width % inputs == 0 and outputs % (width // inputs) == 0


def _one_less(name: str) -> str:
    """A name with the last of its numbers less by one; empty if it has none above zero."""
    found = list(_NUMBER.finditer(name))
    if not found or int(found[-1][0]) == 0:
        return ""
    start, stop = found[-1].span()
    return f"{name[:start]}{int(found[-1][0]) - 1}{name[stop:]}"


def is_plain(name: str) -> bool:
    """Whether a name says norm and nothing else, but for a number.

    >>> [is_plain(name) for name in ("_bn2", "norm", "h_bn", "3")]
    [True, True, False, False]
    """
    rest, norms = _NORM.subn("", name)
    return name == "adn" or (norms > 0 and not words(rest))


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
