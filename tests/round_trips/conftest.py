"""Round trips that take long or need further libraries run only where this folder is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.name


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked ``libraries``, unless this folder or the mark is named."""
    if "libraries" in config.option.markexpr or any(FOLDER in name for name in config.args):
        return
    left_out = [item for item in items if item.get_closest_marker("libraries")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
