"""Random layouts of files, links and folders around a run, and what the run may change in them."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save

#: Three checkpoints of one model, as files; the same bytes serve all layouts.
CONTENTS = [
    save({"w": torch.full((2, 3), 1.0 - 0.1 * k), "b": torch.full((3,), 1.0 + k)}, {"format": "pt"})
    for k in range(2)
]
DIGEST = f"{'0' * 64}  {{}}\n"
NAMES = ("a", "A", "b", "out", "Out", "c0", "model.safetensors", "config.json", "é", "e\u0301")

#: Ends of the names of what a model in a folder consists of.
OF_A_MODEL = (".safetensors", "/config.json", "/sub/vocab.txt")
#: What may be at a place: device, inode, kind, and its bytes or where it leads.
Found = tuple[int, int, int, bytes | str]


@dataclass
class Layout:
    """Files on disk and a command for them.

    Attributes:
        root: all of them are in it.
        inputs: as they are given.
        output: as it is given.
        is_folder: whether the inputs are folders.
        force: whether ``--force`` is given.
        checksum: whether ``--checksum`` is.
        report: the argument of ``--json``, if it is given.
        every_step: whether ``--every-step`` is.
    """

    root: Path
    is_folder: bool
    force: bool
    checksum: bool
    every_step: bool
    inputs: list[str] = field(default_factory=list)
    output: str = "out"
    report: str | None = None

    @property
    def words(self) -> list[str]:
        """The command line."""
        flags = {
            "--force": self.force,
            "--checksum": self.checksum,
            "--every-step": self.every_step,
        }
        steps = ["--steps", "2"] if self.every_step else []
        return [
            "predict", *self.inputs, "-o", self.output, "--method", "linear", "--quiet", "--threads", "1",
            *steps, *(["--json", self.report] if self.report else []), *(flag for flag, on in flags.items() if on),
        ]  # fmt: skip


def make_layout(root: Path, chance: random.Random) -> Layout:
    """Draw a layout: inputs, an output, and what may lie between them and on them."""
    layout = Layout(
        root,
        is_folder=chance.random() < 0.6,
        force=chance.random() < 0.6,
        checksum=chance.random() < 0.3,
        every_step=chance.random() < 0.2,
    )
    folders = [root]
    for _ in range(chance.randrange(4)):
        place = chance.choice(folders) / chance.choice(NAMES)
        if not os.path.lexists(place):
            place.mkdir()
            folders.append(place)
    for number, content in enumerate(CONTENTS):
        place = chance.choice(folders) / f"c{number}"
        while os.path.lexists(place):
            place = place.with_name(f"{place.name}x")
        _write_input(layout, place, content, chance, folders)
        layout.inputs.append(_named(place, root, chance))
    places = [place for place in _all(root) if place.is_dir() or chance.random() < 0.5]
    layout.output = _output(layout, chance, [root, *places])
    _clutter(layout, chance)
    if chance.random() < 0.25:
        layout.report = _output(layout, chance, [root, *_all(root)])
        if (root / layout.report).is_fifo():  # which would wait for a reader
            layout.report = None
    return layout


def _write_input(
    layout: Layout, place: Path, content: bytes, chance: random.Random, folders: list[Path]
) -> None:
    if not layout.is_folder:
        place.write_bytes(content)
        return
    place.mkdir()
    folders.append(place)
    (place / "model.safetensors").write_bytes(content)
    (place / "config.json").write_text("{}")
    if chance.random() < 0.3:
        (place / "sub").mkdir()
        (place / "sub" / "vocab.txt").write_text("words")


def _named(place: Path, root: Path, chance: random.Random) -> str:
    """An input by its own name, by a link's, or by a way around."""
    kind = chance.randrange(4)
    name = os.path.relpath(place, root)
    if kind == 0:
        link = root / f"link-{place.name}"
        if not os.path.lexists(link):
            link.symlink_to(place if chance.random() < 0.5 else name)
            return link.name
    if kind == 1 and place.is_file():
        other = root / f"hard-{place.name}"
        if not os.path.lexists(other):
            os.link(place, other)
            return other.name
    if kind == 2:
        return str(place)
    return name


def _output(layout: Layout, chance: random.Random, places: list[Path]) -> str:
    """Where an output goes: a new name, or one that exists, in or on anything."""
    place = chance.choice(places)
    if chance.random() < 0.15:  # what exists and is of the right kind
        alike = [one for one in places[1:] if one.is_dir() == layout.is_folder]
        place = chance.choice(alike or [layout.root])
    elif chance.random() < 0.5:
        place = layout.root
    if place.is_dir() and (place == layout.root or chance.random() < 0.5):
        names = NAMES[:6] if layout.is_folder else NAMES
        place = place / chance.choice(names)
    name = os.path.relpath(place, layout.root)
    if chance.random() < 0.2:
        link = layout.root / "to-output"
        if not os.path.lexists(link):
            link.symlink_to(name)
            return link.name
    return name


