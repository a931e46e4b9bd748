"""Files that are kept open for reading, as many as a process may have beside others."""

from __future__ import annotations

import os
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from know_cli.files import open_to_read


class OpenFiles:
    """Descriptors by path, opened when they are needed; those not used for longest are closed.

    Safe to use from several threads, which read at the same time.

    Args:
        most: how many are kept open while no thread uses them.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._files = OrderedDict[Path, int]()
        self._users = Counter[Path]()
        self._lock = Lock()

    @contextmanager
    def using(self, path: Path) -> Iterator[int]:
        """A file's descriptor, which stays open for as long as the block takes.

        Raises:
            OSError: it cannot be opened.
        """
        with self._lock:
            descriptor = self._files.pop(path, None)
            if descriptor is None:
                self._close_others()
                descriptor = open_to_read(path)
            self._files[path] = descriptor
            self._users[path] += 1
        try:
            yield descriptor
        finally:
            with self._lock:
                self._users[path] -= 1

    def _close_others(self) -> None:
        """Make room for one more. A number that a thread still reads from must not be reused."""
        for path in [path for path in self._files if not self._users[path]]:
            if len(self._files) < self._most:
                break
            os.close(self._files.pop(path))

    def __len__(self) -> int:
        """How many are open."""
        return len(self._files)

    def close(self) -> None:
        """Close all; no thread may be using one. They are opened again when they are needed."""
        while self._files:
            os.close(self._files.popitem()[1])
