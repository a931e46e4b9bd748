"""``--trajectory`` of predict, inspect and verify: order, notices, refusals, and a run's folder."""

from __future__ import annotations

import json
import shutil
from itertools import permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from know_cli.checkpoints import open_trajectory
from know_cli.checkpoints.metadata import Session, TrajectoryKind
from know_cli.checkpoints.training_step import training_step, training_steps
from know_cli.errors import EXIT_CHECKPOINT, EXIT_DONE, EXIT_USAGE, CheckpointError
from know_cli.known.bundle import load_bundle, save_bundle
from tests.support.bundles import random_bundle
from tests.support.command import Command, one_line

STEPS = (100, 200, 300, 400, 500)
OPTION = ("--trajectory", "run")


def state(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "fc.weight": torch.randn(4, 3, generator=generator),
        "fc.bias": torch.randn(4, generator=generator).half(),
        "steps": torch.tensor(step),
    }


def trainer_run(folder: Path, steps: tuple[int, ...] = STEPS, state_file: bool = True) -> Path:
    """A run's folder as transformers' Trainer leaves it."""
    for step in steps:
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        save_file(state(step), checkpoint / "model.safetensors", {"format": "pt"})
        (checkpoint / "config.json").write_text("{}")
        if state_file:
            (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


def files(folder: Path, names: dict[str, int], metadata: bool = False) -> list[Path]:
    """Files by names, of these steps."""
    paths = []
    for name, step in names.items():
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        own = {"know.trajectory-kind": "run", "know.training-step": str(step)} if metadata else {}
        save_file(state(step), path, {"format": "pt", **own})
        paths.append(path)
    return paths


def mean(*steps: int) -> dict[str, Tensor]:
    """The average by float64, and what is only copied from the latest."""
    latest = state(max(steps))
    return {
        name: sum((state(step)[name].double() for step in steps), torch.zeros(())).div(len(steps))
        .float().to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in latest.items()
    }  # fmt: skip


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata()
    return found


# ---------------------------------------------------------------------- a run


def test_a_run_s_folder_is_averaged(tmp_path: Path, know: Command) -> None:
    trainer_run(tmp_path / "run")
    done = know("predict", "run", *OPTION, "-o", "out", "--json", "report", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    words = "1 step from 5 checkpoints of a run, training steps 500 to 100, average"
    assert words in done.stdout
    assert "warning" not in done.stderr
    assert (tmp_path / "out" / "config.json").is_file()
    out = load_file(tmp_path / "out" / "model.safetensors")
    for name, expected in mean(*STEPS).items():
        torch.testing.assert_close(out[name], expected, rtol=1e-6, atol=1e-7)
    found = header(tmp_path / "out" / "model.safetensors")
    assert found["know.trajectory-kind"] == "run"
    assert "know.rate" not in found
    report = json.loads((tmp_path / "report").read_text())
    assert (report["trajectory"], report["rate"], report["factor"]) == ("run", None, None)
    assert report["training_steps"] == [500, 400, 300, 200, 100]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--last", "2"], (400, 500)),
        (["--every", "2"], (100, 300, 500)),
        (["--every", "2", "--last", "2"], (300, 500)),
        (["--every", "3"], (200, 500)),
    ],
)
def test_some_of_a_run(
    options: list[str], steps: tuple[int, ...], tmp_path: Path, know: Command
) -> None:
    trainer_run(tmp_path / "run")
    done = know("predict", "run", *OPTION, *options, "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    out = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(out["fc.weight"], mean(*steps)["fc.weight"])
    # Those that were used are found again among all.
    for named in (["run"], [f"run/checkpoint-{step}" for step in STEPS]):
        again = know("verify", "out", *named, "--full", cwd=tmp_path)
        assert again.returncode == EXIT_DONE, again.stderr


def test_more_than_are_averaged_are_chosen_from(tmp_path: Path, know: Command) -> None:
    trainer_run(tmp_path / "run", tuple(range(1, 19)))
    done = know("predict", "run", *OPTION, "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_USAGE
    assert "got 18 checkpoints: give 2 to 16" in one_line(done.stderr)
    assert "--last" in done.stderr
    done = know("predict", "run", *OPTION, "-o", "out", "--last", "5", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "training steps 18 to 14" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["run/checkpoint-*"],
        ["run/checkpoint-100..checkpoint-500"],
        ["run/checkpoint-500..100"],
        ["run/checkpoint-[45]*", "run/checkpoint-100..300"],
        [f"run/checkpoint-{step}/model.safetensors" for step in STEPS],
    ],
)
def test_every_way_to_name_a_run(arguments: list[str], tmp_path: Path, know: Command) -> None:
    """A pattern in quotes, which no shell has expanded, is expanded here."""
    trainer_run(tmp_path / "run")
    assert know("predict", "run", *OPTION, "-o", "whole", cwd=tmp_path).returncode == EXIT_DONE
    done = know("predict", *arguments, *OPTION, "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    out, whole = tmp_path / "out", tmp_path / "whole" / "model.safetensors"
    written = out / "model.safetensors" if out.is_dir() else out
    assert load_file(written)["fc.weight"].equal(load_file(whole)["fc.weight"])
    said = "put right to the latest first: 500, 400, 300, 200, 100" in done.stderr
    assert said == (arguments[0] != "run/checkpoint-500..100")


@settings(max_examples=6)
@given(
    steps=st.lists(st.integers(0, 10**9), min_size=2, max_size=6, unique=True).flatmap(
        lambda steps: st.tuples(st.just(steps), st.permutations(steps))
    ),
    how=st.sampled_from(["names", "metadata", "trainer"]),
)
def test_any_order_of_a_run_gives_the_same_bytes(
    steps: tuple[list[int], list[int]],
    how: str,
    tmp_path_factory: pytest.TempPathFactory,
    know: Command,
) -> None:
    folder = tmp_path_factory.mktemp("run")
    one, two = steps
    if how == "trainer":
        trainer_run(folder, tuple(one))
        named = {step: folder / f"checkpoint-{step}" for step in one}
    elif how == "metadata":
        # Names that say the opposite do not count.
        names = {f"step{10**9 - step}": step for step in one}
        named = dict(zip(one, files(folder, names, metadata=True), strict=True))
    else:
        named = dict(zip(one, files(folder, {f"s{n}": n for n in one}), strict=True))
    written = []
    for number, order in enumerate((one, two)):
        with open_trajectory([named[s] for s in order], kind=TrajectoryKind.RUN) as opened:
            assert opened.training_steps == sorted(one, reverse=True)
        paths = [named[step] for step in order]
        done = know("predict", *paths, *OPTION, "-o", f"out{number}", cwd=folder)
        assert done.returncode == EXIT_DONE, done.stderr
        out = folder / f"out{number}"
        written.append((out / "model.safetensors" if out.is_dir() else out).read_bytes())
    assert written[0] == written[1]


def test_a_step_twice_is_refused(tmp_path: Path, know: Command) -> None:
    for run in ("a", "b"):
        trainer_run(tmp_path / run, (100, 200))
    done = know("predict", "a", "b/checkpoint-200", *OPTION, "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT
    assert "are of the same training step 200; give checkpoints of one run" in one_line(done.stderr)


def test_a_run_without_steps_keeps_its_order(tmp_path: Path, know: Command) -> None:
    files(tmp_path, {"late": 9, "early": 3})
    done = know("predict", "late", "early", *OPTION, "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "nothing tells the training steps of the checkpoints" in done.stderr
    assert int(load_file(tmp_path / "out")["steps"]) == 9
    done = know("predict", "late", "early", *OPTION, "-o", "other", "--last", "2", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT
    assert "--last and --every need" in one_line(done.stderr)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--last", "2"], "--last: says which checkpoints of a run to take; add --trajectory run"),
        (["--every", "2"], "--every: says which checkpoints of a run to take"),
        ([], "run: is a folder with checkpoints of a training run; add --trajectory run"),
    ],
)
def test_a_run_has_to_be_called_one(
    options: list[str], message: str, tmp_path: Path, know: Command
) -> None:
    trainer_run(tmp_path / "run")
    named = ["run/checkpoint-100..500"] if options else ["run"]
    done = know("predict", *named, "-o", "out", *options, cwd=tmp_path)
    assert done.returncode == EXIT_USAGE
    assert message in one_line(done.stderr)


def test_a_run_with_its_last_weights_in_its_folder_has_to_be_called_one(
    tmp_path: Path, know: Command
) -> None:
    trainer_run(tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoint-500").iterdir():
        shutil.copy(file, tmp_path / "run")
    done = know("predict", "run", "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_USAGE
    line = one_line(done.stderr)
    assert "got 1 checkpoint" in line
    assert "checkpoints of a training run in run, add --trajectory run" in line
    done = know("predict", "run/checkpoint-500", "-o", "out", cwd=tmp_path)
    assert "training run in" not in one_line(done.stderr)


# ---------------------------------------------------------------------- what the checkpoints tell


def test_metadata_tell_a_run(tmp_path: Path, know: Command) -> None:
    files(tmp_path / "run", {f"checkpoint-{step}": step for step in STEPS}, metadata=True)
    for arguments in (["run"], ["run/checkpoint-100..500"], ["run", "--last", "5"]):
        done = know("predict", *arguments, "-o", "out", "--force", cwd=tmp_path)
        assert done.returncode == EXIT_DONE, done.stderr
        assert "of a run, training steps 500 to 100, average" in done.stdout
    done = know("predict", "run/checkpoint-100..500", "-o", "f", "--trajectory", "forgetting",
                "--method", "naive", cwd=tmp_path)  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    assert "--trajectory forgetting, but the checkpoints are recorded as of a run" in done.stderr


def test_one_that_tells_something_else(tmp_path: Path, know: Command) -> None:
    files(tmp_path, {"a1": 1, "a2": 2}, metadata=True)
    save_file(state(3), tmp_path / "a3.safetensors", Session(0, 1.0, 0.5, "t").to_metadata())
    done = know("predict", "a1..a3", "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT
    assert "a3.safetensors: is recorded as of a forgetting, and a1.safetensors as of a run" in (
        one_line(done.stderr)
    )
    assert know("predict", "a1..a3", *OPTION, "-o", "out", cwd=tmp_path).returncode == EXIT_DONE
    # One of a run among others that tell nothing does not make them one.
    files(tmp_path, {"b1": 1, "b2": 2})
    with open_trajectory([tmp_path / f"{name}.safetensors" for name in ("b1", "a2")]) as opened:
        assert opened.kind is TrajectoryKind.FORGETTING


LOOKS = {
    "run/checkpoint-100 run/checkpoint-200": "names",
    "step_000100 step_000200": "names",
    "epoch_1 epoch_2": "names",
    "epoch=2-loss=0.5 epoch=3-loss=0.25": "names",
    "ckpt0 ckpt1": None,
    "checkpoint-0 checkpoint-1": None,
    "a b": None,
}


@pytest.mark.parametrize("names", LOOKS)
def test_names_of_a_run_are_noticed(names: str, tmp_path: Path, know: Command) -> None:
    files(tmp_path, {name: k for k, name in enumerate(names.split())})
    done = know("predict", *names.split(), "-o", "out", "--method", "naive", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    noticed = [line for line in done.stderr.splitlines() if "--trajectory" in line]
    if LOOKS[names] is None:
        assert noticed == []
    else:
        (line,) = noticed
        assert f"the checkpoints' {LOOKS[names]} look like those of one training run" in line
        assert line.endswith("if they are of a run, add --trajectory run")
    for command in ("inspect", "predict"):
        more = ["-o", "out2", "--method", "naive"] if command == "predict" else []
        said = know(command, *names.split(), "--trajectory", "forgetting", *more, cwd=tmp_path)
        assert said.returncode == EXIT_DONE
        assert "--trajectory" not in said.stderr


def test_a_folder_of_files_with_other_names_of_steps_says_how_to_take_them(
    tmp_path: Path, know: Command
) -> None:
    names = {f"epoch={k}-step={20 * k}": k for k in (1, 2, 10)}  # as Lightning calls them
    files(tmp_path / "run", names)
    files(tmp_path / "other", {"best": 1, "worst": 2})
    done = know("inspect", "run", "--trajectory", "run", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT
    assert one_line(done.stderr).endswith("; to take all files there, give 'run/*.safetensors'")
    done = know("inspect", "run/*.safetensors", "--trajectory", "run", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "training steps 200 to 20" in done.stdout
    done = know("inspect", "other", "--trajectory", "run", cwd=tmp_path)
    assert one_line(done.stderr).endswith("or epoch_5")


def test_trainer_states_are_noticed(tmp_path: Path, know: Command) -> None:
    for name, step in (("first", 10), ("second", 20)):
        trainer_run(tmp_path, (step,))
        (tmp_path / f"checkpoint-{step}").rename(tmp_path / name)
    done = know("inspect", "second", "first", cwd=tmp_path)
    assert "the checkpoints' trainer states look like those of one training run" in done.stderr


@pytest.mark.parametrize(
    ("history", "words"),
    [
        (
            [{"learning_rate": 5e-5}, {"loss": 1.0}, {"learning_rate": 1e-6}, {"eval_loss": 1}],
            "2.0%",
        ),
        ([{"learning_rate": 1e-6}, {"learning_rate": 5e-5}, {"learning_rate": 0}], "0.0%"),
        ([{"learning_rate": 3e-4}, {"learning_rate": 3e-5}], None),
        ([{"learning_rate": 5e-5}, {"learning_rate": 5e-5}], None),
        ([{"learning_rate": 0}, {"loss": 1.0}], None),
        (
            [{"learning_rate": 1.0}, {"learning_rate": float("nan")}, {"learning_rate": "0"}, 7],
            None,
        ),
        ({"learning_rate": 0}, None),
        (None, None),
    ],
)
def test_a_rate_that_has_fallen_is_warned_of_where_a_run_is_averaged(
    tmp_path: Path, know: Command, history: object, words: str | None
) -> None:
    trainer_run(tmp_path, (10, 20))
    # That of the older checkpoint says nothing of how the run ended.
    for step, log in ((10, [{"learning_rate": 1}, {"learning_rate": 0}]), (20, history)):
        state = {"global_step": step, "log_history": log}
        path = tmp_path / f"checkpoint-{step}" / "trainer_state.json"
        path.write_text(json.dumps(state))
    done = know("predict", ".", "--trajectory", "run", "-o", "out", "--dry-run", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    told = [line for line in done.stderr.splitlines() if "the learning rate had fallen" in line]
    assert len(told) == (words is not None)
    if words:
        assert f"checkpoint-20: the learning rate had fallen to {words} of its highest" in told[0]


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("run/checkpoint-500", 500),
        ("step_000100.safetensors", 100),
        ("epoch=3-step=400-val_loss=0.25.safetensors", 400),
        ("model-v2-epoch12-acc0.93", 12),
        ("global_step7", 7),
        ("llama3-1000", 1000),
        ("final", None),
        ("run-00ff12e5", 5),  # a hash, whatever its digits look like
        ("loss-1.5e4", 15000),
        ("model-1k", 1000),
        ("ckpt_1.5M.safetensors", 1_500_000),
        ("step_2e4", 20_000),
        ("tokens-900B", 900 * 10**9),
        ("step100-tokens2B", 100),
        ("epoch3b", 3),
        ("step5e99", 5),
        ("step12kb", 12),
    ],
)
def test_the_step_in_a_name(name: str, step: int | None) -> None:
    assert training_step(Path(name), {}) == step


def test_steps_that_are_written_short_are_in_order(tmp_path: Path, know: Command) -> None:
    files(tmp_path, {"model-500": 500, "model-1k": 1000, "model-1.5k": 1500})
    for order in permutations(("model-500", "model-1k", "model-1.5k")):
        done = know("predict", *order, *OPTION, "-o", "out", "--force", cwd=tmp_path)
        assert done.returncode == EXIT_DONE, done.stderr
        assert load_file(tmp_path / "out")["steps"] == 1500
        assert "training steps 1500 to 500" in done.stdout


def test_steps_in_folders_and_broken_trainer_states(tmp_path: Path) -> None:
    names = [Path(f"exp2/{n}/ema_0.9999.safetensors") for n in (10, 20, 30)]
    assert training_steps([(name, {}) for name in names]) == [10, 20, 30]
    # The state of the folder's own model says nothing of other files in it.
    (tmp_path / "trainer_state.json").write_text('{"global_step": 30}')
    paths = files(tmp_path, {"step_10": 10, "step_20": 20})
    assert training_steps([(path, {}) for path in paths]) == [10, 20]
    (tmp_path / "trainer_state.json").write_text("[")
    assert training_step(tmp_path / "model.safetensors", {}) is None
    assert training_steps([(Path("a"), {}), (Path("b2"), {})]) is None
    # Numbers that are recorded are not compared with numbers in names.
    mixed = [(Path("x3"), {"know.training-step": "900"}), (Path("x5"), {})]
    assert training_steps(mixed) == [3, 5]


# ---------------------------------------------------------------------- methods and bundles


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--method", "known"], EXIT_USAGE, "no KNOWN that was taught on runs is shipped; take --method average"),
        (["--method", "lstsq"], EXIT_USAGE, "no KNOWN that was taught on runs is shipped"),
        (["--method", "logfit"], EXIT_USAGE, "is for forgettings, and these checkpoints are of a run; take --method average"),
        (["--method", "last"], EXIT_USAGE, "is for forgettings, and these checkpoints are of a run; take --method average"),
        (["--weights", "continuation"], EXIT_CHECKPOINT, "this KNOWN was taught on forgettings, and these checkpoints are of a run"),
        (["--rate", "0.5"], EXIT_USAGE, "--rate 0.5: is the sampling rate of a forgetting, and these checkpoints are of a run"),
    ],
)  # fmt: skip
def test_what_reads_a_forgetting_does_not_read_a_run(
    arguments: list[str], code: int, message: str, tmp_path: Path, know: Command
) -> None:
    trainer_run(tmp_path / "run")
    done = know("predict", "run", *OPTION, "-o", "out", *arguments, cwd=tmp_path)
    assert done.returncode == code
    assert message in one_line(done.stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["naive", "linear", "task-vector", "shrink"])
def test_methods_that_a_run_can_have(method: str, tmp_path: Path, know: Command) -> None:
    files(tmp_path, {"s1": 1, "s2": 2, "s3": 3})
    done = know("predict", "s1..s3", *OPTION, "-o", "out", "--method", method, "--steps", "2",
                "--every-step", cwd=tmp_path)  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    assert (tmp_path / "out.step1").is_file()


def test_a_bundle_for_runs(tmp_path: Path, know: Command) -> None:
    bundle = random_bundle(3)
    save_bundle(bundle, tmp_path / "forgetting")
    assert json.loads((tmp_path / "forgetting" / "manifest.json").read_text())["trajectory"] == "forgetting"  # fmt: skip
    bundle.manifest["trajectory"] = "run"
    save_bundle(bundle, tmp_path / "run")
    assert load_bundle(tmp_path / "run").trajectory is TrajectoryKind.RUN
    assert load_bundle(tmp_path / "run").digest == load_bundle(tmp_path / "forgetting").digest
    files(tmp_path, {"s1": 1, "s2": 2, "s3": 3})
    done = know("predict", "s1..s3", *OPTION, "-o", "out", "--weights", "./run", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "of a run, training steps 3 to 1, KNOWN retrodiction" in done.stdout
    again = know("verify", "out", "s1..s3", "--full", "--weights", "./run", cwd=tmp_path)
    assert again.returncode == EXIT_DONE, again.stderr
    done = know("predict", "s1..s3", "-o", "other", "--weights", "./run", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT
    assert "this KNOWN was taught on runs, and these checkpoints are of a forgetting" in done.stderr
    assert "say --trajectory run if that is what they are of" in one_line(done.stderr)
    manifest = tmp_path / "run" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"run"', '"walk"'))
    done = know("predict", "s1..s3", *OPTION, "-o", "other", "--weights", "./run", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT
    assert "a trajectory (forgetting, run or branches)" in one_line(done.stderr)


def test_shipped_bundles_are_for_forgettings(know: Command) -> None:
    from know_cli.known.shipped import shipped

    for sizes in shipped().values():
        for path in sizes.values():
            assert load_bundle(path).trajectory is TrajectoryKind.FORGETTING
            assert "trajectory" not in json.loads((path / "manifest.json").read_text())


# ---------------------------------------------------------------------- verify, inspect


def test_an_average_of_a_run_is_verified_in_any_order(tmp_path: Path, know: Command) -> None:
    files(tmp_path, {"s1": 1, "s2": 2, "s3": 3})
    assert know("predict", "s1..s3", *OPTION, "-o", "out", cwd=tmp_path).returncode == EXIT_DONE
    for order in permutations(["s1", "s2", "s3"]):
        assert know("verify", "out", *order, cwd=tmp_path).returncode == EXIT_DONE
    files(tmp_path, {"s4": 4})
    assert know("verify", "out", "s1..s4", cwd=tmp_path).returncode == EXIT_DONE
    done = know("verify", "out", "s1", "s2", "s4", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT
    assert "was not made from s4.safetensors in that place" in one_line(done.stderr)


def test_a_forgetting_is_what_it_was(tmp_path: Path, know: Command) -> None:
    """Nothing but the header's key is new, and outputs without it are verified as before."""
    paths = files(tmp_path, {"a": 5, "b": 3, "c": 1})
    for out, more in (("out", []), ("said", ["--trajectory", "forgetting"])):
        done = know("predict", *paths, "-o", tmp_path / out, "--method", "linear", *more)
        assert done.returncode == EXIT_DONE, done.stderr
        assert done.stderr.count("warning") == 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "said").read_bytes()
    metadata = header(tmp_path / "out")
    assert metadata.pop("know.trajectory-kind") == "forgetting"
    assert metadata["know.rate"] == "0.5"
    save_file(load_file(tmp_path / "out"), tmp_path / "older", metadata)
    done = know("verify", tmp_path / "older", *paths, "--full")
    assert done.returncode == EXIT_DONE, done.stderr


def test_a_run_that_is_still_on_its_way_is_warned_of(tmp_path: Path, know: Command) -> None:
    """Steps of length 1 and 2 at an angle of 60°, and the same back and forth."""
    for folder, points in (
        ("on", [(0.0, 0.0), (1.0, 0.0), (2.0, 3**0.5)]),
        ("noise", [(0.0, 0.0), (1.0, 0.0), (0.0, 3**0.5)]),
    ):
        (tmp_path / folder).mkdir()
        for step, point in enumerate(points, 1):
            save_file(
                {"fc.weight": torch.tensor([point])},
                tmp_path / folder / f"checkpoint-{step}.safetensors",
            )
    done = know("inspect", "on", *OPTION, "--json", "found", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    (warning,) = json.loads((tmp_path / "found").read_text())["warnings"]
    assert warning.startswith("successive steps point the same way (mean cosine +0.50, more than ")
    assert "know choose" in warning
    known = know("inspect", "noise", *OPTION, cwd=tmp_path)
    assert "successive steps" not in known.stdout
    as_forgetting = know("inspect", "on", "--trajectory", "forgetting", cwd=tmp_path)
    assert "successive steps" not in as_forgetting.stdout


def test_inspecting_a_run(tmp_path: Path, know: Command) -> None:
    trainer_run(tmp_path / "run")
    done = know("inspect", "run", *OPTION, "--last", "3", "--json", "found", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "3 checkpoints of a run, training steps 500 to 300" in done.stdout
    assert "500 to 400" in done.stdout
    assert "training step" in done.stdout
    assert "in reverse" not in done.stdout
    found = json.loads((tmp_path / "found").read_text())
    assert (found["trajectory"], found["training_steps"]) == ("run", [500, 400, 300])
    moved = [state(500)[n].double() - state(400)[n].double() for n in ("fc.weight", "fc.bias")]
    length = sum(float(each.square().sum()) for each in moved) ** 0.5
    assert found["total"]["step_lengths"][0] == pytest.approx(length)


def test_a_trajectory_that_is_none(tmp_path: Path, know: Command) -> None:
    done = know("predict", "a", "b", "-o", "out", "--trajectory", "walk", cwd=tmp_path)
    assert done.returncode == EXIT_USAGE
    assert "'walk'" in one_line(done.stderr)
    with pytest.raises(CheckpointError, match="same training step 7"):
        open_trajectory(files(tmp_path, {"a-7": 7, "b-7": 8}), kind=TrajectoryKind.RUN)
