"""What the user should know, collected in one place from opening to the end of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator


class Notices:
    """Lines for the user, in the order in which they came up, each once.

    Args:
        tell: is given each line as it comes up; None keeps them only.

    >>> notices = Notices()
    >>> notices.add("a line", "another", "a line")
    >>> list(notices)
    ['a line', 'another']
    """

    def __init__(self, tell: Callable[[str], None] | None = None) -> None:
        self._texts: dict[str, None] = {}
        self._tell = tell

    def add(self, *texts: str) -> None:
        """Note some lines."""
        for text in texts:
            if text in self._texts:
                continue
            self._texts[text] = None
            if self._tell is not None:
                self._tell(text)

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._texts))

    def __len__(self) -> int:
        return len(self._texts)
