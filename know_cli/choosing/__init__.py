"""Which start is best for a task: candidates, a search among them, and its confirmation."""

from know_cli.choosing.running import choose

__all__ = ["choose"]
