"""What tools read of the repository, and that all of it names the same versions."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

import know_cli

ROOT = Path(know_cli.__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def read_yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def value(key: str, text: str = PROJECT) -> str:
    """The value of a key of ``pyproject.toml`` that is a text."""
    (found,) = re.findall(rf'^{key} = "(.+)"$', text, re.MULTILINE)
    return str(found)


def supported() -> list[str]:
    """Versions of Python among the classifiers."""
    return re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)


def test_the_workflow_runs_the_readmes_command_on_every_python() -> None:
    workflow = read_yaml(".github/workflows/ci.yml")
    job = workflow["jobs"]["test"]
    assert job["strategy"]["matrix"]["python-version"] == supported()
    assert job["steps"][-1] == {"run": ".ci/run"}
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    # YAML 1.1 reads the key 'on' as true.
    assert set(workflow[True]) == {"push", "pull_request"}
    assert workflow["permissions"] == {"contents": "read"}


def test_versions_of_python_agree() -> None:
    versions = supported()
    first, last = (int(version.removeprefix("3.")) for version in (versions[0], versions[-1]))
    assert versions == [f"3.{minor}" for minor in range(first, last + 1)]
    assert value("requires-python") == f">={versions[0]}"
    assert value("python_version") == versions[0]
    assert value("target-version") == f"py3{first}"
    lint = read_yaml(".github/workflows/ci.yml")["jobs"]["lint"]
    (setup,) = [step["with"] for step in lint["steps"] if "with" in step]
    assert setup["python-version"] == versions[0]
    for page, words in {
        "README.md": f"Python {versions[0]} or newer",
        "CONTRIBUTING.md": f"Python {versions[0]} to {versions[-1]}",
    }.items():
        assert words in (ROOT / page).read_text(encoding="utf-8")


def test_linters_are_the_same_everywhere() -> None:
    """CI, hooks and the page for contributors run the same tools, from the extra ``dev``."""
    dev = re.findall(r'"([\w-]+)>=', re.findall(r"^dev = \[(.*)\]$", PROJECT, re.MULTILINE)[0])
    (local,) = read_yaml(".pre-commit-config.yaml")["repos"]
    assert local["repo"] == "local"
    hooks = {hook["id"]: hook for hook in local["hooks"]}
    assert hooks.keys() == {"ruff-check", "ruff-format", "mypy"}
    assert all(hook["entry"].split()[0] in dev for hook in hooks.values())
    assert all(hook["language"] == "system" for hook in hooks.values())
    steps = read_yaml(".github/workflows/ci.yml")["jobs"]["lint"]["steps"]
    commands = [step["run"] for step in steps if "run" in step]
    assert commands[0] == "pip install -c constraints.txt -e '.[dev]'"
    of_cards = "mypy tests/known/test_cuda.py tests/evaluation/test_devices.py"
    assert commands[1:] == ["ruff check .", "ruff format --check .", "mypy", of_cards]
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert all(command in page for command in commands)


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    citation = read_yaml("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["title"] == value("name")
    assert citation["version"] == know_cli.__version__
    assert citation["license"] == value("license")
    assert value("description").rstrip(".") in citation["abstract"]
    keywords = re.findall(r'"([^"]+)"', re.findall(r"^keywords = \[(.*)\]$", PROJECT, re.MULTILINE)[0])  # fmt: skip
    assert citation["keywords"] == keywords
    (paper,) = citation["references"]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"*{paper['title']}*" in readme
    assert paper["url"] in readme
    assert all(part["authors"] for part in (citation, paper))  # the format asks for them
