"""The measures that a search has taken, one JSON line each, written as soon as each is there."""

from __future__ import annotations

import fcntl
import json
import math
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from know_cli.choosing.measures import Result
from know_cli.choosing.search import Arm, Purpose, Trial
from know_cli.errors import OutputError, UsageError
from know_cli.files import lock, open_own, output_errors

_FORMAT = 1
# What of an identity tells what was written under the same names.
_WRITTEN = {"files", "bundles"}
# What is given as something else than an option of its own name.
_OPTIONS = {
    "inputs": "checkpoints", "files": "checkpoints", "bundles": "bundles",
    "candidates": "candidates", "measure": "command", "key": "--measure-json",
}  # fmt: skip


class Log:
    """Results of trials on disk.

    A line that is damaged, or that a killed run left unfinished, is dropped; it is measured again,
    and so is what failed. One search at a time has it.

    Args:
        path: of the file, which is made if it is missing.
        identity: all that a result depends on beside its trial, such as the command. What it has
            under ``files`` and ``bundles`` tells written weights from those that were there before.
            A log of another search is refused.

    Raises:
        UsageError: the file is of another search.
        OutputError: it cannot be read or written, or another search has it.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._found: dict[Trial, Result] = {}
        header = json.dumps({"format": _FORMAT, "search": dict(identity)}, sort_keys=True)
        with output_errors(path):
            self._own = open_own(path, "log", mode=0o666)
        try:
            with output_errors(path):
                self._hold()
                self._begin(header.encode() + b"\n")
        except BaseException:
            self._own.close()
            raise

    def _hold(self) -> None:
        try:
            lock(self._own.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{self.path}: another search is at work in this folder; wait until it is done, or "
                "give another --folder"
            ) from None

    def _begin(self, header: bytes) -> None:
        """Read what is there, and see to it that the next line is one of its own."""
        content = self._own.read()
        whole = content[: content.rfind(b"\n") + 1]
        if not whole and header.startswith(content):  # a run was killed that had just begun
            self._own.replace_content(header)
            return
        first, *lines = whole.splitlines() or [content]
        self._check(first, header)
        self._read(lines)
        self._own.truncate(len(whole))

    def get(self, trial: Trial) -> Result | None:
        """The result of a trial that was measured before; None if it was not."""
        return self._found.get(trial)

    def __len__(self) -> int:
        return len(self._found)

    def add(self, trial: Trial, result: Result) -> None:
        """Keep a result.

        Raises:
            OutputError: it cannot be written.
        """
        line = {
            "start": trial.arm.start,
            "values": dict(trial.arm.values),
            "seed": trial.seed,
            "purpose": trial.purpose.value,
            "value": result.value,
            "reason": result.reason,
        }
        with self._lock:
            self._found[trial] = result
            try:
                self._own.append(json.dumps(line).encode() + b"\n")
            except OSError as error:
                raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Close the file."""
        self._own.close()

    def _check(self, line: bytes, header: bytes) -> None:
        if line == header.rstrip(b"\n"):
            return
        found = _differences(line, header)
        if found and found <= _WRITTEN:
            raise UsageError(
                f"{self.path}: is of a search with other checkpoints or bundles: their files were "
                "written again since, and its measures may be of other weights; remove it to "
                "measure anew, or give another --folder"
            )
        other = [_OPTIONS.get(key, f"--{key}") for key in sorted(found)]
        raise UsageError(
            f"{self.path}: is of a search with other "
            f"{', '.join(dict.fromkeys(other)) or 'checkpoints, candidates, command or seed'}; "
            "give the same again to go on with it, or another --folder"
        )

    def _read(self, lines: Sequence[bytes]) -> None:
        for line in lines:
            try:
                entry = json.loads(line)
                arm = Arm(entry["start"], tuple(entry["values"].items()))
                trial = Trial(arm, int(entry["seed"]), Purpose(entry["purpose"]))
                value = entry["value"]
                # A measure was a finite number when it was written: all else is damage.
                if type(value) in (int, float) and math.isfinite(value):
                    self._found[trial] = Result(float(value))
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                continue


def _differences(line: bytes, header: bytes) -> set[str]:
    """In which parts the identities of two searches differ; none where a line has no identity."""
    try:
        one, two = (json.loads(text) for text in (line, header))
        if one["format"] != two["format"]:
            return set()
        old, new = dict(one["search"]), dict(two["search"])
        if not old.keys() >= _WRITTEN:  # of a version that did not tell
            return set()
        return {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    except (ValueError, KeyError, TypeError, RecursionError):
        return set()
