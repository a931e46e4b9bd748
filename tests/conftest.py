"""Fixtures: small trajectories on disk, random KNOWN, and the command line as users run it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The tests fill the cores with processes, and threads that wait for one another double the time of
# a run on small tensors. OpenMP reads it when torch is imported; what tests start inherits it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

from know_cli.known.bundle import save_bundle
from tests.support.bundles import random_bundle
from tests.support.command import Command, run_here
from tests.support.forkserver import ForkServer
from tests.support.trajectories import write_trajectory

# Speed is not tested: on a busy machine any example may take long.
settings.register_profile("project", parent=settings(), deadline=None)
settings.load_profile("project")


@pytest.fixture
def trajectory_paths(tmp_path: Path) -> list[Path]:
    """Five checkpoints on disk."""
    return write_trajectory(tmp_path)


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bundle for five checkpoints on disk."""
    path = tmp_path_factory.mktemp("bundle") / "known"
    save_bundle(random_bundle(), path)
    return path


@pytest.fixture(scope="session")
def know(request: pytest.FixtureRequest) -> Command:
    """Runs ``know …``: in this process, where torch is imported already, or in one of its own.

    ``process=True`` takes one of the fixture ``server``'s, which are quick to start;
    ``python=True`` starts ``python -m know_cli …`` as a shell would, which takes seconds where
    torch is needed.
    """

    def run(
        *arguments: object,
        cwd: Path | None = None,
        process: bool = False,
        python: bool = False,
        **env: str,
    ) -> subprocess.CompletedProcess[str]:
        command = [str(argument) for argument in arguments]
        if process:
            server: ForkServer = request.getfixturevalue("server")
            return server.complete(*command, cwd=cwd or Path.cwd(), env={"COLUMNS": "100", **env})
        if not python:
            return run_here(command, cwd or Path.cwd(), env)
        clean = {name: value for name, value in os.environ.items() if name != "KNOW_DEBUG"}
        return subprocess.run(
            [sys.executable, "-m", "know_cli", *command],
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**clean, "COLUMNS": "100", **env},
            timeout=600,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    """Starts command lines quickly."""
    running = ForkServer()
    yield running
    running.close()
