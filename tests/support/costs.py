"""What trials cost, from the published results: ``python -m tests.support.costs`` writes it."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "know_cli" / "evaluation" / "costs.json"
#: Of each sort of evaluation the results that were measured with all its starts.
RESULTS = {"forgetting": "chosen", "run": "runs", "branches": "branches", "release": "release"}


def published() -> dict[str, Any]:
    """The median seconds of a trial, by sort and task, to two digits."""
    found = {}
    for sort, name in RESULTS.items():
        content = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text("utf-8"))
        seconds = {
            task: float(f"{median(of['seconds']):.2g}") for task, of in content["tasks"].items()
        }
        found[sort] = {"processor": content["machine"]["processor"], "seconds": seconds}
    return found


if __name__ == "__main__":
    TARGET.write_text(json.dumps(published(), indent=1) + "\n", "utf-8")
