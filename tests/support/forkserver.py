"""Runs command lines in processes that are cheap to start, so that hundreds can be killed.

This program imports everything once and forks for each command line: what runs in the child is
what ``python -m know_cli`` runs. It reads wishes from a socket, a JSON object a line, and answers
with the child's process id; to such an id on a line it answers with that child's exit code
(minus the signal that ended it) and its peak of resident memory. Several children may run at once.

A wish has ``arguments``, ``cwd``, ``out`` and ``err`` (see :class:`ForkServer`), and may have
faults: ``die``, ``stop`` and ``fail`` map a function of :mod:`os` to its call, counted from 1, at
which the child is killed, stopped, or gets an error (``[call, errno]``); ``file_bytes`` limits the size of files,
``env`` has variables, ``encoding`` is the terminal's.
"""

from __future__ import annotations

import gc
import io
import json
import os
import pkgutil
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

#: Exit code of a child that ended before its command line had begun.
NOT_BEGUN = 99


class ForkServer:
    """The other end: starts the program and speaks with it."""

    def __init__(self) -> None:
        self._socket, other = socket.socketpair()
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.forkserver", str(other.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
                cwd=Path(__file__).parents[2],
            )
        self._answers = self._socket.makefile()
        assert self._answers.readline() == "ready\n"

    def _ask(self, question: object, descriptors: list[int] | None = None) -> list[int]:
        line = json.dumps(question) + "\n"
        socket.send_fds(self._socket, [line.encode()], descriptors or [])
        return [int(number) for number in self._answers.readline().split()]

    def start(
        self,
        *arguments: object,
        cwd: Path,
        out: Path | int | None = Path("stdout.txt"),
        err: Path | int | None = Path("stderr.txt"),
        **wishes: Any,
    ) -> int:
        """Start a command line; its process id.

        Args:
            arguments: without ``know``.
            cwd: where it runs.
            out: its standard output: a file, relative to that folder; or a descriptor, as of a
                pipe, of which it gets a copy; or None for a closed one.
            err: its standard error, likewise.
            wishes: as the module describes them.
        """
        wish = {"arguments": [str(argument) for argument in arguments], "cwd": str(cwd), **wishes}
        descriptors: list[int] = []
        for name, stream in (("out", out), ("err", err)):
            wish[name] = None
            if isinstance(stream, int):
                wish[name] = len(descriptors)
                descriptors.append(stream)
            elif stream is not None:
                wish[name] = str(cwd / stream)
                # A child that ends before it opens them must not be taken to have said what the
                # one before it said.
                (cwd / stream).write_bytes(b"")
        (child,) = self._ask(wish, descriptors)
        return child

    def wait(self, child: int) -> int:
        """Exit code of a command line that was started."""
        return self.wait_for_peak(child)[0]

    def wait_for_peak(self, child: int) -> tuple[int, int]:
        """Exit code of a command line, and the most bytes of memory that it had.

        What the program has imported counts, so that only differences are the command line's own.
        """
        code, peak = self._ask(child)
        return code, peak

    def run(self, *arguments: object, cwd: Path, **wishes: Any) -> int:
        """Start a command line and wait for it."""
        return self.wait(self.start(*arguments, cwd=cwd, **wishes))

    def complete(
        self, *arguments: object, cwd: Path, **wishes: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command line and catch what it says, as :func:`subprocess.run` does."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            streams = {"out": out.fileno(), "err": err.fileno()}
            code = self.run(*arguments, cwd=cwd, **{**streams, **wishes})
            for file in (out, err):
                file.seek(0)
            return subprocess.CompletedProcess(arguments, code, out.read(), err.read())

    def close(self) -> None:
        """End the program."""
        self._answers.close()
        self._socket.close()
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


def stop() -> None:
    """Stop this process until it is told to go on."""
    os.kill(os.getpid(), signal.SIGSTOP)


def _child(wish: dict[str, Any], descriptors: list[int], command: Callable[..., Any]) -> int:
    from know_cli.cli.main import run

    # Whoever runs the tests may ignore these, as a shell does in the background, and nohup.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    encoding = wish.get("encoding", "utf-8")
    for number, key in ((1, "out"), (2, "err")):
        stream = wish[key]
        if stream is None:
            os.close(number)
        elif isinstance(stream, int):
            os.dup2(descriptors[stream], number)
        else:
            opened = os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(opened, number)
            os.close(opened)
    for descriptor in descriptors:
        os.close(descriptor)
    # As Python makes them at its start: what is closed is None.
    made = [
        None if wish[key] is None else os.fdopen(number, "w", buffering, encoding)
        for number, key, buffering in ((1, "out", -1), (2, "err", 1))
    ]
    sys.stdout, sys.stderr = made  # type: ignore[assignment]
    os.chdir(wish["cwd"])
    os.environ.update(wish.get("env", {}))
    if "file_bytes" in wish:
        resource.setrlimit(resource.RLIMIT_FSIZE, (wish["file_bytes"], wish["file_bytes"]))
    for name, at in wish.get("die", {}).items():
        inject(name, at, kill)
    for name, at in wish.get("stop", {}).items():
        inject(name, at, stop)
    for name, (at, number) in wish.get("fail", {}).items():

        def fail(number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        inject(name, at, fail)
    code = run(command, "know", wish["arguments"])
    sys.stdout.flush()
    with suppress(OSError):  # as Python does when it ends
        sys.stderr.flush()
    return code


def _questions(channel: socket.socket) -> Iterator[tuple[Any, list[int]]]:
    """What is asked, and the descriptors that come with it, until the other end is closed."""
    text, descriptors = b"", list[int]()
    while True:
        data, more, _, _ = socket.recv_fds(channel, 1 << 16, 2)
        if not data:
            return
        text, descriptors = text + data, descriptors + more
        if text.endswith(b"\n"):  # one at a time: the next comes after the answer
            yield json.loads(text), descriptors
            for descriptor in descriptors:
                os.close(descriptor)
            text, descriptors = b"", []


def main() -> None:
    """Serve until the socket is closed."""
    import torch
    import typer

    from know_cli.cli.main import family_app, run

    # What a command line imports late would be imported anew by each child.
    for name in ("cli", "checkpoints", "engine", "files", "methods", "prediction", "ranks"):
        for module in pkgutil.iter_modules(import_module(f"know_cli.{name}").__path__):
            import_module(f"know_cli.{name}.{module.name}")
    command = typer.main.get_command(family_app())
    with redirect_stderr(io.StringIO()):  # parsing imports some more
        run(command, "know", ["predict", "no file", "no other", "-o", "out", "--dry-run"])
    # A library is opened once a process; faults are counted among a run's own files.
    import_module("know_cli.passes.native").native()
    torch.set_num_threads(1)
    # What is there already is never looked at again: it would be copied for each child.
    gc.collect()
    gc.freeze()
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.sendall(b"ready\n")
    for question, descriptors in _questions(channel):
        if isinstance(question, int):
            # Until somebody asks, a child that has ended keeps its id, and can be killed once more.
            _, status, used = os.wait4(question, 0)
            unit = 1 if sys.platform == "darwin" else 1024
            answer = f"{os.waitstatus_to_exitcode(status)} {used.ru_maxrss * unit}\n"
            channel.sendall(answer.encode())
            continue
        child = os.fork()
        if child == 0:
            code = NOT_BEGUN
            try:
                code = _child(question, descriptors, command)
            finally:
                os._exit(code)
        channel.sendall(f"{child}\n".encode())


if __name__ == "__main__":
    main()
