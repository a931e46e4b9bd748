"""Runs command lines in processes that are cheap to start, so that hundreds can be killed.

This program imports everything once and forks for each command line: what runs in the child is
what ``python -m know_cli`` runs. It reads wishes from stdin, a JSON object a line, and answers
with the child's process id; to any further line it answers with the child's exit code (minus
the signal that ended it).

A wish has ``arguments``, ``cwd``, ``out`` and ``err`` (files), and may have faults: ``die`` and
``fail`` map a function of :mod:`os` to its call, counted from 1, at which the child is killed or
gets an error (``[call, errno]``); ``file_bytes`` limits the size of files, ``env`` has variables.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Exit code of a child that ended before its command line had begun.
NOT_BEGUN = 99


class ForkServer:
    """The other end: starts the program and speaks with it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forkserver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def start(self, *arguments: object, cwd: Path, **wishes: Any) -> int:
        """Start a command line; its process id."""
        wish = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd),
            "out": str(cwd / "stdout.txt"),
            "err": str(cwd / "stderr.txt"),
            **wishes,
        }
        for stream in ("out", "err"):
            # A child that ends before it opens them must not be taken to have said what the
            # one before it said.
            Path(wish[stream]).write_bytes(b"")
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(wish) + "\n")
        self._process.stdin.flush()
        return int(self._answer())

    def wait(self) -> int:
        """Exit code of the command line that was started last."""
        assert self._process.stdin is not None
        self._process.stdin.write("wait\n")
        self._process.stdin.flush()
        return int(self._answer())

    def run(self, *arguments: object, cwd: Path, **wishes: Any) -> int:
        """Start a command line and wait for it."""
        self.start(*arguments, cwd=cwd, **wishes)
        return self.wait()

    def close(self) -> None:
        """End the program."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def inject(name: str, at: int, what: Callable[[], None]) -> None:
    """Do something before a call of a function of :mod:`os`, the first being 1."""
    original, calls = getattr(os, name), 0

    def injected(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            what()
        return original(*arguments, **named)

    setattr(os, name, injected)


def kill() -> None:
    """End this process as ``kill -9`` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def _child(wish: dict[str, Any]) -> int:
    from know_cli.cli.main import family_app, run

    for number, key in ((1, "out"), (2, "err")):
        descriptor = os.open(wish[key], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(wish["cwd"])
    os.environ.update(wish.get("env", {}))
    if "file_bytes" in wish:
        resource.setrlimit(resource.RLIMIT_FSIZE, (wish["file_bytes"], wish["file_bytes"]))
    for name, at in wish.get("die", {}).items():
        inject(name, at, kill)
    for name, (at, number) in wish.get("fail", {}).items():

        def fail(number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        inject(name, at, fail)
    code = run(family_app(), "know", wish["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def main() -> None:
    """Serve until stdin ends."""
    import torch

    import know_cli.cli.main
    import know_cli.cli.progress
    import know_cli.cli.tables
    import know_cli.methods.known
    import know_cli.methods.linear
    import know_cli.prediction.predict  # noqa: F401

    torch.set_num_threads(1)
    print("ready", flush=True)
    while line := sys.stdin.readline():
        child = os.fork()
        if child == 0:
            code = NOT_BEGUN
            try:
                code = _child(json.loads(line))
            finally:
                os._exit(code)
        print(child, flush=True)
        # Until somebody asks, a child that has ended keeps its id, and can be killed once more.
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
