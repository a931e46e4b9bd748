"""Measures a user can give: a shell command, or a function in a process that stays up."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from know_cli.choosing.intervals import LARGEST
from know_cli.errors import UsageError, quoted
from know_cli.ranks.environment import own_command

#: How much of a failed measure's output is reported.
_END_CHARACTERS = 2000
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_START, _SEED = "start", "seed"
# How long a process has to end after it was asked to, and its output after it has ended.
_GRACE_SECONDS = 5.0
# How often is looked whether a process has ended while its output is read, and all of its group.
_LOOK_SECONDS, _LOOK_AT_GROUP_SECONDS = 1.0, 0.05


@dataclass(frozen=True)
class Result:
    """What came of one measure.

    Attributes:
        value: the number; None if the measure failed.
        reason: why it failed; empty if it did not.
        output: the end of what it wrote, if it failed.
    """

    value: float | None
    reason: str = ""
    output: str = ""


class Measure(Protocol):
    """Takes a start's path, a seed and the tuned values, and gives a number."""

    def take(self, start: Path, seed: int, values: Mapping[str, str], slot: int) -> Result:
        """Take one measure; several threads may do so, each with its own ``slot``."""

    def close(self) -> None:
        """End every process."""


@dataclass
class CommandMeasure:
    """A shell command that is run once for each measure.

    Attributes:
        command: with ``{start}``, ``{seed}`` and the names of tuned values in braces.
        key: the measure is this key of the last JSON line on standard output; None takes the last
            line that is not empty as a number.
        timeout: seconds after which a measure counts as failed; None waits for ever.
        variable: environment variable that tells each measure its slot, such as
            ``CUDA_VISIBLE_DEVICES``; empty sets none.
        option: that the command was given with, for messages.
    """

    command: str
    key: str | None = None
    timeout: float | None = None
    variable: str = ""
    option: str = "--measure"
    _running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self, tuned: tuple[str, ...]) -> None:
        """Refuse a command whose placeholders are not those that are filled.

        Raises:
            UsageError: with the placeholder.
        """
        found = set(_PLACEHOLDER.findall(self.command))
        if _START not in found:
            raise UsageError(
                f"{self.option}: has no {{start}}, so it would measure every candidate alike; put "
                "{start} where your program takes the checkpoint's path"
            )
        for name in tuned:
            if name not in found:
                raise UsageError(f"--tune {name}: {self.option} has no {{{name}}}")

    def take(self, start: Path, seed: int, values: Mapping[str, str], slot: int) -> Result:
        """Run the command; see :class:`Measure`."""
        filled = {**values, _START: shlex.quote(os.fspath(start)), _SEED: str(seed)}
        command = _PLACEHOLDER.sub(lambda found: filled.get(found[1], found[0]), self.command)
        environment = dict(os.environ)
        if self.variable:
            environment[self.variable] = str(slot)
        # A session of its own, so that a measure that hangs ends with all that it started.
        process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        with self._lock:
            self._running.add(process)
        try:
            output, errors, is_late = _read_all(process, self.timeout)
        finally:
            with self._lock:
                self._running.discard(process)
        if is_late:
            return _failed(f"took longer than {self.timeout:g} s", output, errors)
        if process.returncode:
            return _failed(_ended(process.returncode), output, errors)
        return self._read(output, errors)

    def close(self) -> None:
        """End what is still running."""
        with self._lock:
            running = list(self._running)
        for process in running:
            _end(process)

    def _read(self, output: str, errors: str) -> Result:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        if self.key is None:
            text = lines[-1] if lines else ""
            return _number(text, "wrote", " as its last line", output, errors)
        for line in reversed(lines):
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(content, dict) and self.key in content:
                text = str(content[self.key])
                return _number(text, "wrote", f" as {quoted(self.key)}", output, errors)
        return _failed(f"wrote no JSON line with {quoted(self.key)}", output, errors)


