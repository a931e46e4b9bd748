"""What a user's measure gives, and how it can fail."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from know_cli.choosing.log import Log
from know_cli.choosing.measures import CommandMeasure, FunctionMeasure, Result
from know_cli.choosing.search import Arm, Purpose, Trial
from know_cli.errors import UsageError

START = Path("a start.safetensors")


def take(command: str, **wishes: object) -> Result:
    return CommandMeasure(command, **wishes).take(START, 7, {"lr": "0.1"}, 2)  # type: ignore[arg-type]


def test_the_last_line_is_the_measure_and_placeholders_are_filled() -> None:
    found = take("echo training; printf '%s|' {start} {seed} {lr} >&2; echo; echo 0.75; echo ' '")
    assert found == Result(0.75)
    failed = take("printf '%s|' {start} {seed} {lr} {other}; exit 3")
    assert failed.value is None
    assert failed.reason == "ended with exit code 3"
    assert failed.output == "a start.safetensors|7|0.1|{other}|"


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("echo nan", "wrote nan as its last line, which is not finite"),
        ("echo -1e308", "wrote -1e+308 as its last line, which is too large to compare"),
        ("echo done", "wrote 'done' as its last line, which is not a number"),
        ("true", "wrote '' as its last line, which is not a number"),
        ("kill -9 $$", "was ended by SIGKILL"),
    ],
)
def test_what_is_no_finite_number_failed(command: str, reason: str) -> None:
    assert take(command) == Result(None, reason, take(command).output)


def test_a_key_of_a_json_line() -> None:
    command = """echo '{"loss": 2, "accuracy": 0.5}'; echo '[1]'; echo end"""
    assert take(command, key="accuracy") == Result(0.5)
    assert take(command, key="f1").reason == "wrote no JSON line with 'f1'"
    nested = "head -c 100000 /dev/zero | tr '\\0' '['"
    assert take(f"{command}; {nested}", key="accuracy") == Result(0.5)


def test_a_measure_that_hangs_ends_with_all_that_it_started(tmp_path: Path) -> None:
    began = time.monotonic()
    mark = tmp_path / "mark"
    found = take(f"(sleep 30; touch {mark}) & sleep 30", timeout=0.3)
    assert found.reason == "took longer than 0.3 s"
    assert time.monotonic() - began < 20
    assert not mark.exists()


def test_a_measure_that_hangs_ends_with_what_ignores_that_it_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("know_cli.choosing.measures._GRACE_SECONDS", 0.5)
    mark = tmp_path / "mark"
    stubborn = f"sh -c 'trap \"\" TERM; while true; do touch {mark}; sleep 0.1; done'"
    found = take(f"{stubborn}; true", timeout=1)
    assert found.reason == "took longer than 1 s"
    mark.unlink()
    time.sleep(0.5)
    assert not mark.exists()


@pytest.mark.parametrize("timeout", [None, 20])
def test_what_a_measure_leaves_running_is_not_waited_for(
    timeout: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("know_cli.choosing.measures._GRACE_SECONDS", 0.5)
    began = time.monotonic()
    found = take("sleep 40 & echo 0.75", timeout=timeout)
    assert found == Result(0.75)
    assert time.monotonic() - began < 15


def test_a_time_out_may_be_any_number(tmp_path: Path) -> None:
    start = tmp_path / "start.safetensors"
    save_file({"w": torch.tensor([3.0])}, start)
    (tmp_path / "mine.py").write_text("def measure(state, seed): return 1\n")
    for timeout in (1e30, math.inf):
        assert take("echo 0.75", timeout=timeout) == Result(0.75)
        measure = FunctionMeasure(f"{tmp_path / 'mine.py'}:measure", timeout)
        try:
            assert measure.take(start, 0, {}, 0) == Result(1.0)
        finally:
            measure.close()


def test_output_that_comes_after_the_end_is_read() -> None:
    assert take("(sleep 1.5; echo 0.75) & echo 0.5", timeout=60) == Result(0.75)


def test_each_slot_is_told_its_number() -> None:
    assert take("echo $DEVICE", variable="DEVICE") == Result(2.0)


def test_a_command_without_its_placeholders_is_refused() -> None:
    with pytest.raises(UsageError, match="has no {start}"):
        CommandMeasure("python train.py").check(())
    with pytest.raises(UsageError, match="--tune lr: --measure has no {lr}"):
        CommandMeasure("python train.py {start}").check(("lr",))


def test_a_function_stays_up_and_its_prints_are_no_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    start = Path("start.safetensors")
    save_file({"w": torch.tensor([3.0])}, start)
    (tmp_path / "mine.py").write_text(
        "import os\n"
        "calls = []\n"
        "def measure(state, seed, lr='1'):\n"
        "    calls.append(seed)\n"
        "    print('5.0')\n"
        "    if seed == 9: raise ValueError('no data')\n"
        "    if seed == 8: os._exit(4)\n"
        "    if seed == 7: raise SystemExit(5)\n"
        "    if seed == 6: input()\n"
        "    if seed == 5: os.chdir('/')\n"
        "    return float(state['w']) * len(calls) + float(lr)\n"
    )
    measure = FunctionMeasure("mine.py:measure", timeout=60)
    try:
        assert measure.take(start, 0, {}, 0) == Result(4.0)
        assert measure.take(start, 1, {"lr": "2"}, 0) == Result(8.0)
        failed = measure.take(start, 9, {}, 0)
        assert failed.reason == "raised ValueError: no data"
        assert failed.output.startswith("5.0")
        assert measure.take(start, 8, {}, 0).reason == "ended with exit code 4"
        assert measure.take(start, 0, {}, 0) == Result(4.0)
        assert measure.take(start, 7, {}, 0).reason == "ended with exit code 5"
        no_input = measure.take(start, 6, {}, 0)  # and not the next question, or a wait for it
        assert no_input.reason == "raised EOFError: EOF when reading a line"
        # From another folder, paths lead to the same files.
        assert measure.take(start, 5, {}, 0) == Result(7.0)
        assert measure.take(start, 0, {}, 0) == Result(10.0)
    finally:
        measure.close()


# ------------------------------------------------------------------ the log


def trial(seed: int, start: str = "a") -> Trial:
    return Trial(Arm(start, (("lr", "1e-3"),)), seed, Purpose.CHOOSING)


def test_a_log_goes_on_from_what_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = Log(path, {"measure": "x"})
    log.add(trial(0), Result(0.1 + 0.2))
    log.add(trial(1), Result(None, "failed"))
    log.close()
    with path.open("a") as file:
        file.write('{"start": "a", "val')  # a run that was killed
    again = Log(path, {"measure": "x"})
    assert again.get(trial(0)) == Result(0.1 + 0.2)
    assert again.get(trial(1)) is None  # measured again
    assert again.get(trial(0, "b")) is None
    again.add(trial(2), Result(1.0))
    again.close()
    assert len(Log(path, {"measure": "x"})) == 2


@pytest.mark.parametrize(
    "damage",
    [
        {"value": "abc"},
        {"value": "0.5"},
        {"value": [1]},
        {"value": True},
        {"value": math.nan},
        {"value": -math.inf},
        {"value": 10**400},
        {"values": {"lr": [1]}},
        {"seed": math.inf},
    ],
)
def test_a_damaged_line_is_measured_again(damage: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = Log(path, {"measure": "x"})
    log.add(trial(0), Result(0.25))
    log.add(trial(1), Result(0.5))
    log.close()
    header, first, second = path.read_bytes().splitlines()
    damaged = json.dumps({**json.loads(first), **damage}).encode()
    path.write_bytes(b"\n".join([header, damaged, second, b""]))
    again = Log(path, {"measure": "x"})
    assert (again.get(trial(0)), again.get(trial(1))) == (None, Result(0.5))
    assert len(again) == 1
    again.close()


def test_a_number_that_is_too_large_is_no_measure(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = Log(path, {"measure": "x"})
    log.add(trial(0), Result(0.25))
    log.close()
    path.write_bytes(path.read_bytes().replace(b"0.25", b"1e400"))
    assert len(Log(path, {"measure": "x"})) == 0


def test_a_log_of_another_search_is_refused(tmp_path: Path) -> None:
    Log(tmp_path / "log", {"measure": "x"}).close()
    before = (tmp_path / "log").read_bytes()
    with pytest.raises(UsageError, match="another --folder"):
        Log(tmp_path / "log", {"measure": "y"})
    assert (tmp_path / "log").read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "log"]
