"""The command line as users run it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from know_cli.cli.main import family_app, predict_app, run

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@cache
def made(name: str) -> Any:
    """``know`` or ``know-predict``, made once: to read all signatures takes longer than most runs."""
    return typer.main.get_command({"know": family_app, "know-predict": predict_app}[name]())


def run_here(
    command: list[str], folder: Path, env: Mapping[str, str], name: str = "know"
) -> subprocess.CompletedProcess[str]:
    """The command line in this process; what it changes of the process is put back."""
    before, threads = Path.cwd(), torch.get_num_threads()
    handlers = {wish: signal.getsignal(wish) for wish in (signal.SIGTERM, signal.SIGHUP)}
    out, err = io.StringIO(), io.StringIO()
    path, modules = list(sys.path), set(sys.modules)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("COLUMNS", "100")
        patch.delenv("KNOW_DEBUG", raising=False)
        for variable, value in env.items():
            patch.setenv(variable, value)
        os.chdir(folder)
        try:
            code = run(made(name), name, command)
        finally:
            os.chdir(before)
            sys.path[:] = path
            # A user's module of the same name in another folder is another module.
            for module in set(sys.modules) - modules:
                if str(getattr(sys.modules[module], "__file__", "")).startswith(str(folder)):
                    del sys.modules[module]
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
