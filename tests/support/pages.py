"""Examples from the pages for readers."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "trajectories.md"
_TESTED = re.compile(r"<!-- tested: (\S+) -->\n```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def documented(name: str, page: Path = PAGE, **numbers: int) -> str:
    """The code of an example that a page marks as tested, with other numbers for some names."""
    code = str(dict(_TESTED.findall(page.read_text(encoding="utf-8")))[name])
    for argument, number in numbers.items():
        code, count = re.subn(rf"\b{argument}=\d+", f"{argument}={number}", code)
        assert count, argument
    return code
