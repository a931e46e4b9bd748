"""The pages for readers say what is there: commands, options, methods, exit codes, links, examples."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

import know_cli
from know_cli import errors
from know_cli.checkpoints.state import read_state
from know_cli.cli.main import family_app
from know_cli.methods.registry import METHODS
from tests.support.command import Command

ROOT = Path(know_cli.__file__).parent.parent
PAGES = sorted(
    page
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "weights").glob("*.md"))
)  # fmt: skip
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TESTED = re.compile(r"<!-- tested: (\S+) -->\n```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
# Options of other programs that the pages name.
FOREIGN = {
    "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--no-python",  # torchrun
    "--init",  # the reader's own script
}  # fmt: skip


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@cache
def commands() -> dict[str, Any]:
    """Every command by its name, such as ``plot trajectory``."""
    family: Any = typer.main.get_command(family_app())
    found: dict[str, Any] = {}
    for name, command in family.commands.items():
        found[name] = command
        inner = getattr(command, "commands", {})
        found |= {f"{name} {own}": each for own, each in inner.items()}
    return found


def rows(text: str) -> list[list[str]]:
    """The cells of every line of the tables on a page."""
    lines = (line.strip() for line in text.splitlines())
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line[:1] == "|"]  # fmt: skip


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.exists(), target
        assert there.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(there), target


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {target.partition("#")[0] for target in LINK.findall(page("README.md"))}
    for path in (ROOT / "docs").glob("*.md"):
        assert f"docs/{path.name}" in linked, path.name


def test_the_readme_has_every_command() -> None:
    listed = [cells[0] for cells in rows(page("README.md")) if cells[0].startswith("`know ")]
    named = [re.findall(r"`know ([a-z-]+)`", cell)[0] for cell in listed]
    assert sorted(named) == sorted(name for name in commands() if " " not in name)


def test_the_readme_has_the_two_commands_first() -> None:
    blocks = [text.strip() for language, text in BLOCK.findall(page("README.md")) if language == "sh"]  # fmt: skip
    assert blocks[0].startswith("pip install -c constraints.txt ")
    assert blocks[0].endswith("&& know demo")
    tests = page("README.md").split("<!-- test command -->\n```sh\n")[1].split("\n```")[0]
    assert tests == blocks[1] == "pip install -c constraints.txt -e '.[test]' && pytest"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_options_on_the_pages_exist(path: Path) -> None:
    there = {name for command in commands().values() for each in command.params for name in each.opts}  # fmt: skip
    shown = " ".join(re.findall(r"`[^`]+`", path.read_text(encoding="utf-8")))
    blocks = BLOCK.findall(path.read_text(encoding="utf-8"))
    text = shown + " ".join(text for language, text in blocks if language == "sh")
    assert set(OPTION.findall(text)) <= there | FOREIGN | {"--help"}


def test_the_page_of_methods_has_every_method_and_option() -> None:
    table = {cells[0].strip("`"): cells for cells in rows(page("docs/methods.md"))}
    for method in METHODS:
        cells = table[method.name]
        for option in method.options:
            if option.default is None:
                assert re.search(rf"`{option.name}` \((all|none)\)", cells[2])
                continue
            default = option.default if option.words else f"{option.default:g}"
            assert re.search(rf"`{option.name}` \(`?{re.escape(str(default))}`?\)", cells[2])
            assert all(f"{option.name}={word}" in cells[1] for word in option.words[1:])
        assert ("--weights" in cells[2]) == method.reads_bundle
    names = {method.name for method in METHODS}
    assert {name for name in table if re.fullmatch("[a-z][a-z-]*", name)} == names


def test_the_package_lists_its_packages() -> None:
    listed = re.findall(r"^``(\w+)``", know_cli.__doc__ or "", re.MULTILINE)
    package = Path(know_cli.__file__).parent
    parts = {path.parent.name for path in package.glob("*/__init__.py")}
    assert parts <= set(listed) <= parts | {path.stem for path in package.glob("*.py")}


def test_exit_codes_are_those_of_the_errors() -> None:
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    cells = [row[0] for row in rows(page("docs/exit-codes.md"))]
    assert [int(cell) for cell in cells if cell.isdigit()] == sorted(codes)


def test_the_examples_of_recording_work(know: Command, tmp_path: Path) -> None:
    examples = dict(TESTED.findall(page("docs/forgetting.md")))
    assert set(examples) == {"train.py", "loop.py"}
    (tmp_path / "train.py").write_text(examples["train.py"], encoding="utf-8")
    done = know(
        "forget", "train.py:train", "run", "--sessions", 3, "--rate", 0.5, cwd=tmp_path
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.syspath_prepend(tmp_path)
        exec(compile(examples["loop.py"], "loop.py", "exec"), {})
    # The same subsets and seeds, whether a function is called or a loop asks for them.
    for k in range(3):
        name = f"ckpt{k}.safetensors"
        first, second = (read_state(tmp_path / run / name) for run in ("run", "recorded"))
        assert first.keys() == second.keys() == {"weight", "bias"}
        assert all(torch.equal(first[key], second[key]) for key in first)
