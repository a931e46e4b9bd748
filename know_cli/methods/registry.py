"""All methods: :data:`METHODS`. A new method is a new file in this folder and one line here.

Nothing heavy is imported here, so names and options are checked before torch is imported. A
method's own module is imported when the method is opened.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.checkpoints.paths import MIN_CHECKPOINTS
from know_cli.engine.settings import NormMode
from know_cli.errors import CheckpointError, UsageError
from know_cli.methods.decay import SHAPES, LoraMode, check_average

#: The method that is taken for each kind of trajectory where none is named.
DEFAULT_METHODS = {
    TrajectoryKind.FORGETTING: "known",
    TrajectoryKind.RUN: "average",
    TrajectoryKind.BRANCHES: "average",
}
DEFAULT_METHOD = DEFAULT_METHODS[TrajectoryKind.FORGETTING]

# Steps take its powers, which must be numbers, too.
_LARGEST = 1e30
# Columns of the table in a help text.
_WIDTH = 78

#: The value of a method's option.
Value = float | str


class HyperModelBundle(Protocol):
    """The weights of a hyper-model, as far as the main flow needs to know them."""

    @property
    def checkpoints(self) -> int:
        """S, the number of checkpoints that it reads."""

    @property
    def digest(self) -> str:
        """Identifies the weights."""

    @property
    def target(self) -> str:
        """What it was trained to predict."""

    @property
    def trajectory(self) -> TrajectoryKind:
        """The kind of trajectory that it was taught on, and can read."""

    @property
    def source(self) -> Path | None:
        """Where it was read from; None if it was not read from a file."""


@dataclass(frozen=True)
class Option:
    """An option of a method: a number, or one of a few words.

    Attributes:
        name: as in ``--option NAME=VALUE``.
        default: the value if none is given; with None the option is then absent.
        words: the allowed values if they are words; empty if the value is a finite number of
            at most 1e30 in size.
        above: a number has to be more than this.
        most: a number may be at most this.
        whole: whether a number has to be whole.

    >>> Option("alpha", 1.0).parse("0.5")
    0.5
    """

    name: str
    default: Value | None
    words: tuple[str, ...] = ()
    above: float = -math.inf
    most: float = math.inf
    whole: bool = False

    def parse(self, text: str) -> Value:
        """Parse the value that a user wrote.

        Raises:
            ValueError: the text is none of the words, or not a number that is allowed.
        """
        if self.words:
            if text not in self.words:
                raise ValueError(f"is none of {', '.join(self.words)}")
            return text
        try:
            number = float(text)
        except ValueError:
            raise ValueError("is not a number") from None
        if not math.isfinite(number):
            raise ValueError("is not a finite number")
        if abs(number) > _LARGEST:
            raise ValueError(f"is so large that no prediction can be finite; at most {_LARGEST:g}")
        if number <= self.above:
            raise ValueError(f"must be more than {self.above:g}")
        if number > self.most:
            raise ValueError(f"must be at most {self.most:g}")
        if self.whole and number != int(number):
            raise ValueError("is not a whole number")
        return int(number) if self.whole else number


@dataclass(frozen=True)
class Method:
    """An entry of the table of methods.

    Attributes:
        name: as in ``--method NAME``; its module has the same name, with underscores.
        summary: what it predicts in n steps, in a few words for users.
        options: the options that it takes.
        hyper_model: the folder of this package that holds its hyper-model, such as ``known``; None
            for methods that read no bundle. The folder has a module ``shipped`` with
            ``find_bundle``, ``check_weights_name`` and ``shipped``, and a module ``bundle`` with
            ``load_bundle``.
        norm: what happens to normalisation layers unless the user says.
        check: refuses options that do not go together, with a :class:`UsageError`.
        fewest: checkpoints that it needs; 1 if it reads nothing but Θ0.
        has_steps: whether what it predicts depends on the number of steps.
    """

    name: str
    summary: str
    options: tuple[Option, ...] = ()
    hyper_model: str | None = None
    norm: NormMode = NormMode.RESCALE
    check: Callable[[Mapping[str, Value]], None] | None = None
    fewest: int = MIN_CHECKPOINTS
    has_steps: bool = True

    @property
    def module(self) -> str:
        """Full name of the module whose function ``predictors`` opens it."""
        return f"know_cli.methods.{self.name.replace('-', '_')}"

    @property
    def reads_bundle(self) -> bool:
        """Whether it needs a hyper-model's bundle."""
        return self.hyper_model is not None


