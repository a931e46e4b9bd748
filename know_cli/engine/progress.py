"""How the engine tells of its progress, without knowing of terminals."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told of phases and of predicted parameters."""

    def phase(self, text: str, parameters: int = 0) -> None:
        """A phase begins; ``parameters`` of work are known for it, 0 where they are not."""

    def advance(self, parameters: int) -> None:
        """So many more parameters are done; called from any thread."""


class Silent:
    """Ignores all progress."""

    def phase(self, text: str, parameters: int = 0) -> None:
        """Do nothing."""

    def advance(self, parameters: int) -> None:
        """Do nothing."""
