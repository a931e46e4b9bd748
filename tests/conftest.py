"""Fixtures: small trajectories on disk, random KNOWN, and the command line as users run it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file
from torch import Tensor

from know_cli.cli.main import family_app, run
from know_cli.kinds import PREDICTED_KINDS
from know_cli.known.bundle import Bundle, save_bundle
from know_cli.known.module import Known, Preparation
from tests.forkserver import ForkServer

# Two cores, shared by the processes that the tests run in.
torch.set_num_threads(max(1, 2 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
# Speed is not tested: on a busy machine any example may take long.
settings.register_profile("project", parent=settings(), deadline=None)
settings.load_profile("project")

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def network(seed: int = 0) -> dict[str, Tensor]:
    """A state dict with a tensor of every kind and most float dtypes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 0.1) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    return {
        "conv1.weight": normal(8, 3, 3, 3),
        "conv1.bias": normal(8),
        "bn1.weight": 1 + normal(8),
        "bn1.bias": normal(8),
        "bn1.running_mean": normal(8),
        "bn1.running_var": normal(8).abs() + 0.5,
        "bn1.num_batches_tracked": torch.tensor(7),
        "fc.weight": normal(20, 33),
        "fc.bias": normal(20),
        "half.weight": normal(16, 10).half(),
        "brain.weight": normal(16, 10).bfloat16(),
        "double.weight": normal(6, 5).double(),
        "frozen.weight": normal(5, 5),
        "scale": normal(),
        "empty.weight": torch.empty(0, 4),
        "mask": torch.tensor([True, False, True]),
    }


def drift(state: dict[str, Tensor], seed: int, size: float) -> dict[str, Tensor]:
    """The state dict a session later: every float tensor moves, but the frozen one."""
    generator = torch.Generator().manual_seed(1000 + seed)
    moved = {}
    for name, tensor in state.items():
        if tensor.is_floating_point() and not name.startswith("frozen"):
            noise = torch.randn(tensor.shape, generator=generator) * size
            if name.endswith("running_var"):
                noise = noise.abs()
            moved[name] = (tensor.double() + noise.double()).to(tensor.dtype)
        else:
            moved[name] = tensor.clone()
    return moved


def states(count: int = 5, seed: int = 0) -> list[dict[str, Tensor]]:
    """State dicts Θ0 … Θ(S − 1) that move ever less."""
    result = [network(seed)]
    for k in range(1, count):
        result.append(drift(result[-1], seed + k, 0.02 * 0.5**k))
    return result


def write_trajectory(
    folder: Path,
    trajectory: list[dict[str, Tensor]] | None = None,
    metadata: list[dict[str, str]] | None = None,
) -> list[Path]:
    """Save state dicts as ckpt0.safetensors, … with the safetensors library."""
    paths = []
    for k, state in enumerate(trajectory if trajectory is not None else states()):
        path = folder / f"ckpt{k}.safetensors"
        save_file(state, path, {"format": "pt", **(metadata[k] if metadata else {})})
        paths.append(path)
    return paths


def random_bundle(
    checkpoints: int = 5, seed: int = 0, preparation: Preparation = Preparation.RAW
) -> Bundle:
    """Three KNOWN with random weights, large enough that every layer matters."""
    generator = torch.Generator().manual_seed(seed)
    every = {}
    for kind in PREDICTED_KINDS:
        state = Known(checkpoints).state_dict()
        every[kind] = {
            name: torch.randn(tensor.shape, generator=generator) * 0.15
            for name, tensor in state.items()
        }
    return Bundle(every, checkpoints, preparation, "retrodiction")


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
def know() -> Command:
    """Runs ``know …``: in this process, where torch is imported already, or in one of its own.

    ``process=True`` starts ``python -m know_cli …`` as a shell would, and so do environment
    variables, which are read when Python starts.
    """

    def run(
        *arguments: object, cwd: Path | None = None, process: bool = False, **env: str
    ) -> subprocess.CompletedProcess[str]:
        command = [str(argument) for argument in arguments]
        clean = {name: value for name, value in os.environ.items() if name != "KNOW_DEBUG"}
        if not (process or env):
            return _run_here(command, cwd or Path.cwd())
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


def _run_here(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """The command line in this process; what it changes of the process is put back."""
    before, threads = Path.cwd(), torch.get_num_threads()
    handlers = {wish: signal.getsignal(wish) for wish in (signal.SIGTERM, signal.SIGHUP)}
    out, err = io.StringIO(), io.StringIO()
    path, modules = list(sys.path), set(sys.modules)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("COLUMNS", "100")
        patch.delenv("KNOW_DEBUG", raising=False)
        os.chdir(folder)
        try:
            code = run(family_app(), "know", command)
        finally:
            os.chdir(before)
            sys.path[:] = path
            # A user's module of the same name in another folder is another module.
            for name in set(sys.modules) - modules:
                if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
                    del sys.modules[name]
            torch.set_num_threads(threads)
            for wish, handler in handlers.items():
                signal.signal(wish, handler)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    """Starts command lines quickly."""
    running = ForkServer()
    yield running
    running.close()


def one_line(text: str) -> str:
    """The one line of an error's stderr."""
    lines = [line for line in text.splitlines() if "error: " in line]
    assert len(lines) == 1, text
    assert "Traceback" not in text
    assert text.splitlines()[-1] == lines[0]
    return lines[0]
