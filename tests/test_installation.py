"""What is packed: the bundles in the wheel, the scripts, the metadata."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from know_cli import __version__
from know_cli.known.native_kernel import trouble_with_native
from know_cli.known.shipped import shipped

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the wheel and the sdist, built from a copy of what is in the checkout."""
    folder = tmp_path_factory.mktemp("build")
    for name in (
        "know_cli",
        "weights",
        "docs",
        "pyproject.toml",
        "hatch_build.py",
        "README.md",
        "LICENSE",
    ):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist"],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(packed: Path) -> Path:
    (built,) = packed.glob("*.whl")
    return built


def test_the_sdist_has_the_published_results(packed: Path) -> None:
    (built,) = packed.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"docs/results/{path.name}" for path in (ROOT / "docs" / "results").iterdir()} <= names
    assert {
        "LICENSE",
        "README.md",
        "know_cli/py.typed",
        "weights/README.md",
        "hatch_build.py",
    } <= names


def test_bundles_are_found_from_a_wheel(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import know_cli; from know_cli.known.shipped import shipped; from know_cli.known.bundle import load_bundle\n"
        "print(know_cli.__file__)\n"
        "for family, sizes in shipped().items():\n"
        "    for size, path in sizes.items(): print(family, size, load_bundle(path).digest, path)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    module, *bundles = done.stdout.splitlines()
    assert module.startswith(str(tmp_path))
    assert len(bundles) == sum(len(sizes) for sizes in shipped().values()) > 0
    assert all(str(tmp_path / "know_cli" / "weights") in line for line in bundles)


def test_the_wheel_has_what_is_needed_and_no_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = next(name for name in names if name.endswith("entry_points.txt"))
        scripts = archive.read(entry_points).decode()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert "know-predict = know_cli.cli.main:know_predict" in scripts
    assert "know = know_cli.cli.main:know" in scripts
    assert f"Version: {__version__}" in metadata
    assert "know_cli/py.typed" in names
    assert {name.split("/")[0] for name in names} == {
        "know_cli",
        f"know_predict-{__version__}.dist-info",
    }
    assert not [name for name in names if "test" in name or "__pycache__" in name]
    # Published results are read where they are, in docs/, and not shipped to everybody.
    others = [name for name in names if not name.endswith(".py") and name.startswith("know_cli/")]
    assert {name.split("/")[1] for name in others} == {
        "py.typed", "weights", "known", "passes", "evaluation",
    }  # fmt: skip
    kernel = {"native_kernel.c", "passes.c"} | (
        {"_native.so"} if trouble_with_native(2) is None else set()
    )
    assert {Path(name).name for name in others if not name.endswith(".safetensors")} == {
        "py.typed", "README.md", "manifest.json", "costs.json", "seconds.json", *kernel,
    }  # fmt: skip


def test_bundles_are_found_from_a_checkout() -> None:
    assert all(path.is_relative_to(ROOT) for sizes in shipped().values() for path in sizes.values())


def test_core_dependencies_are_the_agreed_five(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("METADATA"))
        lines = archive.read(name).decode().splitlines()
    needs = [line.split(": ")[1] for line in lines if line.startswith("Requires-Dist: ")]
    core = {need.split(">")[0] for need in needs if "extra ==" not in need}
    extras = {line.split(": ")[1] for line in lines if line.startswith("Provides-Extra: ")}
    assert core == {"torch", "safetensors", "numpy", "typer", "rich"}
    libraries = {"bench", "choose", "keras", "lightning", "paper", "plot", "transformers"}
    assert extras == {"collect", "demo", "dev", "round-trips", "test", *libraries}
