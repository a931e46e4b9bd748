"""The measures that a search has taken, one JSON line each, written as soon as each is there."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from know_cli.choosing.measures import Result
from know_cli.choosing.search import Arm, Purpose, Trial
from know_cli.errors import OutputError, UsageError
from know_cli.files import open_own, output_errors

_FORMAT = 1


class Log:
    """Results of trials on disk.

    A line that a killed run left unfinished is dropped; what failed is measured again.

    Args:
        path: of the file, which is made if it is missing.
        identity: all that a result depends on beside its trial: digests of the candidates, the
            command. A log of another search is refused.

    Raises:
        UsageError: the file is of another search.
        OutputError: it cannot be read or written.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._found: dict[Trial, Result] = {}
        header = {"format": _FORMAT, "search": dict(identity)}
        with output_errors(path):
            self._own = open_own(path, "log", mode=0o666)
            lines = self._own.read().decode("utf-8", "replace").split("\n")[:-1]
            if lines:
                self._check(lines[0], header)
                whole = self._read(lines[1:])
                text = "".join(line + "\n" for line in [lines[0], *whole])
            else:
                text = json.dumps(header, sort_keys=True) + "\n"
            self._own.replace_content(text.encode())

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
                self._own.append(f"{json.dumps(line)}\n".encode())
            except OSError as error:
                raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Close the file."""
        self._own.close()

    def _check(self, line: str, header: Mapping[str, Any]) -> None:
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if found != json.loads(json.dumps(header)):
            raise UsageError(
                f"{self.path}: is of a search with other checkpoints, candidates, command or seed; "
                "give the same again to go on with it, or another --folder"
            )

    def _read(self, lines: list[str]) -> list[str]:
        whole = []
        for line in lines:
            try:
                entry = json.loads(line)
                arm = Arm(entry["start"], tuple(entry["values"].items()))
                trial = Trial(arm, int(entry["seed"]), Purpose(entry["purpose"]))
                value = entry["value"]
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            if value is not None:
                self._found[trial] = Result(float(value))
                whole.append(line)
        return whole
