"""What trials cost, from the published results: ``python -m tests.support.costs`` writes it."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "know_cli" / "evaluation" / "costs.json"
#: Of each sort of evaluation the results that were measured with all, or nearly all, its starts.
RESULTS = {
    "forgetting": ("chosen", "scale"),
    "run": ("runs",),
    "branches": ("branches",),
}


def published() -> dict[str, Any]:
    """The median seconds of a trial, by sort and task, to two digits."""
    found = {}
    for sort, names in RESULTS.items():
        seconds, processors = {}, set()
        for name in names:
            content = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text("utf-8"))
            processors.add(content["machine"]["processor"])
            for task, of in content["tasks"].items():
                seconds[task] = float(f"{median(of['seconds']):.2g}")
        (processor,) = processors
        found[sort] = {"processor": processor, "seconds": seconds}
    return found


if __name__ == "__main__":
    TARGET.write_text(json.dumps(published(), indent=1) + "\n", "utf-8")
