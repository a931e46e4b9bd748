"""The last checkpoints of a run, kept while it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from know_cli.errors import EXIT_DONE, OutputError, UsageError
from know_cli.forgetting import RunRecorder
from tests.support.command import Command
from tests.support.pages import documented


def state(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.arange(3.0) / 7 + step}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_last_are_kept_at_a_spacing(tmp_path: Path, know: Command) -> None:
    run = RunRecorder(tmp_path / "run", every=10, last=3)
    run.begin(0)
    saved = [run.save(step, state(step)) for step in range(1, 56)]
    assert [step for step, path in enumerate(saved, 1) if path] == [10, 20, 30, 40, 50]
    assert names(tmp_path / "run") == [f"checkpoint-{n}.safetensors" for n in (30, 40, 50)]
    with safe_open(run.kept[-1], "pt") as file:
        assert file.metadata() == {
            "format": "pt", "know.trajectory-kind": "run", "know.training-step": "50",
        }  # fmt: skip
    done = know("predict", "run", "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "3 checkpoints of a run, training steps 50 to 30, average" in done.stdout
    torch.testing.assert_close(load_file(tmp_path / "out")["w"], state(40)["w"])


def test_the_example_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(documented("loop"), {"model": state(1), "train_one_step": lambda model: None})
    assert names(tmp_path / "run") == [
        f"checkpoint-{n}.safetensors" for n in range(4600, 5001, 100)
    ]


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    run = RunRecorder(tmp_path, every=1)
    assert run.save(0, state(0)) is None
    assert run.save(1, state(1)) is not None
    assert run.save(1, state(7)) is None
    assert load_file(run.kept[0])["w"].equal(state(1)["w"])


def test_a_run_that_was_cut_off(tmp_path: Path) -> None:
    first = RunRecorder(tmp_path, every=10, last=3)
    for step in (10, 20, 30):
        first.save(step, state(step))
    again = RunRecorder(tmp_path, every=10, last=3)
    with pytest.raises(UsageError, match="holds checkpoints of a run, up to step 30"):
        again.begin(0)
    again.begin(25)  # the last ten steps were lost
    assert names(tmp_path) == ["checkpoint-10.safetensors", "checkpoint-20.safetensors"]
    for step in (30, 40):
        again.save(step, state(step))
    assert [path.name for path in again.kept] == [
        f"checkpoint-{step}.safetensors" for step in (20, 30, 40)
    ]


def test_folders_with_other_files(tmp_path: Path) -> None:
    run = RunRecorder(tmp_path, every=1, last=2)

    def write(folder: Path) -> None:
        (folder / "config.json").write_text("{}")

    for step in (1, 2, 3):
        run.save(step, state(step), write)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    assert names(tmp_path / "checkpoint-3") == ["config.json", "model.safetensors"]

    def fail(folder: Path) -> None:
        raise OSError(28, "no space")

    with pytest.raises(OutputError, match="checkpoint-4: cannot be written: no space"):
        run.save(4, state(4), fail)
    assert "checkpoint-4" not in names(tmp_path)
    assert [path.name for path in run.kept] == ["checkpoint-2", "checkpoint-3"]
    run.save(5, state(5), write)  # what was left of it is not in the way
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-5"]


def test_what_others_have_saved_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
    save_file(state(4), tmp_path / "checkpoint-4.safetensors")
    (tmp_path / "checkpoint-5.safetensors").write_text("none")
    run = RunRecorder(tmp_path, every=1, last=2)
    run.begin(0)
    assert run.kept == []
    with pytest.raises(OutputError, match="checkpoint-2: exists already"):
        run.save(2, state(2), lambda folder: None)
    for step in (6, 7, 8):
        run.save(step, state(step))
    assert names(tmp_path) == [
        "checkpoint-2", "checkpoint-4.safetensors", "checkpoint-5.safetensors",
        "checkpoint-7.safetensors", "checkpoint-8.safetensors",
    ]  # fmt: skip


def test_a_folder_that_cannot_be_written_is_told_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        RunRecorder(tmp_path / "file" / "run", every=5).begin(0)


def test_numbers_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="every=0"):
        RunRecorder(tmp_path, every=0)
    for last in (1, 17):
        with pytest.raises(UsageError, match=f"last={last}: keep 2 to 16 checkpoints"):
            RunRecorder(tmp_path, every=1, last=last)
    with pytest.raises(UsageError, match="file: is a file"):
        RunRecorder(tmp_path / "file", every=1)
