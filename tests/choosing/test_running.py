"""What runs a search: which measures of an earlier run it takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from know_cli.choosing.log import Log
from know_cli.choosing.measures import Result
from know_cli.choosing.running import Runner
from know_cli.choosing.search import BASE, RANDOM, Settings, search


class Worth:
    """A measure by the name of the file, some of which cannot be measured."""

    def __init__(self, worth: Mapping[str, float], *failing: str) -> None:
        self._worth, self._failing = worth, failing
        self.taken: list[str] = []

    def take(self, start: Path, seed: int, values: Mapping[str, str], slot: int) -> Result:
        self.taken.append(start.name)
        if start.name in self._failing:
            return Result(None, "failed")
        return Result(self._worth[start.name] + seed)

    def close(self) -> None:
        pass


def test_the_random_direction_of_another_winner_is_measured_again(tmp_path: Path) -> None:
    worth = {BASE: 0.0, "a": 1.0, "b": 2.0, "as far as a": -1.0, "as far as b": -2.0}

    def outcome(*failing: str) -> tuple[float, list[str]]:
        measure = Worth(worth, *failing)
        log = Log(tmp_path / "log", {})
        runner = Runner(
            {name: Path(name) for name in (BASE, "a", "b")},
            measure,
            log=log,
            make_random=lambda winner: Path(f"as far as {winner}"),
        )
        found = runner.run(search(["a", "b"], [()], Settings(30)))
        log.close()
        assert found.random is not None
        return found.random.mean, [name for name in measure.taken if name.startswith("as far")]

    assert outcome("b")[0] == -1.0
    # This time b can be measured, and wins: what was as far as a is none of its measures.
    mean, taken = outcome()
    assert mean == -2.0
    assert set(taken) == {"as far as b"}
    assert outcome() == (-2.0, [])
    assert RANDOM in (tmp_path / "log").read_text()
