"""Every method there is: :data:`METHODS`. A new method is a new file here and one line in it.

Nothing heavy is imported here, so that names and options are known, and wrong ones refused,
before torch is; a method's own module is imported when it is opened.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from know_cli.errors import UsageError

DEFAULT_METHOD = "known"

# Steps take its powers, which must be numbers, too.
_LARGEST = 1e30

#: The value of a method's option.
Value = float | str


@dataclass(frozen=True)
class Option:
    """A number, or one of some words, that a method can be given.

    Attributes:
        name: as in ``--option NAME=VALUE``.
        default: its value where none is given.
        words: the values there are, if they are words; else it is a number of at most 1e30 in
            size.
    """

    name: str
    default: Value
    words: tuple[str, ...] = ()

    def parse(self, text: str) -> Value:
        """The value that a user wrote.

        Raises:
            ValueError: it is none of the words, not a finite number, or too large.
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
        return number


@dataclass(frozen=True)
class Method:
    """A line of the table.

    Attributes:
        name: as in ``--method NAME``; its module is called the same, with underscores.
        summary: what it predicts in n steps, in a few words for users.
        options: that it can be given.
        reads_bundle: whether it needs a bundle of KNOWN.
    """

    name: str
    summary: str
    options: tuple[Option, ...] = ()
    reads_bundle: bool = False

    @property
    def module(self) -> str:
        """Full name of the module whose ``predictors`` opens it."""
        return f"know_cli.methods.{self.name.replace('-', '_')}"


_ALPHA = Option("alpha", 1.0)

METHODS = (
    Method("known", "the hyper-model KNOWN, n times", reads_bundle=True),
    Method("naive", "Θ0"),
    Method("last", "the most-forgotten checkpoint Θ(S−1)"),
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
    Method("lstsq", "the linear rule in a KNOWN's manifest, n times", reads_bundle=True),
    Method("shrink", "λ^n·Θ0", (Option("lambda", 0.97),)),
    Method("average", "mean of the checkpoints"),
    Method("noise", "Θ0 ± the size of KNOWN's change, signs at random", reads_bundle=True),
)


def find_method(name: str) -> Method:
    """The method of a name.

    Raises:
        UsageError: there is none; the message has all names.
    """
    for method in METHODS:
        if method.name == name:
            return method
    names = ", ".join(method.name for method in METHODS)
    raise UsageError(f"--method {name}: is none of {names}")


def parse_options(method: Method, texts: Sequence[str]) -> dict[str, Value]:
    """Options of a command line, each ``NAME=VALUE``; of the same name, the last one counts.

    Raises:
        UsageError: the method has no such option, or that is no value for it.
    """
    values: dict[str, Value] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--option {text}: write NAME=VALUE; {_allowed(method)}")
        values[name] = _checked(method, name, value)
    return values


def complete_options(method: Method, values: Mapping[str, Value]) -> dict[str, Value]:
    """Values for all options of a method: those given, and the defaults of the others.

    Raises:
        UsageError: the method has no such option, or that is no value for it.
    """
    given = {name: _checked(method, name, value) for name, value in values.items()}
    return {option.name: given.get(option.name, option.default) for option in method.options}


def check_weights(method: Method, weights: str | None) -> None:
    """Refuse a bundle for a method that reads none.

    Raises:
        UsageError: with the methods that do.
    """
    if weights is not None and not method.reads_bundle:
        readers = ", ".join(other.name for other in METHODS if other.reads_bundle)
        raise UsageError(
            f"--weights {weights}: --method {method.name} reads no KNOWN; leave it out, or take "
            f"one of {readers}"
        )


def describe_methods() -> str:
    """The table for a help text: a line a method, with its options and their defaults."""
    width = max(len(method.name) for method in METHODS)
    lines = []
    for method in METHODS:
        options = ", ".join(_describe(option) for option in method.options)
        lines.append(f"{method.name:{width}}  {method.summary}{options and f' ({options})'}")
    return "\n".join(lines)


def _describe(option: Option) -> str:
    if option.words:
        others = (word for word in option.words if word != option.default)
        return f"{option.name}={'|'.join((str(option.default), *others))}"
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
    names = " and ".join(option.name for option in method.options)
    return f"--method {method.name} takes {names or 'no options'}"
