"""The command line as users run it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from know_cli.cli.main import family_app, run

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def run_here(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
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


def one_line(text: str) -> str:
    """The one line of an error's stderr."""
    lines = [line for line in text.splitlines() if "error: " in line]
    assert len(lines) == 1, text
    assert "Traceback" not in text
    assert text.splitlines()[-1] == lines[0]
    return lines[0]