_ALPHA = Option("alpha", 1.0)
_AVERAGE = (
    Option("shape", SHAPES[0], SHAPES),
    Option("last", None, above=0, whole=True),
    Option("forgotten", None, above=0, whole=True),
    Option("over", None, above=0, most=1),
    Option("half-life", None, above=0),
    Option("lora", LoraMode.EXACT.value, tuple(mode.value for mode in LoraMode)),
)
_KNOWN = "known"

METHODS = (
    Method("known", "the hyper-model KNOWN, n times", hyper_model=_KNOWN),
    Method("naive", "Θ0", fewest=1, has_steps=False),
    Method("last", "the most-forgotten checkpoint Θ(S−1)", norm=NormMode.AVERAGE, has_steps=False),
    Method(
        "task-vector",
        "Θ0 + n·α·(Θ0 − Θ1), or − Θ(S−1)",
        (_ALPHA, Option("range", "session", ("session", "full"))),
    ),
    Method("linear", "least-squares line in the session index, n beyond Θ0"),
    Method(
        "logfit",
        "least-squares line in a logarithm, n beyond Θ0",
        (Option("of", "data", ("data", "position")),),
    ),
    Method("tsv", "Θ0 + n·α·(merged task singular vectors); matrices whole", (_ALPHA,)),
    Method("lstsq", "the linear rule in a hyper-model's manifest, n times", hyper_model=_KNOWN),
    Method(
        "shrink",
        "λ^n·Θ0, of weights of layers or of all",
        (Option("lambda", 0.97), Option("of", "weights", ("weights", "all"))),
        fewest=1,
    ),
    Method(
        "average",
        "mean of the checkpoints",
        _AVERAGE,
        norm=NormMode.AVERAGE,
        check=check_average,
        has_steps=False,
    ),
    Method("noise", "Θ0 ± the size of KNOWN's change, signs at random", hyper_model=_KNOWN),
    Method(
        "settle",
        "an average that reads how they went",
        hyper_model="settle",
        norm=NormMode.AVERAGE,
        has_steps=False,
    ),
)


_FORGETTING_OR_RUN = (TrajectoryKind.FORGETTING, TrajectoryKind.RUN)

#: What the methods are for that are not for every kind of trajectory. Methods with a hyper-model
#: are for the kind that their bundle was taught on.
ONLY_FOR: Mapping[str, tuple[TrajectoryKind, ...]] = {
    # Of a run it would be the oldest checkpoint, and the latest is Θ0.
    "last": (TrajectoryKind.FORGETTING,),
    "task-vector": _FORGETTING_OR_RUN,
    "linear": _FORGETTING_OR_RUN,
    "logfit": (TrajectoryKind.FORGETTING,),
    "tsv": (TrajectoryKind.FORGETTING,),
}