def _clutter(layout: Layout, chance: random.Random) -> None:
    """Put something where the output and what belongs to it go."""
    root, place = layout.root, layout.root / layout.output
    if chance.random() < 0.6 and not os.path.lexists(place):
        if layout.is_folder:
            place.mkdir()
            (place / "model.safetensors").write_bytes(CONTENTS[0])
            (place / "precious.txt").write_text("precious")
        else:
            place.write_text("old")
    files = [path for path in _all(root) if path.is_file() and not path.is_symlink()]
    for target in (
        place,
        place.with_name(f"{place.name}.sha256"),
        place / "model.safetensors",
        place / "config.json",
        place / "sub",
    ):
        if chance.random() < 0.6 or os.path.lexists(target) or not target.parent.is_dir():
            continue
        kind = chance.randrange(6)
        if kind == 0:
            target.write_text("precious")
        elif kind == 1:
            target.mkdir()
            (target / "precious.txt").write_text("precious")
        elif kind == 2:
            target.symlink_to(os.path.relpath(chance.choice([root, *_all(root)]), target.parent))
        elif kind == 3 and files:
            os.link(chance.choice(files), target)
        elif kind == 4:
            target.write_text(DIGEST.format(place.name))
        else:
            os.mkfifo(target)


def _all(root: Path) -> list[Path]:
    return sorted(root.rglob("*"))


def look(root: Path) -> dict[str, Found]:
    """All that there is, by path: device, inode, kind, content."""
    return dict(_look(root, root))


def _look(place: Path, root: Path) -> Iterator[tuple[str, Found]]:
    for entry in os.scandir(place):
        found = entry.stat(follow_symlinks=False)
        kind = stat.S_IFMT(found.st_mode)
        content: bytes | str = ""
        if entry.is_symlink():
            content = str(Path(entry.path).readlink())
        elif entry.is_file():
            content = Path(entry.path).read_bytes()
        yield os.path.relpath(entry.path, root), (found.st_dev, found.st_ino, kind, content)
        if entry.is_dir(follow_symlinks=False):
            yield from _look(Path(entry.path), root)


def is_below(name: str, above: str) -> bool:
    """Whether a path is another or lies below it."""
    return name == above or name.startswith(f"{above}/")


def check_changes(
    layout: Layout, code: int, before: dict[str, Found], after: dict[str, Found]
) -> str:
    """Compare what was with what is, against the model of what may change; what came of it.

    The model: what did not exist may be made at the output's real place, at those of its steps,
    beside it as its digest, and at the report's. With ``--force`` a regular file at these places
    may be replaced, and in a folder that is the output regular files and links may be. Everything
    else is as it was, and nothing of the inputs ever changes.
    """
    root = os.path.realpath(layout.root)

    def real(name: str) -> str:
        return os.path.relpath(_resolved(os.path.join(root, name), before, root), root)  # noqa: PTH118

    own = real(layout.output)
    outputs = [own]
    if layout.every_step:
        outputs.append(real(_step_name(layout)))
    singles = [real(layout.report)] if layout.report else []
    given = [layout.output, *([_step_name(layout)] if layout.every_step else [])]
    singles += [f"{name}.sha256" for name in outputs]
    singles += [real(f"{name}.sha256") for name in given]
    singles += [] if layout.is_folder else outputs
    changed = {name for name in before.keys() | after.keys() if not _same(name, before, after)}
    for name in changed:
        was, now = before.get(name), after.get(name)
        inside = layout.is_folder and any(is_below(name, output) for output in outputs)
        assert not any(is_below(name, real(one)) for one in layout.inputs), f"{name} is an input's"
        assert name in singles or inside, f"{name} is none of {outputs} {singles}: {was} → {now}"
        if was is None:
            assert code == 0, f"{name} was left by a run that failed"
            continue
        assert layout.force, f"{name} was replaced or removed without --force"
        assert stat.S_ISREG(was[2]) or (inside and stat.S_ISLNK(was[2])), f"{name} was no file"
        assert not inside or name.endswith(OF_A_MODEL), f"{name} is no part of a model"
        if now is not None:
            assert stat.S_ISREG(now[2])
    if code != 0:
        assert not changed, "a run that fails changes nothing"
        return "refused"
    return "replaced" if changed & before.keys() else "made"


def _same(name: str, before: dict[str, Found], after: dict[str, Found]) -> bool:
    was, now = before.get(name), after.get(name)
    if was is None or now is None:
        return False
    # A folder stays the same folder; a file the same inode with the same bytes.
    return was == now


def _resolved(path: str, before: dict[str, Found], root: str) -> str:
    """Where a path led before the run, links resolved, whatever is there now."""
    for _ in range(50):
        parts = os.path.relpath(path, root).split("/")
        here = root
        for number, part in enumerate(parts):
            if part == "..":
                here = os.path.dirname(here)  # noqa: PTH120
                continue
            here = os.path.normpath(os.path.join(here, part))  # noqa: PTH118
            found = before.get(os.path.relpath(here, root))
            if found is not None and stat.S_ISLNK(found[2]):
                rest = parts[number + 1 :]
                target = os.path.join(os.path.dirname(here), str(found[3]), *rest)  # noqa: PTH118, PTH120
                path = target
                break
        else:
            return here
    return path


def _step_name(layout: Layout) -> str:
    """The name of the step before the last, as the documentation has it."""
    stem, suffix = os.path.splitext(layout.output)  # noqa: PTH122
    whole = layout.is_folder or suffix != ".safetensors"
    return f"{layout.output}.x2" if whole else f"{stem}.x2{suffix}"
