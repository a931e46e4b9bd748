"""Checkpoint arguments as users write them: ranges, missing suffixes, rates, output names."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from know_cli.checkpoints.layouts import OTHER_FORMATS, SUFFIX, has_model
from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.checkpoints.run_folder import run_checkpoints
from know_cli.errors import CheckpointError, OutputError, UsageError, counted

_NUMBER = re.compile(r"\d+")
_DIGITS = re.compile(r"([0-9]{1,18})")
_PATTERN = re.compile(r"[*?[]")
_BETWEEN = ".."
# What may stand at the end of an output's name as its suffix; the 5 of model.v1.5 is none.
_FILE_SUFFIXES = {SUFFIX, ".sft", ".st", *OTHER_FORMATS}
# Of an argument that no system takes for a path, and one with more numbers than any has.
_LONGEST = 4096
_MOST_READINGS = 16
MIN_CHECKPOINTS = 2
MAX_CHECKPOINTS = 16
_ADVICE = {
    TrajectoryKind.FORGETTING: "full data first, most-forgotten last",
    TrajectoryKind.RUN: "of a longer run the last ones, by name or with 'know predict --last'",
    TrajectoryKind.BRANCHES: "Θ0 first, then the branches",
}


def expand_arguments(
    arguments: list[str], notice: Callable[[str], None] = lambda text: None
) -> list[Path]:
    """Turn the checkpoint arguments of a command line into existing paths, in their order.

    An argument that names nothing on disk but reads as a range of numbers becomes those of its
    members that exist, in ascending or descending order: ``run/ckpt0..ckpt4.safetensors``,
    ``run/ckpt0..4``, ``checkpoint-500..checkpoint-100``, ``pipe0/unet..pipe4/unet``. One with
    ``*``, ``?`` or ``[`` becomes the folders and ``.safetensors`` files that match, as a shell
    would have it, in ascending order of the numbers in their names. A path that does not exist,
    but does with ``.safetensors`` after it, gets it.

    Args:
        arguments: of the command line.
        notice: is told what the user should know of a range.

    Raises:
        CheckpointError: a path does not exist, nor the ends of a range.
    """
    paths: list[Path] = []
    for argument in arguments:
        found = _existing(argument)
        if found is not None:
            paths.append(found)
            continue
        matches = _matches(argument)
        if matches:
            paths += matches
            continue
        ranges = list(_ranges(argument))
        members = next(filter(None, map(_members, ranges)), None)
        if members is None:
            raise CheckpointError(f"{argument}: no such file or folder{_tried(argument, ranges)}")
        numbers = [number for number, _ in members]
        if len({one - other for one, other in itertools.pairwise(numbers)}) > 1:
            notice(
                f"warning: {argument}: takes the numbers that there are, {_listing(numbers)}, "
                "which are not equally far apart"
            )
        paths += [path for _, path in members]
    return paths


def check_count(
    paths: Sequence[Path],
    kind: TrajectoryKind | None = None,
    fewest: int = MIN_CHECKPOINTS,
    of_one: str = "",
) -> None:
    """Refuse too few or too many checkpoints, or one given twice.

    Args:
        paths: of the checkpoints.
        kind: how they came about, for the message; None is a forgetting.
        fewest: 1 for what reads Θ0 only.
        of_one: what else takes a single one, for the message.

    Raises:
        UsageError: with what is wrong.
    """
    if not fewest <= len(paths) <= MAX_CHECKPOINTS:
        advice = _ADVICE[kind or TrajectoryKind.FORGETTING]
        raise UsageError(
            f"got {counted(len(paths), 'checkpoint')}: give "
            f"{fewest} to {MAX_CHECKPOINTS}, {advice}"
            + (f"; {of_one}" if len(paths) == 1 and of_one else "")
            + (_run_hint(paths[0]) if len(paths) == 1 and kind is None else "")
        )
    for number, path in enumerate(paths):
        for other in paths[:number]:
            if path.resolve() == other.resolve() or (path.exists() and path.samefile(other)):
                raise UsageError(f"{path}: given twice; name each checkpoint once")


def _run_hint(path: Path) -> str:
    """What to do with a checkpoint that is a run's folder, too, as trainers leave it in the end."""
    if not path.is_dir() or not run_checkpoints(path):
        return ""
    return f"; to take the checkpoints of a training run in {path}, add --trajectory run"


def _existing(argument: str) -> Path | None:
    path, file = Path(argument), Path(argument + SUFFIX)
    try:
        if path.is_dir() and not argument.endswith("/") and file.is_file():
            # A folder of logs does not hide the file beside it.
            return path if has_model(path) else file
        return next((each for each in (path, file) if each.exists()), None)
    except OSError as error:  # a name too long, for one
        raise CheckpointError(f"{argument}: {error.strerror or error}") from error


def _matches(argument: str) -> list[Path]:
    """The checkpoints that a pattern matches; none if it is no pattern."""
    if not _PATTERN.search(argument):
        return []
    found = {
        path: None
        # Not Path's, which would drop a leading ./ and know no absolute pattern.
        for name in sorted(glob.glob(argument), key=_natural)  # noqa: PTH207
        if name.endswith(SUFFIX) or Path(name).is_dir()
        for path in [_existing(name)]
        if path is not None
    }
    return list(found)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts ``step9`` before ``step10``."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in _DIGITS.split(name)]


@dataclass(frozen=True)
class _Range:
    """A reading of an argument as a range: ``{before}{first}{after}`` to ``{before}{last}{after}``.

    Attributes:
        before: the path up to the number.
        first: digits, as they are written.
        last: digits.
        after: the rest of the path.
    """

    before: str
    first: str
    last: str
    after: str

    @property
    def ends(self) -> tuple[str, str]:
        """The arguments that the range begins and ends with."""
        return f"{self.before}{self.first}{self.after}", f"{self.before}{self.last}{self.after}"


def _ranges(argument: str) -> Iterator[_Range]:
    """All readings of an argument as a range, those of the last number first.

    What stands before the number at the first end may stand at the last one, too, whole or from
    its last folders on; what stands after it, at either end or at both.
    """
    if len(argument) > _LONGEST:
        return
    for between in itertools.islice(re.finditer(r"(?=\.\.)", argument), _MOST_READINGS):
        left, right = argument[: between.start()], argument[between.start() + len(_BETWEEN) :]
        for first in list(_NUMBER.finditer(left))[: -_MOST_READINGS - 1 : -1]:
            before, after = left[: first.start()], left[first.end() :]
            for last in itertools.islice(_NUMBER.finditer(right), _MOST_READINGS):
                again, rest = right[: last.start()], right[last.end() :]
                is_same = again in ("", before) or before.endswith(f"/{again}")
                if is_same and (after == rest or not (after and rest)):
                    yield _Range(before, first[0], last[0], after or rest)


def _members(wanted: _Range) -> list[tuple[int, Path]] | None:
    """Numbers and paths of what a range has, in its order; None where one of its ends is not."""
    found: dict[int, Path] = {}
    first, last = int(wanted.first), int(wanted.last)
    for number, end in zip((first, last), wanted.ends, strict=True):
        path = _existing(end)
        if path is None:
            return None
        found[number] = path
    padded = [digits for digits in (wanted.first, wanted.last) if digits.startswith("0")]
    width = max(len(wanted.first), len(wanted.last)) if any(len(d) > 1 for d in padded) else 0
    lowest, highest = sorted((first, last))
    for number in _numbers_beside(wanted):
        if lowest < number < highest and number not in found:
            path = _existing(f"{wanted.before}{number:0{width}d}{wanted.after}")
            if path is not None:
                found[number] = path
    return sorted(found.items(), reverse=first > last)


def _numbers_beside(wanted: _Range) -> set[int]:
    """Numbers that files or folders have where the range's have theirs."""
    folder, slash, start = wanted.before.rpartition("/")
    end = wanted.after.partition("/")[0]
    pattern = re.compile(rf"{re.escape(start)}(\d{{1,18}}){re.escape(end)}(?:{re.escape(SUFFIX)})?")
    try:
        names = [path.name for path in Path(f"{folder}{slash}" or ".").iterdir()]
    except OSError:
        return set()
    return {int(match[1]) for match in map(pattern.fullmatch, names) if match is not None}


def _tried(argument: str, ranges: Sequence[_Range]) -> str:
    """What was tried with an argument that names nothing; ends the message."""
    if ranges:
        missing = [end for end in ranges[0].ends if _existing(end) is None]
        there = sorted(_numbers_beside(ranges[0]))
        more = f"; there are numbers {_listing(there)}" if there else ""
        verb = "are" if len(missing) > 1 else "is"
        return f"; read as a range, {' and '.join(missing)} should be there but {verb} not{more}"
    if _PATTERN.search(argument):
        return f", and no folder or {SUFFIX} file matches the pattern"
    if _BETWEEN in argument.strip("./"):
        return "; nor a range, whose ends differ in one number only, as in run/ckpt0..ckpt4"
    return "; check the path"


def _listing(numbers: Sequence[int]) -> str:
    more = ", …" if len(numbers) > MAX_CHECKPOINTS else ""
    return ", ".join(map(str, numbers[:MAX_CHECKPOINTS])) + more


def factor_name(rate: float, steps: int) -> str:
    """The factor of training data that ``steps`` steps at a sampling rate stand for.

    >>> factor_name(0.5, 3)
    'x8'
    >>> factor_name(1 / 3, 2)
    'x9'
    >>> factor_name(0.7, 1)
    'x1.43'
    """
    factor = rate**-steps
    # Three digits that count; more where fewer would say that nothing is gained.
    rounded = float(f"{factor:.3g}")
    if rounded == 1:
        return f"x{factor:.6g}"
    return f"x{rounded:.0f}" if rounded >= 100 else f"x{rounded:.3g}"


def step_path(output: Path, rate: float | None, step: int, is_folder: bool) -> Path:
    """Where ``--every-step`` writes an intermediate step: ``out.x2.safetensors``, ``out.x2/``.

    Steps that stand for no factor of training data have no rate: ``out.step1.safetensors``.
    """
    name = f"step{step}" if rate is None else factor_name(rate, step)
    output = _with_name(output)
    if is_folder or output.suffix.lower() not in _FILE_SUFFIXES:
        return output.with_name(f"{output.name}.{name}")
    return output.with_name(f"{output.stem}.{name}{output.suffix}")


def method_path(output: str | Path, name: str) -> Path:
    """Where one of several methods writes: ``out.shrink.safetensors``, ``out.shrink/``.

    >>> method_path("start.safetensors", "average-last-3").name
    'start.average-last-3.safetensors'
    """
    path = _with_name(Path(output))
    if path.suffix.lower() not in _FILE_SUFFIXES:
        return path.with_name(f"{path.name}.{name}")
    return path.with_name(f"{path.stem}.{name}{path.suffix}")


def search_path(output: Path) -> Path:
    """Where ``know choose`` keeps its measures: ``out.safetensors.search/``."""
    path = _with_name(output)
    return path.with_name(path.name + ".search")


def _with_name(output: Path) -> Path:
    """An output by a path that ends in its name, also where it was given as ``.`` or ``..``."""
    if output.name not in ("", ".."):
        return output
    output = output.resolve()
    if not output.name:
        raise OutputError(f"{output}: is the root of all files; name another output")
    return output