def check_suited(
    method: Method,
    kind: TrajectoryKind,
    weights: str | None,
    bundle: HyperModelBundle | None = None,
) -> None:
    """Refuse a method that is not for a kind of trajectory, or whose bundle is not.

    Args:
        method: the method.
        kind: of the checkpoints.
        weights: name or path of the bundle, as the user gave it.
        bundle: of the method's hyper-model, once it is loaded.

    Raises:
        UsageError: the method is not for it, or no bundle for it is shipped.
        CheckpointError: the bundle was taught on another kind.
    """
    remedy = f"take --method {DEFAULT_METHODS[kind]}"
    if kind not in ONLY_FOR.get(method.name, tuple(TrajectoryKind)):
        suited = " and ".join(other.plural for other in ONLY_FOR[method.name])
        raise UsageError(
            f"--method {method.name}: is for {suited}, and these checkpoints are of {kind.text}; "
            f"{remedy}"
        )
    if not method.reads_bundle:
        return
    if bundle is None:
        is_known = method.hyper_model == _KNOWN
        if weights is None and is_known and kind is not TrajectoryKind.FORGETTING:
            raise UsageError(
                f"--method {method.name}: no KNOWN that was taught on {kind.plural} is shipped; "
                f"{remedy}, or name one with --weights"
            )
    elif bundle.trajectory is not kind:
        other = bundle.trajectory
        name = "KNOWN" if method.hyper_model == _KNOWN else "hyper-model"
        elsewhere = "" if method.name == DEFAULT_METHODS[kind] else f", or {remedy}"
        raise CheckpointError(
            f"{bundle.source}: this {name} was taught on {other.plural}, and these checkpoints are "
            f"of {kind.text}; name another with --weights{elsewhere}, or say --trajectory "
            f"{other.value} if that is what they are of"
        )


def find_method(name: str) -> Method:
    """Look a method up by name.

    Raises:
        UsageError: there is no such method; the message lists all names.

    >>> find_method("tsv").module
    'know_cli.methods.tsv'
    """
    for method in METHODS:
        if method.name == name:
            return method
    names = ", ".join(method.name for method in METHODS)
    raise UsageError(f"--method {name}: is none of {names}")


def parse_options(method: Method, texts: Sequence[str]) -> dict[str, Value]:
    """Parse options of a command line, each ``NAME=VALUE``; if a name is repeated, the last counts.

    Raises:
        UsageError: the method has no such option, or the value is not allowed.

    >>> parse_options(find_method("task-vector"), ["alpha=0.5", "range=full"])
    {'alpha': 0.5, 'range': 'full'}
    """
    values: dict[str, Value] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--option {text}: write NAME=VALUE; {_allowed(method)}")
        values[name] = _checked(method, name, value)
    return values


def complete_options(method: Method, values: Mapping[str, Value]) -> dict[str, Value]:
    """Return values for the options of a method: those given, and defaults for the others.

    Raises:
        UsageError: the method has no such option, or the value is not allowed.

    >>> complete_options(find_method("task-vector"), {"range": "full"})
    {'alpha': 1.0, 'range': 'full'}
    """
    given = {name: _checked(method, name, value) for name, value in values.items()}
    every = {option.name: given.get(option.name, option.default) for option in method.options}
    complete = {name: value for name, value in every.items() if value is not None}
    if method.check is not None:
        method.check(complete)
    return complete


def describe_methods() -> str:
    """Return the table for a help text: each method, with its options and defaults."""
    width = max(len(method.name) for method in METHODS)
    lines = []
    for method in METHODS:
        options = ", ".join(_describe(option) for option in method.options)
        line = f"{method.name:{width}}  {method.summary}{options and f' ({options})'}"
        lines += textwrap.wrap(
            line, _WIDTH, subsequent_indent=" " * (width + 2), break_on_hyphens=False
        )
    return "\n".join(lines)


def _describe(option: Option) -> str:
    if option.words:
        others = (word for word in option.words if word != option.default)
        return f"{option.name}={'|'.join((str(option.default), *others))}"
    if option.default is None:
        return f"{option.name}=…"
    return f"{option.name}={option.default:g}"


def _checked(method: Method, name: str, value: Value) -> Value:
    found = next((option for option in method.options if option.name == name), None)
    if found is None:
        raise UsageError(f"--option {name}: {_allowed(method)}")
    try:
        return found.parse(str(value))
    except ValueError as error:
        raise UsageError(f"--option {name}={value}: {error}") from error


def _allowed(method: Method) -> str:
    *names, last = [option.name for option in method.options] or ["no options"]
    listing = f"{', '.join(names)} and {last}" if names else last
    return f"--method {method.name} takes {listing}"