class FunctionMeasure:
    """A function (state dict, seed, **tuned values) → number, in processes that stay up.

    Args:
        function: ``module:function`` or ``file.py:function``.
        timeout: seconds after which a measure counts as failed, and its process is replaced.
        variable: as for :class:`CommandMeasure`.
    """

    def __init__(self, function: str, timeout: float | None = None, variable: str = "") -> None:
        self._function = function
        self._timeout = timeout
        self._variable = variable
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._lock = threading.Lock()

    def take(self, start: Path, seed: int, values: Mapping[str, str], slot: int) -> Result:
        """Ask the process of a slot, which is started if it does not run; see :class:`Measure`."""
        process = self._process(slot)
        assert process.stdin is not None
        assert process.stdout is not None
        hung = threading.Event()

        def stop() -> None:
            hung.set()
            _end(process)

        seconds = min(self._timeout or 0.0, threading.TIMEOUT_MAX)  # infinity is no time of a timer
        timer = threading.Timer(seconds, stop) if self._timeout else None
        if timer:
            timer.start()
        try:
            # The function may have gone to another folder.
            question = {"start": str(start.absolute()), "seed": seed, "values": dict(values)}
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except (BrokenPipeError, ValueError):
            answer = ""
        finally:
            if timer:
                timer.cancel()
        if not answer:
            # Its own exit code is told, and not that it was ended in the middle of its end.
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_SECONDS)
            self._forget(slot)
            if hung.is_set():
                return _failed(f"took longer than {self._timeout:g} s", "", "")
            return _failed(_ended(process.wait()), "", "")
        content = json.loads(answer)
        if "error" in content:
            return _failed(content["error"], content["output"], "")
        return _number(content["value"], "returned", "", content["output"], "")

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            slots = list(self._processes)
        for slot in slots:
            self._forget(slot)

    def _process(self, slot: int) -> subprocess.Popen[str]:
        with self._lock:
            process = self._processes.get(slot)
            if process is None or process.poll() is not None:
                environment = dict(os.environ)
                if self._variable:
                    environment[self._variable] = str(slot)
                process = subprocess.Popen(
                    [*own_command("know_cli.choosing.worker"), self._function],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=environment,
                    start_new_session=True,
                )
                self._processes[slot] = process
            return process

    def _forget(self, slot: int) -> None:
        with self._lock:
            process = self._processes.pop(slot, None)
        if process is not None:
            _end(process)


def _number(text: object, did: str, where: str, output: str, errors: str) -> Result:
    """What a measure wrote or returned; the reason, if it is none, says what the measure did."""
    try:
        value = float(str(text))
    except ValueError:
        return _failed(f"{did} {quoted(text)}{where}, which is not a number", output, errors)
    if not math.isfinite(value):
        return _failed(f"{did} {value}{where}, which is not finite", output, errors)
    if abs(value) > LARGEST:
        return _failed(f"{did} {value}{where}, which is too large to compare", output, errors)
    return Result(value)


def _failed(reason: str, output: str, errors: str) -> Result:
    return Result(None, reason, (output + errors)[-_END_CHARACTERS:])


def _ended(code: int) -> str:
    if code < 0:
        try:
            return f"was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"was ended by signal {-code}"
    return f"ended with exit code {code}"


def _read_all(process: subprocess.Popen[bytes], timeout: float | None) -> tuple[str, str, bool]:
    """Read what a process writes until it ends, or end it with all that it started.

    Its output may stay open after its end, held by what it has left running: that is waited for
    only as long as the rest of the output may need.

    Args:
        process: with pipes for its standard output and standard error.
        timeout: seconds that it may take; None for ever.

    Returns:
        Its standard output, its standard error, and whether it took longer.
    """
    limit = math.inf if timeout is None else time.monotonic() + timeout
    until, is_late = math.inf, False
    parts: tuple[bytes | None, bytes | None] = (None, None)
    while time.monotonic() < until:
        wait = _LOOK_SECONDS
        if process.poll() is None:
            wait = min(wait, max(limit - time.monotonic(), 0))
        try:
            parts = process.communicate(timeout=wait)
            break
        except subprocess.TimeoutExpired as error:
            parts = error.output, error.stderr
        if process.poll() is None and time.monotonic() >= limit:
            is_late = True
            _end(process)
        if process.poll() is not None:
            until = min(until, time.monotonic() + _GRACE_SECONDS)
    for pipe in (process.stdout, process.stderr):
        assert pipe is not None
        pipe.close()
    output, errors = ((part or b"").decode(errors="replace") for part in parts)
    return output, errors, is_late


def _end(process: subprocess.Popen[Any]) -> None:
    """End a process and all that it started, first politely."""
    until = time.monotonic() + _GRACE_SECONDS
    with suppress(ProcessLookupError, PermissionError):  # none of them is left
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < until:
            process.poll()  # one that has ended is of its group until it is asked for
            time.sleep(_LOOK_AT_GROUP_SECONDS)
            os.killpg(process.pid, 0)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
