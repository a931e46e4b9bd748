"""Nothing but ``know_cli.files`` creates, replaces, removes, locks or opens anything."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "know_cli"
DOOR = PACKAGE / "files"
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if DOOR not in path.parents]

#: Methods of paths; ``replace`` with one argument is no string's.
OF_PATHS = {
    "chmod", "hardlink_to", "mkdir", "open", "read_bytes", "read_text", "rename", "rmdir", "symlink_to",
    "touch", "unlink", "write_bytes", "write_text",
}  # fmt: skip
OF_OS = {
    "chmod", "chown", "fchmod", "fdopen", "ftruncate", "link", "makedirs", "mkdir", "mkfifo", "mknod", "open",
    "pwritev", "remove", "removedirs", "rename", "renames", "replace", "rmdir", "sendfile", "symlink",
    "truncate", "unlink", "write",
}  # fmt: skip
#: Functions that write or open a path, by whatever module they are of.
ANYWHERE = {
    "NamedTemporaryFile", "TemporaryDirectory", "copyfile", "copytree", "copy2", "flock", "lockf", "memmap", "mkdtemp",
    "mkstemp", "rmtree", "save_file", "savez", "disk_usage", "serialize_file",
}  # fmt: skip
#: What is a file only by its name, or is written into one that the door has opened.
ALLOWED = {
    ("checkpoints/pickles.py", "os.fdopen"),  # a descriptor of the door's
    ("checkpoints/state.py", "os.fdopen"),
    ("cli/main.py", "os.open"),  # /dev/null, for streams that are closed
    ("cli/main.py", "open"),
    ("checkpoints/torch_files.py", "self._zip.open"),  # records of an open archive
    ("choosing/worker.py", "os.fdopen"),  # standard input and output
    ("choosing/worker.py", "os.open"),  # /dev/null, for standard input
    ("lab/data/cifar.py", "tarfile.open"),  # of a file that the door has opened
    ("lab/data/sheets.py", "Image.open"),
    ("lab/pictures/decoding.py", "Image.open"),
}


def calls(path: Path) -> Iterator[tuple[int, str, ast.Call]]:
    """Line, dotted name and node of each call in a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func), node


def opens(name: str, call: ast.Call) -> bool:
    """Whether a call creates, replaces, removes, locks or opens something by itself."""
    base, _, last = name.rpartition(".")
    if base == "os":
        return last in OF_OS
    if not base:
        return last in ANYWHERE | {"open"}
    if last in ANYWHERE:
        return True
    if last == "save":
        return base in ("np", "numpy", "torch")
    if last == "savefig":
        return ast.unparse(call.args[0]) != "buffer"
    if last == "replace":
        return len(call.args) == 1 and base != "dataclasses"
    return last in OF_PATHS


@pytest.mark.parametrize(
    "path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE).with_suffix(""))
)
def test_nothing_else_opens_a_file(path: Path) -> None:
    module = path.relative_to(PACKAGE).as_posix()
    found = [
        f"{module}:{line}: {name}"
        for line, name, call in calls(path)
        if opens(name, call) and (module, name.rpartition(".")[2] if name.startswith("Path(") else name) not in ALLOWED
    ]  # fmt: skip
    assert not found, "goes through know_cli.files: " + ", ".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "open('x', 'w')", "Path('x').open()", "path.write_text('')", "os.open('x', 0)", "shutil.rmtree('x')",
        "tempfile.mkdtemp()", "path.replace(other)", "torch.save({}, 'x')", "figure.savefig('x.png')", "save_file({}, 'x')",
    ],
)  # fmt: skip
def test_what_is_looked_for_is_found(text: str) -> None:
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    assert opens(ast.unparse(call.func), call)


@pytest.mark.parametrize("text", ["text.replace('a', 'b')", "replace(job, plan=1)", "run()"])
def test_what_is_none_is_not(text: str) -> None:
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    assert not opens(ast.unparse(call.func), call)
